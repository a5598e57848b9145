"""The launcher of the examples: what it starts, it ends, and nothing else."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("launch")


def ids(path, count):
    """Wait until a script has written the ids of its processes; return them as processes."""
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_text().split()) < count:
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
    return [psutil.Process(int(word)) for word in path.read_text().split()]


def test_leaving_ends_all_descendants_and_no_other_process(launch, tmp_path):
    script = f"sleep 600 & echo $! >> {tmp_path}/ids; setsid sh -c 'echo $$ >> {tmp_path}/ids; "
    script += "sleep 600; true'"
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as bystander:
        with launch.Launcher(tmp_path) as launcher:
            launcher.start("first", ["sh", "-c", script])
            (leader,) = launcher.processes.values()
            children = ids(tmp_path / "ids", 2)
            assert all(launch.is_running(child) for child in children)
        assert not launcher.processes
        assert leader.returncode == -signal.SIGTERM
        assert not any(launch.is_running(child) for child in children)
        assert bystander.poll() is None
        bystander.kill()


def test_children_of_a_process_that_died_are_ended(launch, tmp_path):
    with launch.Launcher(tmp_path) as launcher:
        launcher.start("first", ["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/ids; exit 3"])
        (leader,) = launcher.processes.values()
        (child,) = ids(tmp_path / "ids", 1)
        while launch.is_running(leader):
            time.sleep(0.02)
        assert launch.is_running(child)
    assert not launch.is_running(child)
    assert leader.returncode == 3


def test_a_process_that_ignores_sigterm_is_killed(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "STOP_SECONDS", 0.2)
    script = f"trap '' TERM; echo $$ > {tmp_path}/ids; while :; do sleep 0.1; done"
    with launch.Launcher(tmp_path) as launcher:
        launcher.start("first", ["sh", "-c", script])
        (leader,) = launcher.processes.values()
        ids(tmp_path / "ids", 1)
    assert leader.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["flwr-serverapp", "flwr-simulation"])
def test_a_server_app_is_killed_before_its_edges(launch, tmp_path, monkeypatch, name):
    monkeypatch.setattr(launch, "STOP_SECONDS", 1.0)
    app = tmp_path / name  # ignores SIGTERM, as a strategy does that runs in a thread
    app.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, subprocess\n"
        "edge = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path('{tmp_path}/ids').write_text(str(edge.pid))\n"
        f"edge.wait()\npathlib.Path('{tmp_path}/refused').touch()\n"
    )
    app.chmod(0o755)
    with launch.Launcher(tmp_path) as launcher:
        launcher.start("superlink", ["sh", "-c", f"{app} & wait"])
        (edge,) = ids(tmp_path / "ids", 1)
    assert not launch.is_running(edge)
    assert not (tmp_path / "refused").exists()


def test_a_process_that_ends_before_it_answers_is_an_error(launch, tmp_path):
    with launch.Launcher(tmp_path) as launcher:
        launcher.start("first", ["sh", "-c", "echo no such database; exit 1"])
        with pytest.raises(RuntimeError, match="first: expected it to start, got\nno such data"):
            launcher.wait_for_health("first", "http://127.0.0.1:1/health")


def test_a_command_that_fails_is_an_error_with_its_output(launch, tmp_path):
    with (
        launch.Launcher(tmp_path) as launcher,
        pytest.raises(RuntimeError, match="exit status 4\nout\nerr\n"),
    ):
        launcher.call(["sh", "-c", "echo out; echo err >&2; exit 4"])


def test_a_stream_returns_run_id_exit_status_and_last_lines(launch, tmp_path, capsys):
    script = (
        "print('started run 12')\nfor line in range(50): print('run', line)\nraise SystemExit(5)"
    )
    with launch.Launcher(tmp_path) as launcher:
        run_id, exit_status, lines = launcher.stream([sys.executable, "-c", script])
    assert (run_id, exit_status) == ("12", 5)
    assert lines == [f"run {line}\n" for line in range(10, 50)]
    assert capsys.readouterr().out.startswith("started run 12\nrun 0\n")


def test_commands_are_printed_only_on_request(launch, tmp_path, capsys):
    with launch.Launcher(tmp_path, settings={"KEY": "two words"}, echo=True) as launcher:
        assert launcher.call(["sh", "-c", "echo $KEY $FLWR_HOME"]) == (
            f"two words {tmp_path}/flwr-home\n"
        )
    text = capsys.readouterr().out
    assert "$ export KEY='two words'\n" in text
    assert "$ sh -c 'echo $KEY $FLWR_HOME'\n" in text
    with launch.Launcher(tmp_path) as launcher:
        launcher.call(["true"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_context(launch, number):
    steps = []
    before = signal.signal(number, lambda *_: steps.append("signal"))
    try:
        with launch.uninterrupted():
            os.kill(os.getpid(), number)
            steps.append("body")
    finally:
        signal.signal(number, before)
    assert steps == ["body", "signal"]
