"""One Phase 2 for several edges: its teachers, its start, its memory and its twin."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from flwr_cloned_kd import CoreState, Limit, Recipe, correct, movement, predict, train_edge
from flwr_cloned_kd.engine.ensemble import clone, mean
from flwr_cloned_kd.method import core as core_module
from flwr_cloned_kd.method import evidence as evidence_module
from flwr_cloned_kd.method.results import EdgeResult, student_start
from tests.helpers.cores import make_core, start_of
from tests.helpers.reference import ROUNDING, distance, images, mlp, same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

DATA, HELD_OUT = images(24, seed=0), images(31, seed=1)
RECIPE = Recipe(epochs=2, batch_size=8)
core_of = partial(make_core, DATA, RECIPE)


def edge_of(index, num_clones=2):
    params, data = mlp().state_dict(), images(24, seed=10 + index)
    return train_edge(mlp(), params, data, RECIPE, num_clones=num_clones, seed=index)


def results_of(count, **options):
    return [EdgeResult(edge_of(index), **options) for index in range(count)]


def test_one_edge_gives_the_bits_of_distill():
    core = core_of(held_out=HELD_OUT, distillation={"student_start": 0.5, "core_as_teacher": True})
    alone, metrics = core.distill(start_of(core), edge_of(0), weight=0.5)
    together, all_metrics = core.distill_all(start_of(core), [EdgeResult(edge_of(0), None, 0.5)])
    assert same_bits(alone.params, together.params)
    assert alone.memory_weights == together.memory_weights
    assert [metrics] == all_metrics


def test_two_edges_without_memory_teach_like_the_ensemble_of_their_clones():
    """The mean of two targets of two clones each is the target of all four clones."""
    options = {"memory_size": 1, "mean_over_memory": True, "student_start": 0.5}
    core = core_of(distillation=options)
    results = results_of(2)
    union = {name: torch.cat([result.edge[name] for result in results]) for name in results[0].edge}
    together, _ = core.distill_all(start_of(core), results)
    twin, _ = core.distill(start_of(core), union)
    assert distance(together.params, twin.params) < ROUNDING


def test_new_edges_and_the_newest_of_the_memory_are_teachers():
    """With the same teachers in the memory, a weight of zero for one changes nothing but itself."""
    core = core_of(distillation={"memory_size": 2})
    state, _ = core.distill(start_of(core), edge_of(0))
    state, _ = core.distill(state, edge_of(1))
    with_memory, _ = core.distill_all(state, results_of(2))
    forgotten = CoreState(state.params, (edge_of(9), state.memory[1]), version=state.version)
    without_oldest, _ = core.distill_all(forgotten, results_of(2))
    changed = CoreState(state.params, (state.memory[0], edge_of(9)), version=state.version)
    other_newest, _ = core.distill_all(changed, results_of(2))
    assert same_bits(with_memory.params, without_oldest.params)
    assert not same_bits(with_memory.params, other_newest.params)


def test_the_memory_keeps_the_latest_edges_in_order():
    core = core_of(distillation={"memory_size": 2})
    results = [EdgeResult(edge_of(index), weight=1 / (1 + index)) for index in range(3)]
    state, metrics = core.distill_all(start_of(core), results)
    assert [same_bits(kept, result.edge) for kept, result in zip(state.memory, results[1:])] == [
        True,
        True,
    ]
    assert state.memory_weights == (1 / 2, 1 / 3)
    assert state.version == 3
    assert len(metrics) == 3
    assert len(state.train_accuracy) == 1


def test_the_start_is_the_mean_of_movements_from_different_models():
    core, edges = mlp(), [edge_of(0), edge_of(1)]
    now = snapshot(mlp(seed=8).state_dict())
    sent = [snapshot(mlp(seed=seed).state_dict()) for seed in (3, 4)]
    results = [EdgeResult(edge, origin) for edge, origin in zip(edges, sent)]
    start = student_start(core, now, results, 0.5)
    for name, _ in core.named_parameters():
        movements = [mean(edge)[name] - origin[name] for edge, origin in zip(edges, sent)]
        expected = now[name] + 0.5 * (movements[0] + movements[1]) / 2
        assert (start[name] - expected).abs().max() < 1e-6


def test_each_edge_gets_metrics_of_its_own():
    core = core_of(held_out=HELD_OUT, distillation={"selection": correct})
    _, metrics = core.distill_all(start_of(core), results_of(2))
    alone = [core.distill(start_of(core), edge_of(index))[1] for index in range(2)]
    for name in ("known", "edge-accuracy", "ensemble-accuracy"):
        assert [row[name] for row in metrics] == [row[name] for row in alone]
    assert metrics[0]["core-accuracy"] == metrics[1]["core-accuracy"]


def test_a_guard_refuses_all_edges_of_a_round():
    core = core_of(guard=lambda evidence: None if evidence.after is None else "no")
    state = start_of(core)
    after, metrics = core.distill_all(state, results_of(2))
    assert after is state
    assert [(row["accepted"], row["cause"]) for row in metrics] == [(0.0, "no")] * 2


def far_moved(result):
    """Return the result of an edge whose parameters have moved a hundred times as far."""
    origin = mlp().state_dict()
    edge = {
        name: origin[name] + 100 * (tensor - origin[name]) if "weight" in name else tensor
        for name, tensor in result.edge.items()
    }
    return result._replace(edge=edge)


def test_a_guard_can_refuse_one_edge_before_the_distillation(monkeypatch):
    good, bad = results_of(2)
    core = core_of(guard=Limit(movement, 5.0))
    after, metrics = core.distill_all(start_of(core), [far_moved(bad), good])
    alone, _ = core_of().distill(start_of(core), good.edge)
    assert same_bits(after.params, alone.params)
    assert after.version == 1
    assert [row["accepted"] for row in metrics] == [0.0, 1.0]
    assert metrics[0]["cause"].startswith("movement: expected at most 5.000, got ")
    assert "train-accuracy" not in metrics[0]
    monkeypatch.setattr(core_module, "fit", None)  # from now on nothing can be trained
    same, metrics = core.distill_all(after, [far_moved(bad)])
    assert same is after
    assert metrics[0]["accepted"] == 0


def test_the_evidence_is_measured_on_the_validation_data():
    calls, validation = [], images(17, seed=5)
    core = core_of(guard=calls.append, validation=validation)
    state = core.state(mlp().state_dict())
    new, metrics = core.distill_all(state, results_of(1))
    before, after = calls
    (result,) = results_of(1)
    assert before.clones.shape == (2, 17)
    measured = replace(core, held_out=validation)
    assert before.before.float().mean() == pytest.approx(measured.held_out_accuracy(state.params))
    assert after.after.float().mean() == pytest.approx(measured.held_out_accuracy(new.params))
    assert metrics[0]["validation-after"] == pytest.approx(float(after.after.float().mean()))
    origin, centre = mlp().state_dict(), mean(result.edge)
    names = [name for name, _ in mlp().named_parameters()]
    moved = sum(float((centre[n] - origin[n]).square().sum()) for n in names)
    length = sum(float(origin[n].square().sum()) for n in names)
    assert before.movement == pytest.approx((moved / length) ** 0.5, rel=1e-5)
    assert before.direction is None


def test_an_edge_that_repeats_the_memory_has_its_direction():
    calls = []
    core = core_of(guard=calls.append, distillation={"recipe": replace(RECIPE, lr=0)})
    state, _ = core.distill(start_of(core), edge_of(0))
    core.distill(state, edge_of(0))
    assert calls[2].direction == pytest.approx(1.0)


def test_a_guard_that_accepts_changes_no_bit():
    free, _ = core_of().distill_all(start_of(core_of()), results_of(2))
    core = core_of(guard=lambda evidence: None, validation=images(17, seed=5))
    guarded, _ = core.distill_all(start_of(core), results_of(2))
    assert same_bits(free.params, guarded.params)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "results: expected at least one, got none"),
        ([EdgeResult({}, None, -1.0)], "weight: expected at least 0, got -1.0"),
    ],
)
def test_results_out_of_range_are_refused(results, message):
    core = core_of()
    with pytest.raises(ValueError, match=message):
        core.distill_all(start_of(core), results)


def test_kept_targets_stay_below_the_limit():
    limit = 24 * 4 * 4 * 2 * 2  # targets of two teachers in two epochs
    core = core_of(distillation={"memory_size": 2})
    core = core_of(distillation={"memory_size": 2}, runtime=type(core.runtime)(target_bytes=limit))
    core.distill_all(start_of(core), results_of(4))
    assert core.target_cache.num_bytes <= limit


def test_trust_scales_the_movement_and_the_weight():
    results = results_of(2)
    plain, _ = core_of().distill_all(start_of(core_of()), results)
    full = core_of(trust=lambda evidence: 1.0)
    trusted, metrics = full.distill_all(start_of(full), results)
    assert same_bits(plain.params, trusted.params)
    assert [row["trust"] for row in metrics] == [1.0, 1.0]
    assert metrics[0]["movement"] > 0
    half = core_of(trust=lambda evidence: 0.5)
    halved, _ = half.distill_all(start_of(half), results)
    by_hand = [result._replace(trust=0.5) for result in results]
    expected, _ = core_of().distill_all(start_of(core_of()), by_hand)
    assert same_bits(halved.params, expected.params)
    assert not same_bits(halved.params, plain.params)
    assert halved.memory_weights == (0.5, 0.5)


def test_half_the_trust_is_half_the_movement():
    core, edge = mlp(), edge_of(0)
    now = snapshot(core.state_dict())
    half = student_start(core, now, [EdgeResult(edge, trust=0.5)], 1.0)
    assert same_bits(half, student_start(core, now, [EdgeResult(edge)], 0.5))


def test_an_edge_without_trust_is_refused_before_the_distillation():
    core = core_of(trust=lambda evidence: 0.0)
    state = start_of(core)
    after, metrics = core.distill(state, edge_of(0))
    assert after is state
    assert metrics["accepted"] == 0
    assert metrics["cause"] == "trust: expected above 0, got 0"
    assert "train-accuracy" not in metrics


def test_an_edge_without_trust_moves_and_teaches_nothing():
    core = core_of(distillation={"student_start": 1.0})
    good, other = results_of(2)
    first, _ = core.distill_all(start_of(core), [good._replace(trust=0)])
    second, _ = core.distill_all(start_of(core), [other._replace(trust=0)])
    assert same_bits(first.params, second.params)


@pytest.mark.parametrize("trust", [-0.1, 1.1, float("nan")])
def test_trust_out_of_range_is_refused(trust):
    core = core_of(trust=lambda evidence: trust)
    with pytest.raises(ValueError, match="trust: expected 0 to 1, got"):
        core.distill(start_of(core), edge_of(0))
    with pytest.raises(ValueError, match="trust: expected 0 to 1, got"):
        core_of().distill_all(start_of(core), [EdgeResult(edge_of(0), trust=trust)])


def test_trust_may_be_a_number_of_pytorch():
    core = core_of(trust=lambda evidence: evidence.ensemble.float().mean())
    _, metrics = core.distill(start_of(core), edge_of(0))
    assert type(metrics["trust"]) is float


def test_finite_clones_with_an_infinite_mean_are_no_evidence():
    """A dead channel hides them: all predictions are finite."""
    edge = edge_of(0)
    names = list(edge)
    first, last = names[1], names[-2]  # the bias of the first layer, the weights of the last one
    edge[first][:, 0] = -3e38
    edge[last][..., 0] = 0.0
    core = core_of(guard=lambda evidence: None)
    with pytest.raises(ValueError, match="edge: movement: expected finite values, got 1 of"):
        core.distill(start_of(core), edge)


def test_the_evidence_holds_the_memory_the_losses_and_the_earlier_rounds():
    calls = []
    core = core_of(guard=calls.append, held_out=HELD_OUT)
    state, first = core.distill(start_of(core), edge_of(0))
    result = EdgeResult(edge_of(1), earlier=[first])
    after, _ = core.distill_all(state, [result])
    assert [evidence.memory is None for evidence in calls] == [True, True, False, False]
    inputs, labels = core.dataset
    outputs = predict(core.model, state.memory[0], inputs)
    remembered = outputs.softmax(-1).mean(0).argmax(-1) == labels
    assert torch.equal(calls[2].memory, remembered)
    assert calls[2].earlier == (first,)
    logits = [
        predict(core.model, clone(core_state.params, 1), inputs)[0] for core_state in (state, after)
    ]
    losses = [float(torch.nn.functional.cross_entropy(outputs, labels)) for outputs in logits]
    assert [calls[3].loss_before, calls[3].loss_after] == pytest.approx(losses)
    assert calls[2].loss_after is None


def test_a_plain_model_in_the_place_of_an_ensemble_is_named():
    core = core_of()
    state = start_of(core)
    name, tensor = next(iter(state.params.items()))
    expected = f"edge: {name}: expected [E, {', '.join(map(str, tensor.shape))}] as as_ensemble"
    with pytest.raises(ValueError, match=re.escape(expected)):
        core.distill(state, state.params)
    with pytest.raises(ValueError, match="got no such tensor"):
        core.distill(state, {})


def test_the_memory_is_predicted_once_for_all_edges_of_a_round(monkeypatch):
    core = core_of(guard=lambda evidence: None)
    state, _ = core.distill(start_of(core), edge_of(0))
    predicted = []
    original = evidence_module.predict

    def predict(model, ensemble, *args, **options):
        predicted.append(ensemble)
        return original(model, ensemble, *args, **options)

    monkeypatch.setattr(evidence_module, "predict", predict)
    core.distill_all(state, results_of(3))
    assert sum(ensemble is state.memory[0] for ensemble in predicted) == 1
