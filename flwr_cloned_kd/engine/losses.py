"""Losses of the three phases (Eq. 1 and 2): functions of logits and a batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .nested import Inputs
from .tasks import Task, classification


class Batch(NamedTuple):
    """The samples of one optimisation step of one clone."""

    inputs: Inputs
    """`[B, ...]`, augmented."""
    labels: Tensor
    """`[B, *]`; int64 for classes."""
    rows: Tensor
    """`[B]`, the row numbers of the samples in the dataset."""
    epoch: int = 0
    """Counted from 0."""
    targets: Tensor | None = None
    """`[B, ..., C]`, the target of all teachers; None without teachers."""


Loss = Callable[[Tensor, Batch], Tensor]
"""(outputs `[B, ...]`, batch) -> scalar, a mean over the batch."""

Targets = Callable[[Batch], Tensor]
"""Batch -> one target `[B, ..., C]` for all teachers, computed without gradients."""


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """L_core and L_edge of Eq. (1): Phases 0 and 1, and every baseline's local training.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Recipe, clone, cross_entropy, fit
        >>> data = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> model = torch.nn.Linear(1, 2)
        >>> start = clone(model.state_dict(), 1)
        >>> trained = fit(model, start, data, Recipe(epochs=1), loss=cross_entropy)
    """
    return F.cross_entropy(logits, batch.labels)


def supervised(task: Task) -> Loss:
    """Make the loss of a task on the labels: Phases 0 and 1."""
    return lambda outputs, batch: task.loss(outputs, batch.labels)


def soft_target(
    logits: Tensor, weights: Tensor, temperature: float, task: Task = classification
) -> Tensor:
    """Fold the predictions of K teachers into one target: sum_k w_k softmax(f_k / t).

    The gradient of `KL(p || q)` with respect to the student's q is linear in the teacher's p.
    One `[B, C]` target therefore replaces K separate divergences exactly. See `tasks` for other
    tasks than classification.

    Args:
        logits: outputs of the teachers, `[K, B, ...]`.
        weights: one weight per teacher, `[K]`, with the dtype and on the device of the logits.
            Eq. (2) gives every clone of an ensemble 1/E, so that each row of the target sums to the
            number of ensembles.
    """
    return torch.einsum("k,k...->...", weights, task.target(logits, temperature))


def distillation(
    temperature: float, student_temperature: float | None = None, task: Task = classification
) -> Loss:
    """L_distill of Eq. (2): cross entropy + t^2 sum_k w_k KL(teacher_k || student).

    `batch.targets` holds the target of all teachers. The entropy of the teachers, which does not
    depend on the student, is left out. The loss therefore differs from Eq. (2) by a constant of
    the batch, and its gradient is exactly that of Eq. (2).

    Args:
        temperature: t of Eq. (1), above 0; the logits of the teachers were divided by it.
        student_temperature: divisor of the student's logits; None is the temperature of the
            teachers (Hinton et al. 2015), 1.0 is Eq. (1) as printed.
        task: what the outputs mean; its loss stands for the cross entropy, and its divergence for
            the KL divergence.

    Raises:
        ValueError: when the loss is called, for a batch without targets.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Recipe, clone, distillation, fit
        >>> data = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> teacher = torch.tensor([[0.8, 0.2], [0.3, 0.7]])  # of each row of the data
        >>> student = torch.nn.Linear(1, 2)
        >>> distilled = fit(
        ...     student,
        ...     clone(student.state_dict(), 1),
        ...     data,
        ...     Recipe(epochs=1),
        ...     loss=distillation(temperature=2.0),
        ...     targets=lambda batch: teacher[batch.rows],
        ... )
    """
    divisor = temperature if student_temperature is None else student_temperature

    def loss(outputs: Tensor, batch: Batch) -> Tensor:
        if batch.targets is None:
            raise ValueError("distillation: expected batches with targets, got none")
        soft = task.divergence(outputs, batch.targets, batch.labels, divisor)
        return task.loss(outputs, batch.labels) + temperature**2 * soft

    return loss
