"""Weights of late answers: the published forms of s(staleness).

The forms are those of Xie, Koyejo and Gupta 2019 (FedAsync) and Nguyen et al. 2022 (FedBuff). All
are 1 for a fresh answer and never grow. `ClonedKD`, `FedAsync` and `FedBuff` take each of them as
`staleness_weight`.
"""

from collections.abc import Callable
from dataclasses import dataclass

StalenessWeight = Callable[[int], float]
"""Staleness of an answer -> its weight, at least 0.

The staleness is the number of versions that the core made while the edge was away; it is never
negative, and 0 for a fresh answer.
"""


@dataclass(frozen=True)
class ConstantStaleness:
    """s(d) = 1: a late answer counts as much as a fresh one.

    Examples:
        >>> from flwr_cloned_kd import ConstantStaleness
        >>> ConstantStaleness()(7)
        1.0
    """

    def __call__(self, staleness: int) -> float:
        return 1.0


@dataclass(frozen=True)
class PolynomialStaleness:
    """s(d) = (1 + d)^-a; with a = 1/2 it is FedBuff's 1 / sqrt(1 + d).

    Args:
        a: how fast the weight falls, at least 0; 0 is constant.

    Raises:
        ValueError: if `a` is out of range.

    Examples:
        >>> from flwr_cloned_kd import PolynomialStaleness
        >>> [PolynomialStaleness(0.5)(staleness) for staleness in (0, 3)]
        [1.0, 0.5]
    """

    a: float = 0.5

    def __post_init__(self) -> None:
        _require_at_least_0("a", self.a)

    def __call__(self, staleness: int) -> float:
        return float((1 + staleness) ** -self.a)


@dataclass(frozen=True)
class HingeStaleness:
    """s(d) = 1 up to d = b, then 1 / (a (d - b) + 1).

    Args:
        a: how fast the weight falls, at least 0; 0 is constant.
        b: the largest staleness of weight 1, in versions, at least 0.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> from flwr_cloned_kd import HingeStaleness
        >>> [HingeStaleness(a=1.0, b=2.0)(staleness) for staleness in (0, 2, 3)]
        [1.0, 1.0, 0.5]
    """

    a: float = 10.0
    b: float = 4.0

    def __post_init__(self) -> None:
        _require_at_least_0("a", self.a)
        _require_at_least_0("b", self.b)

    def __call__(self, staleness: int) -> float:
        return 1.0 / (self.a * max(staleness - self.b, 0.0) + 1.0)


def _require_at_least_0(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected at least 0, got {value}")
