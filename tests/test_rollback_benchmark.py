"""The benchmark of undoing an edge: what it measures, and its table."""

import json

from benchmarks import rollback


def test_every_pair_is_undone_with_the_same_bits(tmp_path, capsys):
    path = tmp_path / "rollback.json"
    options = ["--pairs", "3", "--clones", "1", "--epochs", "1", "--json", str(path)]
    rollback.main(options)
    results = json.loads(path.read_text())
    assert [pair["bit-equal"] for pair in results["undone"]] == [True] * 3
    assert len(results["round-bytes"]) == rollback.NUM_EDGES
    # A round holds the core before it and one clone, and the first one no memory.
    assert 2 * results["model-bytes"] < max(results["round-bytes"]) < 2.5 * results["model-bytes"]
    assert "rounds repeated" in capsys.readouterr().out
