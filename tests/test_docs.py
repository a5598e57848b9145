"""The code blocks of the README and the docs run, and what their pages refer to exists."""

import importlib
import re
from pathlib import Path

import pytest

from .test_layers import FLOOR

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flwr_cloned_kd"
PROJECT_PAGES = ("README.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in PROJECT_PAGES), *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{index}")
    for page in PAGES
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_code_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(block, "block", "exec"), {"__name__": "block"})
    except ImportError as error:
        if 'pip install "flwr-cloned-kd[' not in str(error):
            raise
        pytest.skip(str(error))


def anchors_of(page):
    """The anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M
    )
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_target_of_every_link_exists(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    folders = "flwr_cloned_kd|tests|examples|benchmarks|docs"
    for name in re.findall(rf"(?<![\w/])((?:{folders})/[\w/]+\.\w+)", page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_of_a_module_that_a_page_gives_exists(page):
    """`method.core.Core.distill` is an attribute of a module in a folder of the package."""
    folders = "|".join(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    for folder, module, names in re.findall(rf"`({folders})\.(\w+)((?:\.\w+)*)`", page.read_text()):
        value = importlib.import_module(f"flwr_cloned_kd.{folder}.{module}")
        for name in filter(None, names.split(".")):
            value = getattr(value, name)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_page_for_contributors_has_every_folder_on_its_floor():
    rows = re.findall(r"^\| (\d) \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    floors = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert floors == {folder: 1 + floor for folder, floor in FLOOR.items()}
