"""The folders of the package are its layers: a folder imports only folders on lower floors."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flwr_cloned_kd"
FLOORS = [
    ("engine",),
    ("data", "method", "io"),
    ("asynchronous",),
    ("flower", "baselines", "virtual", "loggers", "reading"),
    ("apps", "attacks"),
    ("paper",),
]
WITHOUT_FLOWER = {"engine", "data", "method"}
PRIVATE_FLOWER = {"flwr.supercore.task_identity": "virtual"}
"""Modules of Flower that are not part of its public API, and the folder that may use each."""

FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
PUBLIC_FLOWER = {
    "flwr.app",
    "flwr.client",
    "flwr.clientapp",
    "flwr.common",
    "flwr.server",
    "flwr.server.strategy",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
    "flwr.simulation",
}


def imported(path):
    """Return the absolute names of the modules that a file imports."""
    package = ("flwr_cloned_kd", *path.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            names.add(".".join([*start, *filter(None, [node.module])]))
    return names


def folders_of(names):
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "flwr_cloned_kd" and len(part) > 1}


def test_every_folder_has_a_floor():
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} == FLOOR.keys()


@pytest.mark.parametrize("folder", FLOOR)
def test_a_folder_imports_only_folders_below_it(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        above = {
            name for name in folders_of(imported(path)) - {folder} if FLOOR[name] >= FLOOR[folder]
        }
        assert not above, path


@pytest.mark.parametrize("folder", FLOOR)
def test_flower_is_imported_by_its_public_names_and_not_by_the_algorithm(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        flower = {name for name in imported(path) if name.split(".")[0] == "flwr"}
        assert not (flower and folder in WITHOUT_FLOWER), path
        private = flower - PUBLIC_FLOWER
        assert all(PRIVATE_FLOWER.get(name) == folder for name in private), path
