"""Every public name has a section in the API reference and an example that runs."""

import ast
import doctest
import re
from collections import Counter
from pathlib import Path

import pytest

import flwr_cloned_kd
import flwr_cloned_kd.attacks

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
PUBLIC = [
    f"{package.__name__}.{name}"
    for package in (flwr_cloned_kd, flwr_cloned_kd.attacks)
    for name in package.__all__
]
SECTION = re.compile(r"^::: (\S+)$", re.MULTILINE)


def docstring_of(path):
    """Return the docstring of a public name, also of one that is a value such as `PRESETS`."""
    package, _, name = path.rpartition(".")
    folder = ROOT.joinpath(*package.split("."))
    imports = ast.parse((folder / "__init__.py").read_text()).body
    module = next(
        statement.module
        for statement in imports
        if isinstance(statement, ast.ImportFrom)
        and name in [alias.name for alias in statement.names]
    )
    body = ast.parse((folder / f"{module.replace('.', '/')}.py").read_text()).body
    for statement, following in zip(body, [*body[1:], None]):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == name:
            return ast.get_docstring(statement)
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if name in [getattr(target, "id", "") for target in targets]:
            return ast.literal_eval(following.value) if isinstance(following, ast.Expr) else None
    raise AssertionError(f"{path}: expected a definition in {module}")


def test_every_public_name_has_exactly_one_section():
    sections = Counter(name for page in PAGES for name in SECTION.findall(page.read_text()))
    assert sections == Counter(PUBLIC)


def test_the_first_api_page_lists_every_public_name():
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    listed = Counter(re.findall(r"`(\w+)`", index[index.index("| page |") :]))
    assert listed == Counter(path.rpartition(".")[2] for path in PUBLIC)


@pytest.mark.parametrize("path", PUBLIC)
def test_the_example_of_a_public_name_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(docstring_of(path), {}, path, None, None)
    assert example.examples, f"{path}: expected an example in the docstring"
    report = []
    doctest.DocTestRunner().run(example, out=report.append)
    assert not report, "".join(report)
