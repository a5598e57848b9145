import json

import pytest

from benchmarks import recovery
from flwr_cloned_kd import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_class_is_once_the_only_class_of_an_edge(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recovery, "EDGE_RECIPE", Recipe(epochs=1))
    monkeypatch.setattr(recovery, "NUM_HONEST", 1)
    trained = []
    train_edge = recovery.train_edge

    def record(model, params, data, recipe, *, seed):
        trained.append((data[1].unique().tolist(), seed))
        return train_edge(model, params, data, recipe, seed=seed, num_clones=1)

    monkeypatch.setattr(recovery, "train_edge", record)
    results = recovery.main(["--epochs", "2", "--seeds", "1", "--json", str(tmp_path / "r.json")])
    assert [labels for labels, _ in trained] == [[*range(10)], *([label] for label in range(10))]
    assert len({seed for _, seed in trained}) == 11
    assert len(results["2"]) == 10
    # 144 core samples in batches of 128 are 2 steps an epoch.
    assert all(one["num_steps"] == 4 and -1 < one["change"] < 1 for one in results["2"])
    assert json.loads((tmp_path / "r.json").read_text()) == results
    assert "of 10" in capsys.readouterr().out
