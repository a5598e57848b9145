"""The events of a strategy on disk: one file for each strategy of a run, one event per line.

Of rounds that no such file has, the events follow from what the rounds cost.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.common import log

from ..asynchronous.timeline import Event
from ..io.checkpoint import write_atomically
from .lines import check_count, check_number, check_text, read_lines, shown

TIMES = ("time", "core-seconds", "wait-seconds", "edge-seconds", "number")
"""Entries of a round from which its events follow, and which are numbers where they are given."""
MAX_EVENTS = 200_000
"""How many events a file holds: about 7 MB, and 40,000 visits of edges."""


def events_file(folder: Path, strategy: str) -> Path:
    """Return the path of the file with the events of a strategy."""
    return folder / f"events-{strategy}.jsonl"


def write_events(folder: Path, strategy: str, events: Sequence[Event]) -> None:
    """Write the events of a strategy that has ended, the earliest `MAX_EVENTS` of them.

    The file is either complete or not there. The first line names the columns.
    """
    if len(events) > MAX_EVENTS:
        log(WARNING, "Events of %s: kept the first %d of %d", strategy, MAX_EVENTS, len(events))
    rows = [[round(event.time, 4), *event[1:]] for event in events[:MAX_EVENTS]]
    lines = [json.dumps(row, separators=(",", ":")) for row in [Event._fields, *rows]]
    write_atomically(events_file(folder, strategy), "\n".join(lines) + "\n")


def read_events(folder: Path, strategy: str) -> list[Event]:
    """Read the events of a strategy; a strategy without such a file has none.

    Raises:
        ValueError: for a file that `write_events` did not write, with its path and the line.
    """
    lines = read_lines(events_file(folder, strategy))
    for place, columns in lines:
        if columns != list(Event._fields):
            expected = ", ".join(Event._fields)
            raise ValueError(f"{place}: expected the columns {expected}, got {shown(columns)}")
        break
    return [_event(place, value) for place, value in lines]


def with_missing(events: Sequence[Event], rows: Iterable[dict[str, Any]]) -> list[Event]:
    """Add the events of rounds that are not among these events, in order of time.

    Such rounds are those of a strategy that has not ended, and those before a resumption.

    Args:
        rows: of one strategy; rounds of Flower's own strategies have no events.
    """
    rows = list(rows)
    num_settled = Counter(_settled(row) for row in rows)
    known = {event.number for event in events if event.kind in ("absorb", "refuse")}
    missing = (row for row in rows if "number" in row and row["number"] not in known)
    added = [
        event for row in missing for event in _events_of_round(row, num_settled[_settled(row)])
    ]
    return sorted([*events, *added], key=lambda event: event.time)


def _settled(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return what is equal in the rounds of answers that the core took up at the same time."""
    return row.get("time", 0.0), row.get("core-seconds", 0.0)


def _events_of_round(row: Mapping[str, Any], num_settled: int) -> Iterator[Event]:
    """Count back from the end of a round to its request; the version is not known and is 0.

    Args:
        num_settled: answers that the core took up at the same time, refused ones among them. They
            share the seconds of the core evenly.
    """
    ended = row.get("time", 0.0)
    began = ended - row.get("core-seconds", 0.0) * num_settled
    arrived = began - row.get("wait-seconds", 0.0)
    asked = arrived - row.get("edge-seconds", 0.0)
    answer = "answer" if row.get("bytes-up", 0) else "error"
    kinds = ("ask", answer, "learn", "absorb" if row["accepted"] else "refuse")
    for time, kind in zip((asked, arrived, began, ended), kinds):
        yield Event(time, kind, str(row.get("edge", "-")), int(row["number"]), 0)


def _event(place: str, value: object) -> Event:
    if not isinstance(value, list) or len(value) != len(Event._fields):
        raise ValueError(f"{place}: expected {len(Event._fields)} values, got {shown(value)}")
    return Event(
        check_number(place, "time", value[0]),
        check_text(place, "kind", value[1]),
        check_text(place, "edge", value[2]),
        check_count(place, "number", value[3]),
        check_count(place, "version", value[4]),
    )
