"""Rules that use the labels of the core data to limit what the core takes over from an edge.

In the paper every ensemble is a teacher of every sample. An edge whose data has few classes
predicts these few classes for every sample, and the core would take that over too. The rules in
this module are ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

Selection = Callable[[Tensor, Tensor], Tensor]
"""(prediction of one ensemble, labels `[B, *]`) -> weights `[B]` or `[B, *]`, in [0, 1].

For classification the prediction is the mean of the clones' tempered probabilities, `[B, C]`, rows
that sum to 1; for other tasks it is what `Task.prediction` returns. The weight of a sample or
element multiplies the divergence between this ensemble and the student there. A weight of 0 leaves
the sample to the loss on the labels and to the other teachers.
"""


def correct(target: Tensor, labels: Tensor) -> Tensor:
    """Use an ensemble for the samples that it classifies correctly, and for no others.

    A core with a task of another form than `[B, C]` uses `Task.correct` in the place of this
    function, so that the preset `practical` means the same for every task.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import correct
        >>> correct(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
        tensor([1., 0.])
    """
    return (target.argmax(-1) == labels).to(target.dtype)


def label_probability(target: Tensor, labels: Tensor) -> Tensor:
    """Weight each sample by the probability that the ensemble gives to its label.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import label_probability
        >>> label_probability(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]))
        tensor([0.9000, 0.2000])
    """
    return target.gather(-1, labels[:, None]).squeeze(-1)


class Knowledge(NamedTuple):
    """Accuracies that a core measures on its own data before a round. Fractions in [0, 1].

    Examples:
        >>> from flwr_cloned_kd import Distillation, Knowledge
        >>> def all_or_nothing(knowledge: Knowledge) -> float:  # a rule of your own
        ...     return 1.0 if knowledge.moved(1.0) >= knowledge.moved(0.0) else 0.0
        >>> phase_2 = Distillation(student_start=all_or_nothing)
    """

    ensemble: float
    """Accuracy of the mean of the clones' predictions."""
    moved: Callable[[float], float]
    """Share of the clones' movement, in [0, 1] -> accuracy of the core after moving by that share.
    """


StartRule = Callable[[Knowledge], float]
"""Knowledge -> share of the clones' movement, in [0, 1], at which the student starts."""


def ensemble_share(knowledge: Knowledge) -> float:
    """Move by a share that equals the accuracy of the ensemble on the core data.

    Examples:
        >>> from flwr_cloned_kd import Knowledge, ensemble_share
        >>> ensemble_share(Knowledge(ensemble=0.8, moved=lambda share: 0.9))
        0.8
    """
    return knowledge.ensemble


START_STEPS = 16
"""Number of starts that `retained` compares: 1/16 of the clones' movement, 2/16, ..., all of it."""
MIN_RETAINED = 0.5
"""Smallest part of its accuracy on the core data that a core may keep after moving, by default."""


def retained(knowledge: Knowledge, min_retained: float = MIN_RETAINED) -> float:
    """Move as far as the moved core keeps enough of its accuracy on the core data.

    Of sixteen steps this is the largest share s for which the core that moved by s classifies at
    least max(s^2, `min_retained`) times as many core samples correctly as the core before. The
    measured model is the model that the student starts from. Clones that predict well but average
    badly, or that moved very far, can therefore not spoil the start.

    Args:
        min_retained: a fraction in [0, 1]. A Phase 2 of few steps may end before the student has
            recovered what it lost at the start. `partial(retained, min_retained=0.8)` then limits
            the loss in a round, but the last core may gain less (docs/robustness.md).

    Raises:
        ValueError: for a fraction outside [0, 1].

    Examples:
        >>> from flwr_cloned_kd import Knowledge, retained
        >>> retained(Knowledge(ensemble=0.8, moved=lambda share: 0.9))  # nothing is lost on the way
        1.0
        >>> retained(Knowledge(ensemble=0.8, moved=lambda share: 0.9 if share < 0.25 else 0.1))
        0.1875
    """
    if not 0 <= min_retained <= 1:
        raise ValueError(f"min_retained: expected 0 to 1, got {min_retained}")
    before = knowledge.moved(0.0)
    for step in range(START_STEPS, 0, -1):
        share = step / START_STEPS
        if knowledge.moved(share) >= max(share**2, min_retained) * before:
            return share
    return 0.0


def rule_name(rule: Callable[..., Any] | float | str) -> str:
    """Return the name of a function, with the arguments of a `partial`; or write out a number."""
    if isinstance(rule, partial):
        arguments = [*map(str, rule.args), *(f"{k}={v}" for k, v in rule.keywords.items())]
        return f"{rule_name(rule.func)}({', '.join(arguments)})"
    if not callable(rule):
        return str(rule)
    return str(getattr(rule, "__qualname__", type(rule).__name__))
