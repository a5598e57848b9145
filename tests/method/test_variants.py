from dataclasses import replace

import pytest
import torch

from flwr_cloned_kd import (
    PRESETS,
    VARIANTS,
    Core,
    CoreState,
    Distillation,
    Recipe,
    cloned,
    initialise,
    practical,
    unselective,
)
from flwr_cloned_kd.method.presets import paper
from tests.helpers.cores import make_core
from tests.helpers.reference import distance, images, mlp, same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(epochs=1, batch_size=8, lr=0.05)


def core_of(seed=0):
    return make_core(images(24), RECIPE, seed=seed)


def states():
    """Make a state of the core for each of three rounds."""
    return [CoreState(snapshot(mlp(seed=v).state_dict()), version=v) for v in range(3)]


def test_the_nine_rows_of_the_papers_table():
    rows = {name: (v.num_clones, v.memory_size) for name, v in VARIANTS.items()}
    assert rows == {
        "IsPP": (1, 1),
        "IPP": (1, 1),
        "IEP": (3, 1),
        "IPM": (1, 3),
        "IEM": (3, 3),
        "CPP": (1, 1),
        "CEP": (3, 1),
        "CPM": (1, 3),
        "CEM": (3, 3),
    }


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("C")])
def test_cloned_variants_send_the_core_itself(name):
    send = VARIANTS[name].init(core_of())
    assert all(send(state) is state.params for state in states())
    assert all(cloned(state) is state.params for state in states())


@pytest.mark.parametrize("name", ["IPP", "IEP", "IPM", "IEM"])
def test_independent_variants_send_one_model_in_every_round(name):
    core = core_of()
    send = VARIANTS[name].init(core)
    sent = [send(state) for state in states()]
    assert all(same_bits(sent[0], other) for other in sent[1:])
    assert distance(sent[0], core.pretrain()) > 0.1
    # The model was trained for one epoch of three batches.
    assert sent[0]["2.num_batches_tracked"] == 3
    assert core.train_accuracy(sent[0]) > core.train_accuracy(core.model.state_dict())


def test_the_independent_model_depends_on_the_seed_alone():
    first = VARIANTS["IPP"].init(core_of(1))(states()[0])
    torch.manual_seed(0)
    assert same_bits(VARIANTS["IPP"].init(core_of(1))(states()[0]), first)
    assert distance(VARIANTS["IPP"].init(core_of(2))(states()[0]), first) > 0.1


def test_the_scratch_variant_sends_new_weights_in_every_round():
    core = core_of()
    send = VARIANTS["IsPP"].init(core)
    sent = [send(state) for state in states()]
    again = [VARIANTS["IsPP"].init(core_of())(state) for state in states()]
    assert all(same_bits(a, b) for a, b in zip(sent, again))
    assert min(distance(sent[0], sent[1]), distance(sent[1], sent[2])) > 0.1
    assert all(model["2.num_batches_tracked"] == 0 for model in sent)
    other = VARIANTS["IsPP"].init(core_of(1))(states()[0])
    assert distance(other, sent[0]) > 0.1
    assert sent[0].keys() == initialise(core.model, 0).keys()


def test_a_variant_changes_neither_model_nor_global_generator():
    core, state = core_of(), states()[0]
    before, generator = snapshot(core.model.state_dict()), torch.get_rng_state()
    for variant in VARIANTS.values():
        variant.init(core)(state)
    assert torch.equal(torch.get_rng_state(), generator)
    assert same_bits(core.model.state_dict(), before)


def test_the_paper_preset_is_the_faithful_default():
    assert paper(RECIPE) == Distillation(recipe=RECIPE)
    preset = paper(RECIPE)
    assert (preset.temperature, preset.student_temperature) == (4.0, None)
    assert (preset.student_start, preset.mean_over_memory, preset.core_as_teacher) == (
        0,
        False,
        False,
    )
    assert preset.memory_size == 3


def test_the_unselective_preset_differs_by_rate_start_and_mean():
    preset = unselective(RECIPE)
    assert preset.recipe == replace(RECIPE, lr=preset.recipe.lr)
    assert preset.recipe.lr == pytest.approx(0.05 / 5)
    assert preset == replace(
        paper(RECIPE), recipe=preset.recipe, student_start=1.0, mean_over_memory=True
    )


def test_presets_are_found_by_name():
    presets = {"paper": paper, "practical": practical, "unselective": unselective}
    assert presets == PRESETS


def test_a_core_without_a_distillation_takes_our_preset_of_its_recipe():
    recipe = Recipe(epochs=3, lr=0.5)
    core = Core(model=mlp(), dataset=images(8), recipe=recipe)
    assert core.distillation == practical(recipe)
    assert replace(core, recipe=Recipe(epochs=9)).distillation == practical(recipe)
