"""Targets that a worker computes while the student trains: the same bits, and bounded memory."""

import threading
from dataclasses import replace

import pytest
import torch

from flwr_cloned_kd import CropAndFlip, Recipe, Runtime
from flwr_cloned_kd.method import targets
from flwr_cloned_kd.method.targets import TargetBank, computed_ahead
from tests.helpers.reference import images, same_bits
from tests.method.test_targets import core_of, ensemble_of, rounds

DATA = images(22)
RECIPE = Recipe(epochs=3, batch_size=8, augment=CropAndFlip(1))
CPU = Runtime(device="cpu")


@pytest.fixture
def two_threads(monkeypatch):
    """PyTorch says that it has two threads: one for the student, one for the worker."""
    threads = []
    monkeypatch.setattr(targets, "available_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    return threads


@pytest.fixture
def epochs_of(monkeypatch):
    """Names of the threads that computed the targets of each epoch, in order."""
    computed = []
    original = TargetBank._epoch_targets

    def record(bank, epoch):
        computed.append((epoch, threading.current_thread().name))
        return original(bank, epoch)

    monkeypatch.setattr(TargetBank, "_epoch_targets", record)
    return computed


@pytest.mark.parametrize("options", [{}, {"core_as_teacher": True}, {"memory_size": 1}])
@pytest.mark.parametrize("target_bytes", [2**30, 22 * 3 * 4 * 4, 0])
def test_the_core_is_the_same_to_the_last_bit(options, target_bytes, request):
    """With one thread nothing is computed ahead; the limits keep all, some and no targets."""
    runtime = replace(CPU, target_bytes=target_bytes)
    edges = [ensemble_of(2, first=first) for first in (10, 20, 30)]
    alone = rounds(core_of(runtime=runtime, **options), edges)
    request.getfixturevalue("two_threads")
    ahead = rounds(core_of(runtime=runtime, **options), edges)
    assert same_bits(ahead.params, alone.params)


def test_a_worker_computes_all_epochs_but_the_first(two_threads, epochs_of):
    rounds(core_of(memory_size=1), [ensemble_of(2)])
    assert [epoch for epoch, _ in epochs_of] == [0, 1, 2]
    assert epochs_of[0][1] == threading.current_thread().name
    assert all(name.startswith("flwr-cloned-kd-teachers") for _, name in epochs_of[1:])


def test_what_a_memory_has_kept_is_not_computed_again(two_threads, epochs_of):
    core, edges = core_of(memory_size=2), [ensemble_of(2), ensemble_of(2, first=20)]
    rounds(core, edges)
    assert [epoch for epoch, _ in epochs_of] == [0, 1, 2] * 2


@pytest.mark.parametrize("augment", [None, lambda inputs, generator: inputs])
def test_without_finite_views_nothing_is_computed_ahead(augment, two_threads):
    with computed_ahead([], replace(RECIPE, augment=augment), CPU) as announce:
        announce(0)
    assert two_threads == []


def test_threads_are_divided_and_restored(two_threads):
    before = torch.get_num_threads()
    with computed_ahead([], RECIPE, CPU) as announce:
        announce(0)
        assert two_threads == [1]
    assert two_threads[-1] == before


def test_an_error_of_the_worker_is_raised_where_the_student_trains(two_threads):
    class Broken:
        def prepare(self, epoch):
            if epoch:
                raise RuntimeError("out of memory")

    def train():
        with computed_ahead([Broken()], RECIPE, CPU) as announce:
            announce(0)
            announce(1)

    with pytest.raises(RuntimeError, match="out of memory"):
        train()


def test_an_error_of_the_student_ends_the_worker(two_threads):
    before = threading.active_count()

    def train():
        with computed_ahead([], RECIPE, CPU) as announce:
            announce(0)
            raise KeyError("student")

    with pytest.raises(KeyError):
        train()
    assert threading.active_count() == before
