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
    options = ["--epochs", "2", "--min-retained", "0.8", "--seeds", "1"]
    results = recovery.main([*options, "--json", str(tmp_path / "r.json")])
    rounds = results["2 epochs, start keeps 0.8"]
    assert [labels for labels, _ in trained] == [[*range(10)], *([label] for label in range(10))]
    assert len({seed for _, seed in trained}) == 11
    assert len(rounds) == 10
    # 144 core samples in batches of 128 are 2 steps an epoch.
    assert all(one["num_steps"] == 4 and -1 < one["change"] < 1 for one in rounds)
    assert json.loads((tmp_path / "r.json").read_text()) == results
    assert "of 10" in capsys.readouterr().out
