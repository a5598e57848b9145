"""Put the SVG diagrams into the pages themselves, where they take the colours of the page."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

PICTURE = re.compile(r'<img alt="([^"]*)" src="(?:\.\./)*figures/(\w+)\.svg" />')
DIAGRAM = '<svg xmlns="http://www.w3.org/2000/svg" class="diagram"'
"""How the files of the diagrams begin; other SVG files stay pictures."""


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace each picture of a diagram by the content of its file."""

    def inline(match: re.Match[str]) -> str:
        svg = (Path(config.docs_dir) / "figures" / f"{match[2]}.svg").read_text()
        if not svg.startswith(DIAGRAM):
            return match[0]
        return svg.replace("<svg ", f'<svg role="img" aria-label="{match[1]}" ', 1)

    return PICTURE.sub(inline, html)
