"""The time of a run: the machine's, or that of a grid which has its own."""

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Stepped(Protocol):
    """A grid with a clock of its own, which stands still until it is told to move."""

    def now(self) -> float:
        """Seconds since it was made."""

    def advance(self, until: float) -> bool:
        """Move to the next event, or to `until` if nothing happens before; say which."""

    def core_seconds(self, edge: str, number: int) -> float:
        """How long the core takes to learn from this answer."""


def clock_of(grid: object) -> Callable[[], float]:
    """Return the clock that times a run on this grid."""
    return grid.now if isinstance(grid, Stepped) else time.monotonic
