"""DESIGN: an arrow may only point down."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flwr_cloned_kd"
LAYERS = [
    {"ensemble", "consensus", "guard", "models", "data"},
    {"losses", "recipe", "staleness", "averages", "knowledge"},
    {"runtime", "_fold", "_lanes", "_step", "engine", "teachers"},
    {"core", "variants"},
    {"_checkpoint", "_clock", "_session", "draws", "timeline"},
    {
        "_courier",
        "_register",
        "_resume",
        "_round",
        "_wire",
        "asynchronous",
        "strategy",
        "baselines",
        "legacy",
        "client",
        "mods",
        "virtual",
    },
    {"settings", "report", "experiment"},
    {f"paper/{path.stem}" for path in (PACKAGE / "paper").glob("*.py")},
]
MAY_IMPORT_FLOWER = LAYERS[5] | LAYERS[6] | LAYERS[7]
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)


def imports(module):
    """Return (names of sibling modules, names of other packages) that a module imports."""
    siblings, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = node.level == 1 and "/" in module
            siblings |= {f"paper/{node.module}" if inside else node.module} - {None}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
        elif isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
    return siblings, others


def layer(module):
    return next(index for index, names in enumerate(LAYERS) if module in names)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_its_own_layer_and_those_below(module):
    siblings = imports(module)[0]
    assert all(layer(sibling) <= layer(module) for sibling in siblings), siblings


@pytest.mark.parametrize("module", MODULES)
def test_flower_is_imported_only_by_the_adapters(module):
    flower = {name for name in imports(module)[1] if name.split(".")[0] == "flwr"}
    assert not flower or module in MAY_IMPORT_FLOWER
    assert all(name in ALLOWED_FLOWER for name in flower), flower


ALLOWED_FLOWER = {
    "flwr.app",
    "flwr.client",
    "flwr.clientapp",
    "flwr.common",
    "flwr.server",
    "flwr.server.strategy",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
    "flwr.simulation",
    "flwr.supercore.task_identity",  # virtual: messages can only be made by who has an identity
}
