"""Even and skewed edges: every method on the same splits, at equal bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..apps.settings import Settings
from ..asynchronous.palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
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
from .rounds import Record
from .statistics import (
    Results,
    Summary,
    core_accuracy,
    cost,
    curve,
    final,
    mean_of_rounds,
    worst_drop,
)
from .style import blank_figure, dots
from .tables import COST_HEADINGS, NONE, SEEDS, Table, cost_cells, spread_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPLITS: dict[str, Changes] = {
    "IID": {"split": "random"},
    "Dirichlet 0.3": {"split": "dirichlet", "dirichlet_alpha": 0.3},
    "Dirichlet 0.1": {"split": "dirichlet", "dirichlet_alpha": 0.1},
    "one class": {"split": "one-class"},
}
"""How labels are spread over the edges, the most even split first. The core's part is even."""


class Method(NamedTuple):
    """One method, which has a row on every split.

    Args:
        changes: of the base settings.
        after: number of rounds after which the core is measured; None is after the last round.
        main: True gives the method all seeds, False the lesser number of seeds.
    """

    changes: Changes
    after: int | None = None
    main: bool = True


PRACTICAL = METHODS[OURS]
ONE_CLONE: Changes = {"variant": "CPM"}
NO_TEACHERS: Changes = {"kd_weight": 0.0}
SHIFTED: Changes = {"distill_augment": "shift"}
"""Phase 2 sees the core's images moved by at most a pixel, the other phases see them unmoved."""
FINE_TUNED: Changes = {**UNSELECTIVE, **NO_TEACHERS, "distillation": {"student_start": 0.6}}
"""FedAsync with alpha 0.6, then Phase 2 on the core data without any teacher."""


def ours_but(**fields: Any) -> Method:
    """Make our preset with some fields of its `Distillation` changed."""
    return Method({**PRACTICAL, "distillation": fields}, main=False)


ROWS: dict[str, Method] = {
    "first core": Method(METHODS["CPP"], 0),
    "ours": Method(PRACTICAL),
    "ours, 1 clone": Method({**PRACTICAL, **ONE_CLONE}),
    "ours without teachers": Method({**PRACTICAL, **NO_TEACHERS}),
    "ours without teachers, 1 clone": Method({**PRACTICAL, **ONE_CLONE, **NO_TEACHERS}),
    "ours, shifted views": Method({**PRACTICAL, **SHIFTED}),
    "ours without teachers, shifted views": Method({**PRACTICAL, **SHIFTED, **NO_TEACHERS}),
    "unselective": Method(UNSELECTIVE),
    "unselective, 1 clone": Method({**UNSELECTIVE, **ONE_CLONE}),
    "CEM, paper": Method(METHODS["CEM"]),
    "CPP, paper": Method(METHODS["CPP"]),
    "keep the clone": Method(AVERAGE),
    "keep the mean of 3 clones": Method({**AVERAGE, "variant": "CEM"}),
    "FedAsync": Method({**AVERAGE, "mix": 0.6}),
    "FedAsync, fine-tuned": Method({**FINE_TUNED, **ONE_CLONE}),
    "FedAsync, fine-tuned, 3 clones": Method(FINE_TUNED),
    "FedAvg, 1 round": Method(FEDAVG_2, 1),
    "FedAvg, 2 rounds": Method(FEDAVG_2),
    "FedAvg, R rounds": Method(FEDAVG),
    "FedProx, 1 round": Method(FEDAVG_2 | FEDPROX, 1),
    "FedProx, 2 rounds": Method(FEDAVG_2 | FEDPROX),
    "FedProx, R rounds": Method(FEDAVG | FEDPROX),
    "FedDF, 1 round": Method(FEDDF, 1),
    "FedDF, 2 rounds": Method(FEDDF),
    "ours, every sample": ours_but(selection="all"),
    "ours, by the label's probability": ours_but(selection="label-probability"),
    "ours, start at the core": ours_but(student_start=0.0),
    "ours, start at the clones' mean": ours_but(student_start=1.0),
    "ours, start keeps 0.8": ours_but(student_start="retained-0.8"),
    "ours, start by the ensemble's share": ours_but(student_start="ensemble-share"),
    "ours, the core does not teach": ours_but(core_as_teacher=False),
    "ours, temperature 4": ours_but(temperature=4.0),
}
"""Name of a method -> the method, which has a row on every split."""

FIRST_CORE = "first core"
"""The row before any edge: far below all others, it is a number above the panel."""

SEPARATOR = " | "


def row_name(method: str, split: str) -> str:
    """Return the name of a row in the JSON file."""
    return f"{method}{SEPARATOR}{split}"


def method_and_split(row: str) -> tuple[str, str]:
    """Return the method and the split in the name of a row."""
    method, _, split = row.partition(SEPARATOR)
    return method, split


def plan(base: Settings, seeds: int, lesser: int) -> Plan:
    """Plan every method on every split, with the same seeds."""
    return {
        row_name(name, split): over_seeds(
            base, seeds if method.main else lesser, method.changes | skew
        )
        for split, skew in SPLITS.items()
        for name, method in ROWS.items()
    }


def reduce(results: Results) -> Summary:
    """Sum up the last core, the mean over the rounds, and the worst round of every row."""
    return {row: _reduce_row(*method_and_split(row), runs) for row, runs in results.items()}


def _reduce_row(method: str, split: str, runs: list[list[Record]]) -> Summary:
    limit = ROWS[method].after
    after = len(runs[0]) - 1 if limit is None else limit
    runs = [records[: 1 + after] for records in runs]
    return {
        "method": method,
        "split": split,
        "final": final(runs),
        "mean of rounds": mean_of_rounds(runs),
        "worst drop": worst_drop(runs),
        "core": curve(runs, core_accuracy),
        **cost(runs[0]),
    }


def _methods(result: Summary) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in result.values()))


def _splits(result: Summary) -> list[str]:
    return list(dict.fromkeys(row["split"] for row in result.values()))


def _fall_cell(row: Summary) -> str:
    return f"{row['worst drop']:.3f}" if row["worst drop"] > 0 else "none"


def _by_split(heading: str, cell: Callable[[Summary], str], *, with_cost: bool = False) -> Table:
    """Make a table with a row for each method, and a column for each split."""

    def table(result: Summary) -> tuple[list[str], list[list[str]]]:
        splits = _splits(result)
        counts = {row["final"]["n"] for row in result.values()}
        # One number of seeds for all rows belongs in the heading, several numbers have a column.
        several = len(counts) > 1
        first = heading if several else f"{heading}, {_plural(*counts)}"
        lines = []
        for method in _methods(result):
            rows = [result.get(row_name(method, split)) for split in splits]
            line = [method, *(NONE if row is None else cell(row) for row in rows)]
            if several:
                line.append(_counts_cell(rows))
            if with_cost:
                line += cost_cells(next(row for row in rows if row is not None))
            lines.append(line)
        headings = [first, *splits]
        if several:
            headings.append(SEEDS)
        if with_cost:
            headings += COST_HEADINGS
        return headings, lines

    return table


def _plural(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"


def _counts_cell(rows: list[Summary | None]) -> str:
    """Write one number of seeds, or one number for each split where they differ."""
    counts = [NONE if row is None else str(row["final"]["n"]) for row in rows]
    return ", ".join(counts) if len({*counts} - {NONE}) > 1 else max(counts)


TABLES: dict[str, Table] = {
    "final": _by_split("last core", lambda row: spread_cell(row["final"]), with_cost=True),
    "rounds": _by_split("mean over rounds", lambda row: spread_cell(row["mean of rounds"])),
    "falls": _by_split("largest fall in a round", _fall_cell),
}


LOOKS: dict[str, dict[str, Any]] = {
    "ours without teachers": {"color": SKY, "marker": "*", "markersize": 8},
    "ours": {"color": BLUE, "marker": "*", "markersize": 8},
    "unselective": {"color": ORANGE, "marker": "s", "markersize": 5},
    "CEM": {"color": VERMILION, "marker": "o", "markersize": 5},
    "CPP": {"color": VERMILION, "marker": "o", "markersize": 5},
    "keep": {"color": PURPLE, "marker": "^", "markersize": 6},
    "FedAsync": {"color": GREEN, "marker": "X", "markersize": 6},
    "FedAvg": {"color": BLACK, "marker": "D", "markersize": 5},
    "FedProx": {"color": "0.45", "marker": "d", "markersize": 6},
    "FedDF": {"color": "0.45", "marker": "v", "markersize": 6},
}
"""Start of a method's name -> colour and marker of its family; the first that fits counts."""

OTHER_LOOK: dict[str, Any] = {"color": BLACK, "marker": "o", "markersize": 5}


def look_of(method: str) -> dict[str, Any]:
    """Return the colour and the marker of a method; the method `ours` has a larger marker."""
    look = next((look for start, look in LOOKS.items() if method.startswith(start)), OTHER_LOOK)
    return look | ({"markersize": 13} if method == "ours" else {})


def draw(result: Summary) -> Figure:
    """Draw a panel for each split: every method as a row, with its bytes at the right."""
    splits = _splits(result)
    methods = [method for method in _methods(result) if method != FIRST_CORE]
    figure = blank_figure(1.3 + 0.25 * len(methods), 3.5 + 2.3 * len(splits))
    panels = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for axes, split in zip(panels, splits):
        _draw_split(axes, result, split, methods)
    panels[0].set_yticks(range(len(methods)), methods, fontsize=9)
    panels[0].set_ylim(len(methods) - 0.4, -0.6)  # The first method is at the top.
    for label in panels[0].get_yticklabels():
        if label.get_text() == "ours":
            label.set(color=BLUE, fontweight="bold")
    for y, method in enumerate(methods):
        cost_bytes = next(row["bytes"] for row in result.values() if row["method"] == method)
        _write_beside(panels[-1], y, f"{cost_bytes / 1e6:5.2f} MB")
    return figure


def _draw_split(axes: Axes, result: Summary, split: str, methods: list[str]) -> None:
    for y, method in enumerate(methods):
        row = result.get(row_name(method, split))
        if row is not None:
            dots(axes, y, row["final"], **look_of(method), zorder=3)
    _separate_families(axes, methods)
    ours = result.get(row_name("ours", split))
    if ours is not None:
        mean = ours["final"]["mean"]
        axes.axvline(mean, color=BLUE, alpha=0.5, linewidth=0.9, linestyle="--", zorder=1)
    first = result.get(row_name(FIRST_CORE, split))
    second_line = f"\nfirst core: {first['final']['mean']:.3f}" if first else ""
    axes.set_title(f"{split}{second_line}", fontsize=10)
    axes.set_xlabel("last core accuracy; dots: seeds", fontsize=9)
    axes.grid(alpha=0.3, axis="x")
    axes.tick_params(axis="x", labelsize=8)


def _separate_families(axes: Axes, methods: list[str]) -> None:
    """Shade the row of `ours`, and draw a line between two families of methods."""
    for y, method in enumerate(methods):
        if method == "ours":
            axes.axhspan(y - 0.5, y + 0.5, color=BLUE, alpha=0.1, linewidth=0)
        look = look_of(method)
        above = look_of(methods[y - 1])
        if y and (look["color"], look["marker"]) != (above["color"], above["marker"]):
            axes.axhline(y - 0.5, color="0.85", linewidth=0.8, zorder=0)


def _write_beside(axes: Axes, y: float, text: str) -> None:
    """Write a text at the right of a panel, next to one of its rows."""
    right = axes.get_yaxis_transform()
    axes.text(1.03, y, text, transform=right, fontsize=8, va="center", family="monospace")
