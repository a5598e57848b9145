"""Models of the durations, speeds and probabilities of a virtual federation.

Every model is a `Draw`: a function that draws one number for one visit of one edge. `Constant`
always returns the same number, `LogNormal` and `Exponential` return random numbers, and `Trace`
returns numbers that were measured.
"""

import csv
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Draw = Callable[[int | str, int, int], float]
"""(edge, visit, seed) -> a number of at least 0, such as the seconds of one training.

The visit counts the requests to the edge, from 1; `VirtualGrid` says what it counts for the options
that belong to no request. Every visit has a seed of its own. If the function has an attribute
`per_edge` that is true, all visits of an edge have one seed.

Examples:
    >>> from flwr_cloned_kd import Draw
    >>> def slower_every_time(edge: int | str, visit: int, seed: int) -> float:
    ...     return 60.0 * visit
    >>> compute: Draw = slower_every_time
"""

MAX_SIGMA = 50
"""`exp` overflows above 709 and Gaussian draws stay below 9 sigma; 50 leaves a margin."""


def as_draw(value: Draw | float) -> Draw:
    """Return `value` if it is a function; otherwise a `Constant` of this number."""
    return value if callable(value) else Constant(float(value))


@dataclass(frozen=True)
class Constant:
    """Always the same number.

    Args:
        value: the number, in the unit of the option, such as seconds.

    Examples:
        >>> from flwr_cloned_kd import Constant
        >>> Constant(60.0)(edge=3, visit=1, seed=0)
        60.0
    """

    value: float

    def __call__(self, edge: int | str, visit: int, seed: int) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """A log-normal number: most numbers are near the median, some are much larger.

    Args:
        median: above 0, finite.
        sigma: standard deviation of the logarithm, at most 50; 0 is constant. With 1, 95 % of the
            numbers lie between median / 7 and 7 median.
        per_edge: draw once for each edge, so that slow edges stay slow.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> from flwr_cloned_kd import LogNormal
        >>> LogNormal(median=60.0, sigma=0.0)(edge=3, visit=1, seed=0)
        60.0
        >>> slow_edges_stay_slow = LogNormal(median=60.0, sigma=1.0, per_edge=True)
    """

    median: float
    sigma: float
    per_edge: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.median < math.inf or not 0 <= self.sigma <= MAX_SIGMA:
            raise ValueError(
                f"LogNormal: expected a finite median above 0 and sigma in [0, {MAX_SIGMA}], "
                f"got {self.median}, {self.sigma}"
            )

    def __call__(self, edge: int | str, visit: int, seed: int) -> float:
        return self.median * math.exp(self.sigma * random.Random(seed).gauss(0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """An exponential number: the time until an event that is equally likely at every moment.

    Args:
        mean: above 0, finite.
        per_edge: draw once for each edge.

    Raises:
        ValueError: if the mean is out of range.

    Examples:
        >>> from flwr_cloned_kd import Exponential
        >>> stay = Exponential(mean=600.0)
        >>> stay(edge=3, visit=1, seed=0) >= 0
        True
    """

    mean: float
    per_edge: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.mean < math.inf:
            raise ValueError(f"Exponential: expected a finite mean above 0, got {self.mean}")

    def __call__(self, edge: int | str, visit: int, seed: int) -> float:
        return random.Random(seed).expovariate(1.0 / self.mean)


@dataclass(frozen=True)
class Trace:
    """Measured numbers: an edge uses its own numbers in turn, then starts again with the first.

    Args:
        numbers: edge -> numbers, each at least 0. Edges are numbered from 0.

    Raises:
        ValueError: if an edge has no numbers or one that is not valid; the error names the edge.

    Examples:
        >>> from flwr_cloned_kd import Trace
        >>> trace = Trace({"0": [30.0, 45.0], "1": [120.0]})
        >>> [trace(edge=0, visit=visit, seed=0) for visit in (1, 2, 3)]
        [30.0, 45.0, 30.0]
    """

    numbers: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        for edge, numbers in self.numbers.items():
            if not numbers or not all(_is_number(number) and number >= 0 for number in numbers):
                raise ValueError(f"edge {edge}: expected numbers of at least 0, got {numbers}")

    @classmethod
    def read(cls, path: str | Path) -> "Trace":
        """Read a trace file.

        A `.json` file is an object, edge -> list of numbers. A `.csv` file has the columns edge
        and value, one number a row.

        Raises:
            ValueError: if the file has neither form; the error names the file.
        """
        path = Path(path)
        try:
            with path.open(encoding="utf-8", newline="") as file:
                if path.suffix == ".json":
                    return cls({str(edge): numbers for edge, numbers in json.load(file).items()})
                by_edge: dict[str, list[float]] = {}
                for row in csv.DictReader(file):
                    by_edge.setdefault(row["edge"], []).append(float(row["value"]))
                return cls(by_edge)
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
