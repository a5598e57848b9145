"""Use the installed package without any extra; `test_package.py` runs this in such an environment.

Prints a JSON object: which modules were imported, and what each missing extra is reported as.
"""

import contextlib
import importlib
import io
import json
import pkgutil
import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import flwr_cloned_kd
from flwr_cloned_kd import Core, Recipe, train_edge


def import_all() -> tuple[list[str], dict[str, str | None]]:
    """Import every module of the package; return the names of those, and what others lack."""
    names = [
        module.name for module in pkgutil.walk_packages(flwr_cloned_kd.__path__, "flwr_cloned_kd.")
    ]
    lacking = {}
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            lacking[name] = error.name
    return [name for name in names if name not in lacking], lacking


def core_versions() -> list[int]:
    """Run the algorithm on random data; return the version after each edge."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 4, generator=generator)
    dataset = (inputs, (inputs.sum(1) > 0).long())
    recipe = Recipe(epochs=2)
    core = Core(model=nn.Linear(4, 2), dataset=dataset, recipe=recipe)
    state = core.state(core.pretrain())
    versions = []
    for seed in (1, 2):
        edge = train_edge(core.model, state.params, dataset, recipe, num_clones=2, seed=seed)
        state, _ = core.distill(state, edge)
        versions.append(state.version)
    return versions


def message_of(use: Callable[[], Any]) -> str:
    """Return the message of the ImportError that this use of a missing extra raises."""
    try:
        use()
    except ImportError as error:
        return str(error)
    return "no error"


def help_of(module: str) -> str:
    """Return what `python -m MODULE --help` prints."""
    output = io.StringIO()
    sys.argv = [module, "--help"]
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return output.getvalue()


def main() -> None:
    from flwr_cloned_kd.apps import Settings
    from flwr_cloned_kd.apps.build import split

    modules, lacking = import_all()
    labels = torch.arange(10).repeat(20)
    report = {
        "file": flwr_cloned_kd.__file__,
        "modules": modules,
        "lacking": lacking,
        "versions": core_versions(),
        "messages": {
            "digits": message_of(flwr_cloned_kd.load_digits),
            "plots": message_of(lambda: flwr_cloned_kd.draw_timeline([], "timeline.png")),
            "datasets": message_of(lambda: flwr_cloned_kd.load_huggingface("cifar100")),
            "dirichlet": message_of(lambda: split(Settings(split="dirichlet"), labels)),
        },
        "help": {
            name.removesuffix(".__main__"): help_of(name.removesuffix(".__main__"))
            for name in ["flwr_cloned_kd.__main__", *modules]
            if name.endswith(".__main__")
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
