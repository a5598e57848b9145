"""Durations and speeds of a virtual federation: constant, drawn, or from a trace."""

import csv
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Draw = Callable[[int | str, int, int], float]
"""(edge, visit, seed) -> a number of at least 0.

The visit counts what is drawn for that edge, from 1. The seed is another one for each visit, or,
if the draw has an attribute `per_edge` that is true, for each edge.
"""

LARGEST_SIGMA = 50
"""From 79 on a draw can overflow: normal numbers reach 9, and e^(9 x 79) is too large a float."""


def as_draw(value: Draw | float) -> Draw:
    """Return a draw, or one that is always this number."""
    return value if callable(value) else Constant(float(value))


@dataclass(frozen=True)
class Constant:
    """Always the same number."""

    value: float

    def __call__(self, edge: int | str, visit: int, seed: int) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """A log-normal number: most near the median, some much larger.

    Args:
        median: above 0, finite.
        sigma: standard deviation of the logarithm, at most 50; 0 is constant, 1 spreads over a
            factor of 50.
        per_edge: draw once for each edge, so that slow edges stay slow.

    Raises:
        ValueError: for a number out of range.
    """

    median: float
    sigma: float
    per_edge: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.median < math.inf or not 0 <= self.sigma <= LARGEST_SIGMA:
            raise ValueError(
                f"LogNormal: expected a finite median above 0 and sigma in [0, {LARGEST_SIGMA}], "
                f"got {self.median}, {self.sigma}"
            )

    def __call__(self, edge: int | str, visit: int, seed: int) -> float:
        draw = random.Random(seed)
        return self.median * math.exp(self.sigma * draw.gauss(0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """An exponential number: waiting for something that can happen at any moment.

    Args:
        mean: above 0, finite.
        per_edge: draw once for each edge.

    Raises:
        ValueError: for a mean out of range.
    """

    mean: float
    per_edge: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.mean < math.inf:
            raise ValueError(f"Exponential: expected a finite mean above 0, got {self.mean}")

    def __call__(self, edge: int | str, visit: int, seed: int) -> float:
        draw = random.Random(seed)
        return draw.expovariate(1.0 / self.mean)


@dataclass(frozen=True)
class Trace:
    """Numbers that were measured: an edge uses its own in turn, and then from the first again.

    Args:
        numbers: edge -> numbers, each at least 0. Edges are numbered from 0.

    Raises:
        ValueError: naming the edge without numbers, or whose number is none.
    """

    numbers: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        for edge, numbers in self.numbers.items():
            if not numbers or not all(_is_number(number) and number >= 0 for number in numbers):
                raise ValueError(f"edge {edge}: expected numbers of at least 0, got {numbers}")

    @classmethod
    def read(cls, path: str | Path) -> "Trace":
        """Read a trace file.

        `.json` is an object, edge -> list of numbers; `.csv` has the columns edge and value, one
        number a row.

        Raises:
            ValueError: if the file is neither, naming it.
        """
        path = Path(path)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                if path.suffix == ".json":
                    return cls({str(edge): numbers for edge, numbers in json.load(file).items()})
                found: dict[str, list[float]] = {}
                for row in csv.DictReader(file):
                    found.setdefault(row["edge"], []).append(float(row["value"]))
                return cls(found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = "edge -> numbers as .json, or columns edge and value as .csv"
            raise ValueError(f"{path}: expected {expected}, got {error!r}") from None

    def __call__(self, edge: int | str, visit: int, seed: int) -> float:
        if str(edge) not in self.numbers:
            raise ValueError(f"trace: expected numbers for edge {edge}, got none")
        numbers = self.numbers[str(edge)]
        return float(numbers[max(visit - 1, 0) % len(numbers)])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
