"""SuperLink, ServerApp and SuperNodes as separate processes, some of which are killed.

The tests share one federation with TLS and authentication. Its edges are those of
examples/deployment, except that a client sleeps as long as its node config says, and writes the id
of its process into a file for the test.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "deployment"
PORT = 48100
WAIT_SECONDS = 150.0
# Longer than the 60 s without a heartbeat after which a killed client is reported.
TIMEOUT_SECONDS = 75.0
# The TTL and the strategy's own deadline end at the same time: either may be seen first.
OVERDUE = r"expected an answer, got none in \d+ s|expected a reply, got error 3: "
SHORT = "core-epochs=6 edge-epochs=3 distill-epochs=3"

pytestmark = pytest.mark.deployment

UNRELIABLE = '''"""Edges that sleep before they train, for as long as their node config says."""

import os
import time
from pathlib import Path

from deployment.task import part, recipe
from flwr_cloned_kd import EdgeClient, digits_cnn, edge_app


class Sleeper(EdgeClient):
    node = None

    def fit(self, parameters, config):
        Path(self.node["mark"]).write_text(str(os.getpid()))
        time.sleep(self.node["sleep"])
        return super().fit(parameters, config)


def client_fn(context):
    node, config = context.node_config, context.run_config
    data = part(1 + node["partition-id"], node["num-partitions"], config["seed"])
    client = Sleeper(digits_cnn(), data, recipe(config, "edge"))
    client.node = node
    return client


app = edge_app(client_fn)
'''


def deploy():
    """Import examples/deployment/deploy.py."""
    spec = importlib.util.spec_from_file_location("deploy", FOLDER / "deploy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait_for(condition, what, seconds=WAIT_SECONDS):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"expected {what} within {seconds:g} s"
        time.sleep(0.2)
    return result


class Life:
    """The federation of this module, its unreliable edges, and the results of its runs."""

    num_partitions = 8

    def __init__(self, federation, folder):
        self.federation = federation
        self.launcher = federation.launcher
        self.folder = folder
        self.app = folder / "app"
        shutil.copytree(FOLDER, self.app, ignore=shutil.ignore_patterns("__pycache__"))
        (self.app / "deployment" / "client_app.py").write_text(UNRELIABLE)
        self.num_edges = 0

    def join(self, name, sleep=0.0):
        """Register an edge and start its SuperNode."""
        self.federation.make_keys([name])
        self.federation.register(name)
        self.start(name, sleep)

    def start(self, name, sleep=0.0):
        self.federation.start_supernode(
            name, self.num_edges, self.num_partitions, sleep=sleep, mark=str(self.mark(name))
        )
        self.num_edges += 1

    def only_steady(self):
        """End all edges except the one that always answers."""
        self.launcher.end(*self.launcher.processes.keys() - {"superlink", "steady"})
        if "steady" not in self.launcher.processes:
            self.join("steady")

    def mark(self, name):
        return self.folder / f"{name}.pid"

    def trains(self, name):
        """Wait until this edge trains; return the id of the process that trains."""
        return int(wait_for(lambda: self.mark(name).exists() and self.mark(name).read_text(), name))

    def server_app(self):
        """Return the id of the process of the one ServerApp that runs."""
        running = processes(self.folder)
        (server_app,) = [pid for pid, command in running if b"flwr-serverapp" in command]
        return int(server_app)

    def run(self, name, **config):
        """Submit a run that writes its results into a folder of this name."""
        values = {
            "num-edges": self.num_partitions,
            "results": str(self.folder / name),
            **{key.replace("_", "-"): value for key, value in config.items()},
        }
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        return self.federation.submit(self.app, f"{SHORT} {pairs}")

    def rounds(self, name):
        """Return the rounds so far: edge -> row."""
        path = self.folder / name / "rounds.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {row["edge"]: row for row in map(json.loads, lines)}

    def finished(self, run_id, seconds=WAIT_SECONDS):
        """Wait for the end of a run; return its status."""
        return wait_for(
            lambda: (s := self.federation.status(run_id)).startswith("finished") and s,
            "the run to end",
            seconds,
        )

    def summary(self, name):
        return json.loads((self.folder / name / "summary.json").read_text())

    def log(self, name):
        return (self.launcher.logs / f"{name}.log").read_text()


def processes(mark):
    """List (id, command) of the processes in whose environment a text occurs."""
    marked = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            if str(mark).encode() in (folder / "environ").read_bytes():
                marked.append((folder.name, (folder / "cmdline").read_bytes()))
    return marked


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        script = deploy()
        with script.Launcher(folder, echo=True) as launcher:
            federation = script.Federation(launcher, folder, port=PORT)
            federation.make_keys([])
            federation.start_superlink()
            yield Life(federation, folder)
    # A client process whose SuperNode ended by itself notices that within seconds.
    wait_for(lambda: not processes(folder), "all processes to end", 20.0)


@pytest.fixture(scope="module")
def storm(life):
    """Run five edges, of which three never answer; return the rounds."""
    life.only_steady()
    for name in ("crash", "leave", "hang"):
        life.join(name, sleep=600.0)
    life.federation.wait_for_supernodes(4)
    life.federation.make_keys(["stranger"])
    life.start("stranger")
    run_id = life.run("storm", num_rounds=5, max_in_flight=5, timeout=TIMEOUT_SECONDS)
    os.kill(life.trains("crash"), signal.SIGKILL)
    life.trains("leave")
    life.launcher.end("leave")
    life.join("late")
    status = life.finished(run_id, TIMEOUT_SECONDS + WAIT_SECONDS)
    assert status == "finished:completed", life.log("superlink")[-5000:]
    return life.rounds("storm")


def test_the_run_completes_with_the_edges_that_answered(life, storm):
    assert {edge for edge, row in storm.items() if row["accepted"]} == {"steady", "late"}
    assert set(storm) == {"steady", "late", "crash", "leave", "hang"}
    summary = life.summary("storm")
    assert summary["version"] == 2
    assert summary["core-accuracy"] > max(0.5, summary["first-core-accuracy"])


def test_an_edge_that_is_killed_while_it_trains_is_refused(storm):
    # Error 8 comes a minute after the client's last heartbeat. If this machine starts the client
    # slowly, the deadline comes first.
    assert re.match(f"expected a reply, got error 8: |{OVERDUE}", storm["crash"]["cause"])


def test_an_edge_that_joins_late_is_used(storm):
    assert storm["late"]["round"] > storm["steady"]["round"]
    # The core was sent to it before or after the other answer; its answer is used in both cases.
    assert storm["late"]["staleness"] in (0, 1)


def test_an_edge_that_leaves_while_it_trains_is_refused(life, storm):
    assert re.match(f"expected a reply, got error 5: |{OVERDUE}", storm["leave"]["cause"])
    assert "SuperNode terminated gracefully" in life.log("leave")


def test_an_edge_that_hangs_past_its_deadline_is_refused(life, storm):
    assert re.match(OVERDUE, storm["hang"]["cause"])
    assert storm["hang"]["edge-seconds"] == pytest.approx(TIMEOUT_SECONDS, abs=15)
    # Its client process still runs and keeps its SuperNode busy.
    os.kill(life.trains("hang"), 0)


def test_a_supernode_that_is_not_registered_is_not_admitted(life, storm):
    assert life.launcher.processes["stranger"].wait(WAIT_SECONDS) == 1
    assert "Failed to activate SuperNode" in life.log("stranger")
    assert not life.mark("stranger").exists()
    assert len(life.federation.supernodes()) == 5


def test_a_killed_server_app_resumes_from_its_checkpoint(life):
    life.only_steady()
    life.join("slow", sleep=5.0)
    life.federation.wait_for_supernodes(2)
    settings = {
        "num_rounds": 2,
        "checkpoint": str(life.folder / "core.ckpt"),
        "timeout": TIMEOUT_SECONDS,
    }
    first = life.run("resumed", max_in_flight=1, **settings)
    # The SuperNodes train in the order in which they registered.
    life.trains("slow")
    assert list(life.rounds("resumed")) == ["steady"]
    before = life.mark("steady").stat().st_mtime_ns
    os.kill(life.server_app(), signal.SIGKILL)
    life.mark("slow").unlink()
    second = life.run("resumed", max_in_flight=1, **settings)
    assert life.finished(second) == "finished:completed", life.log("superlink")[-5000:]
    assert life.mark("slow").exists()
    assert life.mark("steady").stat().st_mtime_ns == before
    rounds = (life.folder / "resumed" / "rounds.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rounds]
    assert [(row["edge"], row["round"], row["accepted"]) for row in rows] == [
        ("steady", 1, 1.0),
        ("slow", 2, 1.0),
    ]
    assert life.summary("resumed")["version"] == 2
    assert life.finished(first) == "finished:failed"


def script(*arguments):
    return [sys.executable, str(FOLDER / "deploy.py"), *map(str, arguments)]


def test_the_script_runs_the_app_on_authenticated_supernodes(tmp_path):
    result = subprocess.run(
        script("--port", PORT + 20, "--run-config", f"{SHORT} max-in-flight=3 timeout=120.0"),
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rounds = re.findall(r"\[ROUND (\d)\] edge (edge-\d): edge 0", result.stdout)
    assert [number for number, _ in rounds] == ["1", "2", "3"]
    assert {edge for _, edge in rounds} == {"edge-0", "edge-1", "edge-2"}
    assert "finished:completed" in result.stdout
    summary = json.loads(re.search(r"\{[^}]*\}\s*$", result.stdout).group())
    assert summary["version"] == 3
    assert summary["core-accuracy"] > max(0.5, summary["first-core-accuracy"])
    # Private keys and processes are gone.
    assert not list(tmp_path.glob("flwr-*"))
    assert not processes(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_script_ends_all_its_processes(tmp_path, number):
    with subprocess.Popen(
        script("--insecure", "--num-edges", 1, "--port", PORT + 30),
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("$ flower-supernode"):
                break
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == {signal.SIGINT: 1, signal.SIGTERM: 143}[number], errors
    assert "Traceback" not in errors
    assert not processes(tmp_path)


def test_the_script_refuses_a_port_in_use(tmp_path):
    with socket.create_server(("127.0.0.1", PORT + 40)):
        result = subprocess.run(
            script("--port", PORT + 40, "--folder", tmp_path), capture_output=True, text=True
        )
    assert result.returncode == 1
    assert f"port {PORT + 40}: expected it to be free" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_script_shows_why_a_supernode_did_not_start(tmp_path):
    # The first SuperNode takes the port after the SuperLink's for its client processes.
    with socket.create_server(("127.0.0.1", PORT + 51)):
        result = subprocess.run(
            script("--insecure", "--num-edges", 1, "--port", PORT + 50, "--folder", tmp_path),
            capture_output=True,
            text=True,
        )
    assert result.returncode == 1
    assert "edge-0: expected it to start, got" in result.stderr
    assert "address already in use" in result.stderr
    assert not processes(tmp_path)


def test_the_script_has_a_help_page():
    result = subprocess.run(script("--help"), capture_output=True, text=True)
    assert result.returncode == 0
    assert "--insecure" in result.stdout
