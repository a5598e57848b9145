"""A virtual federation with scripted speeds, and a strategy that adds up what its edges send."""

from flwr_cloned_kd import VirtualGrid
from tests.helpers.federation import NOTHING, Tally, adds

W_BYTES = 136
"""Bytes of an array that holds one float64: 8, and the 128 of NumPy's header."""


def by_edge(*numbers):
    """A draw that returns `numbers[i]` for edge i."""
    return lambda edge, visit, seed: numbers[int(edge)]


def nodes(count):
    """Apps of `count` edges; edge i is called `str(1 + i)` and sends the number 1 + i."""
    return [adds(1 + edge) for edge in range(count)]


def run(grid: VirtualGrid, *, rounds, timeout=1000.0, **options):
    """Run a `Tally` on the grid and return it."""
    strategy = Tally(**options)
    strategy.start(grid, NOTHING, num_rounds=rounds, timeout=timeout)
    return strategy
