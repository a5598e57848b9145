"""Three paths, one number: the plain loop, Flower's loop, and ours."""

import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from flwr_cloned_kd import VARIANTS, ClonedKD, practical
from flwr_cloned_kd.engine.recipe import Recipe
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import apps, plain_loop, small_core
from tests.helpers.reference import same_bits

LOOPS = {"flower's": Strategy.start, "ours": ClonedKD.start}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("variant", ["CEM", "IPM", "IsPP"])
def test_flower_and_the_plain_loop_end_with_the_same_bits(loop, variant):
    core, row = small_core(), VARIANTS[variant]
    expected = plain_loop(core, 3, row.num_clones, row.init(core))
    strategy = ClonedKD(core, num_clones=row.num_clones, send=row.init(core))
    first = ArrayRecord(core.pretrain())
    result = LOOPS[loop](strategy, FakeGrid(apps(4)), first, num_rounds=3)
    assert same_bits(result.arrays.to_torch_state_dict(keep_input=True), expected.params)
    assert same_bits(strategy.state.params, expected.params)
    assert strategy.state.train_accuracy == expected.train_accuracy
    assert not same_bits(first.to_torch_state_dict(keep_input=True), expected.params)


def test_the_practical_preset_takes_the_same_three_paths():
    core = small_core(distillation=practical(Recipe(epochs=2, batch_size=32)))
    expected = plain_loop(core, 3, 2)
    for loop in LOOPS.values():
        strategy = ClonedKD(core, num_clones=2)
        loop(strategy, FakeGrid(apps(3)), ArrayRecord(core.pretrain()), num_rounds=3)
        assert same_bits(strategy.state.params, expected.params)
