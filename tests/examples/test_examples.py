"""The examples, started by the commands of their pages."""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.common.config import parse_config_args

from flwr_cloned_kd import VARIANTS, edge_seed, fold_in, load_digits, take, train_edge
from flwr_cloned_kd.apps.build import build_core, recipe, split
from flwr_cloned_kd.apps.settings import Settings
from tests.examples.test_deployment import processes

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
SHORT = "core-epochs=6 edge-epochs=4 distill-epochs=4 baseline-rounds=1"


def run(*arguments, timeout=300):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_app(tmp_path, run_config):
    return run(
        EXAMPLES / "run.py", "quickstart_digits", "--results", tmp_path, "--run-config", run_config
    )


def runner():
    """examples/run.py as a module. Like the script, it finds launch.py in its own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("run")


def rows(tmp_path):
    """Read every round of the only run, without the fields that depend on the clock."""
    (path,) = tmp_path.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if "seconds" not in key and key != "time"}
        for row in lines
    ]


def plain_accuracies(settings):
    """Run Algorithm 1 without Flower by the settings of the app."""
    core = build_core(settings)
    variant = VARIANTS[settings.variant]
    train, _ = load_digits()
    parts = split(settings, train[1])
    state = core.state(core.pretrain())
    rows = []
    for server_round in range(1, settings.num_edges + 1):
        edge = train_edge(
            core.model,
            state.params,
            take(train, parts[server_round]),
            recipe(settings, settings.edge_epochs),
            num_clones=variant.num_clones,
            seed=edge_seed(core.seed, server_round),
        )
        state, metrics = core.distill(state, edge)
        rows.append(metrics)
    return rows


@pytest.mark.simulation
def test_a_run_and_the_plain_loop_give_the_same_rounds(tmp_path):
    result = run_app(tmp_path, f"{SHORT} seed=5 strategy='cloned-kd,fedavg,fedprox'")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Comparison (first core:" in result.stdout
    assert "Final core accuracy:" in result.stdout
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "events-cloned-kd.jsonl",
        "metrics.jsonl",
        "summary.json",
        "accuracy.png",
        "timeline-cloned-kd.png",
    }
    settings = Settings(core_epochs=6, edge_epochs=4, distill_epochs=4, seed=5)
    all_rows = rows(tmp_path)
    cloned = [row for row in all_rows if row["strategy"] == "cloned-kd"]
    assert cloned == all_rows[:9]
    assert [row["edge"] for row in cloned] == [str(edge) for edge in range(9)]
    for row, expected in zip(cloned, plain_accuracies(settings), strict=True):
        assert {key: row[key] for key in expected} == expected
    assert [row["strategy"] for row in all_rows[9:]] == ["fedavg", "fedprox"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("variant='CEN'", "run-config variant: expected one of IsPP, IPP"),
        ("varaint='CEM'", "run-config varaint: expected a known key (nearest: variant)"),
        ("lr=", "--run-config: expected key=value pairs, got 'lr='"),
        ("model=resnet-8", "expected TOML, such as key='text' or key=1, got 'model=resnet-8'"),
    ],
)
def test_a_wrong_setting_is_an_error_before_a_process_starts(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        runner().check(EXAMPLES / "quickstart_digits", runner().parse(["seed=1", config]))


def started(monkeypatch, *arguments):
    """Start no simulation; return its settings as Flower reads them, and its resources.

    If the arguments have a mistake, return the exit status.
    """
    script = runner()
    simulations = []

    def simulate(app, overrides, resources, home):
        simulations.append((parse_config_args([overrides]), resources))
        return "finished:failed", ["stopped by the test"]

    monkeypatch.setattr(script, "simulate", simulate)
    monkeypatch.setattr(sys, "argv", ["run.py", "quickstart_digits", *map(str, arguments)])
    exit_status = script.main()
    return simulations[0] if simulations else exit_status


@pytest.mark.parametrize("page", sorted(EXAMPLES.glob("*/README.md")), ids=lambda p: p.parent.name)
def test_an_example_is_installed_from_this_repository(page):
    commands = re.findall(r"^pip install .*$", page.read_text(), re.M)
    assert commands
    assert all(re.fullmatch(r'pip install -e "\.\./\.\.\[[a-z,]+\]"', line) for line in commands)


def test_the_runner_takes_edges_and_results_from_the_run_config(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config, resources = started(monkeypatch, "--run-config", "num-edges=5 results='/tmp/x' seed=3")
    assert config == {"num-edges": 5, "results": "/tmp/x", "seed": 3}
    assert resources["num-supernodes"] == 5
    config, resources = started(monkeypatch, "--run-config", "num-edges=5", "--num-edges", 4)
    assert (config["num-edges"], resources["num-supernodes"]) == (4, 4)
    config, resources = started(monkeypatch, "--results", "there")
    assert config == {"results": str(tmp_path / "there")}
    assert resources["num-supernodes"] == 9
    assert started(monkeypatch)[0] == {"results": str(tmp_path / "results")}


def test_the_runner_gives_edges_cpus_and_gpus_in_the_form_that_flower_takes(monkeypatch):
    _, resources = started(monkeypatch, "--num-cpus", 2, "--num-gpus", 0.25)
    pairs = " ".join(f"{key}={value}" for key, value in resources.items())
    assert pairs.endswith("client-resources-num-cpus=2 client-resources-num-gpus=0.25")


def test_the_cause_of_a_failed_run_is_the_innermost_error():
    lines = [
        "ValueError: ActorPool is empty. Check `num_cpus`",
        '    raise RuntimeError("Simulation Runtime crashed.") from ex',
        "RuntimeError: Simulation Runtime crashed.",
        "RuntimeError: An error was encountered. Ending simulation.",
        "\x1b[91mERROR \x1b[0m:     Exit Code: 700",
    ]
    assert runner().cause(lines) == lines[0]


def test_the_runner_takes_files_and_pairs_together(monkeypatch, tmp_path):
    file = tmp_path / "my.toml"
    lines = ["num-edges = 3", "lr = 0.05", "cuda-graphs = true", 'data-path = "Ann\'s"  # a string']
    file.write_text("\n".join(lines))
    config, resources = started(monkeypatch, "--run-config", file, "--run-config", "lr=0.1")
    config.pop("results")
    assert config == {"num-edges": 3, "lr": 0.1, "cuda-graphs": True, "data-path": "Ann's"}
    assert resources["num-supernodes"] == 3


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("dataset='npz' data-path='my.npz'", "my.npz"),
        ("dataset='cifar100' data-path='images'", "images"),
        ("dataset='cifar100'", "data"),
    ],
)
def test_the_runner_finds_data_from_the_present_folder(monkeypatch, tmp_path, config, expected):
    monkeypatch.chdir(tmp_path)
    Path("my.npz").touch()
    assert started(monkeypatch, "--run-config", config)[0]["data-path"] == str(tmp_path / expected)


def test_the_runner_leaves_the_name_of_a_huggingface_dataset(monkeypatch):
    config, _ = started(monkeypatch, "--run-config", "dataset='huggingface' data-path='me/mine'")
    assert config["data-path"] == "me/mine"


def test_a_path_with_an_apostrophe_arrives_unchanged(monkeypatch, tmp_path):
    config, _ = started(monkeypatch, "--results", tmp_path / "Ann's")
    assert config["results"] == str(tmp_path / "Ann's")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run-config", "gone.toml"], "--run-config gone.toml: [Errno 2] No such file"),
        (["--results", 'Ann\'s "x"'], "results: expected one kind of quotes at most"),
        (["--num-edges", "0"], "run-config num-edges: expected at least 1, got 0"),
        (
            ["--run-config", "dataset='npz' data-path='/nowhere/x.npz'"],
            "run-config data-path: expected an archive, got no file '/nowhere/x.npz'",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, capsys, arguments, message):
    assert started(monkeypatch, *arguments) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(("folder", "got"), [(EXAMPLES / "tabular", "epochs"), (ROOT, "none")])
def test_the_runner_names_an_app_that_it_cannot_run(folder, got):
    message = f"expected the settings of the quickstart, got {got}"
    with pytest.raises(ValueError, match=message):
        runner().check(folder, {})


def test_a_wrong_setting_ends_the_runner(tmp_path):
    result = run_app(tmp_path, "varaint='CEM'")
    assert result.returncode == 2
    assert "run-config varaint: expected a known key (nearest: variant)" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.simulation
def test_a_run_that_fails_inside_the_app_exits_with_its_cause(tmp_path):
    (tmp_path / "x.npz").write_text("no archive")
    result = run_app(tmp_path, f"dataset='npz' data-path='{tmp_path}/x.npz'")
    assert result.returncode == 1
    assert "The run failed (finished:failed)" in result.stderr
    assert f"ValueError: {tmp_path}/x.npz: expected an .npz archive of numbers" in result.stderr


@pytest.mark.simulation
def test_a_terminated_runner_ends_the_processes_of_its_run(tmp_path):
    command = [sys.executable, str(EXAMPLES / "run.py"), "quickstart_digits"]
    command += ["--results", str(tmp_path / "results"), "--run-config", SHORT]
    # Ray's sockets need a short path.
    folders = {"TMPDIR": str(tmp_path), "RAY_TMPDIR": tempfile.gettempdir()}
    with subprocess.Popen(
        command,
        env=os.environ | ENVIRONMENT | folders,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if "[ROUND 1]" in line:
                break
        process.terminate()
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert not processes(tmp_path)
    assert not list(tmp_path.glob("flwr-*"))


SIMULATION = """
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from tests.helpers.federation import app, small_core
from flwr_cloned_kd import ClonedKD

server = ServerApp()

@server.main()
def main(grid, context):
    core = small_core()
    show = lambda row: print(row["edge"], row["accepted"])
    strategy = ClonedKD(core, num_clones=2, on_round=show)
    strategy.start(grid, ArrayRecord(core.pretrain()), num_rounds=3, timeout=120)
    print("version", strategy.state.version)

if __name__ == "__main__":
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, app(), num_supernodes=3, backend_config=resources)
"""


@pytest.mark.simulation
def test_a_ray_simulation_absorbs_every_edge(tmp_path):
    script = tmp_path / "simulate.py"
    script.write_text(f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\n{SIMULATION}")
    result = run(script)
    assert result.returncode == 0, result.stdout + result.stderr
    for line in ("0 1.0", "1 1.0", "2 1.0", "version 3"):
        assert line in result.stdout


def test_the_loop_without_flower_runs():
    result = run(
        EXAMPLES / "algorithm1.py", "--epochs", "2", "--core-epochs", "2", "--num-edges", "2"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("core") >= 3


def test_the_loop_without_flower_has_a_help_page():
    result = run(EXAMPLES / "algorithm1.py", "--help")
    assert result.returncode == 0
    assert "--variant" in result.stdout


def test_seeds_of_one_purpose_do_not_collide_with_another():
    assert len({fold_in(0, "phase-1", 1), fold_in(0, "phase-2", 1), edge_seed(1, 1)}) == 3
    assert edge_seed(0, 1) == fold_in(0, "phase-1", 1)


def test_an_edge_of_the_deployment_splits_data_as_its_server(monkeypatch):
    """An edge must ignore num-partitions: split into two, edge 0 would get rows of the core."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(EXAMPLES / "deployment"))
    make = importlib.import_module("deployment.client_app").client_fn
    part = importlib.import_module("deployment.task").part
    config = {"num-edges": 3, "edge-epochs": 1, "seed": 4}

    def edge(partition):
        node = {"partition-id": partition, "num-partitions": 2}
        return make(Context(1, 5, node, RecordDict(), config))

    for partition in range(3):
        inputs, labels = part(1 + partition, 3, 4)
        assert torch.equal(edge(partition).dataset[0], inputs)
        assert torch.equal(edge(partition).dataset[1], labels)
    with pytest.raises(ValueError, match=r"partition-id: expected below num-edges \(3\), got 3"):
        edge(3)
