"""Files of JSON, checked while they are read: whole ones, and ones with a value per line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

MAX_NUMBER = 1e100
MAX_SHOWN = 60
"""How many characters of a wrong value an error shows."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; a file that is not there is an empty object.

    Raises:
        ValueError: for other content, with the path.
    """
    if not path.exists():
        return {}
    value = _parsed(path.read_bytes(), f"{path}")
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {shown(value)}")
    return value


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Read a file with one JSON value per line; a file that is not there has no lines.

    A process that is killed may leave half a line at the end. Such a line is left out.

    Yields:
        The place of a line, for error messages, and its value.

    Raises:
        ValueError: for a line that is not JSON, with the path and the number of the line.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                value = _parsed(line, place)
            except ValueError:
                if line.endswith(b"\n"):
                    raise
                return
            yield place, value


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite number with which sums over runs remain finite."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= MAX_NUMBER  # false for NaN
    )


def check_number(place: str, name: str, value: object) -> float:
    """Return a number for which `is_number` is true.

    Raises:
        ValueError: for every other value, with its place and its name.
    """
    if not is_number(value):
        expected = f"a number of at most {MAX_NUMBER:g}"
        raise ValueError(f"{place}: {name}: expected {expected}, got {shown(value)}")
    return float(value)


def check_count(place: str, name: str, value: object) -> int:
    """Return a whole number of at least 0.

    Raises:
        ValueError: for every other value, with its place and its name.
    """
    number = check_number(place, name, value)
    if number < 0 or number != int(number):
        raise ValueError(f"{place}: {name}: expected a whole number, got {shown(value)}")
    return int(number)


def check_text(place: str, name: str, value: object) -> str:
    """Return a text.

    Raises:
        ValueError: for every other value, with its place and its name.
    """
    if not isinstance(value, str):
        raise ValueError(f"{place}: {name}: expected a text, got {shown(value)}")
    return value


def shown(value: object) -> str:
    """Write a value for an error message, which is short whatever the value is."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or a deep list
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _parsed(data: bytes, place: str) -> Any:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):
        raise ValueError(f"{place}: expected JSON, got {shown(data.strip())}") from None
