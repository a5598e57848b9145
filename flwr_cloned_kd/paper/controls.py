"""Baselines, and every option changed, on the same splits and seeds.

R is the number of edges, which is the number of rounds of the paper's method.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from ..apps.settings import Settings
from ..asynchronous.palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION
from .methods import (
    AVERAGE,
    FEDAVG,
    FEDAVG_2,
    FEDDF,
    FEDPROX,
    METHODS,
    OURS,
    UNSELECTIVE,
    Changes,
    Plan,
    over_seeds,
)
from .statistics import Results, Summary, core_accuracy, cost, spread
from .style import blank_figure, dots
from .tables import COST_HEADINGS, SEEDS, cost_cells, spread_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Control(NamedTuple):
    """One row.

    Args:
        group: heading above rows that are read together.
        name: of the row; it says what differs.
        changes: of the base settings.
        main: True gives the row all seeds, False the lesser number of seeds.
        after: number of rounds after which the core is measured; None is after the last round.
    """

    group: str
    name: str
    changes: Changes
    main: bool = True
    after: int | None = None


def three_in_flight(base: Settings) -> tuple[tuple[int, int], ...]:
    """Visit every edge once, with a core that lacks the answers of the two edges before it."""
    return tuple((edge, min(edge, 2)) for edge in range(base.num_edges))


def epochs(times: int) -> Callable[[Settings], int]:
    """Return a function that multiplies the longest phase's epochs."""
    return lambda base: times * max(base.core_epochs, base.edge_epochs)


def dirichlet(alpha: float) -> Changes:
    """Skew the labels of the edges; the smaller `alpha` is, the more they are skewed."""
    return {"split": "dirichlet", "dirichlet_alpha": alpha}


CPP = METHODS["CPP"]
CEP = METHODS["CEP"]
CPM = METHODS["CPM"]
CEM = METHODS["CEM"]
PRACTICAL = METHODS[OURS]
THREE: Changes = {"edges_per_round": lambda base: min(3, base.num_edges)}
NO_EDGES: Changes = {"variant": "CPP", "edge_data": "none", "kd_weight": 0.0}

CONTROLS = [
    Control("methods", "CEM, practical (ours)", PRACTICAL),
    Control("methods", "CPM, practical: 1 clone", {**PRACTICAL, "variant": "CPM"}),
    Control("methods", "CEM, unselective", UNSELECTIVE),
    Control("methods", "CEM, paper", CEM),
    Control("methods", "CPP, paper", CPP),
    Control("baselines", "keep the clone", AVERAGE),
    Control("baselines", "FedAvg, 1 round", FEDAVG_2, after=1),
    Control("baselines", "FedAvg, 2 rounds", FEDAVG_2),
    Control("baselines", "FedAvg, R rounds", FEDAVG),
    Control("baselines", "FedProx, 1 round", FEDAVG_2 | FEDPROX, after=1),
    Control("baselines", "FedProx, 2 rounds", FEDAVG_2 | FEDPROX),
    Control("baselines", "FedProx, R rounds", FEDAVG | FEDPROX),
    *(
        Control("baselines", f"FedAsync, alpha {alpha}", {**AVERAGE, "mix": alpha})
        for alpha in (0.3, 0.6, 0.9)
    ),
    Control(
        "baselines",
        "FedAsync, alpha 0.6, 3 in flight",
        {**AVERAGE, "mix": 0.6, "order": three_in_flight},
    ),
    *(
        Control("baselines", f"FedBuff, K 3, lr {lr}", {**AVERAGE, **THREE, "mix": lr})
        for lr in (0.5, 1.0)
    ),
    Control("baselines", "average, then distil (FedDF), 1 round", FEDDF, after=1),
    Control("baselines", "average, then distil (FedDF), 2 rounds", FEDDF),
    Control("without edges", "core only", CPP, after=0),
    Control("without edges", "core only, R restarts", {**NO_EDGES, "preset": "paper"}),
    Control(
        "without edges", "core only, R restarts, lr / 5", {**NO_EDGES, "preset": "unselective"}
    ),
    Control(
        "without edges", "self-distillation (edge data = core data)", {**CEM, "edge_data": "core"}
    ),
    Control("without edges", "all data central", {"central": True, "core_epochs": epochs(1)}),
    Control(
        "without edges", "all data central, 3 x epochs", {"central": True, "core_epochs": epochs(3)}
    ),
    Control("equal bytes", "3 clones of 3 edges, in turn", CEP, after=3),
    Control("equal bytes", "1 clone of 6 edges, in turn", CPP, after=6),
    Control("equal bytes", "1 clone of 6 edges, 3 side by side", {**CPP, **THREE}, after=2),
    Control("memory", "memory 1 (CEP)", CEP),
    Control("memory", "memory 2", {**CEM, "memory_size": 2}, main=False),
    Control("memory", "memory 3 (CEM)", CEM),
    Control("memory", "memory 5", {**CEM, "memory_size": 5}, main=False),
    Control("memory", "memory 1, KD weight x 3", {**CEP, "kd_weight": 3.0}),
    Control(
        "memory",
        "memory 3, mean instead of sum",
        {**CEM, "distillation": {"mean_over_memory": True}},
    ),
    Control("memory", "practical, memory 1", {**PRACTICAL, "memory_size": 1}),
    Control("clones", "1 clone (CPM)", CPM),
    Control("clones", "2 clones", {**CEM, "num_clones": 2}, main=False),
    Control("clones", "3 clones (CEM)", CEM),
    Control("clones", "5 clones", {**CEM, "num_clones": 5}, main=False),
    Control("temperature", "temperature 1", {**CEM, "temperature": 1.0}, main=False),
    Control("temperature", "temperature 2", {**CEM, "temperature": 2.0}, main=False),
    Control("temperature", "temperature 4 (CEM)", CEM),
    Control("start", "student starts at the core (CEM)", CEM),
    Control(
        "start",
        "student starts half way",
        {**CEM, "distillation": {"student_start": 0.5}},
        main=False,
    ),
    Control(
        "start",
        "student starts at the clones' mean",
        {**CEM, "distillation": {"student_start": 1.0}},
        main=False,
    ),
    *(
        Control(
            "core size",
            f"{name}, core with {share:.0%} of its images",
            {**method, "core_share": share},
            main=False,
        )
        for name, method in (("CEM paper", CEM), ("practical", PRACTICAL))
        for share in (0.25, 0.5)
    ),
    *(
        Control(
            "Dirichlet",
            f"{name}, alpha {alpha}",
            {**method, **dirichlet(alpha)},
            main=False,
            after=after,
        )
        for alpha in (1.0, 0.3, 0.1)
        for name, method, after in (
            ("CEM practical", PRACTICAL, None),
            ("CPP paper", CPP, None),
            ("keep the clone", AVERAGE, None),
            ("FedAvg 2 rounds", FEDAVG_2, None),
        )
    ),
]


def plan(base: Settings, seeds: int, lesser: int) -> Plan:
    """Plan every row, the main rows first.

    A row that is measured after more rounds than it has is left out; this happens with few edges.
    """
    runs: Plan = {}
    for control in sorted(CONTROLS, key=lambda control: not control.main):
        of_row = over_seeds(base, seeds if control.main else lesser, control.changes)
        if of_row[0].num_rounds >= (control.after or 0):
            runs[control.name] = of_row
    return runs


def reduce(results: Results) -> Summary:
    """Sum up the core of every row after its last round or an earlier one, and the cost by then."""
    summary: Summary = {}
    for control in CONTROLS:
        if control.name not in results:
            continue
        runs = results[control.name]
        after = len(runs[0]) - 1 if control.after is None else control.after
        summary[control.name] = {
            "group": control.group,
            "rounds": after,
            "core": spread([core_accuracy(records[after]) for records in runs]),
            **cost(runs[0][: 1 + after]),
        }
    return summary


def table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show the last core and the cost of every row."""
    return ["", "", "last core", SEEDS, *COST_HEADINGS], [
        [row["group"], name, spread_cell(row["core"]), str(row["core"]["n"]), *cost_cells(row)]
        for name, row in result.items()
    ]


GROUP_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, BLACK)


def draw(result: Summary) -> Figure:
    """Draw every row: accuracy over seeds, megabytes, training images, number of seeds."""
    figure = blank_figure(0.5 + 0.21 * (len(result) + 12), 9.5)
    axes = figure.subplots()
    beside = axes.get_yaxis_transform()
    heights: list[float] = []
    y = 0.0
    groups = groupby(result.items(), key=lambda item: item[1]["group"])
    for (group, rows), colour in zip(groups, 3 * GROUP_COLOURS):
        axes.text(
            0.01,
            y,
            group,
            transform=beside,
            fontsize=8.5,
            fontweight="bold",
            color=colour,
            va="center",
        )
        for _, row in rows:
            y -= 1
            heights.append(y)
            dots(axes, y, row["core"], color=colour, marker="o", markersize=4)
            text = (
                f"{row['core']['mean']:.3f}   {row['bytes'] / 1e6:5.2f} MB   "
                f"{row['images'] / 1e3:4.0f}k   n = {row['core']['n']}"
            )
            axes.text(
                1.01,
                y,
                text,
                transform=beside,
                fontsize=7.5,
                va="center",
                family="monospace",
            )
        y -= 1.3
    axes.set_yticks(heights, [*result], fontsize=8)
    axes.set_ylim(y + 0.5, 1)
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel(
        "core accuracy, held-out data (right: mean, bytes exchanged, thousands of "
        "training images, seeds)",
        fontsize=9,
    )
    return figure
