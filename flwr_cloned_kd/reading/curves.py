"""The accuracy of the core over the rounds, the bytes and the seconds of a strategy."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Point(NamedTuple):
    """The core after a round."""

    round: int
    """0 is the core before any edge."""
    megabytes: float
    """Exchanged up to then, down and up."""
    seconds: float
    """Passed up to then."""
    accuracy: float
    """Of the core on held-out data, a fraction in [0, 1]."""


def curve(rows: Iterable[dict[str, Any]], first: float | None) -> list[Point]:
    """Follow the core through the rounds of one strategy.

    After a refused round, and after a round that does not measure the core, the core has the
    accuracy that it had before. A round is left out as long as no accuracy is known.

    Args:
        rows: of one strategy, in order.
        first: accuracy of the core before any edge; None if it is not known.
    """
    accuracy = first
    megabytes = 0.0
    seconds = 0.0
    points = [] if first is None else [Point(0, 0.0, 0.0, first)]
    for row in rows:
        megabytes += (row.get("bytes-down", 0) + row.get("bytes-up", 0)) / 1e6
        seconds += row.get("seconds", 0.0)
        if row["accepted"]:
            accuracy = row.get("core-accuracy", accuracy)
        if accuracy is not None:
            points.append(Point(row["round"], megabytes, seconds, accuracy))
    return points
