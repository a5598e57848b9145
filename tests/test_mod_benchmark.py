"""The benchmark of `train_clones`: its clients train alike, and it measures the mod alone."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import mod as benchmark
from flwr_cloned_kd import take
from tests.helpers.federation import TEST, TRAIN


def test_a_loop_with_the_draws_of_fit_ends_where_an_edge_client_does(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "NUM_EDGES", 2)
    monkeypatch.setattr(benchmark, "CORE_EPOCHS", 1)
    monkeypatch.setattr(benchmark, "load_digits", lambda: (take(TRAIN, range(90)), TEST))
    path = tmp_path / "mod.json"
    results = benchmark.main(["--seeds", "1", "--epochs", "1", "--json", str(path)])
    assert json.loads(path.read_text()) == results
    clients = results["clients"]
    assert list(clients) == list(benchmark.CLIENTS)
    (accuracy,) = clients["EdgeClient"]["accuracy"]
    # Batched clones differ from a plain loop by the rounding of float32, see tests/helpers.
    own = clients["own loop, mod, draws of fit"]["accuracy"]
    assert own == [pytest.approx(accuracy, abs=0.01)]
    for measured in clients.values():
        assert 0 <= measured["overhead-per-clone"][0] < measured["seconds-per-clone"][0]
    assert "+0.0000" in capsys.readouterr().out


def test_only_trainings_are_timed(monkeypatch):
    durations = []
    clock = iter([1.0, 3.5, 4.0])
    monkeypatch.setattr(benchmark.time, "process_time", lambda: next(clock))
    measure = benchmark.timed(durations)
    for kind in ("train", "query"):
        request = SimpleNamespace(metadata=SimpleNamespace(message_type=kind))
        assert measure(request, None, lambda message, context: "reply") == "reply"
    assert durations == [2.5]
