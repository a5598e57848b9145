"""Fig. 6: consensus of the core with the present edge and with the first edge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..apps.settings import Settings
from ..method.consensus import Venn
from .methods import METHODS, Plan, over_seeds
from .statistics import Results, Summary, curve
from .style import band, blank_figure, rounds_axis, style_of
from .tables import last_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANTS = ("IPP", "IPM", "CPP", "CPM")
HEADINGS = {
    "consensus": "consensus",
    "intersection": "both right",
    "edge-1 consensus": "edge-1 consensus",
    "edge-1 intersection": "edge-1 both right",
}
"""Score -> the heading of its column."""

PANELS = {
    "intersection": "both right: core and present edge",
    "consensus": "consensus: core and present edge",
    "edge-1 intersection": "both right: core and edge 1",
}
"""Score -> the label of its panel."""


def plan(base: Settings, seeds: int, lesser: int) -> Plan:
    """Plan the variants of one clone, with and without the temporal memory."""
    return {method: over_seeds(base, seeds, METHODS[method]) for method in VARIANTS}


def reduce(results: Results) -> Summary:
    """Sum up the scores of the new core with the present edge and with the first edge."""
    return {
        name: {
            "intersection": curve(runs, lambda record: float(record["after"]["both"]), 1),
            "consensus": curve(runs, lambda record: Venn(**record["after"]).consensus, 1),
            "edge-1 intersection": curve(runs, lambda record: float(record["first"]["both"]), 1),
            "edge-1 consensus": curve(runs, lambda record: Venn(**record["first"]).consensus, 1),
        }
        for name, runs in results.items()
    }


def table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show the scores after the last edge."""
    return ["after the last edge", *HEADINGS.values()], [
        [name, *(last_cell(row[score]) for score in HEADINGS)] for name, row in result.items()
    ]


def draw(result: Summary) -> Figure:
    """Draw three scores over the rounds."""
    figure = blank_figure(3.9, 12.0)
    for axes, (score, label) in zip(figure.subplots(1, 3), PANELS.items()):
        for name, row in result.items():
            band(axes, row[score], **style_of(name))
        rounds_axis(axes, label, row[score]["rounds"][-1])
    axes.legend(fontsize=8, loc="lower right")
    return figure
