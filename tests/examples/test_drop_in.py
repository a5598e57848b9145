"""examples/drop_in: the diffs apply, and what they make of a plain Flower app runs."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from tests.examples.test_examples import run as run_script
from tests.examples.test_examples import runner
from tests.helpers.fake_grid import FakeGrid

DROP_IN = Path(__file__).parents[2] / "examples" / "drop_in"
CONFIG = {"local-epochs": 2, "learning-rate": 0.1, "batch-size": 32, "num-server-rounds": 2}
STEPS = {"first": ["drop_in.diff"], "second": ["drop_in.diff", "clones.diff"]}


def copy(tmp_path, *diffs):
    """Copy the plain app, as `before`, and apply diffs to it."""
    folder = tmp_path / "app"
    for path in files(DROP_IN / "before"):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((DROP_IN / "before" / path).read_bytes())
    for diff in diffs:
        command = ["git", "apply", "--verbose", str(DROP_IN / diff)]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "Skipped" not in result.stderr
    return folder


def files(folder):
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if "__pycache__" not in path.parts)


@pytest.fixture
def load(monkeypatch):
    """Import the server and the client app of a folder."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "digits_app"]:
            del sys.modules[name]

    def modules(folder):
        forget()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        monkeypatch.syspath_prepend(str(folder))
        names = ("server_app", "client_app")
        return [importlib.import_module(f"digits_app.{name}").app for name in names]

    yield modules
    forget()


def run(server, client, config, num_edges=2):
    """Run an app in this process."""
    configs = [{"partition-id": edge, "num-partitions": 9} for edge in range(num_edges)]
    grid = FakeGrid([client] * num_edges, configs)
    for context in grid.contexts.values():
        context.run_config = config
    server(grid, Context(1, 0, {}, RecordDict(), config))
    return grid


def refused(lines):
    return [line for line in lines if "refused" in line]


def test_the_diff_changes_the_server_and_the_project_alone(tmp_path):
    changed = copy(tmp_path, "drop_in.diff")
    assert files(changed) == files(DROP_IN / "before")
    different = [
        path
        for path in files(changed)
        if (changed / path).read_bytes() != (DROP_IN / "before" / path).read_bytes()
    ]
    assert different == [Path("digits_app/server_app.py"), Path("pyproject.toml")]


@pytest.mark.parametrize("name", ["drop_in.diff", "clones.diff"])
def test_the_readme_shows_the_diff_as_it_is(name):
    shown = re.findall(r"```diff\n(.*?)```", (DROP_IN / "README.md").read_text(), re.S)
    assert (DROP_IN / name).read_text() in shown


def test_the_plain_app_runs(load, capsys):
    server, client = load(DROP_IN / "before")
    grid = run(server, client, CONFIG | {"fraction-evaluate": 1.0})
    assert sorted(grid.trained()) == [100, 100, 101, 101]
    assert re.search(r"Final accuracy: 0\.\d{3}", capsys.readouterr().out)


def test_the_changed_app_distils_plain_replies(load, tmp_path, capsys, flower_log):
    server, client = load(copy(tmp_path, "drop_in.diff"))
    grid = run(server, client, CONFIG)
    assert grid.trained() == [100, 101]
    assert not refused(flower_log)
    assert sum(line.startswith("[ROUND") and "consensus" not in line for line in flower_log) == 2
    accuracy = float(re.search(r"Final accuracy: (0\.\d{3})", capsys.readouterr().out).group(1))
    assert accuracy > 0.5  # chance is 0.1


def test_the_second_diff_makes_the_client_train_clones(load, tmp_path, capsys, flower_log):
    server, client = load(copy(tmp_path, "drop_in.diff", "clones.diff"))
    replies = []

    def keep(message, context):
        reply = client(message, context)
        if message.metadata.message_type == "train":
            replies.append(reply.content)
        return reply

    run(server, keep, CONFIG)
    assert len(replies) == 2
    for content in replies:
        biases = content["arrays"]["fc2.bias"].numpy()
        assert biases.shape == (3, 10)
        # The clones differ, because the client seeds its draws from the request.
        assert len({bias.tobytes() for bias in biases}) == 3
        assert "identical-clones" not in content["metrics"]
        assert content["metrics"].keys() == {"train_loss", "num-examples", "train-seconds"}
    assert not refused(flower_log)
    assert "Final accuracy: 0." in capsys.readouterr().out


def test_the_second_diff_keeps_the_training_loop_and_every_line_but_one(tmp_path):
    lines = (DROP_IN / "clones.diff").read_text().splitlines()
    removed = [line for line in lines if line.startswith("-") and not line.startswith("---")]
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    assert removed == ["-app = ClientApp()"]
    assert len(added) == 3  # the import, the mod and the seed
    first, second = (copy(tmp_path / name, *diffs) for name, diffs in STEPS.items())
    different = [
        path for path in files(first) if (first / path).read_bytes() != (second / path).read_bytes()
    ]
    assert different == [Path("digits_app/client_app.py")]


def test_the_script_measures_all_three_apps(tmp_path):
    """The script of the README, with few epochs."""
    examples = tmp_path / "drop_in"
    shutil.copytree(DROP_IN, examples, ignore=shutil.ignore_patterns("__pycache__"))
    project = examples / "before" / "pyproject.toml"
    project.write_text(project.read_text().replace("local-epochs = 10", "local-epochs = 1"))
    diff = examples / "drop_in.diff"
    diff.write_text(
        diff.read_text()
        .replace(" local-epochs = 10", " local-epochs = 1")
        .replace("epochs=40", "epochs=1")
    )
    result = run_script(examples / "measure.py", "--seeds", "1")
    assert result.returncode == 0, result.stderr
    names = [line.split(": ")[0] for line in result.stdout.splitlines()]
    assert names == ["before", "after", "after with clones.diff"]


@pytest.mark.simulation
@pytest.mark.parametrize(
    "diffs",
    # Every commit runs the last step under Flower, and the tests above run both in one process.
    [pytest.param(STEPS["first"], marks=pytest.mark.slow), STEPS["second"]],
    ids=STEPS,
)
def test_the_changed_app_runs_under_flwr_run(tmp_path, diffs, capsys):
    app = copy(tmp_path, *diffs)
    resources = {"num-supernodes": 3, "client-resources-num-cpus": 1}
    home = tmp_path / "home"
    home.mkdir()
    status, _ = runner().simulate(app, "num-server-rounds=3 local-epochs=2", resources, home)
    text = capsys.readouterr().out
    assert status == "finished:completed", text
    assert "Final accuracy: 0." in text
