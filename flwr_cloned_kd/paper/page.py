"""Keep the numbers of a page equal to the committed JSON files that they come from.

This module writes the text between two comments of the page from RESULTS/DATASET/FIGURE.json, and
leaves all other text as it is. A table has lines of its own, a number stands inside a line:

    <!-- table: digits/skew part=final rows="ours; CEM, paper" columns="IID; Dirichlet 0.3" -->
    <!-- end -->

    Ours ends at <!-- number: digits/skew "ours | IID" final -->0.978 ± 0.004<!-- end --> and
    costs <!-- number: digits/skew "ours | IID" bytes MB -->2.78 MB<!-- end -->.

`part`, `rows` and `columns` are optional. A number is named by a row of the JSON's `result` and by
the dotted path to a value in that row. The path to a whole spread gives "0.978 ± 0.004", and
`"ROW" - "OTHER"` gives the difference seed by seed, "+0.026 ± 0.015, up in 5 of 5". The last word
may be a format: one of Python's (default: .3f) or of `SCALES`. In a cell of a Markdown table the
"|" in a name is written as "\\|".
"""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from ..io.checkpoint import write_atomically
from .figures import table_part
from .statistics import Summary, spread
from .tables import expect

START = re.compile(r"<!--\s*(table|number):\s*(.*?)\s*-->", re.DOTALL)
END = "<!-- end -->"
BEFORE_TEXT = re.compile(r"\s*([-*+>]\s+|\d+[.)]\s+)*")
"""What may stand before the first word of a line: an indent, the sign of a list or a quotation."""

SCALES = {
    "MB": (1e-6, ".2f", " MB"),
    "k": (1e-3, ".0f", "k"),
    "points": (100.0, ".1f", " points"),
}
"""Name of a format -> a factor, Python's format of the product, and the unit behind it."""

TABLE_FORM = 'table: DATASET/FIGURE [part=PART] [rows="ROW; ..."] [columns="COLUMN; ..."]'
NUMBER_FORM = 'number: DATASET/FIGURE "ROW" [- "ROW"] VALUE [FORMAT]'


def rewrite(page: Path, results: Path) -> int:
    """Bring a page up to date with the JSON files; returns the exit status of the command."""
    try:
        old = page.read_bytes().decode()
        new = render(old, results)
    except (ValueError, OSError) as error:
        print(f"page: {page}: {error}", file=sys.stderr)
        return 2
    if new != old:
        write_atomically(page, new)
    print(f"page: {page} {'is up to date' if new == old else 'has new numbers'}")
    return 0


def render(page: str, results: Path) -> str:
    """Return the text of a page with new text between its markers.

    Raises:
        ValueError: with the number of the line, for a malformed marker or for one that names a row
            or a value that the results lack.
    """
    written: list[str] = []
    place = 0
    while start := START.search(page, place):
        line = 1 + page.count("\n", 0, start.start())
        following = START.search(page, start.end())
        end = page.find(END, start.end(), following.start() if following else len(page))
        try:
            if END in page[place : start.start()]:
                raise ValueError(f"an {END} before this marker closes none")
            if end < 0:
                raise ValueError(f"expected {END} behind the marker and before the next")
            if start[1] == "number" and BEFORE_TEXT.fullmatch(_line_before(page, start.start())):
                raise ValueError("a line that a number begins is HTML to Markdown; begin with text")
            content = _content(start[1], start[2].replace("\\|", "|"), results)
        except ValueError as error:
            raise ValueError(f"line {line}, <!-- {start[1]}: {start[2]} -->: {error}") from error
        written += [page[place : start.end()], content, END]
        place = end + len(END)
    if END in page[place:]:
        raise ValueError(f"the last {END} closes no marker")
    return "".join([*written, page[place:]])


def _line_before(page: str, place: int) -> str:
    return page[page.rfind("\n", 0, place) + 1 : place]


def _content(kind: str, text: str, results: Path) -> str:
    words = shlex.split(text)
    return _table(words, results) if kind == "table" else _number(words, results)


def _table(words: list[str], results: Path) -> str:
    name, *pairs = words or [""]
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if not name or not options.keys() <= {"part", "rows", "columns"}:
        raise ValueError(f"expected <!-- {TABLE_FORM} -->")
    table = table_part(
        _read(results, name),
        options.get("part", ""),
        rows=_names(options.get("rows", "")),
        columns=_names(options.get("columns", "")),
    )
    return f"\n\n{table}\n"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(";") if name.strip()]


def _number(words: list[str], results: Path) -> str:
    match words:
        case [name, row, "-", other, path, *form] if len(form) <= 1:
            result = _read(results, name)["result"]
            difference = _difference(_pick(result, row, path), _pick(result, other, path))
            return _format(difference, *form, sign="+")
        case [name, row, path, *form] if len(form) <= 1:
            return _format(_pick(_read(results, name)["result"], row, path), *form)
    raise ValueError(f"expected <!-- {NUMBER_FORM} -->")


def _format(value: Any, form: str = ".3f", *, sign: str = "") -> str:
    """Write a number or a spread.

    Args:
        value: a number, or a spread as `statistics.spread` returns it.
        form: a name in `SCALES`, or a format of Python.
        sign: "+" if the value is a difference: its sign is always written, and for a spread the
            number of seeds with a positive difference.
    """
    scale, python_form, unit = SCALES.get(form, (1, form, ""))
    if not isinstance(value, dict):
        return f"{value * scale:{sign}{python_form}}{unit}"
    text = f"{value['mean'] * scale:{sign}{python_form}}"
    if value["n"] > 1:
        text += f" ± {value['sd'] * scale:{python_form}}"
    text += unit
    if sign:
        text += f", up in {sum(one > 0 for one in value['values'])} of {value['n']}"
    return text


def _pick(result: Summary, row: str, path: str) -> Any:
    """Return a number, or a spread as `statistics.spread` returns it, from one row of a result."""
    expect("row", row, result)
    value: Any = result[row]
    for step in path.split("."):
        if isinstance(value, list):  # a place counts from the front or, if negative, from the back
            places = [*range(len(value)), *range(-len(value), 0)]
            value = {str(place): value[place] for place in places}
        steps = value if isinstance(value, dict) else {}
        expect(f"value {path!r}, step", step, steps)
        value = steps[step]
    if not isinstance(value, int | float) and not (isinstance(value, dict) and "values" in value):
        raise ValueError(f"value {path!r}: expected the path to a number or to a spread")
    return value


def _difference(minuend: Any, subtrahend: Any) -> Any:
    """Subtract two numbers, or two spreads seed by seed, as far as both have the seeds 0, 1, ..."""
    if isinstance(minuend, dict):
        pairs = zip(minuend["values"], subtrahend["values"])
        return spread([a - b for a, b in pairs])
    return minuend - subtrahend


def _read(results: Path, name: str) -> Summary:
    path = results / f"{name}.json"
    if not path.is_file():
        names = sorted(str(file.relative_to(results))[:-5] for file in results.glob("*/*.json"))
        raise ValueError(f"expected the file {path}; there is {', '.join(names) or 'none'}")
    try:
        data: Summary = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, found {error}") from error
    return data
