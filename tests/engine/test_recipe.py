import hashlib
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flwr_cloned_kd import AccuracyReached, Plateau, Recipe, fold_in, step_decay
from flwr_cloned_kd.engine.recipe import Epoch
from tests.helpers.reference import few


def test_fold_in_is_the_first_63_bits_of_a_hash_of_the_path():
    digest = hashlib.sha256(b"(7, 'phase-2', 3)").hexdigest()
    assert fold_in(7, "phase-2", 3) == int(digest[:16], 16) // 2


words = st.text("ab0'\"\n", max_size=9)


@few
@given(seed=st.integers(-(2**70), 2**70), path=st.lists(st.integers() | words, max_size=3))
def test_fold_in_is_a_seed_that_any_generator_accepts(seed, path):
    assert 0 <= fold_in(seed, *path) < 2**63


def test_integers_of_any_type_give_the_same_seed():
    expected = fold_in(7, "edge", 3)
    for three in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert fold_in(7, "edge", three) == expected
    assert fold_in(np.int64(7), np.str_("edge"), 3) == expected
    with pytest.raises(TypeError):
        fold_in(7, "edge", 3.5)


def test_different_purposes_get_different_seeds():
    paths = [(), (0,), (1,), ("0",), (0, 1), (1, 0), (0, "a"), ("a", 0), (0, 0)]
    assert len({fold_in(seed, *path) for seed in (0, 1) for path in paths}) == 2 * len(paths)


@pytest.mark.parametrize(
    ("progress", "factor"),
    [(0, 1), (0.49, 1), (0.5, 0.1), (0.74, 0.1), (0.75, 0.01), (0.999, 0.01)],
)
def test_the_learning_rate_falls_at_half_and_three_quarters(progress, factor):
    assert step_decay(progress) == factor


def test_training_stops_once_the_last_epoch_is_accurate_enough():
    stop = AccuracyReached(0.8)
    assert not stop([Epoch(1, 0.9), Epoch(1, 0.79)])
    assert stop([Epoch(1, 0.1), Epoch(1, 0.8)])


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([5.0], False),
        ([5.0, 5.0, 5.0], False),  # patience has not passed since the first
        ([5.0, 5.0, 5.0, 5.0], True),
        ([5.0, 6.0, 4.0, 6.0], False),
        ([5.0, 4.0, 6.0, 6.0, 4.5], True),  # the best is the second
        ([5.0, 4.95, 4.95, 4.95], True),  # better by less than 0.1
        ([5.0, 4.95, 4.85, 4.95], False),
    ],
)
def test_training_stops_after_three_epochs_without_improvement(losses, stops):
    stop = Plateau(patience=3, min_improvement=0.1)
    assert stop([Epoch(loss, 0.5) for loss in losses]) is stops


def test_the_default_recipe_is_the_papers():
    recipe = Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.lr) == (164, 128, 0.1)
    assert (recipe.momentum, recipe.weight_decay, recipe.proximal_mu) == (0.9, 1e-4, 0)
    assert recipe.schedule is step_decay
    assert (recipe.augment, recipe.label_noise, recipe.stop) == (None, None, None)


@pytest.mark.parametrize("field", ["epochs", "batch_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_recipe_refuses_counts_below_one(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected at least 1, got {value}"):
        Recipe(**{field: value})


@pytest.mark.parametrize("field", ["lr", "momentum", "weight_decay", "proximal_mu"])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_a_recipe_refuses_rates_that_are_negative_or_not_finite(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected at least 0, got {value}"):
        Recipe(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": "3"}, "epochs: expected an integer of at least 1, got '3'"),
        ({"steps": 1e4}, "steps: expected an integer of at least 1, got 10000.0"),
        ({"lr": "0.1"}, "lr: expected at least 0, got '0.1'"),
        ({"schedule": 0.5}, "schedule: expected a function, got 0.5"),
        ({"schedule": None}, "schedule: expected a function, got None"),
        ({"augment": "crop"}, "augment: expected a function, got 'crop'"),
        ({"optimizer": "adam"}, "optimizer: expected a function, got 'adam'"),
    ],
)
def test_a_recipe_refuses_values_of_a_wrong_type(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**options)


def test_a_recipe_accepts_the_numbers_of_numpy():
    assert Recipe(epochs=np.int64(3), lr=np.float32(0.5)).num_steps(128) == 3
