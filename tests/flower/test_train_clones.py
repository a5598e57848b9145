"""The mod that trains clones with any client app: one run of the app for every clone."""

import io
import logging
import math

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod, fixedclipping_mod, message_size_mod
from flwr.serverapp.strategy import FedAvg
from torch.nn import functional as F

from flwr_cloned_kd import (
    ClipClones,
    ClonedKD,
    EdgeClient,
    LegacyClonedKD,
    LocalDpClones,
    Recipe,
    Runtime,
    as_ensemble,
    edge_app,
    fold_in,
    in_wire_dtype,
    train_clones,
    train_edge,
)
from flwr_cloned_kd.flower.train_clones import _warn_of_identical_clones
from flwr_cloned_kd.io.wire import WIRE_DTYPES, decode_reply, encode_reply, encode_request
from tests.flower.test_legacy import LegacyGrid
from tests.flower.test_legacy import run as run_legacy
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import edge_client, small_core
from tests.helpers.reference import epoch_batches, images, mlp, same_bits

SEED = 5
SENT = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array(0)}
DATA = images(38)
RECIPE = Recipe(epochs=2, batch_size=8)


@pytest.fixture(autouse=True)
def fresh_process():
    """Let every test see the warning that a process logs once."""
    _warn_of_identical_clones.cache_clear()


def learn(sent, seed):
    """Move the weights by draws from the seed, and count one step."""
    draws = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
    return {"w": sent["w"] + draws, "count": np.asarray(sent["count"] + 1)}


def records(arrays):
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def reply_to(message, arrays, **metrics):
    content = {"arrays": records(arrays), "metrics": MetricRecord({"num-examples": 7} | metrics)}
    return Message(RecordDict(content), reply_to=message)


def plain(message, context):
    """Train one model; no line of this function knows of clones."""
    sent = {name: array.numpy() for name, array in message.content["arrays"].items()}
    return reply_to(message, learn(sent, message.content["config"]["seed"]))


class Plain(NumPyClient):
    """The same in the legacy API, where arrays have no names."""

    def fit(self, parameters, config):
        trained = learn(dict(zip(SENT, parameters)), config["seed"])
        return list(trained.values()), 7, {}


def app_of(train, *mods):
    app = ClientApp(mods=list(mods))
    app.train()(train)
    return app


def legacy_app_of(client, *mods):
    return ClientApp(lambda context: client.to_client(), mods=list(mods))


def request(arrays=None, **config):
    content = {"arrays": records(SENT) if arrays is None else arrays}
    content["config"] = ConfigRecord({"num-clones": 3, "seed": SEED} | config)
    return content


def legacy_request(**config):
    bare = {}
    for index, array in enumerate(map(Array, SENT.values())):
        bare[str(index)] = Array(dtype="", shape=(), stype=array.stype, data=array.data)
    config = ConfigRecord({"num-clones": 3, "seed": SEED} | config)
    return {"fitins.parameters": ArrayRecord(bare), "fitins.config": config}


def context():
    return Context(1, 100, {"partition-id": 0}, RecordDict(), {})


def ask(app, content, kind="train", context=context):
    message = Message(RecordDict(content), dst_node_id=100, message_type=kind)
    message.metadata.__dict__["_message_id"] = "asked"
    return app(message, context())


def numbers(reply, key="arrays"):
    return {name: array.numpy() for name, array in reply.content[key].items()}


def expected_ensemble(num_clones=3):
    clones = [learn(SENT, fold_in(SEED, index)) for index in range(num_clones)]
    return {name: np.stack([clone[name] for clone in clones]) for name in SENT}


def same_arrays(left, right):
    return all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(left.values(), right.values(), strict=True)
    )


@pytest.mark.parametrize("num_clones", [1, 3, 16])
def test_clone_e_is_what_the_app_trains_from_the_seed_of_clone_e(num_clones):
    reply = ask(app_of(plain, train_clones()), request(**{"num-clones": num_clones}))
    ensemble = numbers(reply)
    assert list(ensemble) == ["w", "count"]
    assert same_arrays(ensemble, expected_ensemble(num_clones))
    assert ensemble["w"].shape == (num_clones, 2, 3)
    assert reply.metadata.reply_to_message_id == "asked"


@pytest.mark.parametrize(
    "app",
    [
        legacy_app_of(Plain(), train_clones()),
        edge_app(lambda context: Plain(), mods=[train_clones()]),
    ],
    ids=["client_fn", "edge_app"],
)
def test_a_numpy_client_trains_the_same_clones(app):
    reply = ask(app, legacy_request())
    assert same_arrays(numbers(reply, "fitres.parameters"), expected_ensemble())
    assert reply.content["fitres.num_examples"]["num_examples"] == 7
    assert reply.content["fitres.metrics"]["train-seconds"] > 0


def test_the_mod_may_stand_at_the_train_function_too():
    app = ClientApp()
    app.train(mods=[train_clones()])(plain)
    assert same_arrays(numbers(ask(app, request())), expected_ensemble())


def test_a_run_gets_its_seed_and_its_index_but_no_number_of_clones():
    configs = []

    def spy(message, context):
        configs.append(dict(message.content["config"]))
        return plain(message, context)

    ask(app_of(spy, train_clones()), request(lr=0.5))
    assert configs == [
        {"seed": fold_in(SEED, index), "clone-index": index, "lr": 0.5} for index in range(3)
    ]


def test_a_run_may_change_the_message_that_it_gets():
    def spoil(message, context):
        reply = plain(message, context)
        message.content["arrays"].to_torch_state_dict(keep_input=False)
        assert not message.content["arrays"]
        message.content["config"]["names"].append("more")
        message.content["config"].clear()
        return reply

    content = request(names=["one"])
    reply = ask(app_of(spoil, train_clones()), content)
    assert same_arrays(numbers(reply), expected_ensemble())
    assert content["config"]["names"] == ["one"]
    assert len(content["arrays"]) == 2


@pytest.mark.parametrize("kind", ["train", "evaluate", "query"])
def test_a_message_that_asks_for_no_clones_passes_unchanged(kind):
    content = request()
    if kind == "train":
        del content["config"]["num-clones"]
    messages = []

    def call_next(message, context):
        messages.append((message, context))
        return "reply"

    message = Message(RecordDict(content), dst_node_id=100, message_type=kind)
    here = context()
    assert train_clones()(message, here, call_next) == "reply"
    assert messages == [(message, here)]
    assert messages[0][0] is message
    assert messages[0][1] is here


def test_fedavg_works_with_the_same_client_app():
    seeded = app_of(plain, train_clones())
    edges = {"fraction_evaluate": 0.0, "min_train_nodes": 2, "min_available_nodes": 2}
    result = FedAvg(**edges).start(
        FakeGrid([seeded] * 2),
        records(SENT),
        num_rounds=1,
        train_config=ConfigRecord({"seed": SEED}),
    )
    assert np.allclose(result.arrays["w"].numpy(), learn(SENT, SEED)["w"])


def test_every_run_starts_with_the_same_state_and_that_of_clone_0_is_kept():
    starts = []

    def count(message, context):
        visits = context.state.setdefault("visits", MetricRecord({"seeds": []}))
        starts.append(list(visits["seeds"]))
        visits["seeds"].append(message.content["config"]["seed"])
        return plain(message, context)

    app, here = app_of(count, train_clones()), context()
    for seed in (1, 2):
        ask(app, request(seed=seed), context=lambda: here)
    assert starts == [[]] * 3 + [[fold_in(1, 0)]] * 3
    assert here.state["visits"]["seeds"] == [fold_in(1, 0), fold_in(2, 0)]


def test_a_request_that_fails_leaves_the_state_as_it_was():
    def fail(message, context):
        context.state["seen"] = MetricRecord({"clone": message.content["config"]["clone-index"]})
        if message.content["config"]["clone-index"] == 1:
            raise MemoryError("no memory")
        return plain(message, context)

    here = context()
    with pytest.raises(RuntimeError, match="clone 1: MemoryError: no memory"):
        ask(app_of(fail, train_clones()), request(), context=lambda: here)
    assert not here.state


def test_metrics_are_means_over_the_runs_and_seconds_are_their_sum():
    def measured(message, context):
        index = message.content["config"]["clone-index"]
        metrics = {"loss": float(index), "train-seconds": 2.0, "losses": [index, 9]}
        reply = plain(message, context)
        reply.content["metrics"].update({"num-examples": 7 + index} | metrics)
        if index == 1:
            del reply.content["metrics"]["loss"]
        return reply

    reply = ask(app_of(measured, train_clones()), request())
    # 7, 8 and 9 samples; the loss of clone 1 is missing; clone 0 reports the list.
    expected = {"num-examples": 8, "loss": 1.0, "train-seconds": 6.0, "losses": [0, 9]}
    assert dict(reply.content["metrics"]) == expected


def test_metrics_of_a_numpy_client_are_means_too():
    class Measured(Plain):
        def fit(self, parameters, config):
            arrays, _, _ = super().fit(parameters, config)
            index = config["clone-index"]
            return arrays, 7 + index // 2, {"loss": index, "note": f"clone {index}", "ok": True}

    content = ask(legacy_app_of(Measured(), train_clones()), legacy_request()).content
    metrics = dict(content["fitres.metrics"])
    assert metrics.pop("train-seconds") > 0
    assert metrics == {"loss": 1.0, "note": "clone 0", "ok": True}
    # The mean of 7, 7 and 8 is 7.3.
    assert content["fitres.num_examples"]["num_examples"] == 7
    assert type(content["fitres.num_examples"]["num_examples"]) is int


def test_seconds_are_measured_if_the_app_reports_none():
    metrics = ask(app_of(plain, train_clones()), request()).content["metrics"]
    assert metrics.keys() == {"num-examples", "train-seconds"}
    assert metrics["num-examples"] == 7
    assert 0 < metrics["train-seconds"] < 10


def unseeded(message, context):
    """Ignore the seed of the request, as `torch.manual_seed(0)` in a train function does."""
    return reply_to(message, learn(SENT, 0))


def test_equal_clones_are_reported_to_the_server_and_once_in_the_log():
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    logging.getLogger("flwr").addHandler(handler)
    app = app_of(unseeded, train_clones())
    for _ in range(2):
        assert ask(app, request()).content["metrics"]["identical-clones"] == 1.0
    assert "identical-clones" not in ask(app, request(**{"num-clones": 1})).content["metrics"]
    logging.getLogger("flwr").removeHandler(handler)
    assert len(lines) == 1
    assert lines[0][0] == "WARNING"
    assert "all clones of this edge are equal" in lines[0][1]
    assert 'torch.manual_seed(config["seed"])' in lines[0][1]


def test_different_clones_are_not_reported(flower_log):
    reply = ask(app_of(plain, train_clones()), request())
    assert "identical-clones" not in reply.content["metrics"]
    assert not flower_log


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"num-clones": 0}, "num-clones: expected 1 to 16, got 0"),
        ({"num-clones": -1}, "num-clones: expected 1 to 16, got -1"),
        ({"num-clones": 17}, "num-clones: expected 1 to 16, got 17"),
        ({"num-clones": 10**18}, "num-clones: expected 1 to 16, got 1000000000000000000"),
        ({"num-clones": True}, "num-clones: expected an integer, got 'True'"),
        ({"num-clones": 2.0}, "num-clones: expected an integer, got '2.0'"),
        ({"num-clones": "3"}, "num-clones: expected an integer, got '3'"),
        ({"num-clones": [3]}, "num-clones: expected an integer, got '[3]'"),
        ({"num-clones": b"\n"}, "num-clones: expected an integer, got \"b'\\\\n'\""),
        ({"seed": 0.5}, "seed: expected an integer, got '0.5'"),
        ({"seed": False}, "seed: expected an integer, got 'False'"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["message", "legacy"])
def test_a_request_that_is_out_of_range_is_one_line_and_runs_nothing(
    config, cause, legacy, flower_log
):
    def fail(message, context):
        raise AssertionError("the app must not run")

    if legacy:
        reply = ask(legacy_app_of(Plain(), train_clones()), legacy_request(**config))
    else:
        reply = ask(app_of(fail, train_clones()), request(**config))
    assert reply.error.reason == f"train_clones: {cause}"
    assert flower_log == [reply.error.reason]
    assert reply.metadata.reply_to_message_id == "asked"


def test_max_clones_sets_another_limit():
    app = app_of(plain, train_clones(max_clones=2))
    assert ask(app, request()).error.reason.endswith("num-clones: expected 1 to 2, got 3")
    assert ask(app, request(**{"num-clones": 2})).has_content()


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda content: content["config"].pop("seed"), "seed: expected an integer, got 'None'"),
        (
            lambda content: content.update(more=ConfigRecord({"num-clones": 2})),
            "expected one config with num-clones, got 2",
        ),
        (
            lambda content: content.update(more=records(SENT)),
            "expected one ArrayRecord, got 2",
        ),
        (lambda content: content.pop("arrays"), "expected one ArrayRecord, got 0"),
    ],
)
def test_a_request_with_wrong_records_is_one_line(change, cause, flower_log):
    content = request()
    change(content)
    reply = ask(app_of(plain, train_clones()), content)
    assert reply.error.reason == f"train_clones: {cause}"
    assert flower_log == [reply.error.reason]


def of_clone_1(change):
    """Train as `plain`, but change the content of clone 1's reply."""

    def train(message, context):
        reply = plain(message, context)
        if message.content["config"]["clone-index"] == 1:
            change(reply.content)
        return reply

    return train


def with_array(name, array):
    return lambda content: content["arrays"].update({name: array})


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (with_array("w", Array(np.zeros(3))), "w: expected shape (2, 3), got (3,)"),
        (
            with_array("w", Array(np.zeros((1, 2, 3), np.float32))),
            "w: expected shape (2, 3), got (1, 2, 3)",
        ),
        (with_array("w", Array(np.zeros((2, 3)))), "w: expected dtype float32, got float64"),
        (
            with_array("x", Array(np.zeros(1))),
            "x: expected in the reply of every clone, got it in some replies only",
        ),
        (
            lambda content: content["arrays"].pop("w"),
            "w: expected in the reply of every clone, got it in some replies only",
        ),
        (
            lambda content: content["arrays"].clear(),
            "ArrayRecord: expected at least one array, got none",
        ),
        (lambda content: content.pop("arrays"), "expected one ArrayRecord, got 0"),
        (lambda content: content.update(more=records(SENT)), "expected one ArrayRecord, got 2"),
        (lambda content: content.pop("metrics"), "expected one MetricRecord, got 0"),
        (
            with_array("w", Array("float32", (1,), "numpy.ndarray", b"junk")),
            "'w': expected a NumPy array, got",
        ),
        (
            with_array("w", Array("float32", (1,), "pickle", b"junk")),
            "'w': expected a NumPy array, got",
        ),
    ],
)
def test_a_reply_that_cannot_be_stacked_is_one_line(change, cause, flower_log):
    reply = ask(app_of(of_clone_1(change), train_clones()), request())
    assert reply.error.reason.startswith(f"train_clones: clone 1: {cause}")
    assert flower_log == [reply.error.reason]
    assert reply.error.reason.count("\n") == 0


def test_a_function_that_returns_no_message_is_one_line(flower_log):
    reply = ask(app_of(lambda message, context: {"w": 1}, train_clones()), request())
    assert reply.error.reason == "train_clones: clone 0: expected a Message, got dict"
    assert flower_log == [reply.error.reason]


def test_an_archive_is_not_an_array():
    buffer = io.BytesIO()
    np.savez(buffer, w=np.zeros(3))
    archive = Array("float32", (3,), "numpy.ndarray", buffer.getvalue())
    reply = ask(app_of(of_clone_1(with_array("w", archive)), train_clones()), request())
    assert reply.error.reason == "train_clones: clone 1: w: expected one array, got NpzFile"


def test_the_error_reply_of_a_run_names_its_clone():
    def fail(message, context):
        if message.content["config"]["clone-index"] == 2:
            return Message(Error(42, "disk full"), reply_to=message)
        return plain(message, context)

    reply = ask(app_of(fail, train_clones()), request())
    assert (reply.error.code, reply.error.reason) == (42, "clone 2: disk full")
    assert reply.metadata.reply_to_message_id == "asked"


def test_an_exception_of_a_run_is_one_line_with_its_clone_and_its_cause():
    def fail(message, context):
        torch.nn.Linear(1, 1).load_state_dict({})  # this message of PyTorch has several lines

    with pytest.raises(RuntimeError, match="clone 0: RuntimeError: Error") as caught:
        ask(app_of(fail, train_clones()), request())
    assert "\n" not in str(caught.value)
    assert "Missing key" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_status_that_is_not_ok_is_the_reply_and_names_its_clone():
    class NoFit(NumPyClient):
        pass

    reply = ask(legacy_app_of(NoFit(), train_clones()), legacy_request())
    assert reply.content["fitres.status"]["code"] != 0
    assert reply.content["fitres.status"]["message"].startswith("clone 0: Client does not")
    assert reply.metadata.reply_to_message_id == "asked"


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("mods", ["before", "after"])
def test_clones_travel_in_the_form_that_the_request_names(wire_dtype, mods):
    sent = {name: torch.from_numpy(np.array(array)) for name, array in SENT.items()}
    encoded = encode_request(sent, wire_dtype)
    content = request(ArrayRecord(encoded), **{"wire-dtype": wire_dtype})
    order = [in_wire_dtype, train_clones()] if mods == "before" else [train_clones(), in_wire_dtype]
    arrays = numbers(ask(app_of(plain, *order), content))
    ensemble = {name: torch.from_numpy(array) for name, array in expected_ensemble().items()}
    expected = encode_reply(ensemble, sent, wire_dtype)
    assert list(arrays) == list(expected)
    assert same_arrays(arrays, {name: tensor.numpy() for name, tensor in expected.items()})
    received = as_ensemble(decode_reply(arrays, sent, wire_dtype), sent)
    assert torch.allclose(received["w"], ensemble["w"], atol=0.05)


def test_flowers_size_mods_work_before_and_after_the_mod():
    sizes = [message_size_mod, arrays_size_mod]
    reply = ask(app_of(plain, *sizes, train_clones(), *sizes), request())
    assert same_arrays(numbers(reply), expected_ensemble())


def test_a_message_that_flower_has_split_into_chunks_is_copied():
    """So has the state of a context, if an app keeps arrays there that it has sent."""
    content = request()
    state = RecordDict({"kept": content["arrays"]})
    for array in content["arrays"].values():
        array.deflate()
        assert array.children
    here = Context(1, 100, {}, state, {})
    reply = ask(app_of(plain, train_clones()), content, context=lambda: here)
    assert same_arrays(numbers(reply), expected_ensemble())
    assert list(here.state["kept"]) == list(SENT)


def test_clip_clones_clips_every_clone_before_and_after_the_mod():
    before = ask(app_of(plain, ClipClones(0.5), train_clones()), request())
    after = ask(app_of(plain, train_clones(), ClipClones(0.5)), request())
    assert same_arrays(numbers(before), numbers(after))
    for clone in numbers(before)["w"]:
        assert np.linalg.norm(clone - SENT["w"]) == pytest.approx(0.5)
    assert before.content["metrics"]["clipped"] == after.content["metrics"]["clipped"] == 1


def test_flowers_mods_for_one_model_work_after_the_mod():
    content = request(clipping_norm=0.5)
    reply = ask(app_of(plain, train_clones(), fixedclipping_mod), content)
    assert reply.has_content()
    for clone in numbers(reply)["w"]:
        assert np.linalg.norm(clone - SENT["w"]) < 0.51


def test_local_dp_clones_adds_the_noise_of_all_clones_or_refuses():
    private = LocalDpClones(clipping_norm=1.0, epsilon=1.0, delta=1e-5)
    reply = ask(app_of(plain, private, train_clones()), request())
    assert np.abs(numbers(reply)["w"] - SENT["w"]).max() > 2
    for app in (
        app_of(plain, train_clones(), private),
        edge_app(lambda context: Plain(), mods=[train_clones(), private]),
    ):
        reason = ask(app, request()).error.reason
        assert reason.startswith("clone 0: LocalDpClones: expected the request for all clones")


def strategy_rows(app, num_clones=3, **options):
    core, rows = small_core(), []
    strategy = ClonedKD(core, num_clones=num_clones, on_round=rows.append, **options)
    grid = FakeGrid([app])
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=1, timeout=30)
    return rows


def torch_app(*mods, seeded=True):
    """A client app with a training loop of its own around the digits of edge 0."""
    edge = edge_client(0)

    def train(message, context):
        torch.manual_seed(message.content["config"]["seed"] if seeded else 0)
        model = edge.model
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        model.train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        inputs, labels = edge.dataset
        for rows in torch.randperm(len(labels)).split(16):
            optimiser.zero_grad()
            F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimiser.step()
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(labels)}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app_of(train, *mods)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_the_core_distils_the_clones_of_a_users_own_loop(wire_dtype):
    app = torch_app(in_wire_dtype, train_clones())
    (row,) = strategy_rows(app, wire_dtype=wire_dtype)
    assert row["accepted"], row["cause"]
    assert row["num-clones"] == 3
    assert row["num-examples"] == 60
    assert row["reported-train-seconds"] > 0
    assert "reported-identical-clones" not in row


def test_the_server_sees_that_clones_are_equal():
    (row,) = strategy_rows(torch_app(train_clones(), seeded=False))
    assert row["accepted"]
    assert row["reported-identical-clones"] == 1.0


def test_an_error_of_a_run_reaches_the_server():
    def fail(message, context):
        raise ZeroDivisionError("no samples")

    (row,) = strategy_rows(app_of(fail, train_clones()))
    assert not row["accepted"]
    assert "clone 0: ZeroDivisionError: no samples" in row["cause"]


def test_a_legacy_server_gets_clones_of_a_client_without_clones():
    edge = edge_client(0)

    class OneModel(NumPyClient):
        def fit(self, parameters, config):
            assert "num-clones" not in config
            return edge.fit(parameters, config)

    core, rows = small_core(), []
    start = core.model.state_dict()
    strategy = LegacyClonedKD(core, start, num_clones=2, timeout=0, on_round=rows.append)
    run_legacy(strategy, LegacyGrid([legacy_app_of(OneModel(), train_clones())]), rounds=1)
    (row,) = rows
    assert row["accepted"], row["cause"]
    assert row["num-clones"] == 2


def textbook(message, context):
    """Phase 1 as in a textbook: one model, PyTorch's SGD, draws from the seed of the request."""
    model = mlp()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    generator = torch.Generator().manual_seed(message.content["config"]["seed"])
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=RECIPE.lr,
        momentum=RECIPE.momentum,
        weight_decay=RECIPE.weight_decay,
        fused=True,
    )
    num_steps = RECIPE.epochs * math.ceil(len(DATA[1]) / RECIPE.batch_size)
    step = 0
    for _ in range(RECIPE.epochs):
        for inputs, labels in epoch_batches(DATA, RECIPE, generator):
            optimiser.param_groups[0]["lr"] = RECIPE.lr * RECIPE.schedule(step / num_steps)
            optimiser.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimiser.step()
            step += 1
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(DATA[1])}),
    }
    return Message(RecordDict(content), reply_to=message)


def ensemble_from(app, model):
    reply = ask(app, request(ArrayRecord(model.state_dict())))
    return reply.content["arrays"].to_torch_state_dict()


def test_a_textbook_loop_with_the_mod_gives_the_bits_of_an_edge_client():
    """The engine trains clone e with one generator, seeded with the seed that run e gets.

    The model has no convolution: the engine runs convolutions in another memory layout.
    """
    runtime = Runtime(batch_clones=False)
    engine = edge_app(lambda context: EdgeClient(mlp(), DATA, RECIPE, runtime=runtime))
    ensemble = ensemble_from(app_of(textbook, train_clones()), mlp())
    assert same_bits(ensemble, ensemble_from(engine, mlp()))
    assert not torch.equal(ensemble["1.weight"][0], ensemble["1.weight"][1])


def test_an_edge_client_with_the_mod_trains_one_clone_per_run():
    """`train_edge` with one clone folds the index 0 into the seed once more."""
    app = edge_app(lambda context: EdgeClient(mlp(), DATA, RECIPE), mods=[train_clones()])
    runs = [
        train_edge(mlp(), mlp().state_dict(), DATA, RECIPE, num_clones=1, seed=fold_in(SEED, index))
        for index in range(3)
    ]
    expected = {name: torch.cat([run[name] for run in runs]) for name in runs[0]}
    assert same_bits(ensemble_from(app, mlp()), expected)
