"""A threshold from honest stand-ins: what it lets pass, what it refuses, and what it costs."""

from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from torch import nn

from flwr_cloned_kd import (
    Core,
    Recipe,
    calibrate,
    ensemble_gap,
    load_digits,
    partition,
    shuffle_labels,
    take,
    train_edge,
    validation_drop,
)
from flwr_cloned_kd.engine.ensemble import seeded
from flwr_cloned_kd.method import core as core_module
from flwr_cloned_kd.method import edge as edge_module

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN, TEST = load_digits()
PARTS = partition(len(TRAIN[1]), 12)
RECIPE = Recipe(epochs=4, batch_size=16, lr=0.1)


@pytest.fixture(scope="module")
def core():
    model = seeded(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 0)
    validation = take(TRAIN, PARTS[11])
    return Core(model=model, dataset=take(TRAIN, PARTS[0]), recipe=RECIPE, validation=validation)


@pytest.fixture(scope="module")
def state(core):
    return core.state(core.pretrain())


def refusals(core, state, guard, recipe=RECIPE):
    """Return how many of six edges a guard refuses, each after the same state."""
    guarded = replace(core, guard=guard)
    accepted = 0.0
    for part in PARTS[1:7]:
        edge = train_edge(core.model, state.params, take(TRAIN, part), recipe, seed=part[0].item())
        accepted += guarded.distill(state, edge)[1]["accepted"]
    return 6 - accepted


@pytest.mark.parametrize("score", [ensemble_gap, validation_drop])
def test_honest_edges_pass(core, state, score):
    assert refusals(core, state, calibrate(core, state, score, stand_ins=6)) <= 1


def test_edges_with_shuffled_labels_are_refused(core, state):
    noisy = replace(RECIPE, label_noise=shuffle_labels)
    assert refusals(core, state, calibrate(core, state, ensemble_gap, stand_ins=6), noisy) == 6


def test_the_threshold_by_hand(core, state):
    """With the scores 1, 2 and 3 the quantile 1/2 is their mean, so the largest score counts."""
    scores = iter([1.0, 2.0, 3.0] * 2)
    half = calibrate(core, state, lambda evidence: next(scores), false_alarms=0.5, stand_ins=3)
    assert half.threshold == 3.0
    one_in_40 = calibrate(
        core, state, lambda evidence: next(scores), false_alarms=0.025, stand_ins=3
    )
    expected = fmean([1, 2, 3]) + 1.959964 * stdev([1, 2, 3]) * (4 / 3) ** 0.5
    assert one_in_40.threshold == pytest.approx(expected, rel=1e-6)


def test_a_score_that_is_known_early_saves_the_distillations(core, state, monkeypatch):
    phases = []
    original = core_module.fit

    def fit(*args, phase="training", **options):
        phases.append(phase)
        return original(*args, phase=phase, **options)

    for module in (core_module, edge_module):
        monkeypatch.setattr(module, "fit", fit)
    calibrate(core, state, ensemble_gap, stand_ins=3)
    assert phases == ["Phase 1"] * 3


def test_the_same_seed_gives_the_same_threshold_and_leaves_the_core(core, state):
    before = {name: tensor.clone() for name, tensor in state.params.items()}
    kept = core.target_cache._kept
    first = calibrate(core, state, ensemble_gap, stand_ins=3)
    assert calibrate(core, state, ensemble_gap, stand_ins=3) == first
    assert all(torch.equal(state.params[name], before[name]) for name in before)
    assert core.target_cache._kept is kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"false_alarms": 0}, "false_alarms: expected above 0 and below 1, got 0"),
        ({"stand_ins": 2}, "stand_ins: expected at least 3, got 2"),
        ({"score": lambda evidence: None}, "score: expected a number for every edge"),
    ],
)
def test_what_is_out_of_range_is_refused(core, state, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(core, state, **({"score": ensemble_gap} | options))
