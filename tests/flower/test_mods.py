"""Client mods around an edge: each one works, or its error names it and reaches the server."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.client import mod as legacy_mod
from flwr.clientapp import mod as message_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

from flwr_cloned_kd import (
    ClipClones,
    ClonedKD,
    LegacyClonedKD,
    LocalDpClones,
    edge_app,
)
from tests.examples.test_examples import run as run_script
from tests.flower.test_legacy import LegacyGrid
from tests.flower.test_legacy import run as run_legacy
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import edge_client, small_core

NORM = {"clipping_norm": 1.0}
DP = {"clipping_norm": 1.0, "epsilon": 1.0, "delta": 1e-5}
FLOWERS_DP = {**DP, "sensitivity": 1.0}


def app(*mods):
    make = lambda context: edge_client(int(context.node_config["partition-id"]))  # noqa: E731
    return edge_app(make, mods=list(mods))


def absorb(*mods, config=NORM, rounds=1, **options):
    """Run ClonedKD over edges with these mods and return its rounds."""
    core = small_core()
    rows = []
    strategy = ClonedKD(core, num_clones=2, on_round=rows.append, **options)
    first = ArrayRecord(core.model.state_dict())
    grid = FakeGrid([app(*mods)] * rounds)
    settings = ConfigRecord(dict(config))
    strategy.start(grid, first, num_rounds=rounds, timeout=30, train_config=settings)
    return rows


def absorb_legacy(*mods, config=NORM):
    core = small_core()
    rows = []
    strategy = LegacyClonedKD(
        core,
        core.model.state_dict(),
        num_clones=2,
        timeout=0,
        on_fit_config_fn=lambda server_round: dict(config),
        on_round=rows.append,
    )
    run_legacy(strategy, LegacyGrid([app(*mods)]), rounds=1)
    return rows


BOTH = pytest.mark.parametrize("absorb", [absorb, absorb_legacy], ids=["message", "legacy"])


@BOTH
@pytest.mark.parametrize("name", ["message_size_mod", "arrays_size_mod"])
def test_flowers_size_mods_work(absorb, name, flower_log):
    (row,) = absorb(getattr(message_mod, name))
    assert row["accepted"]
    assert row["num-clones"] == 2
    assert any("Outgoing" in line or "elements sent" in line for line in flower_log)


@BOTH
@pytest.mark.parametrize(
    "mod",
    [
        message_mod.fixedclipping_mod,
        message_mod.adaptiveclipping_mod,
        message_mod.LocalDpMod(**FLOWERS_DP),
    ],
    ids=["fixed", "adaptive", "local"],
)
def test_flowers_mods_for_one_model_refuse_an_ensemble(absorb, mod, flower_log):
    (row,) = absorb(mod)
    name = getattr(mod, "__name__", "LocalDpMod")
    cause = f"{name}: expected one model in the reply, got an ensemble of 2 clones"
    assert not row["accepted"]
    assert cause in row["cause"]
    assert sum(line.startswith(cause) for line in flower_log) == 1


@pytest.mark.parametrize(
    "mod",
    [
        legacy_mod.fixedclipping_mod,
        legacy_mod.adaptiveclipping_mod,
        legacy_mod.LocalDpMod(**FLOWERS_DP),
    ],
    ids=["fixed", "adaptive", "local"],
)
def test_a_legacy_mod_refuses_what_it_cannot_handle(mod):
    (row,) = absorb(mod)
    assert "the mod of flwr.client.mod is for legacy servers" in row["cause"]
    (row,) = absorb_legacy(mod)
    assert "expected one model in the reply, got an ensemble of 2 clones" in row["cause"]


@BOTH
@pytest.mark.parametrize("mod", [legacy_mod.secagg_mod, legacy_mod.secaggplus_mod])
def test_secure_aggregation_refuses_a_request_for_clones(absorb, mod):
    (row,) = absorb(mod)
    assert not row["accepted"]
    assert f"{mod.__name__}: secure aggregation only reveals a sum of many edges" in row["cause"]


def test_a_clipping_mod_without_a_norm_is_an_error():
    (row,) = absorb(message_mod.fixedclipping_mod, config={})
    assert "fixedclipping_mod requires the key 'clipping_norm'" in row["cause"]
    (row,) = absorb(ClipClones(), config={})
    assert "ClipClones: expected a number as clipping_norm in the request" in row["cause"]
    (row,) = absorb(ClipClones(), config={"clipping_norm": -1.0})
    assert "ClipClones: clipping_norm: expected above 0, got -1.0" in row["cause"]


@pytest.mark.parametrize(
    "mod",
    [message_mod.fixedclipping_mod, message_mod.adaptiveclipping_mod, ClipClones(1.0)],
    ids=["fixed", "adaptive", "ours"],
)
def test_clipping_works_with_fedavg_and_skips_evaluation(mod):
    core = small_core()
    all_edges = {"min_train_nodes": 2, "min_evaluate_nodes": 2, "min_available_nodes": 2}
    result = FedAvg(**all_edges).start(
        FakeGrid([app(mod)] * 2),
        ArrayRecord(core.model.state_dict()),
        num_rounds=2,  # in the second, FedAvg sends the mean of the batch counters, a float
        train_config=ConfigRecord(dict(NORM)),
    )
    end = result.arrays.to_torch_state_dict(keep_input=True)
    start = core.model.state_dict()
    floating = [name for name in start if start[name].is_floating_point()]
    squares = [float((end[name] - start[name]).double().square().sum()) for name in floating]
    # Each of the two edges moves by at most 1 a round, and so does their mean; float32 rounds.
    assert 0 < math.sqrt(sum(squares)) <= 2 + 1e-4
    assert list(result.train_metrics_clientapp) == [1, 2]
    assert "loss" in result.evaluate_metrics_clientapp[2]


def test_a_mods_error_for_the_wrong_receiver_reaches_the_server():
    def lost(message, context, call_next):
        """Do as Flower's mods do with several records: address the error to the reply."""
        reply = call_next(message, context)
        reply.content["arrays-too"] = ArrayRecord({"x": Array(np.zeros(1))})
        return message_mod.fixedclipping_mod(message, context, lambda *_: reply)

    (row,) = absorb(lost)
    assert "expected a reply, got error 6: 'fixedclipping_mod expects exactly one" in row["cause"]


def test_without_guarded_that_error_has_no_receiver():
    # This is the reason for guarded(): Flower itself sends the error of the same mod nowhere.
    def lost(message, context):
        reply = Message(RecordDict(), reply_to=message)
        return message_mod.fixedclipping_mod(message, context, lambda *_: reply)

    content = {"arrays": ArrayRecord(), "config": ConfigRecord(dict(NORM))}
    message = Message(RecordDict(content), dst_node_id=100, message_type="train")
    message.metadata.__dict__["_message_id"] = "asked"
    assert lost(message, None).metadata.reply_to_message_id == ""


@BOTH
def test_our_mods_work_with_an_ensemble(absorb):
    (row,) = absorb(ClipClones(0.1))
    assert row["accepted"]
    assert row["reported-clipped"] == 1.0  # two epochs of training move a clone by more than 0.1
    (row,) = absorb(ClipClones(1e6))
    assert row["reported-clipped"] == 0.0
    quiet = LocalDpClones(clipping_norm=0.01, epsilon=1.0, delta=0.5)
    assert quiet.standard_deviation(2) == pytest.approx(0.0383, abs=1e-4)
    (row,) = absorb(quiet)
    assert row["accepted"]


@BOTH
def test_noise_that_makes_a_running_variance_negative_is_refused(absorb):
    # A deviation of 13.7 around variances of 1: of 120 about half are below zero.
    (row,) = absorb(LocalDpClones(**DP))
    assert not row["accepted"]
    assert row["cause"].startswith("edge predictions: logits: expected finite values")


def test_mods_are_applied_in_the_order_given():
    seen = []

    def look(message, context, call_next):
        reply = call_next(message, context)
        seen.append(reply.content["metrics"].get("clipped"))
        return reply

    absorb(look, ClipClones(0.1), look)
    assert seen == [None, 1.0]  # the last mod of the list is next to the client


def test_a_mod_for_one_model_checks_the_reply_that_it_receives():
    def first_clone(message, context, call_next):
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        clones = {name: array.numpy() for name, array in reply.content["arrays"].items()}
        first = {name: Array(np.array(array[0])) for name, array in clones.items()}
        reply.content["arrays"] = ArrayRecord(first)
        return reply

    (row,) = absorb(message_mod.fixedclipping_mod, first_clone)
    assert row["accepted"]
    assert row["num-clones"] == 1
    (row,) = absorb(first_clone, message_mod.fixedclipping_mod)
    assert "fixedclipping_mod: expected one model in the reply" in row["cause"]


class Moving(NumPyClient):
    """Move w and b by the given amounts, one triple a clone; add 1 to the counter."""

    def __init__(self, *clones, plain=False):
        self.clones = clones
        self.plain = plain

    def fit(self, parameters, config):
        w, b, count = parameters
        count = count.astype("i8")
        moved = [
            np.stack([w + np.array(c[:2], w.dtype) for c in self.clones]),
            np.stack([b + np.array(c[2], b.dtype) for c in self.clones]),
            np.stack([count + 1 for _ in self.clones]),
        ]
        return [np.asarray(m[0]) for m in moved] if self.plain else moved, 1, {}


def moved(mod, *clones, plain=False, count=5):
    """Send w = [1, 1], b = 1 and a counter; return the arrays and metrics of the reply."""
    arrays = {"w": np.ones(2, "f4"), "b": np.ones((), "f4"), "count": np.array(count)}
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    message = Message(RecordDict({"arrays": record}), dst_node_id=100, message_type="train")
    edge = edge_app(lambda context: Moving(*clones, plain=plain), mods=[mod])
    reply = edge(message, Context(1, 100, {}, RecordDict(), {}))
    arrays = {name: array.numpy() for name, array in reply.content["arrays"].items()}
    return arrays, reply.content["metrics"]


def test_each_clone_is_clipped_by_its_own_norm():
    # |(2, 1, 2)| = 3 is scaled by 1/3; |(0.25, 0.5, 0.5)| = 0.75 is within the norm of 1.
    arrays, metrics = moved(ClipClones(1.0), (2, 1, 2), (0.25, 0.5, 0.5))
    assert arrays["w"] == pytest.approx(np.array([[1 + 2 / 3, 1 + 1 / 3], [1.25, 1.5]]), abs=1e-6)
    assert arrays["b"] == pytest.approx(np.array([1 + 2 / 3, 1.5]), abs=1e-6)
    assert metrics["clipped"] == 0.5


def test_clipping_keeps_dtypes_and_counters():
    arrays, _ = moved(ClipClones(1.0), (2, 1, 2), (0.25, 0.5, 0.5))
    assert arrays["count"].tolist() == [5, 5]
    assert [array.dtype for array in arrays.values()] == ["f4", "f4", "i8"]


def test_a_counter_sent_as_a_mean_returns_in_the_edges_dtype():
    # 5.5 batches is a mean of two edges; the edge, like EdgeClient, counts in whole numbers.
    for mod in (ClipClones(1.0), LocalDpClones(**DP)):
        arrays, _ = moved(mod, (2, 1, 2), (0.25, 0.5, 0.5), count=5.5)
        assert arrays["count"].tolist() == [5, 5]
        assert arrays["count"].dtype == "i8"


def test_a_float_of_another_precision_is_refused():
    class Double(NumPyClient):
        def fit(self, parameters, config):
            return [parameters[0].astype("f8")], 1, {}

    record = ArrayRecord({"w": Array(np.ones(2, "f4"))})
    message = Message(RecordDict({"arrays": record}), dst_node_id=100, message_type="train")
    edge = edge_app(lambda context: Double(), mods=[ClipClones(1.0)])
    reply = edge(message, Context(1, 100, {}, RecordDict(), {}))
    assert "w: expected dtype torch.float32, got torch.float64" in reply.error.reason


def test_a_clone_within_the_norm_keeps_its_bits():
    arrays, metrics = moved(ClipClones(100.0), (0.1, 0.2, 0.3), (0, 0, 0))
    assert np.array_equal(arrays["w"][0], np.ones(2, "f4") + np.array([0.1, 0.2], "f4"))
    assert arrays["w"][1].tolist() == [1, 1]
    assert metrics["clipped"] == 0


def test_a_plain_model_is_clipped_and_stays_plain():
    arrays, metrics = moved(ClipClones(1.0), (2, 1, 2), plain=True)
    assert arrays["w"] == pytest.approx(np.array([1 + 2 / 3, 1 + 1 / 3]), abs=1e-6)
    assert arrays["b"].shape == ()
    assert metrics["clipped"] == 1


def test_a_reply_of_another_shape_becomes_an_error(flower_log):
    class Odd(NumPyClient):
        def fit(self, parameters, config):
            return [parameters[0][:1]], 1, {}

    record = ArrayRecord({"w": Array(np.ones(2))})
    message = Message(RecordDict({"arrays": record}), dst_node_id=100, message_type="train")
    edge = edge_app(lambda context: Odd(), mods=[ClipClones(1.0)])
    reply = edge(message, Context(1, 100, {}, RecordDict(), {}))
    assert reply.error.reason == "ClipClones: w: expected shape (2,), got (1,)"
    assert flower_log == [reply.error.reason]


def test_the_noise_has_the_deviation_of_the_gaussian_mechanism():
    # 2 C sqrt(2 ln(1.25 / 1e-5)) / epsilon = 2 sqrt(2 * 11.7361) = 9.6896, and twice that for
    # four clones of the same data.
    dp = LocalDpClones(**DP)
    assert dp.standard_deviation(1) == pytest.approx(9.6896, abs=1e-4)
    assert dp.standard_deviation(4) == pytest.approx(19.3792, abs=2e-4)
    assert LocalDpClones(**FLOWERS_DP).standard_deviation(1) == pytest.approx(4.8448, abs=1e-4)


def test_every_value_of_every_clone_is_noised_by_itself():
    size = 40_000
    scale = LocalDpClones(**DP).standard_deviation(2)

    class Wide(NumPyClient):
        def fit(self, parameters, config):
            return [np.stack([parameters[0]] * 2), np.stack([parameters[1]] * 2)], 1, {}

    dp = LocalDpClones(**DP, generator=lambda: np.random.default_rng(3))
    record = ArrayRecord({"w": Array(np.zeros(size, "f4")), "count": Array(np.array(5))})
    message = Message(RecordDict({"arrays": record}), dst_node_id=100, message_type="train")
    edge = edge_app(lambda context: Wide(), mods=[dp])
    reply = edge(message, Context(1, 100, {}, RecordDict(), {}))
    noise = reply.content["arrays"]["w"].numpy().astype(float)
    # The standard error of a deviation is 1 / sqrt(2 n) = 0.35 %, of a correlation 0.5 %.
    assert noise.std(1) == pytest.approx([scale, scale], rel=0.02)
    assert abs(np.corrcoef(noise)[0, 1]) < 0.03
    assert abs(noise.mean()) < 5 * scale / math.sqrt(2 * size)
    assert reply.content["arrays"]["count"].numpy().tolist() == [5, 5]
    assert dict(reply.content["metrics"]) == {"num-examples": 1}


def test_the_default_noise_differs_in_every_call():
    first, second = (moved(LocalDpClones(**DP), (0, 0, 0))[0]["w"] for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clipping_norm": 0}, "clipping_norm: expected above 0, got 0"),
        ({"clipping_norm": math.inf}, "clipping_norm: expected above 0, got inf"),
        ({"epsilon": 0}, "epsilon: expected above 0, at most 1, got 0"),
        ({"epsilon": 2.0}, "epsilon: expected above 0, at most 1, got 2.0"),
        ({"delta": 1.0}, "delta: expected between 0 and 1, got 1.0"),
        ({"sensitivity": -1.0}, "sensitivity: expected above 0, got -1.0"),
    ],
)
def test_a_number_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LocalDpClones(**(DP | change))
    if "clipping_norm" in change:
        with pytest.raises(ValueError, match=message):
            ClipClones(**change)


def test_the_norm_can_follow_a_quantile_of_the_clones():
    """Andrew et al. 2021: C <- C exp(-rate (share unclipped - quantile)), from on_round."""
    core = small_core()
    settings = ConfigRecord({"clipping_norm": 0.1})
    norms = []

    def adapt(row):
        norms.append(settings["clipping_norm"])
        unclipped = 1 - row["reported-clipped"]
        settings["clipping_norm"] *= math.exp(-0.5 * (unclipped - 0.5))

    strategy = ClonedKD(core, num_clones=2, on_round=adapt)
    first = ArrayRecord(core.model.state_dict())
    grid = FakeGrid([app(ClipClones())] * 3)
    strategy.start(grid, first, num_rounds=3, timeout=30, train_config=settings)
    # All clones move by more than the norm, so it grows by exp(0.25) a round.
    assert norms == pytest.approx([0.1, 0.1 * math.exp(0.25), 0.1 * math.exp(0.5)])


def test_a_users_own_mod_is_not_changed():
    def double(message, context, call_next):
        reply = call_next(message, context)
        reply.content["metrics"] = MetricRecord({"num-examples": 7})
        return reply

    (row,) = absorb(double)
    assert row["num-examples"] == 7


def test_flowers_noise_on_the_server_does_not_reach_the_core():
    """The wrapper adds noise to the arrays that it returns, as docs/drop_in.md warns."""
    core = small_core()
    strategy = ClonedKD(core, num_clones=2)
    grid = FakeGrid([app(ClipClones())] * 2)
    wrapper = DifferentialPrivacyClientSideFixedClipping(
        strategy, noise_multiplier=0.1, clipping_norm=1.0, num_sampled_clients=1
    )
    first = ArrayRecord(core.model.state_dict())
    result = wrapper.start(grid, first, num_rounds=2, timeout=30)
    noised = result.arrays["head.bias"].numpy()
    assert strategy.state.version == 2
    assert np.abs(noised - strategy.state.params["head.bias"].numpy()).max() > 1e-3
    plain = ClonedKD(core, num_clones=2)
    settings = ConfigRecord(dict(NORM))
    other = FakeGrid([app(ClipClones())] * 2)
    plain.start(other, first, num_rounds=2, timeout=30, train_config=settings)
    assert torch.equal(strategy.state.params["head.bias"], plain.state.params["head.bias"])


SIMULATION = """
from flwr.app import ArrayRecord, ConfigRecord
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from tests.helpers.federation import small_core
from tests.flower.test_mods import FLOWERS_DP, app
from flwr_cloned_kd import ClipClones, ClonedKD

APPS = [app(arrays_size_mod, ClipClones(1.0)), app(LocalDpMod(**FLOWERS_DP)), app(secaggplus_mod)]

class Edges(ClientApp):
    def __call__(self, message, context):
        return APPS[int(context.node_config["partition-id"])](message, context)

server = ServerApp()

@server.main()
def main(grid, context):
    core = small_core()
    show = lambda row: print("edge", row["edge"], row["accepted"], row["cause"])
    strategy = ClonedKD(core, num_clones=2, on_round=show)
    strategy.start(grid, ArrayRecord(core.pretrain()), num_rounds=3, timeout=120)

if __name__ == "__main__":
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, Edges(), num_supernodes=3, backend_config=resources)
"""


@pytest.mark.simulation
def test_the_errors_arrive_in_a_real_run(tmp_path):
    script = tmp_path / "simulate.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(Path(__file__).parents[2])!r}]\n{SIMULATION}"
    )
    result = run_script(script)
    assert result.returncode == 0, result.stdout + result.stderr
    for line in (
        "edge 0 1.0",
        "edge 1 0.0 expected a reply, got error 6: 'LocalDpMod: expected one model in the reply",
        "edge 2 0.0 expected a reply, got error 6: 'secaggplus_mod: secure aggregation only",
    ):
        assert line in result.stdout
