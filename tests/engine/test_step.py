"""The recording of a step on the CPU, with a recorder that keeps the contract of CUDA graphs.

The function does not run while it is recorded. Every replay runs it again on the same fixed batches
and learning rate, and overwrites the same outcome.
"""

import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

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
from flwr_cloned_kd.engine.step import WARM_UP_STEPS, Outcome, RecordedStep, Step
from tests.helpers.reference import ROUNDING, cnn, distance, images, mlp, same_bits, train

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_BY_ONE = Runtime(device="cpu", batch_clones=False)
TOGETHER = Runtime(device="cpu", batch_clones=True)
# Four batches of 8 and one of 6: the last one of an epoch is smaller.
DATA = images(38)
RECIPE = Recipe(epochs=3, batch_size=8, augment=CropAndFlip(1))


class Counts:
    """What the recorded steps of one or several phases did."""

    def __init__(self):
        self.sizes = []
        self.rates = []
        self.warm_ups = self.records = self.replays = 0


class RecordedOnCpu(RecordedStep):
    """Keeps the contract of a CUDA graph on the CPU, and counts."""

    def __init__(self, step, counts):
        self.counts = counts
        self.first_outcome = None

        def counted(batches, lr):
            counts.sizes.append(len(batches[0].rows))
            counts.rates.append(float(lr))
            outcome = step(batches, lr)
            if self.first_outcome is None:
                self.first_outcome = outcome
            return outcome

        super().__init__(counted, torch.device("cpu"))

    def record(self, run):
        self.counts.records += 1
        fixed = Outcome(*(torch.full_like(part, torch.nan) for part in self.first_outcome))

        def replay():
            self.counts.replays += 1
            for old, new in zip(fixed, run()):
                old.copy_(new)

        return replay, fixed

    @contextmanager
    def warming_up(self):
        self.counts.warm_ups += 1
        yield


@contextmanager
def recording():
    """Record the steps of all fits in the block on the CPU."""
    counts = Counts()

    def make_steps(lanes, recipe, loss, num_clones, plan):
        return [RecordedOnCpu(Step(lanes, recipe, loss, num_clones), counts)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "make_steps", make_steps)
        yield counts


def both_ways(run):
    """Return the result of `run` with plain steps, with recorded steps, and the counts."""
    plain = run()
    with recording() as counts:
        actual = run()
    return plain, actual, counts


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
def test_a_recorded_step_trains_to_the_same_bits(build, runtime, change):
    recipe = replace(RECIPE, **change)
    plain, actual, counts = both_ways(lambda: trained(build(), recipe, runtime=runtime))
    assert same_bits(actual, plain)
    assert counts.records == 1
    assert distance(actual, clone(build().state_dict(), 3)) > 0.1


def test_a_recorded_step_ends_where_the_slow_twin_does():
    recipe = replace(RECIPE, proximal_mu=0.1, label_noise=shuffle_labels)
    with recording():
        actual = trained(mlp(), recipe)
    for e in range(3):
        expected = train(mlp(), mlp().state_dict(), DATA, recipe, seed=6, clone=e)
        assert distance(member(actual, e), expected) < ROUNDING


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_full_batches_warm_up_then_replay_and_smaller_ones_do_not(epochs):
    with recording() as counts:
        trained(mlp(), replace(RECIPE, epochs=epochs))
    assert WARM_UP_STEPS == 3
    assert counts.sizes == [8, 8, 8, 8, 6] * epochs
    # Of 4 full batches an epoch the first three warm up, once; all others are replayed.
    assert (counts.warm_ups, counts.records, counts.replays) == (3, 1, 4 * epochs - 3)


def test_a_phase_shorter_than_the_warm_up_is_never_recorded():
    with recording() as counts:
        trained(mlp(), replace(RECIPE, epochs=1, batch_size=16))  # 16, 16, 6
    assert (counts.sizes, counts.warm_ups, counts.records) == ([16, 16, 6], 2, 0)


def test_data_smaller_than_a_batch_is_a_batch_of_full_size():
    def run():
        return trained(mlp(), replace(RECIPE, epochs=6, batch_size=100))

    plain, actual, counts = both_ways(run)
    assert same_bits(actual, plain)
    assert (counts.sizes, counts.warm_ups, counts.replays) == ([38] * 6, 3, 3)


def test_the_learning_rate_follows_the_schedule_when_replayed():
    with recording() as counts:
        trained(mlp(), replace(RECIPE, epochs=4, lr=0.2, schedule=step_decay))
        # A step that kept the rate of the recording would end with other weights.
        flat = replace(RECIPE, epochs=4, lr=0.2, schedule=lambda share: 1.0)
        end = trained(mlp(), flat)
        assert distance(end, trained(mlp(), replace(flat, schedule=step_decay))) > 0.1
    # 20 steps in float32: 10 at the rate 0.2, 5 at a tenth and 5 at a hundredth of it.
    expected = [0.2] * 10 + [0.02] * 5 + [0.002] * 5
    assert counts.rates[:20] == pytest.approx(expected, rel=1e-7)


def test_targets_of_teachers_are_copied_for_every_replay():
    def targets(batch):
        # Targets differ for every row and epoch, so a stale target would change the result.
        angle = batch.rows.float() + 50 * batch.epoch
        return torch.stack([angle.sin(), angle.cos(), -angle.sin()], 1).softmax(1)

    def run():
        return trained(mlp(), loss=distillation(4.0), targets=targets)

    plain, actual, _ = both_ways(run)
    assert same_bits(actual, plain)
    assert distance(actual, trained(mlp())) > 1e-2


def test_a_recorded_round_gives_the_core_the_same_bits():
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

    plain, actual, counts = both_ways(run)
    assert same_bits(actual, plain)
    assert counts.records == 2  # one per round: a recording holds the tensors of one student


def test_the_history_reads_each_outcome_before_it_is_overwritten():
    seen = []

    def run():
        def stop(history):
            seen.append(list(history))
            return Plateau(10)(history)

        return trained(mlp(), replace(RECIPE, stop=stop))

    plain, actual, _ = both_ways(run)
    assert same_bits(actual, plain)
    assert seen[3:] == seen[:3]
    assert len({epoch.loss for epoch in seen[2]}) == 3


def test_dropout_draws_anew_when_replayed():
    plain, actual, _ = both_ways(lambda: trained(mlp(nn.Dropout(0.5))))
    assert same_bits(actual, plain)


def test_the_same_seed_gives_the_same_bits_when_recorded():
    with recording():
        first = trained(mlp())
        torch.manual_seed(8)
        assert same_bits(trained(mlp()), first)


def batch_of(num_rows, value):
    rows = torch.arange(num_rows)
    return Batch(torch.full((num_rows, 2), float(value)), rows % 3, rows, 0, None)


def test_a_recorded_step_by_hand():
    # The step returns the sum of its inputs times the rate. Batches belong to the caller: a
    # recording reads copies of them, always the same tensors, and each call overwrites the copies.
    calls = []

    def step(batches, lr):
        calls.append((batches[0].inputs.data_ptr(), lr))
        return Outcome(batches[0].inputs.sum().view(1, 1, 1) * lr, torch.zeros(1) + lr)

    recorded = RecordedOnCpu(step, Counts())
    batches = [batch_of(2, value) for value in range(6)]
    # 2 rows of 2 numbers, each `value`, times the rate 0.5: 2 value.
    assert [recorded([batch], 0.5).logits.item() for batch in batches] == [0, 2, 4, 6, 8, 10]
    assert len({pointer for pointer, _ in calls}) == 1
    assert len({lr.data_ptr() for _, lr in calls}) == 1
    assert all(batch.inputs.unique().tolist() == [value] for value, batch in enumerate(batches))
    first, second = recorded([batches[1]], 0.5), recorded([batches[1]], 0.25)
    assert first.logits is second.logits
    assert second.losses.item() == 0.25
    # A batch of one row is a plain step: its own tensors and the rate as a number.
    assert recorded([batch_of(1, 7)], 0.5).logits.item() == 7
    assert calls[-1][1] == 0.5
    assert isinstance(calls[-1][1], float)
    # The next batch of full size is replayed as before.
    assert recorded([batches[5]], 0.5).logits.item() == 10


class Unrecordable(RecordedStep):
    """Runs the step while it records; the end of a recording that failed fails too."""

    def __init__(self, step, ending=None):
        super().__init__(step, torch.device("cpu"))
        self.ending = ending

    def record(self, run):
        try:
            return (lambda: None), run()
        finally:
            if self.ending is not None:
                raise self.ending

    @contextmanager
    def warming_up(self):
        yield


ENDING = RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("ending", [None, ENDING], ids=["alone", "hidden by the end"])
def test_an_error_while_recording_names_the_option_and_what_failed(ending):
    calls = []

    def step(batches, lr):
        calls.append(batches)
        if len(calls) > WARM_UP_STEPS:
            raise KeyError("a loss that reads a table")
        return Outcome(torch.zeros(1, 1, 1), torch.zeros(1))

    recorded = Unrecordable(step, ending)
    for _ in range(WARM_UP_STEPS):
        recorded([batch_of(2, 1)], 0.5)
    expected = "cuda_graphs: .*got KeyError: 'a loss that reads a table'; cuda_graphs=False trains"
    with pytest.raises(RuntimeError, match=expected) as caught:
        recorded([batch_of(2, 1)], 0.5)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_the_recorder_itself_names_the_option():
    recorded = Unrecordable(
        lambda batches, lr: Outcome(torch.zeros(1, 1, 1), torch.zeros(1)), ENDING
    )
    for _ in range(WARM_UP_STEPS):
        recorded([batch_of(2, 1)], 0.5)
    with pytest.raises(RuntimeError, match=r"cuda_graphs: .*got RuntimeError: CUDA") as caught:
        recorded([batch_of(2, 1)], 0.5)
    assert caught.value.__cause__ is ENDING


def test_an_error_of_a_warm_up_step_stays_as_it_is():
    def step(batches, lr):
        raise KeyError("no recording yet")

    with pytest.raises(KeyError, match="no recording yet"):
        Unrecordable(step)([batch_of(2, 1)], 0.5)


class Stream:
    """Stands for a CUDA stream, and is a context in which it is the current one."""

    current = None

    def __init__(self):
        Stream.current = Stream.current or self

    def wait_stream(self, other):
        pass

    def __enter__(self):
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *_):
        Stream.current = self.before


@pytest.fixture
def cuda(monkeypatch):
    """Imitate PyTorch's streams and graphs: count streams, keep the options of recordings."""
    imitation = SimpleNamespace(streams=[], options=[], graph=nullcontext)

    def make_stream():
        imitation.streams.append(Stream())
        return imitation.streams[-1]

    def graph(graph, **options):
        imitation.options.append(options)
        return imitation.graph()

    monkeypatch.setattr(Stream, "current", None)
    imitation.default = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", make_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None), raising=False
    )
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return imitation


def on_cuda(step=None):
    outcome = Outcome(torch.zeros(1, 1, 1), torch.zeros(1))
    return RecordedStep(step or (lambda batches, lr: outcome), torch.device("cpu"))


def test_a_recorded_step_has_one_side_stream_for_warm_up_and_recording(cuda):
    used = []

    def step(batches, lr):
        used.append(Stream.current)
        return Outcome(torch.zeros(1, 1, 1), torch.zeros(1))

    recorded = on_cuda(step)
    for _ in range(WARM_UP_STEPS + 3):
        recorded([batch_of(2, 1)], 0.5)
    (side,) = cuda.streams
    assert used == [side] * (WARM_UP_STEPS + 1)
    # Only the calls of this thread can break the recording.
    assert cuda.options == [{"stream": side, "capture_error_mode": "thread_local"}]
    assert Stream.current is cuda.default


def test_a_failed_recording_leaves_the_stream_of_the_thread_as_it_was(cuda):
    @contextmanager
    def graph():
        Stream.current = Stream()
        yield
        raise ENDING

    cuda.graph = graph
    recorded = on_cuda()
    for _ in range(WARM_UP_STEPS):
        recorded([batch_of(2, 1)], 0.5)
    with pytest.raises(RuntimeError, match="cuda_graphs"):
        recorded([batch_of(2, 1)], 0.5)
    assert Stream.current is cuda.default


def test_two_threads_never_record_at_the_same_time(cuda):
    # Each recording lasts until the other thread has had the chance to begin its own.
    other_began, num_active = threading.Event(), []
    active = []

    @contextmanager
    def graph():
        active.append(threading.get_ident())
        num_active.append(len(active))
        if len(num_active) == 2:
            other_began.set()
        other_began.wait(0.1)
        yield
        active.pop()

    cuda.graph = graph

    def train():
        recorded = on_cuda()
        for _ in range(WARM_UP_STEPS + 1):
            recorded([batch_of(2, 1)], 0.5)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert num_active == [1, 1]


def test_on_a_cpu_a_step_is_never_recorded(monkeypatch):
    monkeypatch.setattr(engine, "RecordedStep", None)
    runtime = replace(ONE_BY_ONE, cuda_graphs=True)
    assert same_bits(trained(mlp(), runtime=runtime), trained(mlp()))


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_plan_with_graphs_makes_a_recorded_step_on_its_device(monkeypatch, cuda_graphs):
    monkeypatch.setattr(engine, "RecordedStep", lambda step, device: (step, device))
    parts, _ = lanes(
        mlp(),
        clone(mlp().state_dict(), 2),
        DATA[0],
        ONE_BY_ONE,
        training=True,
        batch_size=8,
        num_samples=1,
    )
    plan = Plan("cuda:1", False, False, False, cuda_graphs)
    (made,) = engine.make_steps(parts, RECIPE, distillation(4), 2, plan)
    if not cuda_graphs:
        assert isinstance(made, Step)
    else:
        step, device = made
        assert step.__func__ is Step.parallel
        assert device == torch.device("cuda:1")
