"""Run the quickstart in Flower's simulation, and exit with 1 if it failed.

`flwr run` leaves a SuperLink behind and exits with 0 even if the app raised. This script starts
a SuperLink of its own, streams the run, ends the SuperLink, and exits with 1 and the cause if the
run failed.
"""

import argparse
import json
import re
import socket
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from launch import Launcher, exit_with

from flwr_cloned_kd.apps.settings import Settings, knobs

OUTER_ERRORS = ("Simulation Runtime crashed.", "An error was encountered. Ending simulation.")
"""Texts of the errors with which Flower's simulation wraps the one that says what went wrong."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("app", type=Path, help="folder of the app: quickstart_digits or a copy")
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="KEYS",
        help="settings to override, as for `flwr run`: \"variant='CPP' seed=1\" or a TOML file",
    )
    parser.add_argument(
        "--num-edges", type=int, help="simulated nodes (default: num-edges of the run-config)"
    )
    parser.add_argument(
        "--num-cpus", type=int, default=1, help="CPU cores that each edge needs (default: 1)"
    )
    parser.add_argument(
        "--num-gpus", type=float, default=0, help="GPUs that each edge needs (default: 0)"
    )
    parser.add_argument(
        "--results", type=Path, help="folder (default: results of the run-config, or ./results)"
    )
    arguments = parser.parse_args()
    folder = find_app(arguments.app)
    try:
        config = parse(arguments.run_config)
        if arguments.num_edges is not None:
            config["num-edges"] = arguments.num_edges
        settings = check(folder, config)
        config |= place_of_data(settings)
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
        status, lines = simulate(folder, overrides, resources, Path(home))
        written = sorted(set(results.glob("*/summary.json")) - before)
    if status != "finished:completed" or not written:
        print(f"\nThe run failed ({status}): {cause(lines)}", file=sys.stderr)
        return 1
    summary = json.loads(written[-1].read_text())
    final = summary["final_core_accuracy"]
    first = summary["first_core_accuracy"]
    print(f"\nFinal core accuracy: {final:.3f} (first core: {first:.3f})")
    print(f"Results: {written[-1].parent}")
    return 0


def find_app(app: Path) -> Path:
    """Find the app by path, or by name beside this script."""
    for folder in (app, Path(__file__).parent / app):
        if (folder / "pyproject.toml").is_file():
            return folder.absolute()
    sys.exit(f"{app}: expected a folder with a pyproject.toml")


def parse(overrides: list[str]) -> dict[str, Any]:
    """Read TOML files and key=value pairs as `flwr run` does, but both at once."""
    config: dict[str, Any] = {}
    for override in overrides:
        try:
            if Path(override).suffix == ".toml":
                text = Path(override).expanduser().read_text()
            else:
                pairs = r"""[\w-]+\s*=\s*(?:'[^']*'|"[^"]*"|[^\s'"]+)"""
                if unread := re.sub(pairs, "", override).strip():
                    raise ValueError(f"--run-config: expected key=value pairs, got {unread!r}")
                text = "\n".join(re.findall(pairs, override))
            config |= tomllib.loads(text)
        except OSError as error:
            raise ValueError(f"--run-config {override}: {error}") from None
        except tomllib.TOMLDecodeError as error:
            expected = "--run-config: expected TOML, such as key='text' or key=1"
            raise ValueError(f"{expected}, got {override!r}: {error}") from None
    return config


def check(app: Path, config: dict[str, Any]) -> Settings:
    """Check the settings before a process starts: Flower's error names no setting.

    Raises:
        ValueError: for a wrong setting, or an app with other settings than the quickstart.
    """
    project = tomllib.loads((app / "pyproject.toml").read_text())
    defaults = project.get("tool", {}).get("flwr", {}).get("app", {}).get("config", {})
    unknown = sorted(defaults.keys() - {knob.key for knob in knobs()})
    if unknown or not defaults:
        raise ValueError(
            f"{app / 'pyproject.toml'}: expected the settings of the quickstart, got "
            f"{', '.join(unknown) or 'none'}; run other apps with `flwr run`"
        )
    return Settings.read(defaults | config)


def place_of_data(settings: Settings) -> dict[str, str]:
    """Return an absolute `data-path` for data in a file or a folder: Flower runs the app elsewhere.

    Raises:
        ValueError: if there is no archive.
    """
    if settings.dataset not in ("cifar100", "npz"):
        return {}
    path = Path(settings.data_path or "data").absolute()
    if settings.dataset == "npz" and not path.is_file():
        raise ValueError(f"run-config data-path: expected an archive, got no file {str(path)!r}")
    return {"data-path": str(path)}


def as_pairs(config: dict[str, Any]) -> str:
    """Write settings as `flwr run` reads them; a string may have one kind of quotes only."""
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
    settings = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port), "RAY_USAGE_STATS_ENABLED": "0"}
    superlink = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    superlink += ["--host", "127.0.0.1", "--port", str(port), "--database", str(home / "state.db")]
    federation = " ".join(f"{key}={value}" for key, value in resources.items())
    run = ["flwr", "run", str(app), "--stream", "--run-config", overrides]
    run += ["--federation-config", federation]
    with Launcher(home, settings=settings) as launcher:
        launcher.start("flower-superlink", superlink)
        launcher.wait_for_health("flower-superlink", f"http://127.0.0.1:{port}/health")
        run_id, exit_status, lines = launcher.stream(run)
        if not run_id:
            return f"flwr run exited with {exit_status}", lines
        try:
            return launcher.status(run_id), lines
        except (RuntimeError, ValueError, LookupError) as error:
            return f"unknown: {error}", lines


def cause(lines: list[str]) -> str:
    """Pick the line of the log that says what went wrong."""
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in lines]
    errors = [
        line
        for line in plain
        if re.search(r"\w*(Error|Exception)\b.*:|expected", line)
        and not any(text in line for text in OUTER_ERRORS)
    ]
    return errors[-1] if errors else "\n".join(plain[-5:])


def free_port() -> int:
    """Return a port of this machine that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    exit_with(main, "Interrupted: the run and its SuperLink were ended")
