"""examples/frozen_backbone: a backbone from a file, and heads that travel alone."""

import importlib
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from safetensors.torch import load_file, save_file

from flwr_cloned_kd import VirtualGrid

FOLDER = Path(__file__).parents[2] / "examples" / "frozen_backbone"
SHORT = {"epochs": 6, "num-edges": 3}
HEAD_BYTES = 4 * 2570


@pytest.fixture(scope="module")
def load():
    """Import a module of the example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module
    for name in [
        key for key in sys.modules if key.split(".")[0] in ("frozen_backbone_app", "pretrain")
    ]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def backbone(load, tmp_path_factory):
    """Train the backbone as the README says."""
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    load("pretrain").main(str(path))
    return path


def run(load, tmp_path, backbone_of_edge):
    """Run the app in this process; return the rows of its results."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    config = project["tool"]["flwr"]["app"]["config"] | SHORT | {"results": str(tmp_path)}
    server = load("frozen_backbone_app.server_app").app
    client = load("frozen_backbone_app.client_app").app

    def edge(index):
        own = config | {"backbone": str(backbone_of_edge(index))}
        return lambda message, context: client(message, replace(context, run_config=own))

    grid = VirtualGrid([edge(index) for index in range(config["num-edges"])])
    own = config | {"backbone": str(backbone_of_edge(0))}
    server(grid, Context(1, 0, {}, RecordDict(), own))
    return [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]


def test_only_heads_travel_and_the_core_learns(load, tmp_path, backbone, capsys):
    rows = run(load, tmp_path, lambda index: backbone)
    cloned = [row for row in rows if row["strategy"] == "cloned-kd"]
    assert all(row["accepted"] for row in cloned)
    assert all(HEAD_BYTES < row["bytes-down"] < HEAD_BYTES + 1000 for row in cloned)
    first = float(capsys.readouterr().out.split("first core: accuracy ")[1].split()[0])
    assert cloned[-1]["core-accuracy"] > first
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_an_edge_with_another_backbone_is_refused(load, tmp_path, backbone):
    other = tmp_path / "other.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(backbone).items()}, other)
    rows = run(load, tmp_path, lambda index: other if index == 1 else backbone)
    refused = [row for row in rows if row["strategy"] == "cloned-kd" and not row["accepted"]]
    assert [row["edge"] for row in refused] == ["1"]
    assert "frozen-digest" in refused[0]["cause"]


def test_a_missing_file_is_named(load):
    with pytest.raises(ValueError, match=r"backbone: expected the absolute path .* got 'nowhere'"):
        load("frozen_backbone_app.task").build_model("nowhere", 0)
