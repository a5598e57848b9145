"""How much an answer still counts that comes late: the published forms of s(staleness).

Xie, Koyejo and Gupta 2019 (FedAsync) and Nguyen et al. 2022 (FedBuff). All are 1 for a
fresh answer and never grow; all go to `ClonedKD`, `FedAsync` and `FedBuff` as `staleness_weight`.
"""

from collections.abc import Callable
from dataclasses import dataclass

StalenessWeight = Callable[[int], float]
"""Versions passed while an edge was away, 0 for a fresh answer -> its weight, at least 0."""


@dataclass(frozen=True)
class ConstantStaleness:
    """s(d) = 1: a late answer counts as much as a fresh one."""

    def __call__(self, staleness: int) -> float:
        _check(staleness)
        return 1.0


@dataclass(frozen=True)
class PolynomialStaleness:
    """s(d) = (1 + d)^-a; with a = 1/2 it is FedBuff's 1 / sqrt(1 + d).

    Args:
        a: how fast the weight falls, at least 0; 0 is constant.

    Raises:
        ValueError: if `a` is out of range; when called, if the staleness is negative.
    """

    a: float = 0.5

    def __post_init__(self) -> None:
        _at_least_0("a", self.a)

    def __call__(self, staleness: int) -> float:
        _check(staleness)
        return float((1 + staleness) ** -self.a)


@dataclass(frozen=True)
class HingeStaleness:
    """s(d) = 1 up to d = b, then 1 / (a (d - b) + 1).

    Args:
        a: how fast the weight falls, at least 0; 0 is constant.
        b: the staleness that costs nothing, in versions, at least 0.

    Raises:
        ValueError: if a number is out of range; when called, if the staleness is negative.
    """

    a: float = 10.0
    b: float = 4.0

    def __post_init__(self) -> None:
        _at_least_0("a", self.a)
        _at_least_0("b", self.b)

    def __call__(self, staleness: int) -> float:
        _check(staleness)
        return 1.0 / (self.a * max(staleness - self.b, 0.0) + 1.0)


def _at_least_0(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected at least 0, got {value}")


def _check(staleness: int) -> None:
    if not staleness >= 0:
        raise ValueError(f"staleness: expected at least 0, got {staleness}")
