"""What the hooks of the documentation site do to a page. `make docs` builds the site itself."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from .test_layers import FLOOR

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIG = SimpleNamespace(config_file_path=str(ROOT / "mkdocs.yml"), docs_dir=str(DOCS))


def hook(name):
    """Import a hook; each call gives a module of its own."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_of(path, site_path):
    """Return a page of the file at a path of the repository, shown at a path of the site."""
    return SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / path), src_uri=site_path))


def linked(markdown, path, site_path):
    page = page_of(path, site_path)
    return hook("repository").on_page_markdown(markdown, page, CONFIG, None)


@pytest.mark.parametrize(
    ("path", "site_path", "link", "expected"),
    [
        ("docs/drop_in.md", "drop_in.md", "../examples/text/README.md", "examples/text/README.md"),
        ("docs/drop_in.md", "drop_in.md", "results.md#noisy-edges", "results.md#noisy-edges"),
        ("docs/api/core.md", "api/core.md", "../results.md", "../results.md"),
        (
            "examples/text/README.md",
            "examples/text/README.md",
            "../../docs/your_model.md#the-data",
            "../../your_model.md#the-data",
        ),
        ("benchmarks/README.md", "benchmarks/README.md", "../README.md", "../index.md"),
        ("docs/drop_in.md", "drop_in.md", "https://flower.ai", "https://flower.ai"),
    ],
)
def test_a_link_of_the_repository_becomes_a_link_of_the_site(path, site_path, link, expected):
    assert linked(f"see [it]({link}).", path, site_path) == f"see [it]({expected})."


def test_code_that_looks_like_a_link_stays():
    code = "`parts[1](train)` and `items[i](docs)`"
    assert linked(code, "docs/drop_in.md", "drop_in.md") == code


def test_public_names_in_a_text_become_links_to_the_api():
    names = hook("names")
    api_page = SimpleNamespace(src_uri="api/core.md", content_string="::: flwr_cloned_kd.Core\n")
    names.on_files(SimpleNamespace(documentation_pages=lambda: [api_page]), CONFIG)

    def linked_names(html):
        page = page_of("docs/drop_in.md", "drop_in.md")
        return re.findall(r'identifier="([^"]+)"', names.on_page_content(html, page, CONFIG, None))

    assert linked_names("<p><code>Core</code>, <code>Kernel</code></p>") == ["flwr_cloned_kd.Core"]
    assert linked_names("<p><code>Core.distill</code></p>") == ["flwr_cloned_kd.Core.distill"]
    for element in ("a", "b", "pre", "h2"):
        assert not linked_names(f"<{element}><code>Core</code></{element}>")


def test_a_diagram_is_put_into_the_page_with_its_description():
    html = '<p><img alt="three phases" src="../figures/phases.svg" /></p>'
    page = hook("diagrams").on_page_content(html, None, CONFIG, None)
    assert page.startswith('<p><svg role="img" aria-label="three phases"')
    assert "<img" not in page


def test_a_picture_that_is_no_diagram_stays_a_picture(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "plot.svg").write_text('<svg viewBox="0 0 1 1"></svg>')
    html = '<img alt="a plot" src="figures/plot.svg" />'
    config = SimpleNamespace(docs_dir=str(tmp_path))
    assert hook("diagrams").on_page_content(html, None, config, None) == html


def test_the_diagram_of_the_folders_has_all_folders():
    svg = (DOCS / "figures" / "folders.svg").read_text()
    assert set(re.findall(r'class="mono middle"[^>]*>(\w+)<', svg)) == FLOOR.keys()
