"""Show what is installed, on which devices it can run, and which commands there are.

The command `report` compares the results folders of runs.
"""

import argparse
import ast
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from .apps.machine import capability, versions
from .reading.command import add_arguments, report

EXTRAS = {
    "simulation": ("ray", "psutil"),
    "launch": ("psutil",),
    "digits": ("sklearn",),
    "plots": ("matplotlib", "matplotlib_venn"),
    "datasets": ("flwr_datasets",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "report": ("plotly", "jinja2"),
}
"""Extras of the package, and the modules that come with each."""
COMMANDS = {
    "python -m flwr_cloned_kd report RUN...": "compare results folders: a table, and an HTML page",
    "python -m flwr_cloned_kd.apps config": "the run-config of the example apps, in TOML",
    "python -m flwr_cloned_kd.apps table": "what its keys mean, as a Markdown table",
    "python -m flwr_cloned_kd.paper --help": "the paper's figures, and claims put to the test",
}
EXAMPLES = {
    "python examples/run.py quickstart_digits": "the quickstart in Flower's simulation",
    "python examples/algorithm1.py": "Algorithm 1 without Flower",
    "python examples/deployment/deploy.py": "a federation with TLS on this machine",
}
CHECKOUT = Path(__file__).parents[1]
"""The folder with examples and benchmarks, if this package is used from a checkout."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flwr_cloned_kd", description=__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    text = "compare results folders: a table on the terminal, and one HTML page without a network"
    add_arguments(commands.add_parser("report", help=text, description=text, allow_abbrev=False))
    parsed = parser.parse_args(arguments)
    if parsed.command == "report":
        return report(parsed)
    print(_section("Versions", versions()))
    print(_section("Extras", {name: _extra(name) for name in EXTRAS}))
    print(_section("Devices", _devices()))
    print(_section("Commands", COMMANDS | _commands_of(CHECKOUT)), end="")
    return 0


def _section(title: str, lines: dict[str, str]) -> str:
    width = max(len(name) for name in lines)
    return "\n".join([title, *(f"  {name:{width}}  {text}" for name, text in lines.items()), ""])


def _extra(name: str) -> str:
    missing = [module for module in EXTRAS[name] if find_spec(module) is None]
    return f'not installed: pip install "flwr-cloned-kd[{name}]"' if missing else "installed"


def _devices() -> dict[str, str]:
    """Name the devices that PyTorch can use."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {str(device): capability(device) for device in (torch.device("cpu"), *gpus)}


def _commands_of(checkout: Path) -> dict[str, str]:
    """Return the commands that only a checkout has: its examples and its benchmarks."""
    examples = {command: text for command, text in EXAMPLES.items() if _is_in(checkout, command)}
    benchmarks = {}
    for path in sorted(checkout.glob("benchmarks/*.py")):
        source = path.read_text()
        if '__name__ == "__main__"' in source:
            benchmarks[f"python -m benchmarks.{path.stem}"] = _first_sentence(source)
    return examples | benchmarks


def _first_sentence(source: str) -> str:
    """Return the first sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    return re.split(r"(?<=[.?]) ", text)[0]


def _is_in(checkout: Path, command: str) -> bool:
    return (checkout / command.split()[1]).is_file()


if __name__ == "__main__":
    sys.exit(main())
