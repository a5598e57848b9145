"""The time of a run: the machine's clock, or the clock of a grid that has its own."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Stepped(Protocol):
    """A grid with a clock of its own, which moves only when `advance` is called."""

    def now(self) -> float:
        """Return the seconds since the grid was made."""

    def advance(self, until: float) -> bool:
        """Move to the next event, or to `until` if no event comes before; return which."""

    def core_seconds(self, answers: Sequence[tuple[str, int]]) -> float:
        """Return how many seconds the core takes to learn from answers together.

        Args:
            answers: edge and number of the request of each, at least one.
        """


def clock_of(grid: object) -> Callable[[], float]:
    """Return the clock that times a run on this grid, in seconds."""
    return grid.now if isinstance(grid, Stepped) else time.monotonic
