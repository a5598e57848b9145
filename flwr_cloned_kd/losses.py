"""Losses of the three phases (Eq. 1 and 2): functions of logits and a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Batch(NamedTuple):
    """What one optimisation step of one clone sees."""

    inputs: Tensor
    """`[B, ...]`, augmented."""
    labels: Tensor
    """`[B]`, int64."""
    rows: Tensor
    """`[B]`, which rows of the dataset these are."""


Loss = Callable[[Tensor, Batch], Tensor]
"""(logits `[B, C]`, batch) -> scalar, a mean over the batch."""


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """L_core and L_edge of Eq. (1): Phases 0 and 1, and every baseline's local training."""
    return F.cross_entropy(logits, batch.labels)


def soft_target(logits: Tensor, weights: Sequence[float], temperature: float) -> Tensor:
    """Fold the predictions of K teachers into one target: sum_k w_k softmax(f_k / t).

    The gradient of `KL(p || q)` by the student's q depends on the teacher's p linearly, so this one
    `[B, C]` target stands for K separate divergences, exactly.

    Args:
        logits: `[K, B, C]`.
        weights: K of them; Eq. (2) gives every clone of an ensemble 1/E, so that each row of
            the target sums to the number of ensembles.
    """
    scale = torch.tensor(weights, dtype=logits.dtype, device=logits.device)
    return torch.einsum("k,kbc->bc", scale, (logits / temperature).softmax(-1))


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """Every teacher of one Phase 2, as one averaged target per batch.

    Args:
        forward: inputs `[B, ...]` -> logits `[K, B, C]` of all teachers, in evaluation mode.
        weights: K non-negative weights of the divergences.
        temperature: t of Eq. (1), above 0.
    """

    forward: Callable[[Tensor], Tensor]
    weights: Sequence[float]
    temperature: float

    def __call__(self, batch: Batch) -> Tensor:
        return soft_target(self.forward(batch.inputs), self.weights, self.temperature)


def distillation(teachers: Teachers, student_temperature: float | None = None) -> Loss:
    """L_distill of Eq. (2): cross entropy + t^2 sum_k w_k KL(teacher_k || student).

    The entropy of the teachers, which no student can change, is left out: the value is that of
    Eq. (2) up to a constant of the batch, its gradient is exactly that of Eq. (2).

    Args:
        teachers: the averaged target.
        student_temperature: what divides the student's logits; None is the teachers'
            temperature (Hinton et al. 2015), 1.0 is Eq. (1) as it is printed.
    """
    divisor = teachers.temperature if student_temperature is None else student_temperature

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        log_student = (logits / divisor).log_softmax(-1)
        soft = -(teachers(batch) * log_student).sum(-1).mean()
        return F.cross_entropy(logits, batch.labels) + teachers.temperature**2 * soft

    return loss
