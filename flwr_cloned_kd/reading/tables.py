"""What a comparison says in numbers: the cells of its tables, for the terminal and for the page."""

from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .curves import Point
from .groups import Group, config_names, differing_keys, distinct_configs, value_text
from .runs import LoadedRun

UNKNOWN = "-"
MAX_HEADING_WIDTH = 8
"""Longer headings of a printed table have two lines."""
MAX_WIDTH = 1000
"""Columns of a printed table, at most."""
MAX_LISTED_SEEDS = 4


class Cells(NamedTuple):
    """A table: the headings of its columns, and the texts of every row."""

    headings: list[str]
    rows: list[list[str]]


Measure = Callable[[list[dict[str, Any]], list[Point]], float | None]
"""(rounds of one strategy, its curve) -> a number; None where it is not known."""

MEASURES: dict[str, tuple[int, Measure]] = {
    "rounds": (0, lambda rows, points: len(rows)),
    "refused": (0, lambda rows, points: sum(not row["accepted"] for row in rows)),
    "first": (3, lambda rows, points: points[0].accuracy if points else None),
    "final": (3, lambda rows, points: points[-1].accuracy if points else None),
    "best": (3, lambda rows, points: max((point.accuracy for point in points), default=None)),
    "MB down": (2, lambda rows, points: sum(row.get("bytes-down", 0) for row in rows) / 1e6),
    "MB up": (2, lambda rows, points: sum(row.get("bytes-up", 0) for row in rows) / 1e6),
    "seconds": (1, lambda rows, points: sum(row.get("seconds", 0.0) for row in rows)),
}
"""Heading -> digits after the point, and the number of one run."""


def summary_cells(groups: Sequence[Group], target: float | None = None) -> Cells:
    """Lay out one row per group: its accuracies, bytes and seconds, as mean and deviation.

    Args:
        target: an accuracy, a fraction in [0, 1]. If it is given, two columns more have the bytes
            and the seconds until the core has this accuracy.
    """
    headings = ["strategy", "seeds", *MEASURES]
    if target is not None:
        headings += [f"MB until {target:g}", f"s until {target:g}"]
    rows = []
    for group in groups:
        curves = group.curves
        rounds = [run.rounds_of(group.strategy) for run in group.runs]
        cells = [group.label, _seeds_cell(group)]
        for digits, measure in MEASURES.values():
            values = [measure(rows_of_run, points) for rows_of_run, points in zip(rounds, curves)]
            cells.append(spread_cell(values, digits))
        if target is not None:
            reached = [first_point_with(points, target) for points in curves]
            cells.append(target_cell([point and point.megabytes for point in reached], 2))
            cells.append(target_cell([point and point.seconds for point in reached], 1))
        rows.append(cells)
    return Cells(headings, rows)


def _seeds_cell(group: Group) -> str:
    """List a few seeds, or say how many there are."""
    if len(group.seeds) > MAX_LISTED_SEEDS:
        return f"{len(group.seeds)} seeds"
    return ", ".join(UNKNOWN if seed is None else str(seed) for seed in group.seeds)


def first_point_with(points: Sequence[Point], target: float) -> Point | None:
    """Return the first point with at least this accuracy; None if no point has it."""
    return next((point for point in points if point.accuracy >= target), None)


def spread_cell(values: Sequence[float | None], digits: int) -> str:
    """Write a mean and, if there are several different values, their standard deviation."""
    known = [float(value) for value in values if value is not None]
    if not known or len(known) < len(values):
        return UNKNOWN
    mean = f"{fmean(known):.{digits}f}"
    if len(set(known)) == 1:
        return mean
    return f"{fmean(known):.{max(digits, 1)}f} ± {stdev(known):.{max(digits, 1)}f}"


def target_cell(values: Sequence[float | None], digits: int) -> str:
    """Write a mean over runs that all reached the target, or else how many of them did.

    A mean over only those runs that reached it would favour strategies that often fail.
    """
    num_reached = sum(value is not None for value in values)
    if num_reached == len(values):
        return spread_cell(values, digits)
    return f"{num_reached} of {len(values)} runs" if num_reached else "never"


def difference_cells(runs: Sequence[LoadedRun]) -> Cells | None:
    """Lay out the keys in which the configs of runs differ; None if they differ in none."""
    configs = distinct_configs(runs)
    keys = differing_keys(configs)
    if not keys:
        return None
    rows = [[key, *(value_text(config, key) for config in configs)] for key in keys]
    return Cells(["key", *config_names(configs)], rows)


def shared_cells(runs: Sequence[LoadedRun]) -> Cells:
    """Lay out the keys that have the same value in all runs."""
    configs = distinct_configs(runs)
    differing = differing_keys(configs)
    keys = [key for key in (configs[0] if configs else ()) if key not in differing]
    return Cells(["key", "value"], [[key, value_text(configs[0], key)] for key in keys])


def refusal_cells(runs: Sequence[LoadedRun]) -> Cells:
    """Lay out one row per refused round, with its cause."""
    rows = [
        [
            str(row.get("edge", UNKNOWN)),
            str(row.get("cause") or UNKNOWN),
            str(row["round"]),
            row["strategy"],
            run.name,
        ]
        for run in runs
        for row in run.rounds
        if not row["accepted"]
    ]
    return Cells(["edge", "cause", "round", "strategy", "run"], rows)


def run_cells(runs: Sequence[LoadedRun]) -> Cells:
    """Lay out one row per run: its seed, whether it ended, and the machine that it ran on."""
    rows = []
    for run in runs:
        hardware = run.summary.get("hardware")
        machine = hardware if isinstance(hardware, dict) else {}
        versions = run.summary.get("versions")
        packages = versions if isinstance(versions, dict) else {}
        rows.append(
            [
                run.name,
                UNKNOWN if run.seed is None else str(run.seed),
                "yes" if run.finished else "no",
                str(machine.get("gpu") or machine.get("cpu") or UNKNOWN),
                ", ".join(f"{name} {version}" for name, version in packages.items()) or UNKNOWN,
            ]
        )
    return Cells(["run", "seed", "ended", "machine of the core", "versions"], rows)


def print_table(console: Console, cells: Cells, title: str = "") -> None:
    """Print a table; its first column holds names, and the others numbers.

    A table that is wider than the terminal is printed whole, and the terminal wraps its lines.

    Names of edges and configs come from other machines. They are shown as they are, and characters
    that would control the terminal are replaced.
    """
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(cells.headings):
        lines = heading.replace(" ", "\n", 1) if len(heading) > MAX_HEADING_WIDTH else heading
        table.add_column(plain(lines), justify="right" if number else "left", no_wrap=True)
    for name, *texts in cells.rows:
        # Each part of a name and each deviation has its own line, so that a dozen columns fit.
        lines_of_cells = [name.replace(", ", "\n"), *(text.replace(" ± ", "\n±") for text in texts)]
        table.add_row(*map(plain, lines_of_cells))
    width = console.measure(table, options=console.options.update_width(MAX_WIDTH)).maximum
    console.width = max(console.width, width)
    console.print(table)


def plain(text: str) -> Text:
    """Return a text without markup and without characters that are not printable."""
    return Text("".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text))
