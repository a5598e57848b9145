"""Tables and heatmaps of the study of bad edges: a line for each attack, a column per defence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .attacks import DEFAULT_GUARD, DEFENCES, HONEST, HONEST_SPLITS, OMITTED, UNGUARDED
from .rounds import SCORES
from .statistics import Summary
from .style import blank_figure
from .tables import NONE, SEEDS, Table, bold, spread_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIN_COST = 0.02
"""An attack counts if it costs an unguarded core more than this share of the samples."""
MAX_LOSS = 0.01
"""The last core with the default guard may be worse than `omitted` by this share of the samples."""
MAX_FALSE_ALARMS = {"IID": 1 / 50, "Dirichlet 0.3": 1 / 20}
"""Split -> the share of honest edges that a guard may refuse."""

Grid = dict[str, list[float | None]]
"""Name of a line -> its number in each column; None in a column without a number."""


def table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show every row: the cores, what the defence refused, and the backdoor.

    A row is bold if the default guard is not good enough, see `_misses`.
    """
    headings = [
        "bad edges",
        "defence",
        "last core",
        "minus omitted",
        "right after",
        "bad refused",
        "honest refused",
        "precision",
        "backdoor",
        SEEDS,
    ]
    lines = []
    for row in result.values():
        if row["split"] == "IID":
            line = _line(row)
            lines.append([bold(cell) for cell in line] if _misses(row, result) else line)
    return headings, lines


def _line(row: Summary) -> list[str]:
    precision = row.get("precision")
    return [
        row["edges"],
        row["defence"],
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


def _misses(row: Summary, result: Summary) -> bool:
    """Return whether the default guard is not as good as omitting the bad edges.

    That is so if the last core is worse than with the bad edges omitted by more than `MAX_LOSS`,
    with an attack that costs a core without a guard more than `MIN_COST`.
    """
    unguarded = result.get(f"{row['edges']}/{UNGUARDED}", {})
    if row["defence"] != DEFAULT_GUARD or not all("minus omitted" in r for r in (row, unguarded)):
        return False
    return bool(
        unguarded["minus omitted"]["mean"] < -MIN_COST and row["minus omitted"]["mean"] < -MAX_LOSS
    )


def score_table(heading: str, score: str, form: str, *, with_references: bool = False) -> Table:
    """Make a table of one score: a line for each attack, a column for each defence.

    Args:
        heading: of the first column, names the score.
        score: an entry in the summary of a row, a number or a spread.
        form: Python's format of the number or of the mean.
        with_references: adds the rows without a bad edge and those in which these are omitted.
    """

    def show(result: Summary) -> tuple[list[str], list[list[str]]]:
        rows = [row for row in result.values() if row["split"] == "IID"]
        if not with_references:
            rows = _attacked(result)
        defences = _defences(rows)
        lines = _cells(_grid(rows, defences, "edges", score), form)
        return [heading, *defences], lines

    return show


def cost_table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show what a run of each defence exchanges and trains, if each edge is visited once."""
    rows = [row for row in result.values() if row["visits"] == 1 and row["split"] == "IID"]
    first = {row["defence"]: row for row in reversed(rows)}
    lines = [
        [defence, f"{first[defence]['bytes'] / 1e6:.2f}", f"{first[defence]['images'] / 1e3:.0f}"]
        for defence in _defences(rows)
    ]
    return ["defence", "MB", "thousands of images"], lines


def false_alarm_table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show the share of honest edges that each defence refuses, without a bad edge.

    A cell is bold if the share is above `MAX_FALSE_ALARMS`.
    """
    rows = [row for row in _honest(result) if "honest refused" in row]
    defences = [defence for defence in _defences(rows) if defence != UNGUARDED]
    lines = []
    for split, values in _grid(rows, defences, "split", "honest refused").items():
        limit = MAX_FALSE_ALARMS.get(split, 1.0)
        cells = [
            bold(cell) if value is not None and value > limit else cell
            for value, cell in zip(values, _formatted(values, ".2f"))
        ]
        lines.append([split, *cells])
    return ["honest edges refused", *defences], lines


def honest_table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show what the default guard does to a core that meets honest edges only, split by split."""
    rows = [row for row in _honest(result) if row["defence"] in (UNGUARDED, DEFAULT_GUARD)]
    rows.sort(key=lambda row: [*HONEST_SPLITS].index(row["split"]))
    lines = [
        [
            row["split"],
            row["defence"],
            spread_cell(row["final"]),
            spread_cell(row["mean of rounds"]),
            f"{row['worst drop']:.3f}" if row["worst drop"] > 0 else NONE,
            f"{row['honest refused']['mean']:.2f}",
            str(row["final"]["n"]),
        ]
        for row in rows
    ]
    headings = ["honest edges", "guard", "last core", "mean over rounds", "largest fall in a round"]
    return [*headings, "refused", SEEDS], lines


def roc_table(heading: str, kind: str) -> Table:
    """Make a table of areas under the ROC: a line for each attack, a column for each score.

    Args:
        heading: of the first column.
        kind: "roc" or "roc skewed", see `attack_scores`.
    """

    def show(result: Summary) -> tuple[list[str], list[list[str]]]:
        headings = [heading, *(name.replace("_", " ") for name in SCORES)]
        return headings, _cells(_roc_grid(result, kind), ".2f")

    return show


def _roc_grid(result: Summary, kind: str) -> Grid:
    return {
        row["edges"]: [row[kind].get(name) for name in SCORES]
        for row in result.values()
        if row.get(kind)
    }


def _attacked(result: Summary) -> list[Summary]:
    return [row for row in result.values() if row["attack"] not in (HONEST, OMITTED)]


def _honest(result: Summary) -> list[Summary]:
    """Return the rows of honest edges, one visit each, with the preset `practical`."""
    return [row for row in result.values() if row["edges"] == HONEST]


def _defences(rows: list[Summary]) -> list[str]:
    return [defence for defence in DEFENCES if any(row["defence"] == defence for row in rows)]


def _grid(rows: list[Summary], defences: list[str], line: str, score: str) -> Grid:
    """Arrange one score by the entry `line` of the rows and by defence."""
    values = {(row[line], row["defence"]): _number(row.get(score)) for row in rows}
    return {
        name: [values.get((name, defence)) for defence in defences]
        for name in dict.fromkeys(row[line] for row in rows)
    }


def _number(value: Summary | float | None) -> float | None:
    return value["mean"] if isinstance(value, dict) else value


def _formatted(values: Sequence[float | None], form: str) -> list[str]:
    return [NONE if value is None else format(value, form) for value in values]


def _cells(grid: Grid, form: str) -> list[list[str]]:
    return [[name, *_formatted(values, form)] for name, values in grid.items()]


TABLES: dict[str, Table] = {
    "all": table,
    "final": score_table("last core minus omitted", "minus omitted", "+.3f"),
    "cores": score_table("last core", "final", ".3f", with_references=True),
    "right after": score_table("core right after", "right after", ".3f"),
    "recall": score_table("bad edges refused", "bad refused", ".2f"),
    "precision": score_table("refused that are bad", "precision", ".2f"),
    "backdoor": score_table("triggered, class 0", "backdoor", ".2f"),
    "false alarms": false_alarm_table,
    "honest": honest_table,
    "roc": roc_table("area under the ROC", "roc"),
    "roc skewed": roc_table("area under the ROC, skewed honest edges", "roc skewed"),
    "cost": cost_table,
}

PANELS = {
    "minus omitted": ("last core, minus omitted", "RdBu", (-0.1, 0.1), "+.3f"),
    "right after": ("core right after", "viridis", (0.0, 1.0), ".2f"),
    "backdoor": ("triggered, class 0", "viridis_r", (0.0, 1.0), ".2f"),
    "bad refused": ("bad edges refused", "viridis", (0.0, 1.0), ".2f"),
    "precision": ("refused that are bad", "viridis", (0.0, 1.0), ".2f"),
    "honest refused": ("honest edges refused, no bad edge", "viridis_r", (0.0, 1.0), ".2f"),
    "roc": ("area under the ROC, no guard", "RdBu", (0.0, 1.0), ".2f"),
    "roc skewed": ("the same, skewed honest edges", "RdBu", (0.0, 1.0), ".2f"),
}
"""Score -> the title of its panel, its colours, the values at their ends, and Python's format."""

PANELS_PER_ROW = 2
INCHES_PER_LINE = 0.25
INCHES_PER_COLUMN = 0.5


def draw(result: Summary) -> Figure:
    """Draw a heatmap of every score: a line for each attack, a column for each defence.

    The panels of the ROC have a column for each score, and that of the honest edges a line for each
    split. A panel without a number is left out.
    """
    grids = {score: _panel(result, score) for score in PANELS}
    shown = {
        score: (columns, grid)
        for score, (columns, grid) in grids.items()
        if any(value is not None for values in grid.values() for value in values)
    }
    num_rows = -(-len(shown) // PANELS_PER_ROW)
    most_lines = [
        max(len(grid) for _, grid in [*shown.values()][PANELS_PER_ROW * i :][:PANELS_PER_ROW])
        for i in range(num_rows)
    ]
    most_columns = max(len(columns) for columns, _ in shown.values())
    height = sum(1.6 + INCHES_PER_LINE * lines for lines in most_lines)
    width = PANELS_PER_ROW * (2.4 + INCHES_PER_COLUMN * max(6, most_columns))
    figure = blank_figure(height, width)
    panels = figure.subplots(
        num_rows,
        PANELS_PER_ROW,
        squeeze=False,
        gridspec_kw={"height_ratios": [2 + lines for lines in most_lines]},
    ).flatten()
    for axes, score in zip(panels, shown):
        _draw_panel(axes, score, *shown[score])
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return figure


def _panel(result: Summary, score: str) -> tuple[list[str], Grid]:
    """Return the columns and the numbers of one panel."""
    if score in ("roc", "roc skewed"):
        return [name.replace("_", " ") for name in SCORES], _roc_grid(result, score)
    line = "edges"
    rows = _attacked(result)
    if score == "honest refused":
        line = "split"
        rows = _honest(result)
    rows = [row for row in rows if row.get(score) is not None]
    defences = _defences(rows)
    return defences, _grid(rows, defences, line, score)


def _draw_panel(axes: Axes, score: str, columns: list[str], grid: Grid) -> None:
    title, colours, (lowest, highest), form = PANELS[score]
    axes.set_title(title, fontsize=9)
    numbers = [[float("nan") if value is None else value for value in row] for row in grid.values()]
    axes.imshow(numbers, cmap=colours, vmin=lowest, vmax=highest, aspect="auto")
    for y, row in enumerate(grid.values()):
        for x, value in enumerate(row):
            if value is not None:
                box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}
                text = format(value, form)
                axes.text(x, y, text, ha="center", va="center", fontsize=7, bbox=box)
    axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=45, ha="right")
    axes.set_yticks(range(len(grid)), list(grid), fontsize=7)
