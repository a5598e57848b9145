"""Fig. 5: all variants, the core over the rounds, and the first edge alone and as an ensemble."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..apps.settings import Settings
from .methods import METHODS, OURS, Plan, over_seeds
from .statistics import Results, Summary, core_accuracy, cost, curve, final, spread
from .style import blank_figure, dots, rounds_axis, style_of
from .tables import COST_HEADINGS, NONE, cost_cells, spread_cell, values_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_FIRST_EDGE = "paper, CIFAR-100: about 0.40, ensemble 0.438"


def plan(base: Settings, seeds: int, lesser: int) -> Plan:
    """Plan every variant, and our method."""
    return {method: over_seeds(base, seeds, changes) for method, changes in METHODS.items()}


def reduce(results: Results) -> Summary:
    """Sum up the core over the rounds, the first edge, and the cost of the run."""
    return {
        name: {
            "core": curve(runs, core_accuracy),
            "final": final(runs),
            "single clone": spread([records[1]["edge-accuracy"] for records in runs]),
            "ensemble": spread([records[1]["ensemble-accuracy"] for records in runs]),
            **cost(runs[0]),
        }
        for name, runs in results.items()
    }


def _has_ensemble(row: Summary) -> bool:
    """Return whether the first edge trained several clones: one clone equals its ensemble."""
    return bool(abs(row["ensemble"]["mean"] - row["single clone"]["mean"]) > 1e-6)


def table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show the last core of every variant, its first edge and its cost."""
    headings = [
        "",
        "core after the last edge",
        "each seed",
        "first edge: one clone",
        "its ensemble",
        *COST_HEADINGS,
    ]
    return headings, [
        [
            name,
            spread_cell(row["final"]),
            values_cell(row["final"]),
            spread_cell(row["single clone"]),
            spread_cell(row["ensemble"]) if _has_ensemble(row) else NONE,
            *cost_cells(row),
        ]
        for name, row in result.items()
    ]


def draw(result: Summary) -> Figure:
    """Draw the core over the rounds, its last accuracy, and the first edge."""
    figure = blank_figure(4.6, 12.5)
    curves, finals, first = figure.subplots(1, 3, width_ratios=(1.25, 1, 0.85))
    # Ten bands of deviations would hide each other: the second panel has the deviations.
    for name, row in result.items():
        curves.plot(row["core"]["rounds"], row["core"]["mean"], **style_of(name))
    later = [mean for row in result.values() for mean in row["core"]["mean"][1:]]
    curves.set_ylim(bottom=min(later) - 0.5 * (max(later) - min(later)))  # room for the legend
    start = next(iter(result.values()))["core"]
    curves.set_title(
        f"first core (round 0): {start['mean'][0]:.3f} ± {start['sd'][0]:.3f}", fontsize=9
    )
    rounds_axis(curves, "core accuracy, held-out data", start["rounds"][-1])
    curves.legend(fontsize=8, ncols=2, loc="lower right")
    names = [*reversed(result)]
    for y, name in enumerate(names):
        row = result[name]
        style = style_of(name) | {"linestyle": "none"}
        dots(finals, y, row["final"], **style)
        dots(first, y, row["single clone"], **style)
        if _has_ensemble(row):
            dots(first, y, row["ensemble"], **style | {"marker": "P", "markersize": 8})
    for axes in (finals, first):
        axes.set_yticks(range(len(names)), [name.replace(OURS, "ours") for name in names])
        axes.grid(alpha=0.3)
    finals.set_xlabel("core after the last edge; dots: seeds")
    first.set_yticklabels([])
    first.set_xlabel("first edge: one clone; plus: ensemble")
    first.set_title(PAPER_FIRST_EDGE, fontsize=9)
    return figure
