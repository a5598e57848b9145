"""Show files of the repository that lie outside docs/ as pages, and make links to them work.

A link of a page names a file of the repository, relative to the page, so that it works on a code
host. On the site the files of docs/ are at the top, and the others keep their paths.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = ("*.md", "benchmarks/*.md", "examples/*/*.md", "examples/*/*.png")
"""Globs of the pages outside docs/, and of their pictures."""
README = "README.md"
"""The page of the code host; the site has `index.md` in its place."""
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/."""
    root = Path(config.config_file_path).parent
    for glob in OUTSIDE:
        for path in sorted(root.glob(glob)):
            name = path.relative_to(root).as_posix()
            if name != README:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change links between docs/ and the rest of the repository to links of the site."""
    root = Path(config.config_file_path).parent
    source = Path(page.file.abs_src_path or page.file.src_uri)
    folder = source.parent.relative_to(root) if source.is_relative_to(root) else Path("docs")

    def link_of_site(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder.as_posix(), match[2]))
        if not (root / path).exists():
            return match[0]
        name = "index.md" if path == README else path.removeprefix("docs/")
        link = posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    return LINK.sub(link_of_site, markdown)
