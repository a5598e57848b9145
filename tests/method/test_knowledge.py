from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flwr_cloned_kd import (
    Knowledge,
    Recipe,
    clone,
    correct,
    ensemble_share,
    label_probability,
    practical,
    predict,
    retained,
    train_edge,
)
from flwr_cloned_kd.method.knowledge import rule_name
from tests.helpers.cores import make_core, start_of
from tests.helpers.reference import few, images, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

# Two samples of class 1: the first one is predicted correctly, the second one is not.
TARGET = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]])
LABELS = torch.tensor([1, 1])
DATA = images(24, seed=0)
RECIPE = Recipe(epochs=1, batch_size=8)
STILL = replace(RECIPE, lr=0)


def core_of(**distillation):
    return make_core(DATA, RECIPE, distillation=distillation)


def edge_of(core, *, num_clones=2, seed=10):
    data = images(24, seed=seed)
    params = core.model.state_dict()
    return train_edge(core.model, params, data, RECIPE, num_clones=num_clones, seed=1)


def knowledge_of(moved, *, ensemble=0.5):
    return Knowledge(ensemble, moved)


def test_correct_selects_correctly_classified_samples():
    assert correct(TARGET, LABELS).tolist() == [1, 0]


def test_label_probability_is_the_weight_of_a_sample():
    assert label_probability(TARGET, LABELS).tolist() == pytest.approx([0.7, 0.3])


def test_ensemble_share_is_the_accuracy_of_the_ensemble():
    assert ensemble_share(knowledge_of(lambda share: 0.0, ensemble=0.25)) == 0.25


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        (lambda share: 0.8, 1.0),
        # 1 - s / 2 is at least max(s^2, 1/2) up to s = 0.78: twelve of sixteen steps.
        (lambda share: 0.8 * (1 - share / 2), 12 / 16),
        # Beyond s = 1/4 the accuracy is below a half of 0.8.
        (lambda share: 0.8 if share <= 0.25 else 0.3, 4 / 16),
        (lambda share: 0.8 if share == 0 else 0.1, 0.0),
        (lambda share: 0.0, 1.0),
    ],
    ids=["nothing lost", "lost in proportion", "lost at once", "lost at the first step", "no core"],
)
def test_retained_is_the_largest_start_that_keeps_the_accuracy(moved, expected):
    assert retained(knowledge_of(moved)) == expected


@few
@given(values=st.lists(st.floats(0, 1), min_size=17, max_size=17))
def test_no_start_loses_more_than_half_of_what_the_core_gets_right(values):
    share = retained(knowledge_of(lambda share: values[round(16 * share)]))
    assert values[round(16 * share)] >= values[0] / 2


def test_a_start_rule_gets_the_accuracies_of_the_models():
    asked = []
    core = core_of(student_start=lambda knowledge: asked.append(knowledge) or 0.5)
    edge = edge_of(core)
    _, metrics = core.distill(start_of(core), edge)
    (knowledge,) = asked
    logits = predict(core.model, edge, DATA[0])
    together = (logits / 4).softmax(-1).mean(0).argmax(-1) == DATA[1]
    assert knowledge.ensemble == metrics["known"] == pytest.approx(together.float().mean().item())
    assert metrics["student-start"] == 0.5
    assert knowledge.moved(0.0) == core.train_accuracy(core.model.state_dict())
    centre = {
        name: (tensor.mean(0) if tensor.is_floating_point() else core.model.state_dict()[name])
        for name, tensor in edge.items()
    }
    assert knowledge.moved(1.0) == pytest.approx(core.train_accuracy(centre), abs=1 / 24)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_start_out_of_range_is_refused_by_name(share):
    core = core_of(student_start=lambda knowledge: share)
    with pytest.raises(ValueError, match="student_start: expected 0 to 1 from the function, got"):
        core.distill(start_of(core), edge_of(core))


def test_a_selection_of_no_sample_leaves_the_cross_entropy():
    edge = edge_of(core_of())
    silent, _ = core_of(selection=lambda target, labels: torch.zeros(len(labels))).distill(
        start_of(core_of()), edge
    )
    alone, _ = core_of().distill(start_of(core_of()), edge, weight=0)
    assert same_bits(silent.params, alone.params)


def test_a_selection_of_every_sample_equals_none():
    edge = edge_of(core_of())
    every, _ = core_of(selection=lambda target, labels: torch.ones(len(labels))).distill(
        start_of(core_of()), edge
    )
    plain, _ = core_of().distill(start_of(core_of()), edge)
    assert same_bits(every.params, plain.params)


@pytest.mark.parametrize("factor", [1e3, 1e6, -1e3])
def test_clones_that_moved_far_do_not_move_the_start(factor):
    core = replace(core_of(recipe=STILL, student_start=retained), recipe=Recipe())
    state = core.state(core.pretrain())
    generator = torch.Generator().manual_seed(0)
    edge = {
        name: tensor + factor * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in clone(state.params, 2).items()
    }
    edge["2.running_var"] = edge["2.running_var"].abs()
    new, metrics = core.distill(state, edge)
    kept = core.train_accuracy(new.params)
    assert kept >= state.train_accuracy[0] / 2
    assert 0 <= metrics["student-start"] <= 1


@pytest.mark.parametrize(("min_retained", "expected"), [(0.0, 0.5), (0.5, 0.5), (0.8, 0.25)])
def test_retained_can_keep_more_than_half(min_retained, expected):
    accuracies = {0.25: 0.9, 0.5: 0.6}
    knowledge = knowledge_of(lambda share: 1.0 if share < 0.25 else accuracies.get(share, 0.0))
    assert retained(knowledge, min_retained) == expected


@pytest.mark.parametrize("min_retained", [-0.1, 1.1])
def test_a_part_that_is_no_fraction_is_refused(min_retained):
    with pytest.raises(ValueError, match="min_retained: expected 0 to 1"):
        retained(knowledge_of(lambda share: 1.0), min_retained)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (0.5, "0.5"),
        (retained, "retained"),
        (partial(retained, min_retained=0.8), "retained(min_retained=0.8)"),
    ],
)
def test_a_rule_has_a_name_with_its_arguments(rule, expected):
    assert rule_name(rule) == expected


def test_the_practical_preset_uses_correct_and_retained():
    preset = practical(RECIPE)
    assert (preset.selection, preset.student_start) == (correct, retained)
    assert (preset.temperature, preset.core_as_teacher, preset.mean_over_memory) == (2, True, True)
