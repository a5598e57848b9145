"""Clones side by side: the same bits as in turn, and the rules that choose the workers."""

import os
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from flwr_cloned_kd import AccuracyReached, CropAndFlip, Recipe, Runtime, clone, fit
from flwr_cloned_kd.engine.fit import side_by_side
from flwr_cloned_kd.engine.runtime import Plan, available_threads, container_processors, plan
from tests.helpers.reference import cnn, images, mlp, same_bits

RECIPE = Recipe(epochs=2, batch_size=8, augment=CropAndFlip(pad=1))
DATA = images(24)
IN_TURN = Runtime(batch_clones=False, workers=1)


@pytest.fixture
def four_threads(monkeypatch):
    """PyTorch says that it has four threads; each worker then uses one of them."""
    threads = []
    for module in ("runtime", "fit"):
        monkeypatch.setattr(f"flwr_cloned_kd.engine.{module}.available_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    return threads


def train(runtime, *, model=None, num_clones=3, recipe=RECIPE):
    model = cnn() if model is None else model
    start = clone(model.state_dict(), num_clones)
    return fit(model, start, DATA, recipe, seed=5, runtime=runtime)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_clones_side_by_side_end_with_the_bits_of_clones_in_turn(workers, four_threads):
    side_by_side_runtime = replace(IN_TURN, workers=workers)
    assert same_bits(train(side_by_side_runtime), train(IN_TURN))


def test_clones_really_train_side_by_side(four_threads):
    """Each waits in its first step for the others: in turn, the barrier would break."""
    barrier = threading.Barrier(3, timeout=30)
    waited = set()

    def meet(inputs, generator):
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            barrier.wait()
        return inputs

    recipe = replace(RECIPE, augment=meet)
    trained = train(replace(IN_TURN, workers=3), recipe=recipe)
    assert len(waited) == 3
    assert same_bits(trained, train(IN_TURN, recipe=replace(recipe, augment=None)))


def test_an_early_stop_ends_all_clones_in_the_same_epoch(four_threads):
    recipe = Recipe(epochs=30, batch_size=8, stop=AccuracyReached(0.5))
    stopped = train(replace(IN_TURN, workers=3), recipe=recipe)
    assert same_bits(stopped, train(IN_TURN, recipe=recipe))
    assert not same_bits(stopped, train(IN_TURN, recipe=replace(recipe, stop=None)))


def test_an_error_of_one_clone_is_raised(four_threads):
    def fail(inputs, generator):
        raise KeyError("no such view")

    with pytest.raises(KeyError, match="no such view"):
        train(replace(IN_TURN, workers=3), recipe=replace(RECIPE, augment=fail))


def test_a_model_with_dropout_trains_its_clones_in_turn(four_threads, monkeypatch):
    """The threads would share one generator, and draw from it in another order in every run."""
    before = threading.active_count()
    model = mlp(nn.Dropout())
    side_by_side_runtime = replace(IN_TURN, workers=3)
    assert same_bits(train(side_by_side_runtime, model=model), train(IN_TURN, model=model))
    assert threading.active_count() == before


def test_workers_share_the_threads_and_leave_them_as_they_were(four_threads):
    before = torch.get_num_threads()
    chosen = Plan("cpu", False, False, False, False, workers=2)
    with side_by_side(chosen) as run_all:
        assert run_all(lambda place: place + 1, range(3)) == [1, 2, 3]
    assert set(four_threads) <= {2, before}
    assert four_threads[-1] == before


@pytest.mark.parametrize(
    ("num_clones", "runtime", "expected"),
    [
        (3, Runtime(batch_clones=False), 3),
        (8, Runtime(batch_clones=False), 4),
        (1, Runtime(batch_clones=False), 1),
        (3, Runtime(batch_clones=False, workers=2), 2),
        (3, Runtime(batch_clones=True), 1),
        (3, Runtime(batch_clones=False, compile=True), 1),
    ],
)
def test_the_rules_for_the_workers(num_clones, runtime, expected, four_threads):
    assert plan(mlp(), DATA[0], runtime, num_clones=num_clones).workers == expected


def test_predictions_have_one_worker(four_threads):
    runtime = Runtime(batch_clones=False)
    assert plan(mlp(), DATA[0], runtime, num_clones=3, training=False).workers == 1


def test_side_by_side_the_rules_compile_nothing(four_threads, monkeypatch):
    monkeypatch.setattr("flwr_cloned_kd.engine.runtime.MIN_COMPILE_FLOP", 0.0)
    runtime = Runtime(batch_clones=False, compile=None)
    assert not plan(cnn(), DATA[0], runtime, num_clones=3, num_samples=10**9).compile


def test_fewer_than_one_worker_is_refused():
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        Runtime(workers=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("150000 100000\n", 1),
        ("400000 100000\n", 4),
        ("50000 100000\n", 1),
        ("max 100000\n", os.cpu_count()),
        ("nonsense", os.cpu_count()),
    ],
)
def test_the_limit_of_a_container_is_read(tmp_path, text, expected):
    path = tmp_path / "cpu.max"
    path.write_text(text)
    assert container_processors(path) == expected


def test_without_a_container_all_processors_count(tmp_path):
    assert container_processors(tmp_path / "missing") == os.cpu_count()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_the_processors_of_this_process_limit_its_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr("flwr_cloned_kd.engine.runtime.container_processors", lambda: 8)
    assert available_threads() == 3
    monkeypatch.setattr("flwr_cloned_kd.engine.runtime.container_processors", lambda: 2)
    assert available_threads() == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert available_threads() == 1
