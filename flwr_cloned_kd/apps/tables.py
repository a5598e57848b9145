"""The tables that a run prints at its end."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..reading.curves import curve
from .plots import style_of

ACCURACY_COLUMNS = {
    "edge acc.": "edge-accuracy",
    "ensemble": "ensemble-accuracy",
    "knows": "known",
    "start": "student-start",
    "core acc.": "core-accuracy",
    "consensus": "consensus",
}
"""Titles of the columns of fractions, and the metrics in them."""

PARTS = ("edges train", "core learns", "start", "other")
"""Titles of the columns that say where the seconds of a strategy went."""


def rounds_table(rows: list[dict[str, Any]]) -> Table:
    """Lay out one line per round of every strategy."""
    table = Table(title="Rounds")
    table.add_column("strategy")
    for title in ("round", "edge", *ACCURACY_COLUMNS, "kB", "seconds"):
        table.add_column(title, justify="right")
    for row in rows:
        fractions = {
            metric: f"{row[metric]:.3f}" if metric in row else "-"
            for metric in ACCURACY_COLUMNS.values()
        }
        if not row["accepted"]:
            fractions["core-accuracy"] = "refused"
        elif row.get("undone"):
            fractions["core-accuracy"] = "undone"
        table.add_row(
            row["strategy"],
            str(row["round"]),
            escape(str(row["edge"])),  # the edge chose the name, which may look like markup
            *fractions.values(),
            f"{(row['bytes-down'] + row['bytes-up']) / 1e3:.1f}",
            f"{row['seconds']:.1f}",
        )
    return table


def comparison_table(
    rows: list[dict[str, Any]], first: float, measured: Mapping[str, float] = MappingProxyType({})
) -> Table:
    """Lay out one line per strategy: rounds, accuracies, bytes, and where the seconds went.

    "start" is the time before the first edge trains, in which Flower starts its processes; "other"
    is mostly transfers and waiting for the next poll. The four parts add up to the seconds.

    Args:
        first: accuracy of the core before any edge, a fraction in [0, 1].
        measured: strategy -> accuracy of its last core, where the rows do not have it.
    """
    table = Table(title=f"Comparison (first core: {first:.3f})")
    table.add_column("strategy")
    for title in (
        "rounds",
        "core acc. after 1",
        "core acc. at end",
        "MB in total",
        "seconds",
        *PARTS,
    ):
        table.add_column(title, justify="right")
    for name in dict.fromkeys(row["strategy"] for row in rows):
        own_rows = [row for row in rows if row["strategy"] == name]
        total = sum(row["bytes-down"] + row["bytes-up"] for row in own_rows) / 1e6
        table.add_row(
            style_of(name).label,
            str(len(own_rows)),
            f"{final_accuracy(own_rows[:1], name, first):.3f}",
            f"{measured.get(name, final_accuracy(own_rows, name, first)):.3f}",
            f"{total:.3f}",
            f"{sum(row['seconds'] for row in own_rows):.1f}",
            *_parts_of_seconds(own_rows),
        )
    return table


def _parts_of_seconds(rows: list[dict[str, Any]]) -> list[str]:
    """Write the seconds of the `PARTS` of a strategy's rounds.

    They are "-" for Flower's own strategies, which do not measure them, and in virtual time, where
    they are seconds of another clock than those of the rounds.
    """
    if any("core-idle-seconds" not in row for row in rows):
        return ["-"] * len(PARTS)
    waits = [row["core-idle-seconds"] for row in rows]
    # An edge may report any number, and it may have trained while the core learned.
    trained = [
        min(max(row.get("reported-train-seconds", 0.0), 0.0), wait)
        for row, wait in zip(rows, waits)
    ]
    parts = [sum(trained), sum(row["core-seconds"] for row in rows), waits[0] - trained[0]]
    total = sum(row["seconds"] for row in rows)
    other = total - sum(parts)
    if other < -0.1 * total:
        return ["-"] * len(PARTS)
    return [f"{seconds:.1f}" for seconds in (*parts, max(other, 0.0))]


def final_accuracy(rows: list[dict[str, Any]], strategy: str, first: float) -> float:
    """Return the core's accuracy after the last accepted round of a strategy, or else `first`."""
    own_rows = (row for row in rows if row["strategy"] == strategy)
    return curve(own_rows, first)[-1].accuracy
