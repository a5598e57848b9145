"""Measure the app before and after each diff, as in the table of the README.

The script copies the app, applies the diffs with `git apply`, and runs every copy with nine edges
in one process, without `flwr run`. A seed sets PyTorch's generator before the server starts.
"""

import argparse
import contextlib
import importlib
import io
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from flwr_cloned_kd import VirtualGrid

HERE = Path(__file__).absolute().parent
APPS = {
    "before": [],
    "after": ["drop_in.diff"],
    "after with clones.diff": ["drop_in.diff", "clones.diff"],
}
NUM_EDGES = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (default: 10)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, diffs in APPS.items():
            app = changed(Path(folder) / name.replace(" ", "-"), diffs)
            server, client = load(app)
            project = tomllib.loads((app / "pyproject.toml").read_text())
            config = project["tool"]["flwr"]["app"]["config"]
            accuracies = [accuracy(server, client, config, seed) for seed in range(arguments.seeds)]
            spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
            numbers = ", ".join(f"{value:.3f}" for value in accuracies)
            print(f"{name}: {numbers}; mean {fmean(accuracies):.3f}, sd {spread:.3f}", flush=True)


def changed(folder: Path, diffs: list[str]) -> Path:
    """Copy the plain app to a folder, apply diffs to the copy, and return the folder."""
    shutil.copytree(HERE / "before", folder)
    for diff in diffs:
        subprocess.run(["git", "apply", str(HERE / diff)], cwd=folder, check=True)
    return folder


def load(folder: Path) -> tuple[ServerApp, ClientApp]:
    """Import the server app and the client app of one copy."""
    for name in [name for name in sys.modules if name.split(".")[0] == "digits_app"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    server, client = (
        importlib.import_module(f"digits_app.{name}").app for name in ("server_app", "client_app")
    )
    sys.path.remove(str(folder))
    return server, client


def accuracy(server: ServerApp, client: ClientApp, config: UserConfig, seed: int) -> float:
    """Run an app and return the final accuracy that its server prints."""

    def edge(message: Message, context: Context) -> Message:
        return client(message, replace(context, run_config=config))

    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        server(VirtualGrid([edge] * NUM_EDGES), Context(1, 0, {}, RecordDict(), config))
    return float(output.getvalue().removeprefix("Final accuracy: "))


if __name__ == "__main__":
    main()
