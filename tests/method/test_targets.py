import gc
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import nn

from flwr_cloned_kd import (
    CoreState,
    CropAndFlip,
    Distillation,
    Recipe,
    Runtime,
    fold_in,
    train_edge,
)
from flwr_cloned_kd.engine.ensemble import seeded
from flwr_cloned_kd.engine.fit import Predictor, epoch_views
from flwr_cloned_kd.engine.losses import Batch
from flwr_cloned_kd.method import targets
from flwr_cloned_kd.method.targets import TargetBank, TargetCache, weighted_sum
from tests.helpers import reference
from tests.helpers.cores import make_core, start_of
from tests.helpers.reference import ROUNDING, cnn, distance, images, mlp, same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

# 22 samples are two batches of 8 and one of 6. With 3 classes, an epoch has 22 x 3 targets.
DATA = images(22)
EPOCH_BYTES = 22 * 3 * 4
RECIPE = Recipe(epochs=3, batch_size=8, augment=CropAndFlip(1))
TEMPERATURE, VIEW_SEED = 4.0, 12


class Mirror:
    """A finite augmentation from outside of the library."""

    def draw(self, num_images, generator):
        return torch.randint(2, (num_images,), generator=generator)

    def view(self, images, views):
        return torch.where(views[:, None, None, None] == 1, images.flip(3), images)

    def __call__(self, images, generator):
        return self.view(images, self.draw(len(images), generator))


def jitter(inputs, generator):
    """Augment with infinitely many views."""
    return inputs + 0.3 * torch.randn(inputs.shape, generator=generator)


AUGMENTATIONS = {"none": None, "crop": CropAndFlip(1), "mirror": Mirror(), "jitter": jitter}
augmentations = pytest.mark.parametrize("augment", AUGMENTATIONS.values(), ids=AUGMENTATIONS)


def ensemble_of(num_clones, *, build=mlp, first=10):
    """Make an ensemble of different models with different running statistics."""
    params = [snapshot(build(seed=first + index).state_dict()) for index in range(num_clones)]
    for index, model in enumerate(params):
        for name in model:
            if name.endswith("running_mean"):
                model[name] += 0.1 * (1 + index)
    return {name: torch.stack([model[name] for model in params]) for name in params[0]}


def core_of(model=None, *, recipe=RECIPE, runtime=None, guard=None, seed=3, **distillation):
    return make_core(
        DATA,
        recipe,
        model,
        distillation={"temperature": TEMPERATURE, **distillation},
        runtime=Runtime(device="cpu") if runtime is None else runtime,
        guard=guard,
        seed=seed,
    )


def rounds(core, edges, state=None):
    state = start_of(core) if state is None else state
    for edge in edges:
        state, _ = core.distill(state, edge)
    return state


def twin_rounds(core, edges, **options):
    """Run the slow twin over the same rounds; it runs every teacher on every batch."""
    params, size = core.model.state_dict(), core.distillation.memory_size
    for version in range(len(edges)):
        memory = edges[max(0, version + 1 - size) : version + 1]
        params = reference.phase2(
            core.model,
            params,
            memory,
            DATA,
            core.distillation,
            seed=fold_in(core.seed, "phase-2", version),
            core_seed=core.seed,
            **options,
        )
    return params


def bank_of(ensemble, recipe=RECIPE, *, max_bytes=2**20, model=None, runtime=None, selection=None):
    return TargetBank(
        mlp() if model is None else model,
        ensemble,
        DATA,
        recipe,
        view_seed=VIEW_SEED,
        temperature=TEMPERATURE,
        max_bytes=max_bytes,
        selection=selection,
        runtime=Runtime(device="cpu") if runtime is None else runtime,
    )


def batches_of(recipe, epoch, *, seed=5):
    """Draw the batches of an epoch, with their rows, by the rule of the slow twin."""
    first, second = (torch.Generator().manual_seed(seed + epoch) for _ in range(2))
    rows = torch.randperm(22, generator=first).split(recipe.batch_size)
    pairs = reference.epoch_batches(DATA, recipe, second, epoch, VIEW_SEED)
    return [Batch(x, y, r, epoch) for (x, y), r in zip(pairs, rows)]


def target_by_hand(ensemble, inputs, build=mlp):
    """Average softmax(f / t) over the clones, each loaded into a module in evaluation mode."""
    model, total = build().eval(), 0
    for index in range(len(next(iter(ensemble.values())))):
        model.load_state_dict({name: tensor[index] for name, tensor in ensemble.items()})
        with torch.no_grad():
            total = total + (model(inputs) / TEMPERATURE).softmax(1)
    return total / len(next(iter(ensemble.values())))


@pytest.fixture
def forwards(monkeypatch):
    """Record the batch sizes of all forward passes of teachers: id of the ensemble -> sizes."""
    sizes = {}

    class Counting(Predictor):
        def __init__(self, model, ensemble, runtime, **options):
            super().__init__(model, ensemble, runtime, **options)
            self.sizes = sizes.setdefault(id(ensemble), [])

        def __call__(self, inputs):
            self.sizes.append(len(inputs))
            return super().__call__(inputs)

    monkeypatch.setattr(targets, "Predictor", Counting)
    return sizes


@augmentations
@pytest.mark.parametrize("build", [mlp, cnn], ids=["mlp", "cnn"])
def test_kept_targets_equal_the_predictions_of_the_teachers(augment, build):
    ensemble, recipe = ensemble_of(2, build=build), replace(RECIPE, augment=augment)
    bank = bank_of(ensemble, recipe, model=build())
    for seed, epoch in enumerate([0, 1, 2, 0]):  # the last in a later round, with other batches
        for batch in batches_of(recipe, epoch, seed=seed):
            actual = bank(batch)
            assert actual.dtype == torch.float32
            assert not actual.requires_grad
            expected = target_by_hand(ensemble, batch.inputs, build)
            # Targets are below 1 and one pass, not 20 steps, computes them: some roundings of 6e-8.
            assert (actual - expected).abs().max() < 1e-6


@augmentations
@pytest.mark.parametrize("target_bytes", [2**30, 0], ids=["kept", "recomputed"])
def test_a_core_with_banks_equals_teachers_run_at_every_step(augment, target_bytes):
    core = core_of(
        recipe=replace(RECIPE, augment=augment),
        memory_size=2,
        runtime=Runtime(device="cpu", target_bytes=target_bytes),
    )
    edges = [ensemble_of(2, first=10 * (1 + index)) for index in range(3)]
    actual = rounds(core, edges).params
    expected = twin_rounds(core, edges)
    assert distance(actual, expected) < 3 * ROUNDING  # three rounds, each of 9 steps
    assert distance(actual, core.model.state_dict()) > 0.1


@pytest.mark.parametrize("build", [mlp, cnn], ids=["mlp", "cnn"])
@pytest.mark.parametrize("batch_clones", [True, False], ids=["together", "one by one"])
def test_the_bank_is_exact_on_both_paths(build, batch_clones):
    runtime = Runtime(device="cpu", batch_clones=batch_clones)
    core = core_of(build(), memory_size=3, runtime=runtime)
    edges = [ensemble_of(3, build=build, first=10 * (1 + index)) for index in range(2)]
    assert distance(rounds(core, edges).params, twin_rounds(core, edges)) < 2 * ROUNDING


@pytest.mark.parametrize(
    "options",
    [
        {"mean_over_memory": True},
        {"core_as_teacher": True},
        {"mean_over_memory": True, "core_as_teacher": True, "student_temperature": 1.0},
    ],
    ids=["mean", "core", "both, as printed"],
)
@pytest.mark.parametrize("target_bytes", [2**30, 0], ids=["kept", "recomputed"])
def test_options_of_the_memory_mean_the_same_with_a_bank(options, target_bytes):
    runtime = Runtime(device="cpu", target_bytes=target_bytes)
    core = core_of(memory_size=2, runtime=runtime, **options)
    edges = [ensemble_of(1 + index, first=10 * (1 + index)) for index in range(3)]
    actual = rounds(core, edges).params
    assert distance(actual, twin_rounds(core, edges)) < 3 * ROUNDING
    plain = core_of(memory_size=2, runtime=runtime)
    assert distance(actual, rounds(plain, edges).params) > 1e-2


def test_weights_apply_to_kept_targets_not_once_and_for_all():
    # One ensemble has the weight 0.5 in its first round and, by the changed state, 2 in the second.
    # The bank must therefore keep targets without a weight.
    core = core_of(memory_size=2)
    first, second = ensemble_of(2, first=10), ensemble_of(2, first=20)
    state, _ = core.distill(start_of(core), first, weight=0.5)
    state = replace(state, memory_weights=(2.0,))
    new, _ = core.distill(state, second, weight=0.25)
    expected = reference.phase2(
        core.model,
        state.params,
        [first, second],
        DATA,
        core.distillation,
        seed=fold_in(core.seed, "phase-2", 1),
        core_seed=core.seed,
        weights=[2.0, 0.25],
    )
    assert distance(new.params, expected) < ROUNDING


def test_weighted_targets_by_hand():
    # 0.5 (0.2, 0.8) + 2 (0.6, 0.4) = (1.3, 1.2); the tensors of the teachers stay unchanged.
    returned = [torch.tensor([[0.2, 0.8]]), torch.tensor([[0.6, 0.4]])]
    target = weighted_sum([lambda batch: returned[0], lambda batch: returned[1]], [0.5, 2.0])
    for _ in range(2):
        batch = Batch(DATA[0], DATA[1], DATA[1])
        assert target(batch).flatten().tolist() == pytest.approx([1.3, 1.2])
    assert returned[0].tolist() == [pytest.approx([0.2, 0.8])]


def test_the_targets_of_an_epoch_follow_the_views_of_that_epoch():
    bank, ensemble = bank_of(ensemble_of(2)), ensemble_of(2)
    every = torch.arange(22)
    drawn = [epoch_views(RECIPE.augment, 22, VIEW_SEED, epoch) for epoch in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    for epoch, views in enumerate(drawn):
        x = RECIPE.augment.view(DATA[0], views)
        actual = bank(Batch(x, DATA[1], every, epoch))
        assert (actual - target_by_hand(ensemble, x)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("augment", "epochs_shown"), [(None, 1), (CropAndFlip(1), 3), (Mirror(), 3)]
)
def test_an_ensemble_is_run_once_in_its_life_in_the_memory(forwards, augment, epochs_shown):
    core = core_of(recipe=replace(RECIPE, augment=augment), memory_size=3)
    edges = [ensemble_of(2, first=10 * (1 + index)) for index in range(6)]
    state = start_of(core)
    for num_edges, edge in enumerate(edges, start=1):
        state, _ = core.distill(state, edge)
        # Two samples measure the size of a target; then all 22 samples run once per view.
        expected = {id(e): [2] + [22] * epochs_shown for e in edges[:num_edges]}
        assert forwards == expected


def test_without_a_budget_teachers_run_on_every_batch(forwards):
    core = core_of(memory_size=2, runtime=Runtime(device="cpu", target_bytes=0))
    edges = [ensemble_of(2, first=10 * (1 + index)) for index in range(3)]
    rounds(core, edges)
    # Two samples measure the size of a target, once. Then three epochs of 8 + 8 + 6 run in each
    # round: two rounds for the first two ensembles, one for the last.
    shown = [Counter(forwards[id(edge)]) for edge in edges]
    assert shown == [{2: 1, 8: 12, 6: 6}] * 2 + [{2: 1, 8: 6, 6: 3}]


def test_an_arbitrary_augmentation_keeps_no_targets(forwards):
    core = core_of(recipe=replace(RECIPE, augment=jitter), memory_size=1)
    (edge,) = edges = [ensemble_of(2)]
    rounds(core, edges)
    assert Counter(forwards[id(edge)]) == {8: 6, 6: 3}
    assert core.target_cache.num_bytes == 0


def test_the_core_as_a_teacher_is_run_once_a_round(forwards):
    core = core_of(memory_size=1, core_as_teacher=True)
    edges = [ensemble_of(2, first=10), ensemble_of(2, first=20)]
    rounds(core, edges)
    sizes = [size for shown in forwards.values() for size in shown if size == 22]
    assert len(sizes) == (2 + 2) * 3  # two edges and twice the core, three epochs each


@pytest.mark.parametrize("extra", [0, 1, EPOCH_BYTES - 1])
@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_a_budget_for_some_epochs_keeps_only_their_targets(forwards, num_kept, extra):
    ensemble = ensemble_of(2)
    max_bytes = num_kept * EPOCH_BYTES + extra
    bank = bank_of(ensemble, max_bytes=max_bytes)
    for _ in range(2):  # rounds
        for epoch in range(3):
            for batch in batches_of(RECIPE, epoch):
                actual = bank(batch)
                assert (actual - target_by_hand(ensemble, batch.inputs)).abs().max() < 1e-6
                assert bank.num_bytes <= max_bytes
    assert bank.num_bytes == num_kept * EPOCH_BYTES
    num_other = 2 * (3 - num_kept)  # epochs in two rounds
    expected = Counter({22: num_kept, 2: 1, 8: 2 * num_other, 6: num_other})
    assert Counter(forwards[id(ensemble)]) == +expected


@pytest.mark.parametrize(("core_as_teacher", "share"), [(False, 3), (True, 4)])
def test_the_banks_of_a_core_share_its_budget(core_as_teacher, share):
    # Three ensembles, and the core if it is a teacher, get equal parts of the budget: here the
    # bytes of one epoch of three.
    target_bytes = share * EPOCH_BYTES + share - 1
    core = core_of(
        memory_size=3,
        core_as_teacher=core_as_teacher,
        runtime=Runtime(device="cpu", target_bytes=target_bytes),
    )
    edges = [ensemble_of(2, first=10 * (1 + index)) for index in range(4)]
    actual = rounds(core, edges).params
    assert core.target_cache.num_bytes == 3 * EPOCH_BYTES
    assert distance(actual, twin_rounds(core, edges)) < 4 * ROUNDING
    tighter = core_of(
        memory_size=3,
        core_as_teacher=core_as_teacher,
        runtime=Runtime(device="cpu", target_bytes=share * EPOCH_BYTES - 1),
    )
    rounds(tighter, edges[:1])
    assert tighter.target_cache.num_bytes == 0


def released(refs):
    gc.collect()
    return [ref() is None for ref in refs]


# A bank holds a reference to its ensemble, so a released ensemble has no bank.
def weight_of(edge):
    return weakref.ref(edge["1.weight"])


def test_an_ensemble_that_left_the_memory_is_released():
    core = core_of(memory_size=2)
    state = start_of(core)
    weights = []
    for index in range(4):
        edge = ensemble_of(2, first=10 * (1 + index))
        weights.append(weight_of(edge))
        state, _ = core.distill(state, edge)
        del edge
        assert core.target_cache.num_bytes == min(index + 1, 2) * 3 * EPOCH_BYTES
    assert released(weights) == [True, True, False, False]


def test_a_refused_edge_is_released_when_the_next_one_comes(forwards):
    answers = iter([None, "no", None])
    core = core_of(
        memory_size=3, guard=lambda evidence: None if evidence.after is None else next(answers)
    )
    first = ensemble_of(2, first=10)
    state, _ = core.distill(start_of(core), first)
    num_forwards = len(forwards[id(first)])
    edge = ensemble_of(2, first=20)
    refused_weight = weight_of(edge)
    same, _ = core.distill(state, edge)
    assert same is state
    del edge
    new, _ = core.distill(state, ensemble_of(2, first=30))
    assert released([refused_weight]) == [True]
    assert len(new.memory) == 2
    assert core.target_cache.num_bytes == 2 * 3 * EPOCH_BYTES
    assert len(forwards[id(first)]) == num_forwards  # its targets were kept


def test_an_edge_that_spoils_the_core_is_released_next_time():
    core = core_of(memory_size=3)
    edge = ensemble_of(2)
    spoiled = weight_of(edge)
    state = replace(start_of(core), params={n: t + 0 for n, t in mlp().state_dict().items()})
    state.params["5.bias"][0] = float("inf")
    with pytest.raises(ValueError, match="core after distillation"):
        core.distill(state, edge)
    del edge
    core.distill(start_of(core), ensemble_of(2, first=20))
    assert released([spoiled]) == [True]


@pytest.mark.parametrize(
    "change",
    [
        {"guard": lambda evidence: None},
        {"held_out": images(9)},
        {"recipe": replace(RECIPE, lr=0.01)},
    ],
    ids=["guard", "held-out data", "Phase 0"],
)
def test_a_replaced_core_keeps_the_targets_that_do_not_change(forwards, change):
    core = core_of(memory_size=2)
    first, second = (ensemble_of(2, first=first) for first in (10, 20))
    state, _ = core.distill(start_of(core), first)
    num_forwards = len(forwards[id(first)])
    actual, _ = replace(core, **change).distill(state, second)
    assert len(forwards[id(first)]) == num_forwards
    assert same_bits(actual.params, rounds(core_of(memory_size=2), [first, second]).params)


@pytest.mark.parametrize(
    "change",
    [
        {"model": mlp(nn.Sigmoid())},
        {"dataset": images(22, seed=5)},
        {"distillation": Distillation(recipe=RECIPE, temperature=2.0, memory_size=2)},
        {"seed": 2**40},
        {"runtime": Runtime(device="cpu", bf16=True)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_replaced_core_computes_the_targets_that_change_again(change):
    edges = [ensemble_of(2, first=10), ensemble_of(2, first=20)]
    core = core_of(memory_size=2)
    state, _ = core.distill(start_of(core), edges[0])
    other = replace(core, **change)
    anew = replace(core, **change, target_cache=TargetCache())
    actual, _ = other.distill(state, edges[1])
    expected, _ = anew.distill(state, edges[1])
    assert same_bits(actual.params, expected.params)
    assert distance(actual.params, rounds(core, edges[1:], state).params) > 1e-6


def tensor_bytes():
    """Measure the storages of all existing tensors."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            # Compilation and vmap may leave tensors behind that have no storage.
            with suppress(RuntimeError):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_the_rounds():
    core = core_of(memory_size=3, core_as_teacher=True)
    state, after = start_of(core), []
    for index in range(8):
        state, _ = core.distill(state, ensemble_of(2, first=10 * (1 + index)))
        after.append(tensor_bytes())
        assert core.target_cache.num_bytes == min(index + 1, 3) * 3 * EPOCH_BYTES
    assert after[0] < after[1] < after[2]  # the measure shows that the memory fills
    assert len(set(after[2:])) == 1


def test_half_precision_targets_are_rounded_once():
    ensemble, runtime = ensemble_of(2), Runtime(device="cpu", bf16=True)
    bank = bank_of(ensemble, runtime=runtime)
    anew = bank_of(ensemble, max_bytes=0, runtime=runtime)
    exact = bank_of(ensemble)
    for epoch in range(3):
        views = epoch_views(RECIPE.augment, 22, VIEW_SEED, epoch)
        x = RECIPE.augment.view(DATA[0], views)
        batch = Batch(x, DATA[1], torch.arange(22), epoch)
        actual, expected = bank(batch), anew(batch)
        assert actual.dtype == expected.dtype == torch.float32
        # float16 has 11 bits: half a unit in the last place is 2^-12 for numbers in [1/2, 1) and
        # less below. Targets are probabilities.
        assert 0 < (actual - expected).abs().max() <= 2**-12
        # bfloat16 has 8 bits: 0.4 % of logits of a few units, divided by a temperature of 4.
        assert 0 < (actual - exact(batch)).abs().max() < 0.01
    assert bank.num_bytes == 3 * EPOCH_BYTES // 2


def test_a_bfloat16_round_with_kept_targets_is_near_the_exact_one():
    # As in test_fit: 0.4 % a layer, 9 steps a round. Wrong targets would differ by the whole way.
    edges = [ensemble_of(2, first=10), ensemble_of(2, first=20)]
    exact = rounds(core_of(memory_size=2), edges).params
    runtime = Runtime(device="cpu", bf16=True)
    core = core_of(memory_size=2, runtime=runtime)
    actual = rounds(core, edges).params
    assert same_bits(rounds(core_of(memory_size=2, runtime=runtime), edges).params, actual)
    start, names = core.model.state_dict(), [name for name, _ in core.model.named_parameters()]
    error = sum((actual[n] - exact[n]).square().sum().item() for n in names) ** 0.5
    way = sum((exact[n] - start[n]).square().sum().item() for n in names) ** 0.5
    assert 0 < error < 0.05 * way


BUDGETS = {"all": 2**30, "some": 3 * EPOCH_BYTES, "none": 0}
budgets = pytest.mark.parametrize("target_bytes", BUDGETS.values(), ids=BUDGETS)


@augmentations
@budgets
def test_the_same_seed_gives_the_same_bits(augment, target_bytes):
    def run(seed):
        runtime = Runtime(device="cpu", target_bytes=target_bytes)
        recipe = replace(RECIPE, augment=augment, epochs=2)
        core = core_of(recipe=recipe, memory_size=3, runtime=runtime, seed=seed)
        return rounds(core, [ensemble_of(2, first=10), ensemble_of(2, first=20)]).params

    first = run(3)
    torch.manual_seed(77)
    assert same_bits(run(3), first)
    assert distance(run(4), first) > 1e-3


@budgets
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_a_resumed_core_has_the_bits_of_one_that_never_stopped(forwards, target_bytes, bf16):
    def core():
        runtime = Runtime(device="cpu", target_bytes=target_bytes, bf16=bf16)
        return core_of(memory_size=3, runtime=runtime)

    edges = [ensemble_of(2, first=10 * (1 + index)) for index in range(4)]
    halfway = rounds(core(), edges[:2])
    whole = rounds(core(), edges)
    state = CoreState(
        snapshot(halfway.params),
        tuple(snapshot(ensemble) for ensemble in halfway.memory),
        halfway.version,
        halfway.train_accuracy,
        halfway.memory_weights,
    )
    resumed = rounds(core(), [snapshot(edge) for edge in edges[2:]], state)
    assert same_bits(resumed.params, whole.params)
    assert all(same_bits(a, b) for a, b in zip(resumed.memory, whole.memory))
    # The targets of a copied ensemble are computed again.
    assert all(id(ensemble) in forwards for ensemble in resumed.memory)


def test_histories_that_take_turns_do_not_disturb_each_other():
    edges = [ensemble_of(2, first=10 * (1 + index)) for index in range(4)]
    runtime = Runtime(device="cpu", target_bytes=2 * EPOCH_BYTES)
    expected = [
        rounds(core_of(memory_size=2, runtime=runtime), pair).params
        for pair in (edges[:2], edges[2:])
    ]
    core = core_of(memory_size=2, runtime=runtime)
    left, right = start_of(core), start_of(core)
    for step in range(2):
        left, _ = core.distill(left, edges[step])
        right, _ = core.distill(right, edges[2 + step])
    assert same_bits(left.params, expected[0])
    assert same_bits(right.params, expected[1])


class Interrupted(TargetCache):
    """A cache that another thread uses directly after each assignment to it."""

    interruptions = ()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        interruptions, Interrupted.interruptions = Interrupted.interruptions, ()
        for interrupt in interruptions:
            interrupt()


def test_two_threads_with_one_core_do_not_mix_up_teachers():
    first, second = ensemble_of(2, first=10), ensemble_of(2, first=20)
    core = replace(core_of(), target_cache=Interrupted())
    expected = rounds(core_of(), [first]).params
    interrupted = []
    Interrupted.interruptions = (lambda: interrupted.append(rounds(core, [second])),)
    assert same_bits(rounds(core, [first]).params, expected)
    assert len(interrupted) == 1


def test_a_phase_that_stops_early_keeps_the_epochs_it_saw(forwards):
    core = core_of(recipe=replace(RECIPE, stop=lambda history: len(history) == 2), memory_size=2)
    edges = [ensemble_of(2, first=10), ensemble_of(2, first=20)]
    actual = rounds(core, edges)
    assert core.target_cache.num_bytes == 2 * 2 * EPOCH_BYTES
    assert forwards == {id(edge): [2, 22, 22] for edge in edges}
    assert distance(actual.params, twin_rounds(core, edges)) < 2 * ROUNDING


def test_data_larger_than_a_forward_pass_is_split(forwards):
    x, y = images(300)
    ensemble = ensemble_of(2)
    bank = TargetBank(
        mlp(), ensemble, (x, y), RECIPE, view_seed=1, temperature=TEMPERATURE, max_bytes=2**20
    )
    rows = torch.tensor([299, 0, 128, 127])
    views = epoch_views(RECIPE.augment, 300, 1, 2)
    inputs = RECIPE.augment.view(x, views)[rows]
    actual = bank(Batch(inputs, y[rows], rows, 2))
    assert (actual - target_by_hand(ensemble, inputs)).abs().max() < 1e-6
    assert forwards[id(ensemble)] == [2, 128, 128, 44]


class Squeezes(nn.Module):
    """Loses the batch axis for a batch of one sample."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Conv2d(1, 3, 8)

    def forward(self, x):
        return self.head(self.norm(x)).squeeze()


@pytest.mark.parametrize("num_clones", [1, 2])
def test_teachers_never_run_on_a_single_sample(num_clones):
    core = core_of(seeded(Squeezes(), 0), memory_size=1)
    edges = [ensemble_of(num_clones, build=lambda seed: seeded(Squeezes(), seed))]
    assert distance(rounds(core, edges).params, twin_rounds(core, edges)) < ROUNDING


def test_edges_of_the_library_are_teachers_as_in_the_slow_twin():
    model = seeded(cnn(), 4)
    core = core_of(model, memory_size=2)
    recipe = Recipe(epochs=1, batch_size=8, augment=CropAndFlip(1))
    edges = [
        train_edge(model, model.state_dict(), images(24, seed=7 + e), recipe, seed=e)
        for e in range(2)
    ]
    assert distance(rounds(core, edges).params, twin_rounds(core, edges)) < 2 * ROUNDING
