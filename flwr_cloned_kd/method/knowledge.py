"""What an edge knows: the core has a label for every sample that it asks its teachers about.

The paper lets every teacher teach every sample. An edge that has seen few classes predicts those
few for everything, and the core would learn that too. The functions here are ours.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Selection = Callable[[Tensor, Tensor], Tensor]
"""(target of one ensemble `[B, C]`, rows that sum to 1; labels `[B]`) -> weights `[B]`, in [0, 1].

The weight of a sample multiplies the divergence between this teacher and the student there, so that
0 leaves the sample to the cross entropy and to other teachers.
"""


def correct(target: Tensor, labels: Tensor) -> Tensor:
    """Let an ensemble teach the samples that it classifies correctly, and no others."""
    return (target.argmax(-1) == labels).to(target.dtype)


def label_probability(target: Tensor, labels: Tensor) -> Tensor:
    """Let an ensemble teach a sample by the probability that it gives to the sample's label."""
    return target.gather(-1, labels[:, None]).squeeze(-1)


class Knowledge(NamedTuple):
    """What a core can measure on its own data before it learns from an edge. Shares in [0, 1]."""

    ensemble: float
    """The share of the core data that the mean of the clones' predictions classifies correctly."""
    moved: Callable[[float], float]
    """Part of the clones' movement, in [0, 1] -> the share that the core, so moved, gets right."""


StartRule = Callable[[Knowledge], float]
"""What is known -> the part of the clones' movement, in [0, 1], by which the student starts."""


def ensemble_share(knowledge: Knowledge) -> float:
    """Move by the share of the core data that the ensemble classifies correctly."""
    return knowledge.ensemble


START_STEPS = 16
"""Starts that `retained` tries: 1/16 of the clones' movement, 2/16, ..., all of it."""
MIN_RETAINED = 0.5
"""No start may lose more than this share of what the core classifies correctly."""


def retained(knowledge: Knowledge) -> float:
    """Move as far as the moved core keeps enough of what the core knows.

    Of sixteen steps this is the largest step s at which the core that moved by s classifies at
    least max(s^2, 1/2) times as many core samples correctly as the core did before. The model that
    is measured is the model that the student starts from, so that clones which predict well and
    average badly, or which moved very far, cannot spoil the start.
    """
    before = knowledge.moved(0.0)
    for step in range(START_STEPS, 0, -1):
        share = step / START_STEPS
        if knowledge.moved(share) >= max(share**2, MIN_RETAINED) * before:
            return share
    return 0.0
