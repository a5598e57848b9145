"""Several processes: the same records, each round reported once, and a clean end."""

import multiprocessing
from dataclasses import replace

import pytest

from flwr_cloned_kd.paper.pool import all_records
from flwr_cloned_kd.paper.runs import Run
from flwr_cloned_kd.paper.store import key, records


@pytest.fixture(autouse=True)
def small_network():
    """Keep the ResNet: a network that is replaced in this process is not replaced in others."""


def test_a_run_that_is_named_twice_is_played_once(tiny, tmp_path):
    played = []
    runs = [Run(settings=tiny), Run(settings=replace(tiny))]
    by_key = all_records(runs, tmp_path, on_round=lambda: played.append(1))
    assert [*by_key] == [key(runs[0])]
    assert len(played) == 4


@pytest.mark.slow
def test_two_processes_find_what_one_does(tiny, tmp_path):
    runs = [Run(settings=replace(tiny, seed=seed)) for seed in (0, 1, 0)]
    played = []
    two = all_records(runs, tmp_path / "two", jobs=2, on_round=lambda: played.append(1))
    assert two == all_records(runs, tmp_path / "one", on_round=lambda: None)
    assert len(played) == 8  # two runs of four rounds, Phase 0 included


@pytest.mark.slow
def test_several_processes_report_the_rounds_that_were_missing(tiny, tmp_path):
    runs = [Run(settings=replace(tiny, seed=seed)) for seed in (0, 1)]
    records(runs[0], tmp_path)
    played = []
    all_records(runs, tmp_path, jobs=2, on_round=lambda: played.append(1))
    assert len(played) == 4


@pytest.mark.slow
def test_when_one_run_fails_the_others_end_at_once(tiny, tmp_path, archive):
    moved = tmp_path / "moved.npz"
    moved.write_bytes(archive.read_bytes())
    long = Run(settings=replace(tiny, edge_epochs=10**6))
    lost = Run(settings=replace(tiny, data_path=str(moved), seed=1))
    key(lost)  # This process has read the data; the child will not find it.
    moved.unlink()
    with pytest.raises(FileNotFoundError, match="moved"):
        all_records([long, lost], tmp_path, jobs=2, on_round=lambda: None)
    assert not multiprocessing.active_children()
