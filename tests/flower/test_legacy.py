"""LegacyClonedKD: the same core as by the other paths, and what it survives."""

import importlib
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Code, FitRes, GetPropertiesRes, Parameters, Status, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.serverapp import ServerApp

from flwr_cloned_kd import (
    VARIANTS,
    ClonedKD,
    Core,
    LegacyClonedKD,
    Recipe,
    Regression,
    digits_cnn,
    edge_seed,
    load_digits,
    partition,
    practical,
    take,
    train_edge,
)
from tests.examples.test_examples import runner
from tests.helpers.diary import Diary
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import app, apps, edge_client, plain_loop, small_core
from tests.helpers.reference import same_bits


class LegacyGrid(FakeGrid):
    """A fake grid that knows its run, as `ServerAppComponents` wants it."""

    run = SimpleNamespace(run_id=1)


def run(strategy, grid, *, rounds=3):
    """Run a strategy as a user does: by a ServerApp made of ServerAppComponents."""

    def server_fn(context):
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))

    ServerApp(server_fn=server_fn)(grid, Context(1, 0, {}, RecordDict(), {}))
    return strategy


def legacy(core, **options):
    return LegacyClonedKD(core, core.pretrain(), **({"num_clones": 2, "timeout": 0} | options))


@pytest.mark.parametrize("variant", ["CEM", "IPM", "IsPP"])
def test_the_legacy_server_and_the_other_paths_end_with_the_same_bits(variant):
    core, row = small_core(), VARIANTS[variant]
    expected = plain_loop(core, 3, row.num_clones, row.init(core))
    strategy = legacy(core, num_clones=row.num_clones, send=row.init(core))
    modern = ClonedKD(core, num_clones=row.num_clones, send=row.init(core))
    modern.start(FakeGrid(apps(3)), ArrayRecord(core.pretrain()), num_rounds=3, timeout=30)
    run(strategy, LegacyGrid(apps(3)))
    assert same_bits(strategy.state.params, expected.params)
    assert same_bits(strategy.state.params, modern.state.params)
    assert strategy.state.train_accuracy == expected.train_accuracy
    assert strategy.state.version == 3


def test_a_legacy_client_app_gives_the_same_bits():
    core = small_core()
    plain = [
        ClientApp(lambda context: edge_client(int(context.node_config["partition-id"])).to_client())
    ]
    strategy = run(legacy(core), LegacyGrid(plain * 3))
    assert same_bits(strategy.state.params, plain_loop(core, 3, 2).params)


def test_a_client_without_clones_is_an_ensemble_of_one():
    class Plain(NumPyClient):
        def fit(self, parameters, config):
            assert set(config) == {"server-round", "num-clones", "seed"}
            arrays, count, _ = edge_client(0).fit(parameters, {"seed": config["seed"]})
            return arrays, count, {}

    core, rows = small_core(), []
    strategy = legacy(core, num_clones=3, on_round=rows.append)
    run(strategy, LegacyGrid([ClientApp(lambda context: Plain().to_client())]), rounds=1)
    assert [row["num-clones"] for row in rows] == [1]
    assert same_bits(strategy.state.params, plain_loop(core, 1, 1).params)


def test_edges_are_asked_once_and_in_the_order_of_their_names():
    names = ["10", "2", "9"]
    grid = LegacyGrid([app()] * 3, [{"name": name, "partition-id": 0} for name in names])
    rows = []
    run(legacy(small_core(), num_clones=1, on_round=rows.append), grid, rounds=4)
    assert [row["edge"] for row in rows] == ["2", "9", "10"]
    assert grid.trained() == [101, 102, 100]


def test_revisit_goes_round_again():
    grid, rows = LegacyGrid(apps(2)), []
    run(legacy(small_core(), num_clones=1, revisit=True, on_round=rows.append), grid, rounds=3)
    assert [row["edge"] for row in rows] == ["0", "1", "0"]


def test_the_guard_knows_the_earlier_rounds_of_a_revisited_edge():
    seen = []

    def guard(evidence):
        seen.append([row["round"] for row in evidence.earlier])

    grid = LegacyGrid(apps(2))
    run(legacy(small_core(guard=guard), num_clones=1, revisit=True), grid, rounds=3)
    assert seen == [[], [], [], [], [1], [1]]  # twice in a round


def test_an_edge_that_returns_under_another_node_id_is_not_asked_again():
    grid = LegacyGrid(apps(2), [{"name": "clinic", "partition-id": 0}] * 2)
    grid.online = [100]

    def swap(row):
        grid.online = [101]

    run(legacy(small_core(), num_clones=1, on_round=swap), grid, rounds=2)
    assert grid.trained() == [100]


def test_a_name_in_use_by_an_online_node_is_rejected():
    grid, rows = LegacyGrid(apps(2), [{"name": "clinic", "partition-id": 0}] * 2), []
    run(legacy(small_core(), num_clones=1, on_round=rows.append), grid, rounds=2)
    assert sorted(row["edge"] for row in rows)[0] == "clinic"
    assert sorted(row["edge"] for row in rows)[1].startswith("node ")


def test_a_late_arrival_is_waited_for():
    grid, polls = LegacyGrid(apps(2)), []
    grid.online = [100]
    present = grid.get_node_ids

    def arrive():
        polls.append(grid.trained())
        # The second edge comes only once the strategy has looked for it in vain.
        if polls[-1] == [100] and polls.count([100]) > 3:
            grid.online = [100, 101]
        return present()

    grid.get_node_ids = arrive
    strategy = run(legacy(small_core(), num_clones=1, timeout=30), grid, rounds=2)
    assert grid.trained() == [100, 101]
    assert strategy.state.version == 2


def test_a_run_without_new_edges_goes_on_to_its_end_with_the_core_it_has(flower_log):
    strategy = run(legacy(small_core(), num_clones=1), LegacyGrid(apps(1)), rounds=4)
    assert strategy.state.version == 1
    assert sum("No edge left to ask" in line for line in flower_log) == 3


def test_only_the_first_fruitless_wait_lasts(monkeypatch):
    now, manager = [0.0], SimpleClientManager()
    clock = SimpleNamespace(
        monotonic=lambda: now[0],
        sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
    )
    monkeypatch.setattr("flwr_cloned_kd.flower.legacy.time", clock)
    strategy = legacy(small_core(), timeout=60)
    strategy.initialize_parameters(manager)
    assert strategy.configure_fit(1, None, manager) == []
    assert now[0] == pytest.approx(60, abs=0.2)
    assert strategy.configure_fit(2, None, manager) == []
    assert now[0] == pytest.approx(60, abs=0.2)


class Proxy:
    """A legacy server's view of one client, without a network."""

    def __init__(self, cid="7", properties=None):
        self.cid, self.properties = cid, properties

    def get_properties(self, ins, timeout, group_id):
        if self.properties is None:
            return GetPropertiesRes(Status(Code.GET_PROPERTIES_NOT_IMPLEMENTED, ""), {})
        if isinstance(self.properties, Exception):
            raise self.properties
        return GetPropertiesRes(Status(Code.OK, ""), self.properties)


def ask(strategy, proxy=None):
    """Open a run with one client and configure its first round."""
    manager = SimpleClientManager()
    proxy = proxy or Proxy()
    manager.register(proxy)
    first = strategy.initialize_parameters(manager)
    ((asked, request),) = strategy.configure_fit(1, first, manager)
    assert asked is proxy
    return proxy, request


def honest(request):
    arrays, count, metrics = edge_client(0).fit(
        [np.load(io.BytesIO(t)) for t in request.parameters.tensors], request.config
    )
    return FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), count, metrics)


def test_a_request_carries_the_core_and_what_to_do_with_it():
    core = small_core()
    strategy = legacy(core, on_fit_config_fn=lambda r: {"proximal-mu": 0.5, "seed": -1, "round": r})
    _, request = ask(strategy)
    assert request.config == {
        "proximal-mu": 0.5,
        "round": 1,
        "server-round": 1,
        "num-clones": 2,
        "seed": edge_seed(7, 1),
    }
    expected = ndarrays_to_parameters([t.numpy() for t in core.pretrain().values()])
    assert request.parameters.tensors == expected.tensors


def with_array(change):
    """Replace the bytes of the first array, conv.weight."""

    def edit(reply):
        reply.parameters.tensors[0] = change(reply.parameters.tensors[0])
        return reply

    return edit


def npy(edit):
    def change(data):
        array = np.load(io.BytesIO(data)).copy()
        return ndarrays_to_parameters([edit(array)]).tensors[0]

    return with_array(change)


def nan(array):
    array.flat[0] = np.nan
    return array


def field(**changes):
    def edit(reply):
        for name, value in changes.items():
            setattr(reply, name, value)
        return reply

    return edit


def pickled(data):
    file = io.BytesIO()
    np.save(file, np.array([{"x": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


HOSTILE = {
    "nan": (npy(nan), "conv.weight: expected finite values, got 1 of 144 not finite"),
    "shape": (npy(lambda a: a[..., :1]), "conv.weight: expected shape (2, 8, 1"),
    "one clone more": (npy(lambda a: np.concatenate([a, a[:1]])), "got (3, 8, 1, 3, 3)"),
    "dtype": (npy(lambda a: a.astype("f8")), "conv.weight: expected dtype torch.float32"),
    "text": (npy(lambda a: np.array(["x"])), "conv.weight: expected an array of numbers"),
    "no array": (with_array(lambda data: b"junk"), "'conv.weight': expected a NumPy array"),
    "empty bytes": (with_array(lambda data: b""), "'conv.weight': expected a NumPy array"),
    "a pickle": (with_array(pickled), "'conv.weight': expected a NumPy array"),
    "another serialisation": (
        lambda reply: field(parameters=Parameters(reply.parameters.tensors, "torch"))(reply),
        "'conv.weight': expected a NumPy array",
    ),
    "empty": (field(parameters=Parameters([], "")), "parameters: expected 8 arrays, got 0"),
    "too few": (
        lambda reply: field(parameters=Parameters(reply.parameters.tensors[1:], ""))(reply),
        "parameters: expected 8 arrays, got 7",
    ),
    "no examples": (field(num_examples=0), "num-examples: expected a number above 0, got 0"),
    "examples that are none": (field(num_examples="many"), "num-examples: expected a number"),
    "a status": (
        field(status=Status(Code.FIT_NOT_IMPLEMENTED, "no fit()")),
        "expected status OK, got FIT_NOT_IMPLEMENTED: 'no fit()'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_reply_that_does_not_fit_is_refused_in_one_line(case, flower_log):
    edit, cause = HOSTILE[case]
    rows = []
    strategy = legacy(small_core(), on_round=rows.append)
    proxy, request = ask(strategy)
    before = strategy.state
    reply = edit(honest(request))
    flower_log.clear()
    arrays, metrics = strategy.aggregate_fit(1, [(proxy, reply)], [])
    assert strategy.state is before
    assert arrays.tensors == request.parameters.tensors
    assert metrics["accepted"] == 0
    assert cause in rows[0]["cause"]
    assert len(flower_log) == 1
    assert flower_log[0].startswith("[ROUND 1] edge node 7 refused:")
    assert "\n" not in flower_log[0]


@pytest.mark.parametrize(
    ("results", "failures", "cause"),
    [
        ([], [], "expected one answer, got 0"),
        (
            [],
            [ValueError("Traceback ...\nMemoryError: out of memory")],
            "MemoryError: out of memory",
        ),
        ([], [ValueError()], "expected a reply, got an error: 'ValueError'"),
        ("twice", [], "expected one answer, got 2"),
        ([], "status", "expected status OK, got FIT_NOT_IMPLEMENTED"),
    ],
)
def test_no_answer_or_an_error_is_refused(results, failures, cause):
    rows = []
    strategy = legacy(small_core(), on_round=rows.append)
    proxy, request = ask(strategy)
    if results == "twice":
        results = [(proxy, honest(request))] * 2
    if failures == "status":
        failed = field(status=Status(Code.FIT_NOT_IMPLEMENTED, ""))(honest(request))
        failures = [(proxy, failed)]
    before = strategy.state
    strategy.aggregate_fit(1, results, failures)
    assert strategy.state is before
    assert cause in rows[0]["cause"]


def test_a_round_is_reported_as_cloned_kd_reports_it(flower_log):
    """One line per round, the ensemble's accuracy in it, and the keys that the docs name."""
    rows = []
    run(legacy(small_core(), on_round=rows.append), LegacyGrid(apps(1)), rounds=1)
    named = {
        "round",
        "edge",
        "accepted",
        "cause",
        "staleness",
        "bytes-down",
        "bytes-up",
        "edge-seconds",
        "core-seconds",
        "num-clones",
        "core-accuracy",
    }
    assert named <= rows[0].keys()
    theirs = []
    strategy = ClonedKD(small_core(), num_clones=2, on_round=theirs.append)
    strategy.start(FakeGrid(apps(1)), ArrayRecord(strategy.core.pretrain()), num_rounds=1)
    more = {"number", "wait-seconds", "core-idle-seconds", "edge-idle-seconds", "time"}
    assert theirs[0].keys() - rows[0].keys() == more
    lines = [line for line in flower_log if line.startswith("[ROUND 1] edge 0: ")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert ", ensemble 0." in lines[0]


def test_more_clones_than_asked_for_are_refused():
    rows = []
    strategy = legacy(small_core(), num_clones=1, on_round=rows.append)
    proxy, request = ask(strategy)
    request.config["num-clones"] = 2
    strategy.aggregate_fit(1, [(proxy, honest(request))], [])
    assert rows[0]["cause"] == "clones: expected at most 1, got 2"


def test_a_round_that_the_guard_refuses_leaves_the_core_as_it_was():
    rows = []
    core = small_core(guard=lambda evidence: "too good")
    strategy = legacy(core, on_round=rows.append)
    proxy, request = ask(strategy)
    before = strategy.state
    strategy.aggregate_fit(1, [(proxy, honest(request))], [])
    assert strategy.state is before
    assert rows[0]["cause"] == "too good"


def test_the_run_goes_on_after_an_edge_that_crashed():
    def crash(message, context):
        if message.metadata.message_type == "train":
            raise MemoryError("out of memory")
        return app()(message, context)

    def corrupt(message, context):
        """Not even the records of a reply."""
        reply = app()(message, context)
        if message.metadata.message_type != "train":
            return reply
        return Message(RecordDict({"x": ConfigRecord()}), reply_to=message)

    def dead(message, context):
        if message.metadata.message_type != "train":
            return app()(message, context)
        return Message(Error(0, "process died"), reply_to=message)

    rows = []
    core, diary = small_core(), Diary()
    grid = LegacyGrid([crash, corrupt, dead, app()])
    options = {"num_clones": 1, "on_round": rows.append, "callbacks": [diary]}
    strategy = run(legacy(core, **options), grid, rounds=4)
    assert [row["accepted"] for row in rows] == [0, 0, 0, 1]
    assert "MemoryError: out of memory" in rows[0]["cause"]
    assert "fitres.parameters" in rows[1]["cause"]
    assert "process died" in rows[2]["cause"]
    assert strategy.state.version == 1
    settled = ["refused"] * 3 + ["absorbed"]
    assert diary.names() == [
        "started",
        *[name for end in settled for name in ("asked", "arrived", end)],
    ]
    assert diary.of("refused", "absorbed") == rows
    assert [event.kind for event in diary.of("arrived")] == ["error"] * 3 + ["answer"]
    assert [event.number for event in diary.of("asked")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("properties", "edge"),
    [
        (None, "node 7"),
        (ConnectionError("gone"), "node 7"),
        ({}, "node 7"),
        ({"edge": "clinic"}, "clinic"),
        ({"edge": 4}, "4"),
        ({"edge": "a\nb"}, "node 7"),
        ({"edge": "node 8"}, "node 7"),
        ({"edge": "x" * 100}, "x" * 64),
    ],
)
def test_a_client_is_known_by_the_name_it_gives_or_else_by_its_id(properties, edge):
    rows = []
    strategy = legacy(small_core(), on_round=rows.append)
    ask(strategy, Proxy(properties=properties))
    strategy.aggregate_fit(1, [], [])
    assert rows[0]["edge"] == edge


def test_the_core_is_evaluated_on_held_out_data():
    # Zeroed, a linear head gives every class the same probability: -log(1/10) = 2.3026.
    core = small_core()
    zero = {name: torch.zeros_like(tensor) for name, tensor in core.model.state_dict().items()}
    strategy = LegacyClonedKD(core, zero)
    loss, metrics = strategy.evaluate(0, strategy.initialize_parameters(SimpleClientManager()))
    assert loss == pytest.approx(2.302585, abs=1e-5)
    share = float((core.held_out[1] == 0).float().mean())  # argmax of equal logits is class 0
    assert metrics == {"core-accuracy": pytest.approx(share)}


def test_the_core_is_evaluated_by_its_task():
    # The weights are 0, so that the outputs are 0: squared errors of 1 and 9, one within 2.
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Flatten(0))
    data = torch.zeros(2, 1), torch.tensor([1.0, 3.0])
    core = Core(model=model, dataset=data, held_out=data, task=Regression(tolerance=2))
    params = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    strategy = LegacyClonedKD(core, params)
    parameters = strategy.initialize_parameters(SimpleClientManager())
    assert strategy.evaluate(0, parameters) == (5.0, {"core-accuracy": 0.5})


def test_without_held_out_data_nothing_is_evaluated():
    strategy = legacy(small_core(held_out=None))
    assert strategy.evaluate(0, strategy.initialize_parameters(SimpleClientManager())) is None


def test_edges_are_not_asked_to_evaluate():
    strategy = legacy(small_core())
    assert strategy.configure_evaluate(1, None, SimpleClientManager()) == []
    assert strategy.aggregate_evaluate(1, [], []) == (None, {})


def test_a_second_run_starts_anew():
    core = small_core()
    strategy = legacy(core)
    first = run(strategy, LegacyGrid(apps(2)), rounds=2).state
    again = run(strategy, LegacyGrid(apps(2)), rounds=2).state
    assert same_bits(first.params, again.params)


def test_a_reply_to_an_unknown_request_is_ignored():
    strategy = legacy(small_core())
    first = strategy.initialize_parameters(SimpleClientManager())
    arrays, metrics = strategy.aggregate_fit(1, [], [])
    assert (arrays.tensors, metrics) == (first.tensors, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clones": 0}, "num_clones: expected at least 1, got 0"),
        ({"timeout": -1}, "timeout: expected at least 0, got -1"),
        ({"timeout": float("nan")}, "timeout: expected at least 0, got nan"),
    ],
)
def test_a_number_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LegacyClonedKD(small_core(), small_core().model.state_dict(), **options)


def test_params_of_another_model_are_refused():
    with pytest.raises(ValueError, match="array names: expected the core's 8"):
        LegacyClonedKD(small_core(), {"w": torch.zeros(1)})


def test_a_strategy_that_was_not_opened_says_so():
    strategy = LegacyClonedKD(small_core(), small_core().model.state_dict())
    manager = SimpleClientManager()
    manager.register(Proxy())
    with pytest.raises(RuntimeError, match="expected initialize_parameters"):
        strategy.configure_fit(1, None, manager)


LEGACY = Path(__file__).parents[2] / "examples" / "legacy"
SHORT = {"num-server-rounds": 3, "core-epochs": 3, "edge-epochs": 2, "distill-epochs": 2}


def expected_lines():
    """What the example prints, by the plain loop."""
    train, test = load_digits()
    parts, short = partition(len(train[1]), 10), Recipe(epochs=2)
    core = Core(
        model=digits_cnn(),
        dataset=take(train, parts[0]),
        held_out=test,
        recipe=Recipe(epochs=3),
        distillation=practical(short),
    )
    state, lines = core.state(core.pretrain()), []
    for r in (1, 2, 3):
        data, seed = take(train, parts[r]), edge_seed(0, r)
        edge = train_edge(core.model, state.params, data, short, num_clones=3, seed=seed)
        state, metrics = core.distill(state, edge)
        lines.append(f"round {r}: edge {r - 1}, core accuracy {metrics['core-accuracy']}")
    return lines


def test_the_legacy_example_learns_what_the_plain_loop_learns(monkeypatch, capsys):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(LEGACY))
    names = ("server_app", "client_app")
    server, client = (importlib.import_module(f"legacy_digits.{name}").app for name in names)
    grid, config = LegacyGrid([client] * 3), SHORT | {"num-edges": 9, "num-clones": 3}
    for context in grid.contexts.values():
        context.run_config = config
    server(grid, Context(1, 0, {}, RecordDict(), config))
    assert capsys.readouterr().out.splitlines() == expected_lines()


@pytest.mark.simulation
def test_the_legacy_example_runs_under_flwr_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process: equal bits need equal threads
    overrides = " ".join(f"{key}={value}" for key, value in SHORT.items())
    resources = {"num-supernodes": 3, "client-resources-num-cpus": 1}
    status, _ = runner().simulate(LEGACY, overrides, resources, tmp_path)
    text = capsys.readouterr().out
    assert status == "finished:completed", text
    lines = re.findall(r"round \d: edge \d, core accuracy [\d.]+", text)
    assert lines == expected_lines()
