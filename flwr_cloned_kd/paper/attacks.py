"""Bad edges in two rounds: every attack against every guard, and false alarms on honest edges."""

from __future__ import annotations

from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from ..apps.settings import Settings
from .fig8 import noisy_edges
from .methods import METHODS, OURS, UNSELECTIVE, Changes, Plan, over_seeds
from .rounds import Record
from .skew import SPLITS
from .statistics import Results, Summary, core_accuracy, final, spread
from .style import blank_figure
from .tables import NONE, SEEDS, Table, spread_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRENGTHS: dict[str, tuple[float, ...]] = {
    "labels shuffled": (1.0, 0.5),
    "labels y + 1": (1.0, 0.5),
    "labels all 0": (1.0, 0.5),
    "backdoor": (1.0, 0.2),
    "movement reversed": (1.0, 3.0),
    "movement scaled": (10.0, 3.0),
    "noise": (10.0, 3.0),
    "random weights": (0.0,),
    "free rider": (0.0, 0.1),
    "two collude": (10.0, 4.0),
    "adaptive": (0.1, 0.05),
}
"""Attack -> its strengths; the first one has all seeds, the others the lesser number of seeds."""

REVISITS: dict[str, tuple[float, ...]] = {
    "first answer again": (0.0,),
    "first model again": (0.0,),
    "slow poison": (0.3,),
}
"""Attacks that need a second visit -> their strengths."""

GUARDS: dict[str, Changes] = {"none": {}, "jump": {"guard": "jump"}, "drop": {"guard": "drop"}}
"""Name of a guard -> what differs from the base settings. A guard is a column of the tables."""

HONEST = "clean"
OMITTED = "omitted"
"""The rows without a bad edge, and the rows in which an oracle refuses every bad edge."""

PRESETS: dict[str, Changes] = {OURS: METHODS[OURS], "unselective": UNSELECTIVE}
"""Name of a preset -> what differs from the base settings. `unselective` shows what an attack does
to a core that learns from every teacher."""

HONEST_SPLITS = {split: SPLITS[split] for split in ("IID", "Dirichlet 0.3", "Dirichlet 0.1")}


class Row(NamedTuple):
    """One row.

    Args:
        attack: one of `attacks.ATTACKS`, `HONEST` or `OMITTED`.
        guard: one of `GUARDS`.
        strength: of the attack; None for an attack without one.
        split: one of `HONEST_SPLITS`.
        num_visits: number of visits of every edge.
        preset: one of `PRESETS`.
        main: True gives the row all seeds, False the lesser number of seeds.
    """

    attack: str
    guard: str = "none"
    strength: float | None = None
    split: str = "IID"
    num_visits: int = 1
    preset: str = OURS
    main: bool = True

    @property
    def edges(self) -> str:
        """What the bad edges do, with what differs from one visit and the preset `practical`."""
        parts = [self.attack]
        if self.strength is not None:
            parts.append(f"{self.strength:g}")
        if self.num_visits > 1:
            parts.append(f"{self.num_visits} visits")
        if self.preset != OURS:
            parts.append(self.preset)
        return ", ".join(parts)

    @property
    def name(self) -> str:
        """The name of the row in the JSON file."""
        split = "" if self.split == "IID" else f"/{self.split}"
        return f"{self.edges}/{self.guard}{split}"

    @property
    def reference(self) -> str:
        """The name of the row in which the bad edges are omitted."""
        return Row(OMITTED, num_visits=self.num_visits, preset=self.preset).name


def _rows(
    strengths: dict[str, tuple[float, ...]], *, num_visits: int = 1, preset: str = OURS
) -> list[Row]:
    """Return the rows of some attacks, and before them their references on even data."""
    return [
        *(Row(HONEST, guard, num_visits=num_visits, preset=preset) for guard in GUARDS),
        Row(OMITTED, num_visits=num_visits, preset=preset),
        *(
            Row(
                attack,
                guard,
                strength or None,
                num_visits=num_visits,
                preset=preset,
                main=strength == strengths[attack][0],
            )
            for attack in strengths
            for strength, guard in product(strengths[attack], GUARDS)
        ),
    ]


ROWS = {
    row.name: row
    for row in (
        *(Row(HONEST, guard, split=split) for split, guard in product(HONEST_SPLITS, GUARDS)),
        *_rows(STRENGTHS),
        *_rows(REVISITS, num_visits=2),
        *_rows(
            {attack: strengths[:1] for attack, strengths in STRENGTHS.items()},
            preset="unselective",
        ),
    )
}


def plan(base: Settings, seeds: int, lesser: int) -> Plan:
    """Plan bad edges in rounds 4 and 7.

    Raises:
        ValueError: if there is only one edge.
    """
    if base.num_edges < 2:
        raise ValueError("--num-edges: expected at least 2, an honest and a bad one, got 1")
    return {
        name: over_seeds(base, seeds if row.main else lesser, _changes(row, base))
        for name, row in ROWS.items()
    }


def _changes(row: Row, base: Settings) -> Changes:
    changes = {**PRESETS[row.preset], **GUARDS[row.guard], **HONEST_SPLITS[row.split]}
    if row.num_visits > 1:
        changes["num_rounds"] = row.num_visits * base.num_edges
    if row.attack == HONEST:
        return changes
    changes["bad_edges"] = tuple(noisy_edges(base))
    if row.attack == OMITTED:  # A free rider costs the least time.
        return changes | {"attack": "free rider", "oracle": True}
    return changes | {"attack": row.attack, "strength": row.strength or 0.0}


def reduce(results: Results) -> Summary:
    """Sum up the last core, the core right after a bad edge, and what the guard refused."""
    return {name: _reduce_row(ROWS[name], results) for name in results}


def _reduce_row(row: Row, results: Results) -> Summary:
    runs = results[row.name]
    summary: Summary = {
        "attack": row.attack,
        "edges": row.edges,
        "guard": row.guard,
        "split": row.split,
        "final": final(runs),
        "honest refused": spread([_share_refused(records, bad=False) for records in runs]),
    }
    if row.reference in results and row.attack not in (HONEST, OMITTED):
        pairs = zip(runs, results[row.reference])
        summary["minus omitted"] = spread(
            [core_accuracy(one[-1]) - core_accuracy(other[-1]) for one, other in pairs]
        )
    if row.attack != HONEST:
        summary["right after"] = spread([min(_after_bad(records)) for records in runs])
        summary["bad refused"] = spread([_share_refused(records, bad=True) for records in runs])
        summary["precision"] = _precision(runs)
        summary["backdoor"] = spread([records[-1]["backdoor"] for records in runs])
    return summary


def is_bad(record: Record) -> bool:
    """Return whether a bad edge attacked in the round of a record."""
    return bool(record.get("bad", 0.0))


def _after_bad(records: list[Record]) -> list[float]:
    return [core_accuracy(record) for record in records if is_bad(record)]


def _share_refused(records: list[Record], *, bad: bool) -> float:
    return fmean(1 - record["accepted"] for record in records[1:] if is_bad(record) == bad)


def _precision(runs: list[list[Record]]) -> float | None:
    """Return the share of bad edges among those refused in all runs; None if none was refused."""
    refused = [record for records in runs for record in records[1:] if not record["accepted"]]
    return fmean(is_bad(record) for record in refused) if refused else None


def table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show every row: the cores, what the guard refused, and the backdoor."""
    headings = [
        "bad edges",
        "guard",
        "last core",
        "minus omitted",
        "right after",
        "bad refused",
        "honest refused",
        "precision",
        "backdoor",
        SEEDS,
    ]
    lines = [_line(row) for row in result.values() if row["split"] == "IID"]
    return headings, lines


def _line(row: Summary) -> list[str]:
    precision = row.get("precision")
    return [
        row["edges"],
        row["guard"],
        spread_cell(row["final"]),
        spread_cell(row["minus omitted"], "+") if "minus omitted" in row else NONE,
        *(
            f"{row[score]['mean']:.2f}" if score in row else NONE
            for score in ("right after", "bad refused", "honest refused")
        ),
        NONE if precision is None else f"{precision:.2f}",
        f"{row['backdoor']['mean']:.2f}" if "backdoor" in row else NONE,
        str(row["final"]["n"]),
    ]


def score_table(score: str, form: str) -> Table:
    """Make a table of one score: a line for each attack, a column for each guard.

    Args:
        score: an entry in the summary of a row, a number or a spread.
        form: Python's format of the number or of the mean.
    """

    def show(result: Summary) -> tuple[list[str], list[list[str]]]:
        rows = [row for row in result.values() if row["attack"] not in (HONEST, OMITTED)]
        guards = _guards(rows)
        cells = [
            [edges, *(NONE if value is None else format(value, form) for value in line)]
            for edges, line in _grid(rows, guards, "edges", score).items()
        ]
        return ["bad edges", *(f"guard: {guard}" for guard in guards)], cells

    return show


def false_alarm_table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show the share of honest edges that each guard refuses, without a bad edge."""
    rows = _honest(result)
    guards = [guard for guard in _guards(rows) if guard != "none"]
    lines = [
        [split, *(NONE if value is None else f"{value:.2f}" for value in line)]
        for split, line in _grid(rows, guards, "split", "honest refused").items()
    ]
    return ["split", *(f"guard: {guard}" for guard in guards)], lines


def _honest(result: Summary) -> list[Summary]:
    """Return the rows of honest edges, one visit each, with the preset `practical`."""
    return [row for row in result.values() if row["edges"] == HONEST]


def _guards(rows: list[Summary]) -> list[str]:
    return [guard for guard in GUARDS if any(row["guard"] == guard for row in rows)]


def _grid(
    rows: list[Summary], guards: list[str], line: str, score: str
) -> dict[str, list[float | None]]:
    """Arrange one score by the entry `line` of the rows and by guard; None where there is none."""
    values = {(row[line], row["guard"]): _number(row.get(score)) for row in rows}
    return {
        name: [values.get((name, guard)) for guard in guards]
        for name in dict.fromkeys(row[line] for row in rows)
    }


def _number(value: Summary | float | None) -> float | None:
    return value["mean"] if isinstance(value, dict) else value


TABLES: dict[str, Table] = {
    "all": table,
    "final": score_table("minus omitted", "+.3f"),
    "right after": score_table("right after", ".3f"),
    "recall": score_table("bad refused", ".2f"),
    "precision": score_table("precision", ".2f"),
    "backdoor": score_table("backdoor", ".2f"),
    "false alarms": false_alarm_table,
}

PANELS = {
    "minus omitted": ("last core, minus omitted", "RdBu", (-0.1, 0.1), "+.3f"),
    "right after": ("core right after", "viridis", (0.0, 1.0), ".2f"),
    "backdoor": ("triggered, class 0", "viridis_r", (0.0, 1.0), ".2f"),
    "bad refused": ("bad edges refused", "viridis", (0.0, 1.0), ".2f"),
    "precision": ("refused that are bad", "viridis", (0.0, 1.0), ".2f"),
    "honest refused": ("honest edges refused", "viridis_r", (0.0, 1.0), ".2f"),
}
"""Score -> the title of its panel, its colours, the values at their ends, and Python's format."""


def draw(result: Summary) -> Figure:
    """Draw a heatmap of every score: a line for each attack, a column for each guard.

    The last panel is about runs without a bad edge and has a line for each split.
    """
    bad = [row for row in result.values() if row["attack"] not in (HONEST, OMITTED)]
    num_lines = len({row["edges"] for row in bad})
    figure = blank_figure(max(3.0, 1.6 + 0.28 * num_lines), 15.0)
    panels = figure.subplots(1, len(PANELS))
    for axes, score in zip(panels[:-1], PANELS):
        _draw_panel(axes, bad, "edges", score)
        axes.tick_params(labelleft=axes is panels[0])
    _draw_panel(panels[-1], _honest(result), "split", "honest refused")
    return figure


def _draw_panel(axes: Axes, rows: list[Summary], line: str, score: str) -> None:
    title, colours, (lowest, highest), form = PANELS[score]
    guards = _guards(rows)
    grid = _grid(rows, guards, line, score)
    axes.set_title(title, fontsize=9)
    if not grid:
        axes.set_axis_off()
        return
    numbers = [[float("nan") if value is None else value for value in row] for row in grid.values()]
    axes.imshow(numbers, cmap=colours, vmin=lowest, vmax=highest, aspect="auto")
    for y, row in enumerate(grid.values()):
        for x, value in enumerate(row):
            if value is not None:
                box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}
                text = format(value, form)
                axes.text(x, y, text, ha="center", va="center", fontsize=7, bbox=box)
    axes.set_xticks(range(len(guards)), guards, fontsize=8)
    axes.set_yticks(range(len(grid)), list(grid), fontsize=7)
    axes.set_xlabel("guard")
