"""Fig. 4: who is right before and after the first round's Phase 2, with a fixed teacher."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..apps.settings import Settings
from ..asynchronous.palette import BLUE, ORANGE
from ..method.consensus import Venn
from .methods import METHODS, Plan, over_seeds
from .rounds import Record
from .statistics import Results, Summary, spread
from .style import blank_figure
from .tables import spread_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"IPP": "independent (IPP)", "CPP": "cloned (CPP)"}
MOMENTS = ("before", "after")
"""Before and after Phase 2."""


def plan(base: Settings, seeds: int, lesser: int) -> Plan:
    """Plan one independent and one cloned variant."""
    return {method: over_seeds(base, seeds, METHODS[method]) for method in TITLES}


def reduce(results: Results) -> Summary:
    """Average the areas of the Venn diagrams of round 1, and their change by Phase 2."""
    return {name: _reduce_row(runs) for name, runs in results.items()}


def _reduce_row(runs: list[list[Record]]) -> Summary:
    first_rounds = [records[1] for records in runs]
    venns = {
        moment: {
            area: fmean(record[moment][area] for record in first_rounds)
            for area in first_rounds[0][moment]
        }
        for moment in MOMENTS
    }
    return venns | {
        "mutual": venns["after"]["both"] - venns["before"]["both"],
        "exclusive": venns["after"]["student_only"] - venns["before"]["student_only"],
        "consensus": {
            moment: spread([Venn(**record[moment]).consensus for record in first_rounds])
            for moment in MOMENTS
        },
    }


def table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show the consensus at both moments, and the change of two areas."""
    headings = ["", "consensus before Phase 2", "after", "mutual area", "exclusive area"]
    return headings, [
        [
            name,
            *(spread_cell(row["consensus"][moment]) for moment in MOMENTS),
            f"{row['mutual']:+.3f}",
            f"{row['exclusive']:+.3f}",
        ]
        for name, row in result.items()
    ]


def draw(result: Summary) -> Figure:
    """Draw circles to scale, a column for each variant, before and after Phase 2."""
    figure = blank_figure(6.6, 8.6)
    panels = figure.subplots(2, len(result), squeeze=False)
    for column, (name, row) in zip(panels.T, result.items()):
        for axes, moment in zip(column, MOMENTS):
            _draw_venn(axes, row[moment])
            consensus = row["consensus"][moment]
            axes.set_title(
                f"{TITLES[name]}, {moment} Phase 2\n"
                f"consensus {consensus['mean']:.3f} ± {consensus['sd']:.3f}",
                fontsize=10,
            )
        column[1].set_xlabel(
            f"change: mutual {row['mutual']:+.3f}, exclusive {row['exclusive']:+.3f}"
        )
    return figure


def _draw_venn(axes: Axes, venn: Summary) -> None:
    from matplotlib_venn import venn2
    from matplotlib_venn.layout.venn2 import DefaultLayoutAlgorithm

    core_only = venn["student_only"]
    both = venn["both"]
    edge_only = venn["teacher_only"]
    # One scale for all panels, here and in the limits: by default each union would fill its panel.
    layout = DefaultLayoutAlgorithm(normalize_to=core_only + both + edge_only)
    circles = venn2(
        (core_only, edge_only, both),
        ax=axes,
        set_labels=None,
        set_colors=(BLUE, ORANGE),
        layout_algorithm=layout,
        subset_label_formatter=lambda share: "",
    )
    starts = [centre.x - radius for centre, radius in zip(circles.centers, circles.radii)]
    ends = [centre.x + radius for centre, radius in zip(circles.centers, circles.radii)]
    centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 10}
    axes.text((max(starts) + min(ends)) / 2, 0, f"both\n{both:.3f}", **centred)
    # The exclusive areas can be too thin for text, so their numbers stand outside.
    axes.text(min(starts) - 0.17, 0, f"core\nonly\n{core_only:.3f}", color=BLUE, **centred)
    axes.text(max(ends) + 0.17, 0, f"edge\nonly\n{edge_only:.3f}", color="#9a6a00", **centred)
    middle = (min(starts) + max(ends)) / 2
    axes.set_xlim(middle - 1.0, middle + 1.0)
    axes.set_ylim(-0.6, 0.6)  # A circle of area 1, the largest possible, has radius 0.564.
    axes.set_aspect("equal")
    axes.set_axis_on()  # `venn2` hides the axes, and with them the label below the panel.
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
