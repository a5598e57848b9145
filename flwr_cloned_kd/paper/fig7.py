"""Fig. 7: the answer of a late edge (Sec. 5.2), left out, used late, or in time."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from ..apps.settings import Settings
from ..asynchronous.palette import BLACK
from .methods import METHODS, OURS, Plan, over_seeds
from .statistics import Results, Summary, final, spread
from .style import blank_figure, dots, panel_title, style_of
from .tables import spread_cell, values_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORDERS = {
    "omitted": ((0, 0),),
    "late": ((0, 0), (1, 1)),
    "normal": ((1, 0), (0, 0)),
}
"""Case -> (edge, rounds late) for each round, with one core and two edges.

The second edge is sent the first core. Its answer is left out ("omitted"), arrives after the first
edge was distilled ("late"), or arrives in time ("normal").
"""

PAPER = {"omitted": 0.6265, "late": 0.6337, "normal": 0.6425}
"""Last core accuracy in the paper: CIFAR-100, ResNet-32."""


def row_name(method: str, case: str) -> str:
    """Return the name of a row in the JSON file."""
    return f"{method} {case}"


ROWS = {row_name(method, case): (method, case) for method, case in product(("CPP", OURS), ORDERS)}
"""Name of a row -> its method and its case."""


def plan(base: Settings, seeds: int, lesser: int) -> Plan:
    """Plan every case with three parts of the data, the core's and two edges'."""
    return {
        name: over_seeds(base, seeds, {**METHODS[method], "num_edges": 2, "order": ORDERS[case]})
        for name, (method, case) in ROWS.items()
    }


def reduce(results: Results) -> Summary:
    """Sum up the last core, and seed by seed what the second edge's answer gained."""
    summary: Summary = {name: {"final": final(runs)} for name, runs in results.items()}
    for name, row in summary.items():
        method, case = ROWS[name]
        if case != "omitted":
            without = summary[row_name(method, "omitted")]["final"]["values"]
            row["gain"] = spread([a - b for a, b in zip(row["final"]["values"], without)])
    return summary


def _methods(result: Summary) -> list[str]:
    return list(dict.fromkeys(ROWS[name][0] for name in result))


def table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show the last core in each case, and the gain of a late answer."""
    lines = []
    for method in _methods(result):
        gain = result[row_name(method, "late")]["gain"]
        finals = [result[row_name(method, case)]["final"] for case in ORDERS]
        lines.append(
            [method, *map(spread_cell, finals), spread_cell(gain, "+"), values_cell(gain, "+")]
        )
    return ["", *ORDERS, "late over omitted", "each seed"], lines


def draw(result: Summary) -> Figure:
    """Draw a row for each case, and the paper's numbers on a scale of their own."""
    figure = blank_figure(3.6)
    methods = _methods(result)
    paper, *panels = figure.subplots(1, 1 + len(methods))
    for y, case in enumerate(ORDERS):
        paper.plot(PAPER[case], y, "o", color=BLACK)
        _annotate(paper, PAPER[case], y)
    paper.set_title("paper: CIFAR-100, ResNet-32", fontsize=10)
    paper.set_xlim(0.624, 0.6451)
    for axes, method in zip(panels, methods):
        style = style_of(method) | {"linestyle": "none"}
        for y, case in enumerate(ORDERS):
            accuracy = result[row_name(method, case)]["final"]
            dots(axes, y, accuracy, **style)
            _annotate(axes, accuracy["mean"], y)
        axes.set_title(panel_title(method), fontsize=10)
    for axes in (paper, *panels):
        axes.set_yticks(range(len(ORDERS)), [*ORDERS] if axes is paper else [""] * len(ORDERS))
        axes.set_ylim(-0.6, len(ORDERS) - 0.5)
        axes.grid(alpha=0.3)
        axes.set_xlabel("last core accuracy")
    paper.set_ylabel("the second edge's answer")
    return figure


def _annotate(axes: Axes, accuracy: float, y: int) -> None:
    """Write an accuracy above its marker."""
    axes.annotate(
        f"{accuracy:.4f}",
        (accuracy, y),
        (0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
