"""Make a public name in a page, such as `Core`, a link to its place in the API reference."""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

DIRECTIVE = re.compile(r"^::: ((?:\w+\.)+(\w+))$", re.MULTILINE)
CODE = re.compile(r"<(a|b|pre|h\d)\b.*?</\1>|<code>((\w+)(?:\.\w+)?)</code>", re.DOTALL)
"""An element in which a name is no link (such as a parameter, which is bold), or a name."""
ALSO_METRICS = {"accuracy", "distillation", "movement"}
"""Public names that also name a metric or a parameter, so that a link could be wrong."""

INDEX = "api/index.md"
"""The page that lists all names; there such a name is the public one."""

_paths: dict[str, str] = {}
"""Public name -> its path, `flwr_cloned_kd.Core`."""


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Collect the public names from the API pages."""
    for file in files.documentation_pages():
        if file.src_uri.startswith("api/"):
            _paths.update({name: path for path, name in DIRECTIVE.findall(file.content_string)})


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mark the names; the plugin autorefs then resolves them."""
    names = _paths.keys() - (() if page.file.src_uri == INDEX else ALSO_METRICS)

    def link(match: re.Match[str]) -> str:
        code, path, name = match[0], match[2], match[3]
        if name not in names:
            return code
        identifier = _paths[name] + path.removeprefix(name)
        # Not every attribute has a place of its own: `Recipe.epochs` stays without a link.
        optional = " optional" if path != name else ""
        return f'<autoref identifier="{identifier}"{optional}>{code}</autoref>'

    return CODE.sub(link, html)
