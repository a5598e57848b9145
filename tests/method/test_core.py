import copy
import doctest
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flwr_cloned_kd import (
    Core,
    CoreState,
    CropAndFlip,
    Distillation,
    Recipe,
    Runtime,
    TrainAccuracyJump,
    clone,
    correct,
    edge_seed,
    fit,
    fold_in,
    label_probability,
    member,
    predict,
    train_edge,
)
from flwr_cloned_kd.engine.ensemble import mean, seeded
from flwr_cloned_kd.method import core as core_module
from flwr_cloned_kd.method import edge as edge_module
from flwr_cloned_kd.method.results import EdgeResult, student_start
from tests.helpers import reference
from tests.helpers.cores import make_core, start_of
from tests.helpers.reference import ROUNDING, cnn, distance, few, images, mlp, same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

DATA, HELD_OUT = images(24, seed=0), images(31, seed=1)
RECIPE = Recipe(epochs=1, batch_size=8, augment=CropAndFlip(1))
STILL = replace(RECIPE, lr=0)


core_of = partial(make_core, DATA, RECIPE)


@cache
def trained_edge(build, index, num_clones):
    params, dataset = build().state_dict(), images(24, seed=10 + index)
    return train_edge(build(), params, dataset, RECIPE, num_clones=num_clones, seed=index)


def edges_of(num_edges, num_clones, build=mlp):
    """Train edges from one model on different data."""
    return [snapshot(trained_edge(build, index, num_clones)) for index in range(num_edges)]


def frozen(state):
    """Copy all tensors of a state, to compare them later."""
    ensembles = tuple(snapshot(ensemble) for ensemble in state.memory)
    return replace(state, params=snapshot(state.params), memory=ensembles)


def assert_same(left, right):
    assert same_bits(left.params, right.params)
    assert len(left.memory) == len(right.memory)
    assert all(same_bits(a, b) for a, b in zip(left.memory, right.memory))
    assert left.memory_weights == right.memory_weights
    assert (left.version, left.train_accuracy) == (right.version, right.train_accuracy)


def after_training(reason):
    """A guard that refuses every edge after the distillation, with this reason."""
    return lambda evidence: None if evidence.after is None else reason


def phase_2_seed(core, version):
    return fold_in(core.seed, "phase-2", version)


@pytest.mark.parametrize(
    ("build", "num_clones", "options"),
    [
        (mlp, 1, {"memory_size": 1}),
        (mlp, 3, {"memory_size": 3}),
        (cnn, 1, {"memory_size": 1}),
        (cnn, 3, {"memory_size": 3}),
        (mlp, 2, {"memory_size": 2, "mean_over_memory": True, "core_as_teacher": True}),
        (mlp, 2, {"memory_size": 2, "temperature": 2.0, "student_temperature": 1.0}),
        (mlp, 3, {"memory_size": 3, "selection": correct}),
        (cnn, 2, {"memory_size": 2, "selection": correct, "core_as_teacher": True}),
        (mlp, 2, {"memory_size": 2, "selection": label_probability, "mean_over_memory": True}),
    ],
    ids=[
        "CPP",
        "CEM",
        "CPP cnn",
        "CEM cnn",
        "mean of the memory and the core",
        "as printed",
        "correct samples only",
        "correct samples only, the core too",
        "by the probability of the label",
    ],
)
def test_four_rounds_equal_a_plain_loop_over_separate_divergences(build, num_clones, options):
    core = core_of(build(), distillation=options, seed=3)
    state, params, memory = start_of(core), core.model.state_dict(), []
    for version, edge in enumerate(edges_of(4, num_clones, build)):
        state, _ = core.distill(state, edge)
        memory = [*memory, edge][-options["memory_size"] :]
        seed = phase_2_seed(core, version)
        params = reference.phase2(
            core.model, params, memory, DATA, core.distillation, seed=seed, core_seed=core.seed
        )
    # Four rounds of three steps, each of which sums up to nine terms in another order.
    assert distance(state.params, params) < 4 * ROUNDING
    assert distance(state.params, core.model.state_dict()) > 0.1


def test_the_weight_of_a_late_edge_scales_its_kd_term():
    core = core_of(distillation={"memory_size": 2})
    first, second = edges_of(2, 2)
    state, _ = core.distill(start_of(core), first, weight=0.25)
    assert state.memory_weights == (0.25,)
    new, _ = core.distill(state, second, weight=0.5)
    assert new.memory_weights == (0.25, 0.5)
    expected = reference.phase2(
        core.model,
        state.params,
        [first, second],
        DATA,
        core.distillation,
        seed=phase_2_seed(core, 1),
        weights=[0.25, 0.5],
    )
    assert distance(new.params, expected) < ROUNDING


def test_distilling_is_a_pure_function():
    core = core_of(held_out=HELD_OUT, distillation={"student_start": 0.5, "core_as_teacher": True})
    first, second = edges_of(2, 2)
    state, _ = core.distill(start_of(core), first)
    before, sent_edge = frozen(state), snapshot(second)
    template = snapshot(core.model.state_dict())

    new, metrics = core.distill(state, second)
    torch.manual_seed(11)
    again, again_metrics = core.distill(state, second)

    assert_same(new, again)
    assert metrics == again_metrics
    assert_same(state, before)
    assert same_bits(second, sent_edge)
    assert same_bits(core.model.state_dict(), template)


def test_distilling_leaves_the_global_generator_as_it_was():
    core = core_of(held_out=HELD_OUT)
    (edge,) = edges_of(1, 1)
    before = torch.get_rng_state()
    core.distill(core.state(core.pretrain()), edge)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_another_core():
    edge = edges_of(1, 1)[0]
    new, other = (core_of(seed=s).distill(start_of(core_of()), edge)[0] for s in (0, 1))
    assert distance(new.params, other.params) > 1e-3


@pytest.mark.parametrize("memory_size", [1, 2, 3])
def test_the_memory_holds_the_newest_ensembles(memory_size):
    core = core_of(distillation={"memory_size": memory_size})
    state, edges = start_of(core), edges_of(4, 1)
    for count in range(1, 5):
        state, _ = core.distill(state, edges[count - 1])
        expected = edges[max(count - memory_size, 0) : count]
        assert len(state.memory) == len(state.memory_weights) == len(expected)
        assert all(kept is edge for kept, edge in zip(state.memory, expected))
        assert state.version == count
        assert len(state.train_accuracy) == count


def test_ensembles_of_different_sizes_are_teachers_together():
    core = core_of(distillation={"memory_size": 2})
    first, second = edges_of(1, 1)[0], edges_of(1, 3)[0]
    state, _ = core.distill(start_of(core), first)
    new, _ = core.distill(state, second)
    expected = reference.phase2(
        core.model,
        state.params,
        [first, second],
        DATA,
        core.distillation,
        seed=phase_2_seed(core, 1),
    )
    assert distance(new.params, expected) < ROUNDING


def test_a_refused_edge_leaves_the_same_state():
    accepting = core_of()
    refusing = replace(accepting, guard=after_training("no"))
    good, bad, later = edges_of(3, 1)
    state, _ = accepting.distill(start_of(accepting), good)

    refused, metrics = refusing.distill(state, bad)

    assert refused is state
    assert metrics["accepted"] == 0
    new, metrics = accepting.distill(refused, later)
    assert metrics["accepted"] == 1
    assert [id(edge) for edge in new.memory] == [id(good), id(later)]
    assert new.version == 2
    assert_same(new, accepting.distill(state, later)[0])


def test_a_guard_gets_the_history_and_the_new_accuracy():
    calls = []
    core = core_of(guard=calls.append)
    first, second = edges_of(2, 1)
    state, metrics = core.distill(core.state(core.pretrain()), first)
    before, after = calls
    assert (before.history, before.train_accuracy) == (state.train_accuracy[:1], None)
    assert (after.history, after.train_accuracy) == (before.history, metrics["train-accuracy"])
    core.distill(state, second)
    assert calls[2].history == calls[3].history == state.train_accuracy
    assert state.train_accuracy[1] == metrics["train-accuracy"] == core.train_accuracy(state.params)


def test_the_guard_of_the_paper_refuses_a_jump():
    core = core_of(guard=TrainAccuracyJump(0.1))
    (edge,) = edges_of(1, 1)
    _, metrics = core.distill(start_of(core), edge)
    accuracy = metrics["train-accuracy"]
    for before, accepted in ((accuracy - 0.2, False), (accuracy - 0.05, True)):
        state = replace(start_of(core), train_accuracy=(before,))
        assert (core.distill(state, edge)[0] is not state) is accepted


def test_the_mean_over_a_memory_of_one_is_the_sum():
    (edge,) = edges_of(1, 3)
    summed, averaged = (
        core_of(distillation={"mean_over_memory": mean}).distill(start_of(core_of()), edge)[0]
        for mean in (False, True)
    )
    assert same_bits(summed.params, averaged.params)


@pytest.mark.parametrize("num_clones", [1, 3])
def test_an_edge_of_weight_zero_leaves_training_on_the_core_data(num_clones):
    core = core_of(distillation={"memory_size": 1})
    (edge,) = edges_of(1, num_clones)
    new, _ = core.distill(start_of(core), edge, weight=0)
    start = clone(core.model.state_dict(), 1)
    seeds = {"seed": phase_2_seed(core, 0), "view_seed": fold_in(core.seed, "phase-2-views")}
    expected = member(fit(core.model, start, DATA, RECIPE, **seeds), 0)
    assert same_bits(new.params, expected)


def test_the_core_as_teacher_adds_one_teacher_of_weight_one():
    core = core_of(distillation={"core_as_teacher": True})
    (edge,) = edges_of(1, 2)
    new, _ = core.distill(start_of(core), edge)
    memory = [edge, clone(core.model.state_dict(), 1)]
    expected = reference.phase2(
        core.model,
        core.model.state_dict(),
        memory,
        DATA,
        Distillation(recipe=RECIPE),
        seed=phase_2_seed(core, 0),
    )
    assert distance(new.params, expected) < ROUNDING
    alone, _ = core_of().distill(start_of(core), edge)
    assert distance(new.params, alone.params) > 1e-3
    assert [id(ensemble) for ensemble in new.memory] == [id(edge)]


def weights_of(model, params):
    """Select the parameters: with a learning rate of 0 only running statistics change."""
    return {name: params[name] for name, _ in model.named_parameters()}


def test_a_student_starts_at_the_core_by_default():
    core = core_of(distillation={"recipe": STILL})
    (edge,) = edges_of(1, 2)
    new, _ = core.distill(start_of(core), edge)
    assert same_bits(
        weights_of(core.model, new.params), weights_of(core.model, start_of(core).params)
    )


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_student_starts_at_a_share_of_the_way_to_the_mean(share):
    core = core_of(distillation={"recipe": STILL, "student_start": share})
    (edge,) = edges_of(1, 3)
    new, _ = core.distill(start_of(core), edge)
    origin, centre = core.model.state_dict(), mean(edge)
    expected = {
        n: (1 - share) * origin[n] + share * centre[n] for n, _ in core.model.named_parameters()
    }
    # One addition and one subtraction of numbers below 2: some 2^-23.
    assert distance(weights_of(core.model, new.params), expected) < 1e-6


def test_a_student_adds_the_movement_of_a_late_edge():
    core = core_of(distillation={"recipe": STILL, "student_start": 1.0})
    sent = snapshot(core.model.state_dict())
    (edge,) = edges_of(1, 3)
    now = snapshot(mlp(seed=8).state_dict())
    new, _ = core.distill(CoreState(now), edge, sent=sent)
    centre = mean(edge)
    expected = {n: now[n] + centre[n] - sent[n] for n, _ in core.model.named_parameters()}
    assert distance(weights_of(core.model, new.params), expected) < 1e-6


def test_a_start_has_the_statistics_of_the_clones_and_own_counters():
    core = core_of()
    (edge,) = edges_of(1, 3)
    now = snapshot(mlp(seed=8).state_dict())
    now["2.num_batches_tracked"].fill_(70)
    now["2.running_var"].fill_(0.5)
    start = student_start(core.model, now, [EdgeResult(edge, core.model.state_dict())], 1.0)
    assert (start["2.running_var"] - edge["2.running_var"].mean(0)).abs().max() < 1e-6
    assert (start["2.running_mean"] - edge["2.running_mean"].mean(0)).abs().max() < 1e-6
    assert start["2.num_batches_tracked"] == 70


variances = st.lists(st.floats(0, 1e6, width=32), min_size=8, max_size=8)


@few
@given(core=variances, sent=variances, clones=variances, share=st.floats(0, 1))
def test_a_running_variance_never_becomes_negative(core, sent, clones, share):
    model = mlp()
    params = [snapshot(model.state_dict()) for _ in range(3)]
    for state, values in zip(params, (core, sent, clones)):
        state["2.running_var"] = torch.tensor(values)
    start = student_start(model, params[0], [EdgeResult(clone(params[2], 2), params[1])], share)
    assert (start["2.running_var"] >= 0).all()


@pytest.mark.parametrize("held_out", [HELD_OUT, None], ids=["held out", "core data"])
def test_an_edge_whose_predictions_overflow_changes_nothing(held_out):
    # Every weight is finite, as `as_ensemble` requires, but sums of the weights overflow.
    core = core_of(held_out=held_out)
    good, bad = edges_of(2, 2)
    state, _ = core.distill(start_of(core), good)
    before = frozen(state)
    bad["5.weight"][1] = 3e38
    bad["5.bias"][1] = 3e38
    bad["2.bias"][1] = 10
    assert all(torch.isfinite(tensor).all() for tensor in bad.values())
    with pytest.raises(ValueError, match="edge predictions: logits: expected finite values, got "):
        core.distill(state, bad)
    assert_same(state, before)


class Positions(nn.Module):
    """A model with an integer buffer that is an index, as models with attention have."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(10, 4), nn.Embedding(6, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("position_ids", torch.arange(6))

    def forward(self, ids):
        return self.head((self.tokens(ids) + self.positions(self.position_ids)).mean(1))


@pytest.mark.parametrize("guard", [None, TrainAccuracyJump(1.0)], ids=["no guard", "guard"])
@pytest.mark.parametrize("num_clones", [1, 2])
def test_an_edge_with_an_index_out_of_range_changes_nothing(num_clones, guard):
    ids = torch.arange(24).reshape(4, 6) % 10
    core = make_core((ids, ids[:, 0] % 2), RECIPE, Positions(), guard=guard)
    state = start_of(core)
    before = frozen(state)
    bad = clone(state.params, num_clones)
    bad["position_ids"] += 6
    message = "edge predictions: expected a model that runs with the core's inputs, got IndexError"
    with pytest.raises(ValueError, match=message):
        core.distill(state, bad)
    assert_same(state, before)


def test_a_core_that_is_not_finite_is_refused_by_name():
    core = core_of(distillation={"recipe": replace(RECIPE, lr=1e38)})
    (edge,) = edges_of(1, 1)
    state = start_of(core)
    before = frozen(state)
    message = "core after distillation: .*: expected finite values"
    with pytest.raises(ValueError, match=message):
        core.distill(state, edge)
    assert_same(state, before)


def test_without_held_out_data_there_are_no_accuracies():
    core = core_of(guard=None)
    (edge,) = edges_of(1, 2)
    state, metrics = core.distill(start_of(core), edge)
    assert metrics.keys() == {"accepted", "train-accuracy", "known", "student-start"}
    assert core.held_out_accuracy(state.params) is None
    with pytest.raises(ValueError, match="held_out: expected a dataset, got None"):
        core.predictions(state.params)


def test_metrics_are_fractions_that_agree_with_each_other():
    core = core_of(held_out=HELD_OUT, guard=None)
    (edge,) = edges_of(1, 3)
    new, metrics = core.distill(core.state(core.pretrain()), edge)
    assert metrics.keys() == {
        "accepted",
        "train-accuracy",
        "known",
        "student-start",
        "core-accuracy",
        "edge-accuracy",
        "ensemble-accuracy",
        "student-only",
        "both",
        "teacher-only",
        "consensus",
    }
    assert all(0 <= value <= 1 for value in metrics.values())
    assert all(type(value) is float for value in metrics.values())
    labels = HELD_OUT[1]
    logits = predict(core.model, edge, HELD_OUT[0])
    per_clone = [(logits[e].argmax(1) == labels).float().mean().item() for e in range(3)]
    together = (logits.softmax(-1).sum(0).argmax(1) == labels).float().mean().item()
    union = metrics["student-only"] + metrics["both"] + metrics["teacher-only"]
    expected = {
        "core-accuracy": core.held_out_accuracy(new.params),
        "edge-accuracy": sum(per_clone) / 3,
        "ensemble-accuracy": together,
        "consensus": metrics["both"] / union,
    }
    # Fractions of 31 in float32.
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert metrics["student-only"] + metrics["both"] == pytest.approx(metrics["core-accuracy"])
    assert metrics["teacher-only"] + metrics["both"] == pytest.approx(metrics["ensemble-accuracy"])


def test_metrics_of_a_refused_round_are_of_the_refused_core():
    accepting = core_of(held_out=HELD_OUT)
    refusing = replace(accepting, guard=after_training("no"))
    (edge,) = edges_of(1, 1)
    _, accepted = accepting.distill(start_of(accepting), edge)
    _, refused = refusing.distill(start_of(accepting), edge)
    assert {name: refused[name] for name in accepted} == accepted | {"accepted": 0.0}
    assert refused["cause"] == "no"


def test_an_edge_that_is_the_core_and_does_not_move_it_agrees_fully():
    # Without BatchNorm a learning rate of 0 keeps everything.
    model = seeded(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 0)
    core = core_of(model, held_out=HELD_OUT, distillation={"recipe": STILL})
    edge = clone(core.model.state_dict(), 2)
    _, metrics = core.distill(start_of(core), edge)
    assert metrics["consensus"] == 1
    assert metrics["student-only"] == metrics["teacher-only"] == 0


def test_pretraining_is_the_plain_loop_from_the_models_weights():
    core = core_of(seed=6)
    seed = fold_in(6, "phase-0")
    expected = reference.train(core.model, core.model.state_dict(), DATA, RECIPE, seed=seed)
    assert distance(core.pretrain(), expected) < ROUNDING


def test_pretraining_can_start_elsewhere():
    core, start = core_of(), mlp(seed=8).state_dict()
    seed = fold_in(0, "phase-0")
    expected = reference.train(core.model, start, DATA, RECIPE, seed=seed)
    assert distance(core.pretrain(start), expected) < ROUNDING


def test_a_new_state_has_the_accuracy_of_phase_0():
    core = core_of()
    params = core.pretrain()
    state = core.state(params)
    assert (state.version, state.memory, state.memory_weights) == (0, (), ())
    assert state.train_accuracy == (core.train_accuracy(params),)
    model = copy.deepcopy(core.model).eval()
    model.load_state_dict(params)
    hits = (model(DATA[0]).argmax(1) == DATA[1]).float().mean().item()
    assert state.train_accuracy[0] == pytest.approx(hits)


def test_an_edge_trains_clones_of_the_sent_model():
    params = mlp(seed=4).state_dict()
    edge = train_edge(mlp(), params, DATA, RECIPE, num_clones=2, seed=9)
    for e in range(2):
        expected = reference.train(mlp(), params, DATA, RECIPE, seed=9, clone=e)
        assert distance(member(edge, e), expected) < ROUNDING


@pytest.mark.parametrize("module", [core_module, edge_module])
def test_the_examples_of_the_docstrings_run(module):
    failed, attempted = doctest.testmod(module)
    assert (failed, attempted > 5) == (0, True)


def test_an_edge_with_a_label_outside_the_outputs_says_so():
    inputs, labels = DATA
    data = inputs, torch.full_like(labels, 99)
    with pytest.raises(ValueError, match=r"dataset: labels: expected 0 to \d+, .* got 99"):
        train_edge(mlp(), mlp().state_dict(), data, RECIPE)


def test_every_round_has_an_edge_seed_of_its_own():
    seeds = {edge_seed(seed, number) for seed in range(5) for number in range(20)}
    assert len(seeds) == 100
    assert edge_seed(3, 7) == fold_in(3, "phase-1", 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature: expected above 0, got 0"),
        ({"temperature": float("inf")}, "temperature: expected above 0, got inf"),
        ({"temperature": float("nan")}, "temperature: expected above 0, got nan"),
        ({"student_temperature": -1.0}, "student_temperature: expected above 0, got -1"),
        ({"memory_size": 0}, "memory_size: expected at least 1, got 0"),
        ({"student_start": 1.1}, "student_start: expected 0 to 1, got 1.1"),
        ({"student_start": -0.1}, "student_start: expected 0 to 1, got -0.1"),
    ],
)
def test_a_distillation_refuses_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**options)


def test_a_memory_without_weights_counts_in_full():
    core, edges = core_of(), edges_of(2, 1)
    params = core.pretrain()
    bare = CoreState(params, memory=(edges[0],))
    weighed = replace(bare, memory_weights=(1.0,))
    assert_same(*(core.distill(state, edges[1])[0] for state in (bare, weighed)))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused(weight):
    core = core_of()
    with pytest.raises(ValueError, match="weight: expected at least 0"):
        core.distill(CoreState(core.pretrain()), edges_of(1, 1)[0], weight=weight)


def test_cores_and_their_states_are_compared_by_identity():
    # Their fields hold tensors, and a comparison of tensors has no single truth value.
    for make in (core_of, lambda: start_of(core_of())):
        first, second = make(), make()
        assert first in [second, first]
        assert first not in [second]
        assert len({first, second}) == 2


def volumes(num_samples, seed):
    x, y = images(num_samples, seed=seed)
    return x[:, :, None].expand(-1, -1, 4, -1, -1), y


@pytest.mark.parametrize("batch_clones", [True, False])
@pytest.mark.parametrize("num_clones", [1, 3])
def test_a_model_of_volumes_can_be_trained_and_distilled(num_clones, batch_clones):
    layers = [nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Tanh(), nn.AdaptiveAvgPool3d(2)]
    model = seeded(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3)), 0)
    recipe = Recipe(epochs=2, batch_size=8)
    core = Core(
        model=model,
        dataset=volumes(24, seed=0),
        held_out=volumes(24, seed=1),
        recipe=recipe,
        distillation=Distillation(recipe=recipe, memory_size=1),
        runtime=Runtime(device="cpu", batch_clones=batch_clones),
    )
    start, dataset = core.pretrain(), volumes(24, seed=2)
    edge = train_edge(model, start, dataset, recipe, num_clones=num_clones, runtime=core.runtime)
    new, metrics = core.distill(core.state(start), edge)
    seed = phase_2_seed(core, 0)
    expected = reference.phase2(
        model, start, [edge], core.dataset, core.distillation, seed=seed, core_seed=core.seed
    )
    assert distance(new.params, expected) < ROUNDING
    assert metrics["accepted"] == 1
