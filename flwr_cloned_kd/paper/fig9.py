"""Fig. 9: the core on every edge's own data, before and after the edge's round."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from ..apps.settings import Settings
from ..asynchronous.palette import BLUE, VERMILION
from .methods import METHODS, OURS, Plan, over_seeds
from .statistics import Results, Summary, curve, spread
from .style import LABELS, band, blank_figure, rounds_axis
from .tables import spread_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plan(base: Settings, seeds: int, lesser: int) -> Plan:
    """Plan two variants of the paper, and our method."""
    return {method: over_seeds(base, seeds, METHODS[method]) for method in ("CPP", "CEM", OURS)}


def reduce(results: Results) -> Summary:
    """Sum up the accuracy on the edge's own data before and after its round, and the mean gain."""
    return {
        name: {
            "before": curve(runs, lambda record: float(record["own-before"]), 1),
            "after": curve(runs, lambda record: float(record["own-after"]), 1),
            "gain": spread(
                [
                    fmean(record["own-after"] - record["own-before"] for record in records[1:])
                    for records in runs
                ]
            ),
        }
        for name, runs in results.items()
    }


def table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show the mean gain."""
    return ["", "gain in its round"], [
        [name, spread_cell(row["gain"], "+")] for name, row in result.items()
    ]


def draw(result: Summary) -> Figure:
    """Draw a panel for each method, with the accuracy before and after every round."""
    figure = blank_figure(3.8, 11.0)
    panels = figure.subplots(1, len(result), sharey=True, squeeze=False)[0]
    for axes, (name, row) in zip(panels, result.items()):
        band(axes, row["before"], color=VERMILION, marker="s", label="before", linestyle="--")
        band(axes, row["after"], color=BLUE, marker="o", label="after")
        rounds_axis(axes, "", row["after"]["rounds"][-1])
        gain = row["gain"]
        axes.set_title(
            f"{LABELS.get(name, name)}: {gain['mean']:+.3f} ± {gain['sd']:.3f}", fontsize=10
        )
    panels[0].set_ylabel("core accuracy on the edge's own data")
    panels[-1].legend(loc="lower right", title="its round")
    return figure
