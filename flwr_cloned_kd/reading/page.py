"""One self-contained HTML page that compares runs, with interactive figures and no network.

Everything that comes from a run is hostile until it is escaped: Jinja escapes what it writes into
HTML and into the page's JSON, and `figures` escapes what Plotly would read as markup. The page's
content security policy forbids every connection.
"""

from collections.abc import Sequence
from pathlib import Path

from ..io.checkpoint import write_atomically
from .groups import group_runs, remarks
from .runs import LoadedRun
from .tables import (
    difference_cells,
    refusal_cells,
    run_cells,
    shared_cells,
    summary_cells,
)

MAX_REFUSALS = 500
"""How many refused rounds the page lists."""


def write_page(runs: Sequence[LoadedRun], path: Path, *, target: float | None = None) -> None:
    """Write the page, of about 5 MB: it holds Plotly's JavaScript library.

    Args:
        target: an accuracy, a fraction in [0, 1]; the table says what it took to reach it.

    Raises:
        ImportError: without plotly or jinja2, which come with the extra `report`.
        OSError: if the file cannot be written.
        ValueError: if the events of a run are damaged.
    """
    write_atomically(path, page(runs, target=target))


def page(runs: Sequence[LoadedRun], *, target: float | None = None) -> str:
    """Return the text of the page; see `write_page`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    from .figures import accuracy_figures, consensus_figures, timeline_figures

    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = group_runs(runs)
    refusals = refusal_cells(runs)
    figures = {
        "accuracy": accuracy_figures(groups),
        "consensus": consensus_figures(groups),
        "timeline": timeline_figures(runs),
    }
    text = environment.get_template("page.html").render(
        num_runs=len(runs),
        summary=summary_cells(groups, target),
        remarks=remarks(runs, groups),
        figures=figures,
        num_refusals=len(refusals.rows),
        refusals=refusals._replace(rows=refusals.rows[:MAX_REFUSALS]),
        differences=difference_cells(runs),
        shared=shared_cells(runs),
        runs=run_cells(runs),
        plotly=Markup(get_plotlyjs()),
    )
    # JSON may hold half of a surrogate pair, which no file in UTF-8 can hold.
    return text.encode(errors="replace").decode()
