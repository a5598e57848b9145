"""Run an example app in Flower's simulation, and tell whether it worked.

`flwr run` leaves a SuperLink behind and exits with 0 even if the app raised. This script starts
a SuperLink of its own, streams the run, ends the SuperLink, and exits with 1 and the cause if the
run failed.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path
from typing import Any

from flwr_cloned_kd.apps.settings import Settings

START_SECONDS = 60.0
STOP_SECONDS = 20.0
LAST_LINES = 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("app", type=Path, help="folder of the app, such as quickstart_digits")
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="KEYS",
        help="settings to override, as for `flwr run`: \"variant='CPP' seed=1\"",
    )
    parser.add_argument(
        "--num-edges", type=int, help="simulated nodes (default: num-edges of the run-config)"
    )
    parser.add_argument(
        "--num-cpus", type=float, default=1, help="cores an edge asks for (default: 1)"
    )
    parser.add_argument(
        "--num-gpus", type=float, default=0, help="GPUs an edge asks for (default: 0)"
    )
    parser.add_argument(
        "--results", type=Path, help="folder (default: results of the run-config, or ./results)"
    )
    arguments = parser.parse_args()
    # A terminated script must end its SuperLink too, as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = find_app(arguments.app)
    try:
        config = parse(arguments.run_config)
        if arguments.num_edges is not None:
            config["num-edges"] = arguments.num_edges
        settings = check(folder, config)
        results = Path(arguments.results or settings.results or "results").absolute()
        overrides = as_pairs(config | {"results": str(results)})
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    resources = {
        "num-supernodes": settings.num_edges,
        "client-resources-num-cpus": arguments.num_cpus,
        "client-resources-num-gpus": arguments.num_gpus,
    }
    with tempfile.TemporaryDirectory(prefix="flwr-") as home:
        before = set(results.glob("*/summary.json"))
        status, tail = simulate(folder, overrides, resources, Path(home))
        written = sorted(set(results.glob("*/summary.json")) - before)
    if status != "finished:completed" or not written:
        print(f"\nThe run failed ({status}): {cause(tail)}", file=sys.stderr)
        return 1
    summary = json.loads(written[-1].read_text())
    print(f"\nFinal core accuracy: {summary['final_core_accuracy']:.3f} "
          f"(first core: {summary['first_core_accuracy']:.3f})")  # fmt: skip
    print(f"Results: {written[-1].parent}")
    return 0


def find_app(app: Path) -> Path:
    """Find the app by path, or by name beside this script."""
    for folder in (app, Path(__file__).parent / app):
        if (folder / "pyproject.toml").is_file():
            return folder.absolute()
    sys.exit(f"{app}: expected a folder with a pyproject.toml")


def parse(overrides: list[str]) -> dict[str, Any]:
    """Read files and key=value pairs as `flwr run` does, but both at once."""
    config: dict[str, Any] = {}
    for override in overrides:
        try:
            if Path(override).suffix == ".toml":
                text = Path(override).expanduser().read_text()
            else:
                pairs = r"""[\w-]+\s*=\s*(?:'[^']*'|"[^"]*"|[^\s'"]+)"""
                if rest := re.sub(pairs, "", override).strip():
                    raise ValueError(f"--run-config: expected key=value pairs, got {rest!r}")
                text = "\n".join(re.findall(pairs, override))
            config |= tomllib.loads(text)
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"--run-config {override}: {error}") from None
    return config


def check(app: Path, config: dict[str, Any]) -> Settings:
    """Refuse a wrong setting at once; Flower would say "Invalid run configuration" and no more."""
    defaults = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return Settings.read(defaults | config)


def as_pairs(config: dict[str, Any]) -> str:
    """Write settings as `flwr run` takes them: its strings have one kind of quotes."""
    words = []
    for key, value in config.items():
        if not isinstance(value, str):
            words.append(f"{key}={json.dumps(value)}")
        elif "'" not in value:
            words.append(f"{key}='{value}'")
        elif '"' not in value:
            words.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
        else:
            raise ValueError(f"{key}: expected one kind of quotes at most, got {value!r}")
    return " ".join(words)


def simulate(
    app: Path, overrides: str, resources: dict[str, float], home: Path
) -> tuple[str, list[str]]:
    """Return the run's status, "finished:completed" if all is well, and its last lines."""
    port = free_port()
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    log = home / "superlink.log"
    with log.open("w") as file:
        superlink = subprocess.Popen(
            ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
             "--host", "127.0.0.1", "--port", str(port), "--database", str(home / "state.db")],
            env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(port, superlink, log)
        return stream(app, overrides, resources, environment)
    finally:
        end(superlink)


def stream(
    app: Path, overrides: str, resources: dict[str, float], environment: dict[str, str]
) -> tuple[str, list[str]]:
    """Run the app, printing what it says."""
    command = ["flwr", "run", str(app), "--stream", "--run-config", overrides]
    federation = " ".join(f"{key}={value}" for key, value in resources.items())
    command += ["--federation-config", federation]
    run_id, tail = "", deque[str](maxlen=LAST_LINES)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                tail.append(line)
                found = re.search(r"run (\d+)", line)
                run_id = run_id or (found.group(1) if found else "")
        except BaseException:  # asked to stop: Popen would wait for the stream's end
            process.terminate()
            raise
    if not run_id:
        return f"flwr run exited with {process.returncode}", list(tail)
    listing = subprocess.run(
        ["flwr", "list", "--run-id", run_id, "--format", "json"],
        env=environment, cwd=app, capture_output=True, text=True,
    )  # fmt: skip
    try:
        return json.loads(listing.stdout)["runs"][0]["status"], list(tail)
    except (ValueError, KeyError, IndexError):
        return f"unknown: {listing.stdout}{listing.stderr}", list(tail)


def cause(tail: list[str]) -> str:
    """Pick the line of the log that says what went wrong."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in tail]
    errors = [line for line in lines if re.search(r"\w*(Error|Exception)\b.*:|expected", line)]
    return errors[-1] if errors else "\n".join(lines[-5:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, superlink: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if superlink.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    sys.exit(f"flower-superlink did not start:\n{log.read_text()[-2000:]}")


def end(superlink: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and every process it started, some in sessions of their own."""
    processes = [superlink.pid, *descendants(superlink.pid)]
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            superlink.wait(STOP_SECONDS)


def descendants(ancestor: int) -> list[int]:
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True)
    pairs = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()]
    found = [ancestor]
    for process in found:
        found += [child for child, parent in pairs if parent == process]
    return found[1:]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: the run and its SuperLink were ended")
