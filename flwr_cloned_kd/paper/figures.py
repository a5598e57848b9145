"""The registry of figures, and what is done alike with every one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..apps.settings import Settings
from . import (
    attack_scores,
    attack_tables,
    attacks,
    controls,
    fig4,
    fig5,
    fig6,
    fig7,
    fig8,
    fig9,
    skew,
)
from .methods import Plan
from .statistics import Results, Summary
from .style import DOTS_PER_INCH
from .tables import Table, expect, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture


class Figure(NamedTuple):
    """One figure.

    Args:
        title: what it shows.
        plan: base settings, seeds, lesser number of seeds -> the runs of every row.
        reduce: the records of every row -> what the JSON file holds as "result".
        tables: their names and how they are made of the result; the first table first.
        draw: makes a picture of the result; raises ImportError if Matplotlib is not installed.
        apart: whether some rows can be read without the others.
        is_usual: whether the row of a name is played unless rows are named.
    """

    title: str
    plan: Callable[[Settings, int, int], Plan]
    reduce: Callable[[Results], Summary]
    tables: dict[str, Table]
    draw: Callable[[Summary], Picture]
    apart: bool = True
    is_usual: Callable[[str], bool] = lambda name: True


FIGURES = {
    "fig4": Figure(
        title="Correct before and after Phase 2",
        plan=fig4.plan,
        reduce=fig4.reduce,
        tables={"all": fig4.table},
        draw=fig4.draw,
    ),
    "fig5": Figure(
        title="All variants",
        plan=fig5.plan,
        reduce=fig5.reduce,
        tables={"all": fig5.table},
        draw=fig5.draw,
    ),
    "fig6": Figure(
        title="Consensus",
        plan=fig6.plan,
        reduce=fig6.reduce,
        tables={"all": fig6.table},
        draw=fig6.draw,
    ),
    "fig7": Figure(
        title="A late edge",
        plan=fig7.plan,
        reduce=fig7.reduce,
        tables={"all": fig7.table},
        draw=fig7.draw,
        apart=False,
    ),
    "fig8": Figure(
        title="Noisy edges and guards",
        plan=fig8.plan,
        reduce=fig8.reduce,
        tables={"all": fig8.table},
        draw=fig8.draw,
        apart=False,
    ),
    "fig9": Figure(
        title="On the edges' own data",
        plan=fig9.plan,
        reduce=fig9.reduce,
        tables={"all": fig9.table},
        draw=fig9.draw,
    ),
    "controls": Figure(
        title="Baselines and controls",
        plan=controls.plan,
        reduce=controls.reduce,
        tables={"all": controls.table},
        draw=controls.draw,
    ),
    "skew": Figure(
        title="Even and skewed edges",
        plan=skew.plan,
        reduce=skew.reduce,
        tables=skew.TABLES,
        draw=skew.draw,
    ),
    "attacks": Figure(
        title="Bad edges and guards",
        plan=attacks.plan,
        reduce=attack_scores.reduce,
        tables=attack_tables.TABLES,
        draw=attack_tables.draw,
        is_usual=attacks.is_usual,
    ),
}


def choose(name: str, plan: Plan, rows: Sequence[str], splits: Sequence[str] = ()) -> Plan:
    """Keep the named rows of a figure's plan; an empty list keeps all rows.

    Args:
        name: of the figure.
        plan: all rows.
        rows: their names, or patterns of names such as "noise*". A row of `skew` is named by its
            method.
        splits: keeps the rows of some splits of `skew`; an empty list keeps all.

    Raises:
        ValueError: for a name or a pattern without a row, or for a figure whose rows are read
            together.
    """
    if rows and not FIGURES[name].apart:
        raise ValueError(f"--rows: {name} needs all its rows")
    if name == "skew":
        named = {row: skew.method_and_split(row) for row in plan}
    else:
        named = {row: (row, "") for row in plan}
    known = dict.fromkeys(method for method, _ in named.values())
    if unknown := [row for row in rows if not any(fnmatchcase(method, row) for method in known)]:
        raise ValueError(f"--rows: expected some of {'; '.join(known)}; got {unknown[0]!r}")
    return {
        row: plan[row]
        for row, (method, split) in named.items()
        if (not rows or any(fnmatchcase(method, pattern) for pattern in rows))
        and (not splits or split in ("", *splits))
    }


def usual(name: str, plan: Plan) -> Plan:
    """Keep the rows of a figure's plan that are played unless rows are named."""
    return {row: runs for row, runs in plan.items() if FIGURES[name].is_usual(row)}


def full_table(data: Summary) -> str:
    """Write all tables of one figure in Markdown, under a title.

    Args:
        data: what the figure's JSON file holds.
    """
    settings = data["settings"]
    counts = sorted(set(data["seeds"].values()))
    title = (
        f"{data['title']}: {data['dataset']}, {settings['model']}, mean ± sample standard "
        f"deviation of {' or '.join(map(str, counts))} seeds"
    )
    tables = FIGURES[data["figure"]].tables.values()
    return "\n".join([f"{title}\n", *(markdown(table, data["result"]) for table in tables)])


def table_part(
    data: Summary, part: str = "", rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> str:
    """Write one table of a figure in Markdown, without a title.

    Args:
        data: what the figure's JSON file holds.
        part: the name of one of the figure's tables; "" is the first table.
        rows, columns: see `tables.markdown`.

    Raises:
        ValueError: for a part, a row or a column that the figure does not have.
    """
    tables = FIGURES[data["figure"]].tables
    if part:
        expect("part", part, tables)
    table = tables[part or next(iter(tables))]
    return markdown(table, data["result"], rows, columns)


def draw(data: Summary, path: Path) -> None:
    """Draw one figure under a title, and save it.

    Args:
        data: what the figure's JSON file holds.
        path: of the picture.

    Raises:
        ImportError: if Matplotlib is not installed.
    """
    picture = FIGURES[data["figure"]].draw(data["result"])
    fewest = min(data["seeds"].values())
    most = max(data["seeds"].values())
    seeds = f"{most} seed{'s' * (most > 1)}" if fewest == most else f"{fewest} to {most} seeds"
    picture.suptitle(
        f"{data['title']}: {data['dataset']}, {data['settings']['model']}, mean and standard "
        f"deviation of {seeds}",
        fontsize=11,
    )
    picture.savefig(path, dpi=DOTS_PER_INCH)
