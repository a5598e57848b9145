"""Put the SVG diagrams into the pages themselves, where they take the colours of the page."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

PICTURE = re.compile(r'<img alt="([^"]*)" src="(?:\.\./)*figures/(\w+)\.svg" />')


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace each picture of docs/figures/*.svg by the content of the file."""

    def inline(match: re.Match[str]) -> str:
        svg = (Path(config.docs_dir) / "figures" / f"{match[2]}.svg").read_text()
        return svg.replace("<svg ", f'<svg role="img" aria-label="{match[1]}" ', 1)

    return PICTURE.sub(inline, html)
