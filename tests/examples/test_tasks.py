"""examples/tabular and examples/text: other data, tasks and optimizers, compared with FedAvg.

The test under `flwr run` covers examples/frozen_backbone too.
"""

import importlib
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict

from flwr_cloned_kd import VirtualGrid
from tests.examples.test_examples import run as run_script
from tests.examples.test_examples import runner

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {"tabular": {"epochs": 10, "num-edges": 3}, "text": {"steps": 12, "num-edges": 2}}
SIMULATED = SHORT | {"frozen_backbone": {"epochs": 6, "num-edges": 2}}
names = pytest.mark.parametrize("name", SHORT)


@pytest.fixture
def load(monkeypatch):
    """Import a module of an example."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def module(name, part):
        monkeypatch.syspath_prepend(str(EXAMPLES / name))
        return importlib.import_module(f"{name}_app.{part}")

    yield module
    for loaded in [key for key in sys.modules if key.split(".")[0] in ("tabular_app", "text_app")]:
        del sys.modules[loaded]


def config_of(name, tmp_path):
    project = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())
    return project["tool"]["flwr"]["app"]["config"] | SHORT[name] | {"results": str(tmp_path)}


def run(load, name, config):
    """Run an app in this process; return the rows of its results."""
    server, client = (load(name, part).app for part in ("server_app", "client_app"))

    def edge(message, context):
        return client(message, replace(context, run_config=config))

    grid = VirtualGrid([edge] * config["num-edges"])
    server(grid, Context(1, 0, {}, RecordDict(), config))
    lines = (Path(config["results"]) / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@names
def test_an_example_runs_both_strategies_for_the_same_bytes(name, load, tmp_path, capsys):
    config = config_of(name, tmp_path)
    rows = run(load, name, config)
    cloned, averaged = (
        [row for row in rows if row["strategy"] == strategy] for strategy in ("cloned-kd", "fedavg")
    )
    assert len(cloned) == config["num-edges"]
    assert all(row["accepted"] and row["num-clones"] == 3 for row in cloned)
    num_bytes = [
        sum(row["bytes-down"] + row["bytes-up"] for row in rows) for rows in (cloned, averaged)
    ]
    # FedAvg sends the header of each array more often.
    assert num_bytes[0] == pytest.approx(num_bytes[1], rel=0.05)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    first = float(text.split("first core: accuracy ")[1].split()[0])
    assert cloned[-1]["core-accuracy"] > first


@pytest.mark.parametrize(("name", "key"), [("tabular", "epochs"), ("text", "steps")])
def test_a_text_in_the_place_of_a_number_is_refused_by_its_key(name, key, load, tmp_path):
    config = config_of(name, tmp_path) | {key: "many"}
    expected = f"run-config {key}: expected an integer of at least 0, got 'many'"
    with pytest.raises(ValueError, match=expected):
        run(load, name, config)


def test_the_parts_of_the_table_are_disjoint(load):
    parts, held_out = load("tabular", "task").load(9, seed=3)
    rows = [tuple(row) for table, _ in [*parts, held_out] for row in table]
    assert len(rows) == len(set(rows)) == 569
    assert held_out[0].dtype == "float64"


def test_the_label_of_a_character_is_the_next_one(load):
    task = load("text", "task")
    inputs, labels = task.encode(["abc", "b" * (task.LENGTH + 1)])
    a, b, c = (1 + task.CHARACTERS.index(letter) for letter in "abc")
    assert inputs["input_ids"][0, :4].tolist() == [a, b, c, 0]
    assert inputs["attention_mask"][0, :4].tolist() == [1, 1, 1, 0]
    assert labels[0, :3].tolist() == [b, c, task.IGNORED]
    assert labels[1].tolist() == [b] * task.LENGTH


def test_no_character_is_predicted_from_a_later_one(load):
    task = load("text", "task")
    model, (_, held_out) = task.build_model(0).eval(), task.load(9, seed=0)
    inputs = {key: tensor[:4] for key, tensor in held_out[0].items()}
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 10:] = 5
    full = {"attention_mask": torch.ones_like(inputs["attention_mask"])}
    with torch.no_grad():
        before, after = (model(**(x | full))["logits"] for x in (inputs, changed))
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-2)


@pytest.mark.parametrize(
    "name",
    # Every commit runs one of the apps under Flower; the tests above run the others in one process.
    [pytest.param(name, marks=pytest.mark.slow if name in SHORT else ()) for name in SIMULATED],
)
@pytest.mark.simulation
def test_an_example_runs_under_flwr_run(name, tmp_path, capsys):
    resources = {"num-supernodes": SIMULATED[name]["num-edges"], "client-resources-num-cpus": 1}
    home = tmp_path / "home"
    home.mkdir()
    options = SIMULATED[name] | {"results": f"'{tmp_path / 'results'}'"}
    if name == "frozen_backbone":
        backbone = tmp_path / "backbone.safetensors"
        run_script(EXAMPLES / name / "pretrain.py", backbone).check_returncode()
        options["backbone"] = f"'{backbone}'"
    config = " ".join(f"{key}={value}" for key, value in options.items())
    status, _ = runner().simulate(EXAMPLES / name, config, resources, home)
    text = capsys.readouterr().out
    assert status == "finished:completed", text
    assert "cloned-kd: accuracy 0." in text
    assert (tmp_path / "results" / "accuracy.png").exists()
