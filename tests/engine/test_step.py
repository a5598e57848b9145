"""The recording of a step, with a recorder for the CPU in the place of CUDA graphs.

It keeps CUDA's contract: the function does not run while it is recorded, every replay runs it anew
on the same fixed batches and learning rate, and overwrites the same outcome.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from flwr_cloned_kd import (
    Core,
    CoreState,
    CropAndFlip,
    Distillation,
    Plateau,
    Recipe,
    Runtime,
    clone,
    distillation,
    fit,
    member,
    shuffle_labels,
    step_decay,
    train_edge,
)
from flwr_cloned_kd.engine import fit as engine
from flwr_cloned_kd.engine.lanes import lanes
from flwr_cloned_kd.engine.losses import Batch
from flwr_cloned_kd.engine.runtime import Plan
from flwr_cloned_kd.engine.step import WARM_UP_STEPS, Outcome, Recorded, Step
from tests.helpers.reference import ROUNDING, cnn, distance, images, mlp, same_bits, train

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_BY_ONE = Runtime(device="cpu", batch_clones=False)
TOGETHER = Runtime(device="cpu", batch_clones=True)
# Four batches of 8 and one of 6: the last one of an epoch is smaller.
DATA = images(38)
RECIPE = Recipe(epochs=3, batch_size=8, augment=CropAndFlip(1))


class Recorder:
    """Counts what a recorded step does."""

    def __init__(self, num_clones=3, batch_size=8):
        self.shape = (num_clones, batch_size, 3)
        self.sizes, self.rates, self.warm_ups, self.records, self.replays = [], [], 0, 0, 0

    def record(self, run):
        self.records += 1
        fixed = Outcome(torch.full(self.shape, torch.nan), torch.full(self.shape[:1], torch.nan))

        def replay():
            self.replays += 1
            for kept, found in zip(fixed, run()):
                kept.copy_(found)

        return replay, fixed

    @contextmanager
    def aside(self):
        self.warm_ups += 1
        yield

    def around(self, step):
        def run(batches, lr):
            self.sizes.append(len(batches[0].rows))
            self.rates.append(float(lr))
            return step(batches, lr)

        return Recorded(run, self.record, self.aside, torch.device("cpu"))


@pytest.fixture
def recorder(monkeypatch):
    """Let the engine record every step of the fits that follow."""
    made, plain = [], engine._step

    def switch_on(**options):
        made.append(Recorder(**options))
        monkeypatch.setattr(
            engine, "_step", lambda *args: made[-1].around(Step(args[0], *args[1:4]))
        )
        return made[-1]

    def switch_off():
        monkeypatch.setattr(engine, "_step", plain)

    switch_on.off = switch_off
    return switch_on


def both_ways(recorder, run, **options):
    """Return what `run` makes of a plain step, of a recorded one, and the recorder."""
    plain = run()
    used = recorder(**options)
    found = run()
    recorder.off()
    return plain, found, used


def trained(model, recipe=RECIPE, *, num_clones=3, runtime=ONE_BY_ONE, **options):
    start = clone(model.state_dict(), num_clones)
    return fit(model, start, DATA, recipe, seed=6, runtime=runtime, **options)


@pytest.mark.parametrize("build", [mlp, cnn], ids=["mlp", "cnn"])
@pytest.mark.parametrize("runtime", [ONE_BY_ONE, TOGETHER], ids=["one by one", "together"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"augment": None},
        {"proximal_mu": 0.5},
        {"label_noise": shuffle_labels},
        {"momentum": 0.0, "weight_decay": 0.0},
        {"proximal_mu": 0.1, "label_noise": shuffle_labels, "epochs": 5},
    ],
    ids=["plain", "no views", "proximal", "noisy", "bare SGD", "all"],
)
def test_a_recorded_step_trains_to_the_same_bits(recorder, build, runtime, change):
    recipe = replace(RECIPE, **change)
    plain, found, used = both_ways(
        recorder, lambda: trained(build(), recipe, runtime=runtime), num_clones=3
    )
    assert same_bits(found, plain)
    assert used.records == 1
    assert distance(found, clone(build().state_dict(), 3)) > 0.1


def test_a_recorded_step_ends_where_the_slow_twin_does(recorder):
    recorder()
    recipe = replace(RECIPE, proximal_mu=0.1, label_noise=shuffle_labels)
    found = trained(mlp(), recipe)
    for e in range(3):
        expected = train(mlp(), mlp().state_dict(), DATA, recipe, seed=6, clone=e)
        assert distance(member(found, e), expected) < ROUNDING


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_the_first_steps_warm_up_and_smaller_batches_are_never_recorded(recorder, epochs):
    used = recorder()
    trained(mlp(), replace(RECIPE, epochs=epochs))
    assert WARM_UP_STEPS == 3
    assert used.sizes == [8, 8, 8, 8, 6] * epochs
    # Of 4 full batches an epoch the first three warm up, once; all others are replayed.
    assert (used.warm_ups, used.records, used.replays) == (3, 1, 4 * epochs - 3)


def test_a_phase_shorter_than_the_warm_up_is_never_recorded(recorder):
    used = recorder()
    trained(mlp(), replace(RECIPE, epochs=1, batch_size=16))  # 16, 16, 6
    assert (used.sizes, used.warm_ups, used.records) == ([16, 16, 6], 2, 0)


def test_data_smaller_than_a_batch_is_a_batch_of_full_size(recorder):
    def run():
        return trained(mlp(), replace(RECIPE, epochs=6, batch_size=100))

    plain, found, used = both_ways(recorder, run, batch_size=38)
    assert same_bits(found, plain)
    assert (used.sizes, used.warm_ups, used.replays) == ([38] * 6, 3, 3)


def test_the_learning_rate_follows_the_schedule_when_replayed(recorder):
    used = recorder()
    trained(mlp(), replace(RECIPE, epochs=4, lr=0.2, schedule=step_decay))
    # 20 steps: 10 of 0.2, 5 of a tenth and 5 of a hundredth of it; kept as float32.
    expected = [0.2] * 10 + [0.02] * 5 + [0.002] * 5
    assert used.rates == pytest.approx(expected, rel=1e-7)
    # The same, had the rate of the recorded step been kept, would end elsewhere.
    flat = replace(RECIPE, epochs=4, lr=0.2, schedule=lambda done: 1.0)
    assert distance(trained(mlp(), flat), trained(mlp(), replace(flat, schedule=step_decay))) > 0.1


def test_targets_of_teachers_are_copied_for_every_replay(recorder):
    def targets(batch):
        # Rows and epochs tell targets apart, so a stale one would be seen.
        angle = batch.rows.float() + 50 * batch.epoch
        return torch.stack([angle.sin(), angle.cos(), -angle.sin()], 1).softmax(1)

    def run():
        return trained(mlp(), loss=distillation(4.0), targets=targets)

    plain, found, _ = both_ways(recorder, run)
    assert same_bits(found, plain)
    assert distance(found, trained(mlp())) > 1e-2


def test_a_recorded_round_gives_the_core_the_same_bits(recorder):
    core = Core(
        model=mlp(),
        dataset=DATA,
        recipe=RECIPE,
        distillation=Distillation(recipe=RECIPE, memory_size=2),
        runtime=ONE_BY_ONE,
    )
    start = mlp().state_dict()
    edges = [
        train_edge(mlp(), start, images(22, seed=9 + e), RECIPE, seed=e, runtime=ONE_BY_ONE)
        for e in range(2)
    ]

    def run():
        state = CoreState(dict(start))
        for edge in edges:
            state, _ = core.distill(state, edge)
        return state.params

    plain, found, used = both_ways(recorder, run, num_clones=1)
    assert same_bits(found, plain)
    assert used.records == 2  # one per round: a recording is of one student's tensors


def test_the_history_reads_each_outcome_before_it_is_overwritten(recorder):
    seen = []

    def run():
        def stop(history):
            seen.append(list(history))
            return Plateau(10)(history)

        return trained(mlp(), replace(RECIPE, stop=stop))

    plain, found, _ = both_ways(recorder, run)
    assert same_bits(found, plain)
    assert seen[3:] == seen[:3]
    assert len({epoch.loss for epoch in seen[2]}) == 3


def test_dropout_draws_anew_when_replayed(recorder):
    plain, found, _ = both_ways(recorder, lambda: trained(mlp(nn.Dropout(0.5))))
    assert same_bits(found, plain)


def test_the_same_seed_gives_the_same_bits_when_recorded(recorder):
    recorder()
    first = trained(mlp())
    torch.manual_seed(8)
    recorder()
    assert same_bits(trained(mlp()), first)


def batch_of(num_rows, value):
    rows = torch.arange(num_rows)
    return Batch(torch.full((num_rows, 2), float(value)), rows % 3, rows, 0, None)


def test_a_recorded_step_by_hand():
    # The step says the sum of its inputs times the rate. Batches belong to the caller: what is
    # recorded are copies, always the same ones, and each call overwrites them.
    seen = []

    def step(batches, lr):
        seen.append((batches[0].inputs.data_ptr(), lr))
        return Outcome(batches[0].inputs.sum().view(1, 1, 1) * lr, torch.zeros(1) + lr)

    def record(run):
        fixed = Outcome(torch.zeros(1, 1, 1), torch.zeros(1))
        return lambda: [kept.copy_(found) for kept, found in zip(fixed, run())], fixed

    @contextmanager
    def aside():
        yield

    recorded = Recorded(step, record, aside, torch.device("cpu"))
    given = [batch_of(2, value) for value in range(6)]
    # 2 rows of 2 numbers, each `value`, times the rate 0.5: 2 value.
    assert [recorded([batch], 0.5).logits.item() for batch in given] == [0, 2, 4, 6, 8, 10]
    assert len({pointer for pointer, _ in seen}) == 1
    assert len({lr.data_ptr() for _, lr in seen}) == 1
    assert all(batch.inputs.unique().tolist() == [value] for value, batch in enumerate(given))
    first, second = recorded([given[1]], 0.5), recorded([given[1]], 0.25)
    assert first.logits is second.logits
    assert second.values.item() == 0.25
    # A batch of one row takes the plain way: its own tensors and the rate as a number.
    assert recorded([batch_of(1, 7)], 0.5).logits.item() == 7
    assert seen[-1][1] == 0.5
    assert isinstance(seen[-1][1], float)
    # And the next one of full size is replayed as before.
    assert recorded([given[5]], 0.5).logits.item() == 10


def test_on_a_cpu_a_step_is_never_recorded(monkeypatch):
    monkeypatch.setattr(engine, "recorded", None)
    runtime = replace(ONE_BY_ONE, cuda_graphs=True)
    assert same_bits(trained(mlp(), runtime=runtime), trained(mlp()))


def test_on_a_gpu_the_engine_records_the_step_it_was_planned_to(monkeypatch):
    monkeypatch.setattr(engine, "recorded", lambda step, device: (step, device))
    parts, _ = lanes(
        mlp(),
        clone(mlp().state_dict(), 2),
        DATA[0],
        ONE_BY_ONE,
        training=True,
        batch_size=8,
        num_samples=1,
    )
    for graphs in (True, False):
        made = engine._step(
            parts, RECIPE, distillation(4), 2, Plan("cuda:1", False, False, False, graphs)
        )
        assert isinstance(made, tuple) == graphs
        if graphs:
            assert isinstance(made[0], Step)
            assert made[1] == torch.device("cuda:1")
