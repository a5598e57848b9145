"""Execute the notebooks of docs/tutorial and make pages of them.

A cell that fails ends the build.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

FOLDER = "tutorial"
MAX_CELL_SECONDS = 120
ERRORS_ONLY = ["--log-level=40"]
"""Option of the kernel, which otherwise warns that it talks to this process over a local port."""
SOURCE = """

*This page is a notebook, [{name}]({name}). It was executed when the site was built. You can run
it as a script, or open it in Jupyter with jupytext.*
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and its pictures."""
    notebooks = sorted((Path(config.docs_dir) / FOLDER).glob("*.py"))
    with ThreadPoolExecutor() as pool:  # a thread waits for the process of its notebook
        results = list(pool.map(executed, notebooks))
    for path, (text, pictures) in zip(notebooks, results):
        page = text + SOURCE.format(name=path.name)
        files.append(File.generated(config, f"{FOLDER}/{path.stem}.md", content=page))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"{FOLDER}/{name}", content=picture))
    return files


def executed(path: Path) -> tuple[str, dict[str, bytes]]:
    """Execute a notebook in an empty folder; return its Markdown, and its pictures by name."""
    notebook = jupytext.read(path)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook,
            timeout=MAX_CELL_SECONDS,
            extra_arguments=ERRORS_ONLY,
            resources=resources,
        ).execute()
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"unique_key": path.stem, "output_files_dir": "."}
    )
    return text, resources["outputs"]
