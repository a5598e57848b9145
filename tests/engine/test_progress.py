"""Progress lines of a phase."""

import threading
from types import SimpleNamespace

import pytest

from flwr_cloned_kd import (
    Core,
    CoreState,
    Distillation,
    Plateau,
    Recipe,
    Runtime,
    clone,
    fit,
    train_edge,
)
from flwr_cloned_kd.engine import progress as module
from flwr_cloned_kd.engine.progress import Progress
from tests.helpers.reference import cnn, images, mlp, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = images(38)


class Clock:
    """Time that passes when a test changes it, or by a fixed step at every reading."""

    def __init__(self, *, step=0.0):
        self.now, self._step = 100.0, step

    def monotonic(self):
        self.now += self._step
        return self.now


@pytest.fixture
def clock(monkeypatch):
    def set_up(**options):
        made = Clock(**options)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=made.monotonic))
        return made

    return set_up


def test_progress_by_hand(clock):
    time, lines = clock(), []
    progress = Progress(lines.append, "Phase 2", 4, 1000)
    for elapsed, epoch, share in [
        (1, 0, 0.1),
        (4.9, 0, 0.4),
        (5, 0, 0.5),  # half an epoch of 1000 in 5 s: 100 samples/s, 3.5 epochs need 35 s
        (9.9, 0, 1.0),
        (10, 1, 0.0),  # 1 epoch in 10 s: 100 samples/s, 3 epochs need 30 s
        (14.9, 1, 0.5),
        (40, 1, 0.25),  # 1.25 epochs in 40 s: 31.25 samples/s, 2.75 epochs need 88 s
        (44.9, 2, 0.5),
        (45, 3, 1.0),  # 4 epochs in 45 s: 88.9 samples/s, nothing left
    ]:
        time.now = 100 + elapsed
        progress.step(epoch, share)
    assert lines == [
        "Phase 2: epoch 1 of 4, 100 samples/s, 0:00:35 left",
        "Phase 2: epoch 2 of 4, 100 samples/s, 0:00:30 left",
        "Phase 2: epoch 2 of 4, 31 samples/s, 0:01:28 left",
        "Phase 2: epoch 4 of 4, 89 samples/s, 0:00:00 left",
    ]


@pytest.mark.parametrize(
    ("elapsed", "num_epochs", "expected"),
    [
        (5, 5, "0:00:00"),
        (5, 5 + 3599, "0:59:59"),
        (5, 5 + 3600, "1:00:00"),
        (5, 5 + 100 * 3600, "4 days, 4:00:00"),
        (7.4, 6, "0:00:01"),  # 1.48 s
        (7.6, 6, "0:00:02"),  # 1.52 s
    ],
)
def test_the_time_left_is_rounded_to_seconds(clock, elapsed, num_epochs, expected):
    # Five epochs are done: each of the others takes a fifth of the elapsed time.
    time, lines = clock(), []
    progress = Progress(lines.append, "Phase 2", num_epochs, 1)
    time.now += elapsed
    progress.step(4, 1.0)
    assert lines == [f"Phase 2: epoch 5 of {num_epochs}, 1 samples/s, {expected} left"]


def test_thousands_are_marked(clock):
    time, lines = clock(), []
    progress = Progress(lines.append, "Phase 1", 2, 1_000_000)
    time.now += 5
    progress.step(0, 0.5)
    assert lines == ["Phase 1: epoch 1 of 2, 100,000 samples/s, 0:00:15 left"]


def test_without_a_log_nothing_is_logged(clock):
    time = clock()
    progress = Progress(None, "Phase 1", 2, 100)
    time.now += 1000
    progress.step(0, 0.5)


RECIPE = Recipe(epochs=2, batch_size=8)


def test_a_phase_reports_to_the_log_every_few_seconds(clock):
    # 2 s pass at every reading of the clock. 38 samples are 5 batches, so step k of 10 ends 2k s
    # after the start, and the lines come at steps 3, 6 and 9. Two clones have 76 samples an epoch,
    # 15.2 a step.
    clock(step=2.0)
    lines = []
    runtime = Runtime(device="cpu", log=lines.append)
    fit(mlp(), clone(mlp().state_dict(), 2), DATA, RECIPE, runtime=runtime, phase="Phase 1")
    assert lines == [
        "Phase 1: epoch 1 of 2, 8 samples/s, 0:00:14 left",
        "Phase 1: epoch 2 of 2, 8 samples/s, 0:00:08 left",
        "Phase 1: epoch 2 of 2, 8 samples/s, 0:00:02 left",
    ]


def test_a_short_phase_is_silent(clock):
    clock(step=0.4)  # 10 steps are 4 s
    lines = []
    runtime = Runtime(device="cpu", log=lines.append)
    fit(mlp(), clone(mlp().state_dict(), 2), DATA, RECIPE, runtime=runtime)
    assert lines == []


def test_a_log_does_not_change_the_result(clock):
    clock(step=2.0)
    start = clone(mlp().state_dict(), 2)
    logged = fit(mlp(), start, DATA, RECIPE, runtime=Runtime(device="cpu", log=lambda line: None))
    assert same_bits(logged, fit(mlp(), start, DATA, RECIPE, runtime=Runtime(device="cpu")))


def test_every_phase_is_called_by_its_number(clock):
    clock(step=3.0)
    lines = []
    runtime = Runtime(device="cpu", log=lines.append)
    core = Core(
        model=mlp(),
        dataset=DATA,
        recipe=RECIPE,
        distillation=Distillation(recipe=RECIPE),
        runtime=runtime,
    )
    params = core.pretrain()
    edge = train_edge(mlp(), params, DATA, RECIPE, num_clones=2, runtime=runtime)
    core.distill(CoreState(params), edge)
    # 10 steps of 3 s each: one line at every second step.
    names = [line.split(":")[0] for line in lines]
    assert names == ["Phase 0"] * 5 + ["Phase 1"] * 5 + ["Phase 2"] * 5


def test_two_phases_at_once_report_by_themselves(clock):
    # Edges of an in-process federation train in threads of one process.
    clock(step=1.0)
    lines = {name: [] for name in ("a", "b")}

    def train(name):
        runtime = Runtime(device="cpu", log=lines[name].append)
        recipe = Recipe(epochs=4, batch_size=8, stop=Plateau(10))
        model = mlp() if name == "a" else cnn()
        fit(model, clone(model.state_dict(), 1), DATA, recipe, runtime=runtime, phase=name)

    threads = [threading.Thread(target=train, args=(name,)) for name in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(lines[name] for name in lines)
    assert all(line.startswith(f"{name}: epoch ") for name in lines for line in lines[name])
