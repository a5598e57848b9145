"""ClonedKD and its loop: whom it asks, what it survives, what it tells."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedProx, Strategy

from flwr_cloned_kd import (
    ClipClones,
    ClonedKD,
    Distillation,
    EdgeClient,
    Runtime,
    edge_app,
    take,
)
from flwr_cloned_kd.io.messages import metrics_of
from tests.helpers.fake_grid import FakeGrid, Flaky, silent
from tests.helpers.federation import PARTS, RECIPE, TRAIN, app, apps, network, small_core


def first(core):
    return ArrayRecord(core.model.state_dict())


def run(core, grid, loop=ClonedKD.start, *, rounds=3, timeout=30, num_clones=2, **options):
    history = []
    strategy = ClonedKD(core, num_clones=num_clones, on_round=history.append, **options)
    result = loop(strategy, grid, first(core), num_rounds=rounds, timeout=timeout)
    return strategy, history, result


def test_each_edge_is_asked_once_in_order_of_arrival():
    grid = FakeGrid(apps(4))
    _, history, _ = run(small_core(), grid, rounds=4)
    assert grid.trained() == [100, 101, 102, 103]
    assert [row["edge"] for row in history] == ["0", "1", "2", "3"]
    assert all(row["accepted"] for row in history)


def test_a_run_ends_when_no_new_edge_arrives_in_time(flower_log):
    grid = FakeGrid(apps(2))
    _, history, result = run(small_core(), grid, rounds=5, timeout=3)
    assert len(history) == 2
    assert len(result.arrays) == len(network().state_dict())
    assert any("No edge left to ask" in line for line in flower_log)


def test_a_run_without_an_edge_to_ask_says_once_that_it_waits(flower_log, monkeypatch):
    monkeypatch.setattr("flwr_cloned_kd.asynchronous.courier.IDLE_LOG_SECONDS", 0.1)
    run(small_core(), FakeGrid(apps(2)), rounds=5, timeout=3)
    (line,) = [line for line in flower_log if "is left to ask" in line]
    assert line.startswith("No edge is left to ask after 2 of 5 requests: the run ends in ")


def test_a_late_arrival_is_waited_for():
    grid = FakeGrid(apps(2))
    grid.online = [100]

    def arrive(row):
        grid.online = [100, 101]

    strategy = ClonedKD(small_core(), num_clones=1, on_round=arrive)
    strategy.start(grid, first(strategy.core), num_rounds=2, timeout=30)
    assert grid.trained() == [100, 101]


def test_revisit_goes_round_again():
    grid = FakeGrid(apps(2))
    run(small_core(), grid, rounds=5, revisit=True, num_clones=1)
    assert grid.trained() == [100, 101, 100, 101, 100]


def test_an_edge_that_returns_under_another_node_id_is_not_asked_again():
    grid = FakeGrid(apps(2), [{"name": "clinic"}, {"name": "clinic"}])
    for name in grid.apps:  # these edges' data does not depend on their name
        grid.contexts[name].node_config["partition-id"] = 0
    grid.online = [100]

    def swap(row):
        grid.online = [101]

    strategy = ClonedKD(small_core(), num_clones=1, on_round=swap)
    strategy.start(grid, first(strategy.core), num_rounds=2, timeout=3)
    assert grid.trained() == [100]


def test_a_name_in_use_by_an_online_node_is_rejected():
    grid = FakeGrid(apps(2), [{"name": "clinic", "partition-id": 0}] * 2)
    _, history, _ = run(small_core(), grid, rounds=2, num_clones=1)
    assert [row["edge"] for row in history] == ["clinic", "node 101"]


def test_several_edges_in_flight_are_all_absorbed_once():
    grid = FakeGrid(apps(5))
    strategy, history, _ = run(small_core(), grid, rounds=5, max_in_flight=3, num_clones=1)
    assert sorted(grid.trained()) == [100, 101, 102, 103, 104]
    assert sorted(row["edge"] for row in history) == ["0", "1", "2", "3", "4"]
    assert strategy.state.version == 5
    # Three start from the first core, and at most three more answers may wait for the core.
    assert max(row["staleness"] for row in history) in range(1, 5)


def test_answers_to_too_old_a_core_are_omitted():
    grid = FakeGrid(apps(4))
    strategy, history, _ = run(
        small_core(), grid, rounds=4, max_in_flight=4, max_staleness=0, num_clones=1
    )
    assert [row["accepted"] for row in history] == [1, 0, 0, 0]
    assert history[1]["cause"] == "staleness: expected at most 0, got 1"
    assert strategy.state.version == 1


def test_staleness_weighs_an_edge_in_the_memory():
    strategy, history, _ = run(
        small_core(),
        FakeGrid(apps(3)),
        rounds=3,
        max_in_flight=3,
        num_clones=1,
        staleness_weight=lambda staleness: 1 / (1 + staleness),
    )
    assert [row["staleness"] for row in history] == [0, 1, 2]
    assert strategy.state.memory_weights == (1, 1 / 2, 1 / 3)


def train_only(answer):
    """An app that says who it is, and answers training with `answer(honest content)`."""
    honest = app()

    def call(message, context):
        reply = honest(message, context)
        if message.metadata.message_type != "train":
            return reply
        content = answer(reply.content)
        return (
            content if isinstance(content, Message | None) else Message(content, reply_to=message)
        )

    return call


def change(name, edit):
    """Replace one array of an honest reply."""

    def answer(content):
        arrays = dict(content["arrays"])
        arrays[name] = edit(arrays[name].numpy())
        if not isinstance(arrays[name], Array):
            arrays[name] = Array(arrays[name])
        return RecordDict({"arrays": ArrayRecord(arrays), "metrics": content["metrics"]})

    return answer


def rename(content):
    arrays = {("x" if n == "conv.weight" else n): a for n, a in content["arrays"].items()}
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": content["metrics"]})


def drop(content):
    arrays = dict(list(content["arrays"].items())[1:])
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": content["metrics"]})


def extra(content):
    arrays = dict(content["arrays"]) | {"more": Array(np.zeros(1))}
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": content["metrics"]})


def poison(value):
    def edit(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return change("conv.weight", edit)


def huge(array):
    return np.full_like(array, 3e38)


def count(value):
    def answer(content):
        metrics = {} if value is None else {"num-examples": value}
        return RecordDict({"arrays": content["arrays"], "metrics": MetricRecord(metrics)})

    return answer


def raw(data, stype="numpy.ndarray"):
    return change("conv.weight", lambda a: Array(str(a.dtype), a.shape, stype, data))


def archive():
    """An .npz in place of a .npy: what NumPy loads of it is not an array."""
    import io

    file = io.BytesIO()
    np.savez(file, x=np.zeros(3))
    return file.getvalue()


HOSTILE = {
    "nan": (poison(np.nan), "conv.weight: expected finite values, got 1 of 144 not finite"),
    "infinity": (poison(-np.inf), "conv.weight: expected finite values"),
    "overflow": (change("head.weight", huge), "edge predictions: logits: expected finite values"),
    "missing": (drop, "expected the core's 8, missing 'conv.weight', unknown none"),
    "extra": (extra, "missing none, unknown 'more'"),
    "misnamed": (rename, "missing 'conv.weight', unknown 'x'"),
    "shape": (change("conv.weight", lambda a: a[..., :1]), "conv.weight: expected shape (2, 8, 1"),
    "clones": (change("conv.weight", lambda a: a[:1]), "conv.weight: expected shape (2, 8, 1"),
    "float64": (
        change("conv.weight", np.float64),
        "expected dtype torch.float32, got torch.float6",
    ),
    "longdouble": (change("conv.weight", np.longdouble), "expected an array of numbers, got dtype"),
    "text": (change("conv.weight", lambda a: a.astype("U9")), "expected an array of numbers"),
    "garbage": (raw(b"no array"), "'conv.weight': expected a NumPy array, got"),
    "archive": (raw(archive()), "conv.weight: expected an array of numbers, got NpzFile"),
    "foreign": (raw(b"x", "pickle"), "'conv.weight': expected a NumPy array, got"),
    "no arrays": (
        lambda c: RecordDict({"metrics": c["metrics"]}),
        "expected one ArrayRecord, got 0",
    ),
    "no metrics": (
        lambda c: RecordDict({"arrays": c["arrays"]}),
        "expected one MetricRecord, got 0",
    ),
    "nothing": (lambda c: RecordDict(), "expected one MetricRecord, got 0"),
    "uncounted": (count(None), "num-examples: expected a number above 0, got None"),
    "zero": (count(0), "num-examples: expected a number above 0, got 0"),
    "negative": (count(-5), "num-examples: expected a number above 0, got -5"),
    "nan count": (count(math.nan), "num-examples: expected a number above 0, got nan"),
    "huge": (count(10**400), "num-examples: expected a number above 0, got 1000"),
    "counts": (count([1, 2]), "num-examples: expected a number above 0, got [1, 2]"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_does_not_fit_is_refused_in_one_line_and_the_run_goes_on(kind, flower_log):
    answer, expected = HOSTILE[kind]
    core = small_core()
    grid = FakeGrid([train_only(answer), app()])
    strategy, history, _ = run(core, grid, rounds=2)
    assert [row["accepted"] for row in history] == [0, 1]
    assert expected in history[0]["cause"]
    lines = [line for line in flower_log if "edge 0 refused" in line]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "\n" not in lines[0]
    # The core is what it would have been had the first edge never been asked.
    assert strategy.state.version == 1
    assert len(strategy.state.memory) == 1


@pytest.mark.parametrize("loop", [Strategy.start, ClonedKD.start])
def test_a_refused_edge_leaves_the_core_as_it_was(loop):
    core = small_core()
    strategy, history, result = run(core, FakeGrid([train_only(drop)]), loop, rounds=1)
    params = result.arrays.to_torch_state_dict(keep_input=True)
    before = core.model.state_dict()
    assert all(torch.equal(params[name], before[name]) for name in before)
    assert strategy.state.memory == ()
    assert history[0]["bytes-up"] > 0


@pytest.mark.parametrize("loop", [Strategy.start, ClonedKD.start])
def test_an_error_reply_is_refused_with_its_last_line(loop):
    def fail(message, context):
        if message.metadata.message_type == "train":
            raise MemoryError("out of memory")
        return app()(message, context)

    _, history, _ = run(small_core(), FakeGrid([fail, app()]), loop, rounds=2)
    assert history[0]["cause"] == "expected a reply, got error 2: 'MemoryError: out of memory'"
    assert history[1]["accepted"] == 1


@pytest.mark.parametrize("loop", [Strategy.start, ClonedKD.start])
def test_silence_is_given_up_on_after_the_timeout(loop):
    core, history = small_core(), []
    strategy = ClonedKD(core, num_clones=1, on_round=history.append)
    loop(strategy, FakeGrid([silent, app()]), first(core), num_rounds=2, timeout=4)
    assert [row["accepted"] for row in history] == [0, 1]
    assert "expected an answer, got none in" in history[0]["cause"]
    assert history[0]["edge"] == "node 100"


def test_a_message_lives_as_long_as_its_answer_is_waited_for():
    grid = FakeGrid(apps(1))
    run(small_core(), grid, rounds=1, timeout=12, num_clones=1)
    train = [m for m in grid.pushed if m.metadata.message_type == "train"]
    assert train[0].metadata.ttl == 12
    assert train[0].metadata.group_id == "0"


def test_a_reply_survives_its_node_being_away_for_a_while():
    """Flower deletes a stored reply if its node is offline when asked for it."""
    grid = FakeGrid([app(), app()])
    honest = grid.apps[100]

    def leave_and_return(message, context):
        reply = honest(message, context)
        if message.metadata.message_type == "train":
            grid.online = [101]
        return reply

    grid.apps[100] = leave_and_return
    calls = []
    ids = grid.get_node_ids

    def get_node_ids():
        calls.append(1)
        if len(calls) > 6:
            grid.online = [100, 101]
        return ids()

    grid.get_node_ids = get_node_ids
    _, history, _ = run(small_core(), grid, rounds=1, num_clones=1)
    assert history[0]["edge"] == "0"
    assert history[0]["accepted"] == 1


def test_more_clones_than_asked_for_are_refused():
    honest = app()

    def greedy(message, context):
        if message.metadata.message_type == "train":
            message.content["config"]["num-clones"] = 3
        return honest(message, context)

    _, history, _ = run(small_core(), FakeGrid([greedy]), rounds=1, num_clones=2)
    assert history[0]["cause"] == "clones: expected at most 2, got 3"


def test_a_guard_refuses_a_round_and_says_so(flower_log):
    core = small_core(guard=lambda evidence: "too good")
    strategy, history, _ = run(core, FakeGrid(apps(1)), rounds=1)
    assert history[0]["accepted"] == 0
    assert strategy.state.memory == ()
    assert history[0]["cause"] == "too good"
    assert any("edge 0 refused: too good" in line for line in flower_log)


@pytest.mark.parametrize("revisit", [True, False])
def test_a_guard_sees_the_earlier_rounds_of_a_revisited_edge(revisit):
    calls = []
    core = small_core(guard=calls.append)
    run(core, FakeGrid(apps(2)), rounds=4 if revisit else 2, revisit=revisit)
    rounds = [[row["round"] for row in evidence.earlier] for evidence in calls[::2]]
    assert rounds == ([[], [], [1], [2]] if revisit else [[], []])


def quickstart_client():
    """A client written the way Flower's PyTorch quickstart writes it."""
    client_app = ClientApp()

    @client_app.train()
    def train(msg, context):
        model = network()
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        optimiser = torch.optim.SGD(model.parameters(), lr=msg.content["config"]["lr"])
        images, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
        metrics = MetricRecord({"train_loss": loss.item(), "num-examples": 20})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=msg)

    return client_app


def test_an_unmodified_quickstart_client_is_an_edge_of_one_clone():
    core, history = small_core(), []
    strategy = ClonedKD(core, on_round=history.append)
    grid = FakeGrid([quickstart_client(), quickstart_client()])
    strategy.start(
        grid, first(core), num_rounds=2, timeout=30, train_config=ConfigRecord({"lr": 0.01})
    )
    assert [row["accepted"] for row in history] == [1, 1]
    assert history[0]["num-clones"] == 1
    assert history[0]["reported-train_loss"] > 0
    # Without an answer to the query a node goes by its id.
    assert history[0]["edge"] == "node 100"


@pytest.mark.parametrize("baseline", [FedAvg, FedProx])
def test_flowers_own_strategies_run_with_the_same_client_app(baseline):
    options = {"proximal_mu": 0.1} if baseline is FedProx else {}
    strategy = baseline(min_train_nodes=3, min_available_nodes=3, **options)
    core = small_core()
    result = strategy.start(FakeGrid(apps(3)), first(core), num_rounds=2, timeout=30)
    arrays = result.arrays.to_torch_state_dict(keep_input=True)
    assert core.held_out_accuracy(arrays) is not None
    assert "accuracy" in result.evaluate_metrics_clientapp[2]


def test_the_callers_config_is_left_alone_and_passed_on():
    config, grid = ConfigRecord({"lr": 0.5}), FakeGrid(apps(1))
    strategy = ClonedKD(small_core(), num_clones=1)
    strategy.start(grid, first(strategy.core), num_rounds=1, train_config=config)
    sent = grid.pushed[-1].content["config"]
    assert dict(config) == {"lr": 0.5}
    assert set(sent) == {"lr", "server-round", "num-clones", "seed"}


def test_every_round_is_accounted_for():
    core = small_core()
    strategy, history, result = run(core, FakeGrid(apps(2)), rounds=2)
    model = sum(len(array.data) for array in first(core).values())
    assert history[0]["bytes-down"] == model
    assert history[0]["bytes-up"] > 1.5 * model
    assert history[0]["edge-seconds"] >= history[0]["reported-train-seconds"]
    numbers = dict(result.train_metrics_clientapp[1])
    assert {k: v for k, v in history[0].items() if k in numbers} == numbers
    assert strategy.arrays["conv.weight"].numpy().shape == (8, 1, 3, 3)


def test_server_side_evaluation_is_called_for_the_start_and_each_round():
    core, seen = small_core(), []

    def evaluate(server_round, arrays):
        seen.append(server_round)
        accuracy = core.held_out_accuracy(arrays.to_torch_state_dict(keep_input=True))
        return MetricRecord({"accuracy": accuracy})

    strategy = ClonedKD(core, num_clones=1)
    result = strategy.start(FakeGrid(apps(2)), first(core), num_rounds=2, evaluate_fn=evaluate)
    assert seen == [0, 1, 2]
    accuracy = result.evaluate_metrics_serverapp[2]["accuracy"]
    assert accuracy == pytest.approx(result.train_metrics_clientapp[2]["core-accuracy"])


def test_a_strategy_can_be_started_again():
    core, grid = small_core(), FakeGrid(apps(2))
    strategy = ClonedKD(core, num_clones=1)
    for _ in range(2):
        strategy.start(grid, first(core), num_rounds=2)
        assert strategy.state.version == 2
    assert grid.trained() == [100, 101, 100, 101]


def test_arrays_that_do_not_fit_the_core_stop_the_start():
    core = small_core()
    with pytest.raises(ValueError, match="array names: expected the core's 8"):
        ClonedKD(core).start(FakeGrid(apps(1)), ArrayRecord({"w": Array(np.ones(1))}))


def test_a_model_in_the_place_of_the_core_is_an_error_that_names_both():
    with pytest.raises(TypeError, match=r"core: expected a Core\(.*\), got Network"):
        ClonedKD(network())


@pytest.mark.parametrize(
    "options", [{"num_clones": 0}, {"max_in_flight": 0}, {"max_failures": 0}, {"max_staleness": -1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected at least"):
        ClonedKD(small_core(), **options)


@pytest.mark.parametrize("number", [float, np.float64, np.float32, torch.tensor])
@pytest.mark.parametrize("start", ["number", "function"])
def test_numbers_of_numpy_and_pytorch_count_as_numbers(number, start, tmp_path):
    half = number(0.5)
    share = half if start == "number" else lambda knowledge: half
    core = small_core(
        seed=np.int64(7), distillation=Distillation(recipe=RECIPE, student_start=share)
    )
    strategy, history, _ = run(
        core,
        FakeGrid(apps(2)),
        rounds=2,
        num_clones=np.int64(2),
        staleness_weight=lambda staleness: half,
        checkpoint=tmp_path / "core.ckpt",
        keep_rounds=2,
    )
    assert [row["accepted"] for row in history] == [1, 1]
    assert [row["student-start"] for row in history] == [0.5, 0.5]
    assert strategy.state.memory_weights == (0.5, 0.5)
    again = ClonedKD(
        replace(core, seed=7),
        num_clones=2,
        staleness_weight=lambda staleness: half,
        checkpoint=tmp_path / "core.ckpt",
        keep_rounds=2,
        quarantine=["0"],
    )
    again.start(FakeGrid(apps(2)), first(core), num_rounds=2)
    assert again.state.version == 1


class WithEmptyTensors(torch.nn.Module):
    """A model with tensors of size 0, and with a parameter that is a single number."""

    def __init__(self):
        super().__init__()
        self.head, self.shift = torch.nn.Linear(64, 10), torch.nn.Parameter(torch.zeros(()))
        self.empty = torch.nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("none", torch.zeros(0, dtype=torch.int64))

    def forward(self, images):
        return self.head(images.flatten(1)) + self.shift + self.empty.sum()


@pytest.mark.parametrize("batch_clones", [True, False])
@pytest.mark.parametrize("wire_dtype", ["float32", "int8"])
def test_a_model_with_tensors_of_size_0_trains_travels_and_is_undone(
    wire_dtype, batch_clones, tmp_path
):
    recipe = replace(RECIPE, max_grad_norm=1.0)
    runtime = Runtime(batch_clones=batch_clones)

    def client(context):
        return EdgeClient(WithEmptyTensors(), take(TRAIN, PARTS[1]), recipe, runtime=runtime)

    core = small_core(model=WithEmptyTensors(), recipe=recipe, guard=None)
    options = {"checkpoint": tmp_path / "core.ckpt", "keep_rounds": 2, "wire_dtype": wire_dtype}
    nodes = [edge_app(client, mods=[ClipClones(1.0)]) for _ in range(3)]
    strategy, _, _ = run(core, FakeGrid(nodes), rounds=2, **options)
    assert strategy.state.version == 2
    strategy, history, _ = run(core, FakeGrid(nodes), rounds=3, quarantine=["0"], **options)
    assert (strategy.state.version, history[0]["cause"]) == (2, "")


def test_state_before_the_start_is_an_error():
    with pytest.raises(RuntimeError, match=r"expected start\(\) first"):
        _ = ClonedKD(small_core()).arrays


def test_errors_made_by_the_superlink_are_matched_to_their_edge():
    """They come from node 1, not from the node that was asked."""

    def expire(message, context):
        if message.metadata.message_type == "query":
            return app()(message, context)
        reply = Message(Error(3, "expired"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 101
        return reply

    _, history, _ = run(small_core(), FakeGrid([expire, app()]), rounds=1, num_clones=1)
    assert history[0]["edge"] == "0"
    assert history[0]["cause"] == "expected a reply, got error 3: 'expired'"


def test_the_summary_names_what_matters(flower_log):
    ClonedKD(small_core(), num_clones=4).summary()
    text = "\n".join(flower_log)
    assert "Clones per edge: 4" in text
    assert "Temporal memory: 3" in text
    assert f"{len(small_core().dataset[1])} samples, seed 7" in text


def test_an_edge_cannot_pass_for_a_nameless_node():
    grid = FakeGrid(apps(2), [{"name": "node 101", "partition-id": 0}, {"partition-id": 1}])
    _, history, _ = run(small_core(), grid, rounds=2, num_clones=1)
    assert [row["edge"] for row in history] == ["node 100", "1"]


def test_what_an_edge_reports_does_not_pass_for_what_the_core_measures():
    def boast(content):
        metrics = MetricRecord({"num-examples": 5, "core-accuracy": 1.0, "accepted": 0})
        return RecordDict({"arrays": content["arrays"], "metrics": metrics})

    core = small_core(held_out=None)
    _, history, _ = run(core, FakeGrid([train_only(boast)]), rounds=1)
    assert "core-accuracy" not in history[0]
    assert history[0]["reported-core-accuracy"] == 1.0
    assert history[0]["accepted"] == 1


def test_a_negative_staleness_weight_is_named():
    _, history, _ = run(small_core(), FakeGrid(apps(1)), rounds=1, staleness_weight=lambda s: -1)
    assert history[0]["cause"] == "weight: expected at least 0, got -1.0"


def test_a_number_that_no_float_holds_is_dropped():
    metrics = MetricRecord({"num-examples": 5, "loss": 0.5, "steps": 10**400, "down": -(10**400)})
    assert metrics_of(RecordDict({"m": metrics})) == {"num-examples": 5, "reported-loss": 0.5}


def test_flowers_own_loop_gets_what_the_grid_raised():
    grid = Flaky(FakeGrid([app()]), {"get_node_ids": 1})
    with pytest.raises(OSError, match="get_node_ids: connection reset"):
        ClonedKD(small_core(), num_clones=1).configure_train(
            1, ArrayRecord(small_core().model.state_dict()), ConfigRecord(), grid
        )
