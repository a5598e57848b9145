"""Waiting answers that are distilled in one Phase 2: rounds, rows, refusals and resumption."""

import pytest
from flwr.app import ArrayRecord, Message, MetricRecord

from flwr_cloned_kd import ClonedKD, VirtualGrid, accounts
from tests.helpers.federation import app, apps, small_core
from tests.helpers.reference import same_bits
from tests.helpers.scripted import by_edge

pytestmark = pytest.mark.usefixtures("one_thread")


def run(edges, *, rounds=4, max_in_flight=4, core=None, **options):
    """Train all edges for one second; the core needs 5 s for an answer and 1 s for each further."""
    core = small_core() if core is None else core
    grid = VirtualGrid(edges, compute=by_edge(1, 2, 3, 4), core=5.0, further=1.0)
    strategy = ClonedKD(core, num_clones=1, max_in_flight=max_in_flight, **options)
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=rounds, timeout=1000)
    return strategy


def test_answers_that_wait_are_distilled_together():
    """While the core learns from edge 0, the others answer: they are one group of 5 + 2 s."""
    strategy = run(apps(4), max_together=3)
    assert [row["edge"] for row in strategy.history] == ["0", "1", "2", "3"]
    assert [row["time"] for row in strategy.history] == [6, 13, 13, 13]
    assert [row.get("together") for row in strategy.history] == [None, 3, 3, 3]
    assert [row["staleness"] for row in strategy.history] == [0, 1, 1, 1]
    assert [row["wait-seconds"] for row in strategy.history] == [0, 4, 3, 2]
    assert strategy.version == 4
    assert accounts(strategy.history)["core-seconds"] == pytest.approx(12)
    assert accounts(strategy.history)["core-idle-seconds"] == 1


def test_a_group_has_a_limit():
    strategy = run(apps(4), max_together=2)
    assert [row["time"] for row in strategy.history] == [6, 12, 12, 17]


def test_with_one_at_a_time_the_bits_are_those_of_a_loop_without_groups():
    alone = run(apps(4))
    assert same_bits(
        run(apps(4), max_in_flight=1, max_together=3).state.params,
        run(apps(4), max_in_flight=1).state.params,
    )
    assert [row["time"] for row in alone.history] == [6, 11, 16, 21]


def test_the_user_evaluates_once_for_a_group():
    core, asked = small_core(), []

    def evaluate(server_round, arrays):
        asked.append(server_round)
        return MetricRecord({"round": server_round})

    grid = VirtualGrid(apps(4), compute=by_edge(1, 2, 3, 4), core=5.0)
    strategy = ClonedKD(core, num_clones=1, max_in_flight=4, max_together=3)
    first = ArrayRecord(core.model.state_dict())
    result = strategy.start(grid, first, num_rounds=4, timeout=1000, evaluate_fn=evaluate)
    assert asked == [0, 1, 4]
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]


def spoiled(message, context):
    """An edge whose reply lacks its metrics."""
    reply = app()(message, context)
    if message.metadata.message_type == "train":
        reply.content.pop("metrics")
    return reply


def crashes(message, context):
    if message.metadata.message_type == "train":
        raise RuntimeError("out of memory")
    return app()(message, context)


@pytest.mark.parametrize(
    ("bad", "cause"),
    [(spoiled, "expected one MetricRecord, got 0"), (crashes, "out of memory")],
)
def test_a_bad_answer_of_a_group_is_refused_alone(bad, cause):
    strategy = run([app(), app(), bad, app()], max_together=3)
    assert [row["accepted"] for row in strategy.history] == [1, 1, 0, 1]
    assert cause in strategy.history[2]["cause"]
    assert strategy.version == 3
    assert strategy.history[1]["together"] == 2


class RefusesGroups:
    """A guard that refuses the second distillation, which is that of the group."""

    def __init__(self):
        self.calls = 0

    def __call__(self, evidence):
        if evidence.after is None:
            return None
        self.calls += 1
        return "a group" if self.calls in (2, 3, 4) else None


def test_a_group_that_the_guard_refuses_is_distilled_one_by_one(flower_log):
    core = small_core(guard=RefusesGroups())
    strategy = run(apps(4), core=core, max_together=3)
    assert [row["accepted"] for row in strategy.history] == [1, 1, 1, 1]
    # Of edge 0 alone, of three edges together, and of each of them alone.
    assert core.guard.calls == 1 + 3 + 3
    assert all("together" not in row for row in strategy.history)
    assert any("3 answers one by one, because together: a group" in line for line in flower_log)


def overflowing(message: Message, context):
    """An edge with finite weights, whose predictions are not finite."""
    reply = app()(message, context)
    if message.metadata.message_type == "train":
        state = reply.content["arrays"].to_torch_state_dict()
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.fill_(3e38)
        reply.content["arrays"] = ArrayRecord(state)
    return reply


def test_infinite_predictions_cost_the_rest_of_a_group_nothing():
    strategy = run([app(), app(), overflowing, app()], max_together=3)
    assert [row["accepted"] for row in strategy.history] == [1, 1, 0, 1]
    assert "not finite" in strategy.history[2]["cause"]


def test_a_run_resumes_between_groups(tmp_path):
    checkpoint = tmp_path / "core.safetensors"
    stopped = run(apps(4), rounds=1, max_together=3, checkpoint=checkpoint)
    assert len(stopped.history) == 1
    strategy = run(apps(4), max_together=3, checkpoint=checkpoint)
    assert len(strategy.history) == 4
    assert strategy.version == 4


@pytest.mark.parametrize("name", ["num_clones", "max_together"])
def test_a_number_out_of_range_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        ClonedKD(small_core(), **{name: 0})
    with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 1, got 2.5"):
        ClonedKD(small_core(), **{name: 2.5})
