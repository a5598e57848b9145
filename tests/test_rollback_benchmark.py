"""The benchmark of undoing an edge: what it measures, and its table."""

import json

from benchmarks import rollback
from flwr_cloned_kd import take
from tests.helpers.federation import TEST, TRAIN


def test_every_pair_is_undone_with_the_same_bits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rollback, "NUM_EDGES", 4)
    monkeypatch.setattr(rollback, "load_digits", lambda: (take(TRAIN, range(100)), TEST))
    path = tmp_path / "rollback.json"
    options = ["--pairs", "3", "--clones", "1", "--epochs", "1", "--json", str(path)]
    rollback.main(options)
    results = json.loads(path.read_text())
    assert [pair["bit-equal"] for pair in results["undone"]] == [True] * 3
    assert len(results["round-bytes"]) == rollback.NUM_EDGES
    # A round holds the core before it and one clone, and the first one no memory.
    assert 2 * results["model-bytes"] < max(results["round-bytes"]) < 2.5 * results["model-bytes"]
    assert "rounds repeated" in capsys.readouterr().out
