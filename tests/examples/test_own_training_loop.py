"""examples/own_training_loop: a client app with its own loop, which one mod gives clones."""

import importlib
import json
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from flwr_cloned_kd import VirtualGrid
from tests.examples.test_examples import runner

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_training_loop"
SHORT = {"core-epochs": 2, "edge-epochs": 1, "num-edges": 3}


@pytest.fixture
def modules(monkeypatch):
    """Import the modules of the example."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    names = ("server_app", "client_app")
    yield [importlib.import_module(f"own_training_loop.{name}") for name in names]
    for name in [name for name in sys.modules if name.split(".")[0] == "own_training_loop"]:
        del sys.modules[name]


def defaults():
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    return project["tool"]["flwr"]["app"]["config"]


def run(server, client, config):
    """Run the app in this process; return the contents of the replies to cloned KD."""
    replies = []

    def edge(message, context):
        reply = client(message, replace(context, run_config=config))
        if "num-clones" in message.content.get("config", {}):
            replies.append(reply.content)
        return reply

    grid = VirtualGrid([edge] * config["num-edges"])
    server(grid, Context(1, 0, {}, RecordDict(), config))
    return replies


def test_edges_train_clones_in_their_own_loop_and_fedavg_runs_with_them(modules, tmp_path, capsys):
    server, client = modules
    config = defaults() | SHORT | {"results": str(tmp_path)}
    replies = run(server.app, client.app, config)
    assert len(replies) == 3
    for content in replies:
        weights = content["arrays"]["fc2.weight"].numpy()
        assert weights.shape == (3, 10, 64)
        assert "identical-clones" not in content["metrics"]
    rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    cloned = [row for row in rows if row["strategy"] == "cloned-kd"]
    assert [row["edge"] for row in cloned] == ["0", "1", "2"]
    assert all(row["accepted"] for row in cloned)
    bytes_of = {
        name: sum(row["bytes-down"] + row["bytes-up"] for row in rows if row["strategy"] == name)
        for name in ("cloned-kd", "fedavg")
    }
    # An ensemble has one header per array, as a model has. FedAvg sends more headers.
    assert bytes_of["fedavg"] == pytest.approx(bytes_of["cloned-kd"], rel=0.02)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert re.search(r"cloned-kd: accuracy 0\.\d{3} after 3 rounds", text)
    assert re.search(r"fedavg: accuracy 0\.\d{3} after 2 rounds", text)


def test_the_same_seed_gives_the_same_rounds(modules, tmp_path):
    server, client = modules

    def accuracies(name, seed):
        config = defaults() | SHORT | {"num-edges": 2, "seed": seed}
        run(server.app, client.app, config | {"results": str(tmp_path / name)})
        lines = (tmp_path / name / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line)["core-accuracy"] for line in lines]

    first = accuracies("first", 3)
    assert first == accuracies("second", 3)
    assert first != accuracies("third", 4)


@pytest.mark.simulation
@pytest.mark.slow  # The tests above run it in one process, and other apps run under Flower.
def test_the_app_runs_under_flwr_run(tmp_path, capsys):
    resources = {"num-supernodes": 3, "client-resources-num-cpus": 1}
    home = tmp_path / "home"
    home.mkdir()
    config = f"core-epochs=4 edge-epochs=2 num-edges=3 results='{tmp_path / 'results'}'"
    status, _ = runner().simulate(EXAMPLE, config, resources, home)
    text = capsys.readouterr().out
    assert status == "finished:completed", text
    assert "cloned-kd: accuracy 0." in text
    assert (tmp_path / "results" / "accuracy.png").exists()
