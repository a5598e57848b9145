"""Tables in Markdown: their cells, and the choice of rows and columns."""

from collections.abc import Callable, Collection, Sequence

from .statistics import Summary

Table = Callable[[Summary], tuple[list[str], list[list[str]]]]
"""A figure's result -> the headings of the columns, and the cells of every row."""

NONE = "-"
SEEDS = "seeds"


def markdown(
    table: Table, result: Summary, rows: Sequence[str] = (), columns: Sequence[str] = ()
) -> str:
    """Write one table of a figure's result in Markdown.

    Args:
        table: makes the headings and the cells.
        result: of the figure, as its JSON file holds it.
        rows: names of rows, in the wanted order; an empty list keeps all rows. A row is named by
            its first cell and by every other cell in a column without a heading.
        columns: headings of columns; an empty list keeps all columns. The first column, columns
            without a heading and the column of the seeds always stay.

    Raises:
        ValueError: for a row or a column that the table does not have.
    """
    headings, lines = table(result)
    naming = [i for i, heading in enumerate(headings) if i == 0 or not heading]
    names = dict.fromkeys(_plain(line[i]) for line in lines for i in naming)
    for row in rows:
        expect("row", row, names)
    for column in columns:
        expect("column", column, headings[1:])
    headings, lines = table(_shown(result, rows, columns))
    if rows:
        names_of_lines = [{_plain(line[i]) for i in naming} for line in lines]
        left = dict.fromkeys(name for names in names_of_lines for name in names)
        for row in rows:
            expect(f"row with {'; '.join(columns)}", row, left)
        lines = [line for row in rows for names, line in zip(names_of_lines, lines) if row in names]
    kept = [
        i
        for i, heading in enumerate(headings)
        if not columns or i == 0 or heading in ("", SEEDS) or heading in columns
    ]
    cells = [[line[i] for i in kept] for line in (headings, ["---"] * len(headings), *lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def bold(cell: str) -> str:
    """Write a cell in bold letters. The name of a row stays what it was."""
    return f"**{cell}**"


def _plain(cell: str) -> str:
    return cell.removeprefix("**").removesuffix("**")


def expect(what: str, name: str, known: Collection[str]) -> None:
    """Raise a ValueError that lists the known names unless the name is one of them."""
    if name not in known:
        raise ValueError(f"{what}: expected one of {'; '.join(known)}; got {name!r}")


def _shown(result: Summary, rows: Sequence[str], columns: Sequence[str]) -> Summary:
    """Drop the methods and splits that a table leaves out.

    A table of `skew` states the number of seeds of the entries that it shows, and of no others.
    """
    splits = [entry["split"] for entry in result.values() if entry.get("split") in columns]
    return {
        name: entry
        for name, entry in result.items()
        if (not rows or entry.get("method", rows[0]) in rows)
        and (not splits or entry["split"] in splits)
    }


def spread_cell(spread: Summary, sign: str = "") -> str:
    """Write a mean and, if there are several seeds, its standard deviation.

    Args:
        spread: as `statistics.spread` returns it.
        sign: "+" writes the sign of a positive mean too.
    """
    mean = f"{spread['mean']:{sign}.3f}"
    return f"{mean} ± {spread['sd']:.3f}" if spread["n"] > 1 else mean


def last_cell(curve: Summary) -> str:
    """Write the mean and the standard deviation of a curve's last round."""
    return f"{curve['mean'][-1]:.3f} ± {curve['sd'][-1]:.3f}"


def values_cell(spread: Summary, sign: str = "") -> str:
    """Write the number of every seed."""
    return ", ".join(f"{value:{sign}.3f}" for value in spread["values"])


COST_HEADINGS = ["MB", "thousands of images"]


def cost_cells(entry: Summary) -> list[str]:
    """Write the bytes exchanged and the images trained on, under `COST_HEADINGS`."""
    return [f"{entry['bytes'] / 1e6:.2f}", f"{entry['images'] / 1e3:.0f}"]
