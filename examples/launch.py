"""Start and end Flower's commands as processes, for `run.py` and `deployment/deploy.py`."""

import contextlib
import json
import os
import re
import shlex
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

try:
    import psutil
except ImportError:
    sys.exit('The launcher needs psutil: pip install "flwr-cloned-kd[launch]"')

START_SECONDS = 120.0
STOP_SECONDS = 20.0
MAX_LINES = 40
"""Lines of a run's log that `Launcher.stream` keeps."""
SERVER_APPS = ("flwr-serverapp", "flwr-simulation")
"""Names of the processes in which Flower runs a ServerApp."""


class Launcher:
    """Start Flower's commands in their own environment; leaving the context ends all of them.

    Args:
        folder: absolute; gets `flwr-home`, which becomes FLWR_HOME, and `logs`, with the output of
            each process as `NAME.log`.
        settings: more environment variables.
        echo: print each command before it runs, in a form that a shell takes.
    """

    def __init__(
        self, folder: Path, *, settings: Mapping[str, str] | None = None, echo: bool = False
    ) -> None:
        self.home = folder / "flwr-home"
        self.logs = folder / "logs"
        self.processes: dict[str, psutil.Popen] = {}
        self._echo = echo
        variables = {
            "FLWR_HOME": str(self.home),
            # The SuperLink would install the app's dependencies anew for every run.
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            **(settings or {}),
        }
        commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._environment = os.environ | variables | {"PATH": commands, "PYTHONUNBUFFERED": "1"}
        for name, value in variables.items():
            self.say(f"export {name}={shlex.quote(value)}")

    def __enter__(self) -> Self:
        self.home.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            # The first process is the SuperLink. The others sign off from it, so it ends last.
            self.end(*list(self.processes)[1:])
            self.end(*self.processes)

    def say(self, command: str) -> None:
        """Print a command if commands are to be printed."""
        if self._echo:
            print(f"$ {command}", flush=True)

    def start(self, name: str, command: Sequence[object]) -> None:
        """Start a process that runs until `end`."""
        words = [str(word) for word in command]
        self.say(f"{shlex.join(words)} &")
        with uninterrupted(), (self.logs / f"{name}.log").open("ab") as log:
            # A session of its own: Ctrl-C reaches this script alone, which then ends it in order.
            self.processes[name] = psutil.Popen(
                words, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for_health(self, name: str, url: str, context: ssl.SSLContext | None = None) -> None:
        """Wait until a process answers at a URL.

        Raises:
            RuntimeError: if the process ends or does not answer in time.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            self.check(name, deadline)
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(url, timeout=2, context=context).close()
                return
            time.sleep(0.2)

    def check(self, name: str, deadline: float) -> None:
        """Check that a process runs and that a deadline of `time.monotonic` has not passed.

        Raises:
            RuntimeError: with the end of the process's log, if not.
        """
        if not is_running(self.processes[name]) or time.monotonic() > deadline:
            log = (self.logs / f"{name}.log").read_text()
            raise RuntimeError(f"{name}: expected it to start, got\n{log[-2000:]}")

    def call(self, command: Sequence[str]) -> str:
        """Run a command to its end and return its output.

        Raises:
            RuntimeError: with the output, if the exit status is not 0.
        """
        self.say(shlex.join(command))
        result = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(
                f"{shlex.join(command)}: exit status {result.returncode}\n"
                f"{result.stdout}{result.stderr}"
            )
        return result.stdout

    def query(self, command: Sequence[str]) -> dict[str, Any]:
        """Run a command of `flwr` and return the JSON object that it prints."""
        output: dict[str, Any] = json.loads(self.call([*command, "--format", "json"]))
        return output

    def status(self, run_id: str, *connection: str) -> str:
        """Return "finished:completed", "finished:failed", "running", ..."""
        command = ["flwr", "list", *connection, "--run-id", run_id]
        return str(self.query(command)["runs"][0]["status"])

    def stream(self, command: Sequence[str]) -> tuple[str, int, list[str]]:
        """Run `flwr run --stream` to its end and print its output.

        Returns:
            the run's id, "" if it has none; the exit status, which is 0 also for a run that
            failed; the last lines of the output.
        """
        self.say(shlex.join(command))
        run_id = ""
        lines = deque[str](maxlen=MAX_LINES)
        with subprocess.Popen(
            command,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                for line in process.stdout or ():
                    print(line, end="", flush=True)
                    lines.append(line)
                    if not run_id and (match := re.search(r"run (\d+)", line)):
                        run_id = match.group(1)
            except BaseException:
                # Leaving the context of a Popen waits for its end.
                process.kill()
                raise
        return run_id, process.returncode, list(lines)

    def end(self, *names: str) -> None:
        """End processes and all that they started.

        A ServerApp among them is killed first. If the edges ended before it, it would record their
        errors as refused rounds, and a run that resumes from its checkpoint would not ask these
        edges again. Then the named processes get SIGTERM, so that each can end its own children in
        order. Then the processes that are left of them get SIGTERM, and at last SIGKILL.
        """
        with uninterrupted():
            # The id of a process that was waited for may belong to another process by now.
            processes = [self.processes.pop(name) for name in names]
            leaders = [process for process in processes if process.returncode is None]
            families = [member for leader in leaders for member in family(leader)]
            _stop([member for member in families if is_server_app(member)], signal.SIGKILL)
            _stop(leaders, signal.SIGTERM)
            _stop(families, signal.SIGTERM)
            _stop(families, signal.SIGKILL)
            for leader in leaders:
                leader.wait()


def family(leader: psutil.Process) -> list[psutil.Process]:
    """List the processes of a leader's group and all their descendants, the leader included.

    Descendants alone are not enough: when a process dies, its children get another parent, but
    they stay in its group. The group alone is not enough: some descendants start their own group.
    """
    members = set[psutil.Process]()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == leader.pid:
                members |= {process, *process.children(recursive=True)}
    return list(members)


def is_server_app(process: psutil.Process) -> bool:
    """Return whether a process runs a ServerApp."""
    try:
        return process.name() in SERVER_APPS
    except psutil.NoSuchProcess:
        return False


def is_running(process: psutil.Process) -> bool:
    """Return whether a process has not ended. Unlike `poll`, this does not free its id."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _stop(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    """Send a signal and wait until all have ended, for `STOP_SECONDS` at most."""
    running = [process for process in processes if is_running(process)]
    for process in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    deadline = time.monotonic() + STOP_SECONDS
    while any(map(is_running, running)) and time.monotonic() < deadline:
        time.sleep(0.1)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM until the end of the context.

    Without it, a process that has started but is not recorded yet would not be ended.
    """
    caught: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for number in caught:
            signal.raise_signal(number)


def exit_with(main: Callable[[], int], interrupted: str) -> NoReturn:
    """Run a script and exit with its status; Ctrl-C and SIGTERM leave its contexts first.

    Args:
        main: returns the exit status; a RuntimeError is printed, and the status is 1.
        interrupted: what to print after Ctrl-C.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"\n{interrupted}")
