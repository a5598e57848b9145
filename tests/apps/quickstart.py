"""The quickstart app, for tests in this process."""

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

from flwr.app import Context, RecordDict

from flwr_cloned_kd import VirtualGrid
from flwr_cloned_kd.apps import Settings

APP = Path(__file__).parents[2] / "examples" / "quickstart_digits" / "quickstart_digits"


def module(name):
    """Import a file of the app without its folder on the path."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", APP / f"{name}.py")
    imported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported)
    return imported


client = module("client_app")
client_fn = client.client_fn
server = module("server_app")


class Written(NamedTuple):
    """What a run wrote."""

    folder: Path
    rows: list
    summary: dict


def play(config, *, num_edges=3, **speeds):
    """Run the app in virtual time and read its results."""
    results = Path(config["results"])
    before = set(results.glob("*/summary.json"))

    def edge(message, context):
        context.run_config = config
        return client.app(message, context)

    server.main(VirtualGrid([edge] * num_edges, **speeds), Context(1, 0, {}, RecordDict(), config))
    (path,) = set(results.glob("*/summary.json")) - before
    folder = path.parent
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    summary = json.loads(path.read_text())
    assert summary["config"] == {
        name.replace("_", "-"): value for name, value in vars(Settings.read(config)).items()
    }
    return Written(folder, [json.loads(line) for line in lines], summary)
