"""The events of a strategy on disk: one file for each strategy of a run, one event per line."""

import json
from collections.abc import Sequence
from logging import WARNING
from pathlib import Path

from flwr.common import log

from ..asynchronous.timeline import Event
from ..io.checkpoint import write_atomically
from .lines import check_count, check_number, check_text, read_lines, shown

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
