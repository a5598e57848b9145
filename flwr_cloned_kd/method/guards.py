"""Rules that refuse or trust an edge by what its answer shows on data of the core."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import torch

from .evidence import Evidence, share

Guard = Callable[[Evidence], str | None]
"""Evidence -> why the edge is refused, in one line; None accepts it."""

Trust = Callable[[Evidence], float]
"""Evidence before the distillation -> how far the core trusts the edge, in [0, 1]."""

Score = Callable[[Evidence], float | None]
"""Evidence -> a number that is the higher, the worse the edge; None before it can be known."""


def train_accuracy_jump(evidence: Evidence) -> float | None:
    """Return how far the core's training accuracy rose above the mean of its history (Sec. 5.3).

    A difference of fractions, in [-1, 1]; None before the distillation or without a history.
    """
    if evidence.train_accuracy is None or not evidence.history:
        return None
    return evidence.train_accuracy - sum(evidence.history) / len(evidence.history)


def train_accuracy_drop(evidence: Evidence) -> float | None:
    """Return how far the core's training accuracy fell since the last accepted round.

    A difference of fractions, in [-1, 1]; None before the distillation or without a history.
    """
    if evidence.train_accuracy is None or not evidence.history:
        return None
    return evidence.history[-1] - evidence.train_accuracy


def validation_drop(evidence: Evidence) -> float | None:
    """Return how far the core's accuracy on the validation data fell by the distillation.

    A difference of fractions, in [-1, 1]; None before the distillation.

    Examples:
        >>> from flwr_cloned_kd import Limit, validation_drop
        >>> guard = Limit(validation_drop, 0.05)  # at most five points
    """
    if evidence.after is None:
        return None
    return share(evidence.before) - share(evidence.after)


def class_drop(evidence: Evidence) -> float | None:
    """Return the largest fall of the core's accuracy on one class of the validation data.

    A difference of fractions, in [-1, 1]; None before the distillation, and for labels that are no
    classes.

    Examples:
        >>> from flwr_cloned_kd import Limit, class_drop
        >>> guard = Limit(class_drop, 0.2)  # at most twenty points of any class
    """
    return evidence.class_drop()


def loss_rise(evidence: Evidence) -> float | None:
    """Return how far the core's loss on the validation data rose by the distillation.

    A number in the unit of `Task.loss`, below 0 if the loss fell; None before the distillation.

    Examples:
        >>> from flwr_cloned_kd import Limit, loss_rise
        >>> guard = Limit(loss_rise, 0.1)  # in the unit of the loss
    """
    return evidence.loss_rise()


def drop_confidence(evidence: Evidence) -> float | None:
    """Return how sure it is that the core's accuracy on the validation data fell.

    It is 1 - p, where p is the one-sided p-value of McNemar's exact test. If a sample that changes
    is equally likely to become worse and to become better, p is the probability that at least as
    many of the changed samples become worse as did here. With `Limit(drop_confidence, 0.99)`, the
    guard that a `Core` has by default, a core that becomes neither better nor worse refuses at most
    one edge in a hundred. The score is a probability in [0, 1], and None before the distillation;
    its threshold needs no calibration.

    A sample with several elements, such as the tokens of a text or the pixels of an image, becomes
    better or worse by the number of its elements that are correct: the test assumes that the
    samples are independent of each other, and the elements of one sample are not.

    Examples:
        >>> from flwr_cloned_kd import Limit, drop_confidence
        >>> guard = Limit(drop_confidence, 0.99)
    """
    if evidence.after is None:
        return None
    changes = evidence.after.int() - evidence.before.int()
    if evidence.samples is not None:
        changes = torch.bincount(evidence.samples, changes.double())
    lost = int((changes < 0).sum())
    gained = int((changes > 0).sum())
    changed = torch.tensor(float(lost + gained), dtype=torch.float64)
    losses = torch.arange(lost, lost + gained + 1, dtype=torch.float64)
    log_choices = changed.add(1).lgamma() - (losses + 1).lgamma() - (changed - losses + 1).lgamma()
    p_value = (log_choices - changed * log(2)).logsumexp(0).exp()
    return 1 - min(float(p_value), 1.0)


def edge_drop(evidence: Evidence) -> float | None:
    """Return the fall of accuracy on the validation data over all rounds of this edge.

    It is the sum of the falls of its accepted rounds, with the present one. A poison in many small
    steps stays below a threshold for one round, and not below the same threshold for their sum.
    The fall of edges that are distilled together (`max_together`) counts for each of them in full.
    A difference of fractions; None before the distillation.

    Examples:
        >>> from flwr_cloned_kd import Limit, edge_drop
        >>> guard = Limit(edge_drop, 0.1)
    """
    fall = validation_drop(evidence)
    if fall is None:
        return None
    accepted = [row for row in evidence.earlier if row.get("accepted")]
    keys = ("validation-before", "validation-after")
    measured = [row for row in accepted if row.keys() >= {*keys}]
    return fall + sum(float(row[keys[0]]) - float(row[keys[1]]) for row in measured)


def ensemble_gap(evidence: Evidence) -> float:
    """Return by how much the ensemble is less accurate than the core; known before Phase 2.

    A difference of fractions, in [-1, 1].

    Examples:
        >>> from flwr_cloned_kd import Limit, ensemble_gap
        >>> guard = Limit(ensemble_gap, 0.3)  # refuses before the distillation is paid for
    """
    return share(evidence.before) - share(evidence.ensemble)


def disagreement(evidence: Evidence) -> float | None:
    """Return the share of elements of which the memory is right and the ensemble is wrong.

    A fraction in [0, 1]. It is known before Phase 2, and None while the memory is empty.

    Examples:
        >>> from flwr_cloned_kd import Limit, disagreement
        >>> guard = Limit(disagreement, 0.3)  # refuses before the distillation is paid for
    """
    if evidence.memory is None:
        return None
    return share(evidence.memory & ~evidence.ensemble)


def movement(evidence: Evidence) -> float:
    """Return the length of the movement, relative to the model that was sent.

    Examples:
        >>> from flwr_cloned_kd import Limit, movement
        >>> guard = Limit(movement, 2.0)  # at most twice the norm of the model that was sent
    """
    return evidence.movement


def relative_accuracy(evidence: Evidence) -> float:
    """Trust an edge by the accuracy of its ensemble, as a part of the core's; at most 1.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Core, Recipe, relative_accuracy
        >>> data = torch.randn(16, 2), torch.arange(16) % 2
        >>> core = Core(
        ...     model=torch.nn.Linear(2, 2),
        ...     dataset=data,
        ...     recipe=Recipe(epochs=2),
        ...     trust=relative_accuracy,
        ... )
    """
    before = share(evidence.before)
    return min(1.0, share(evidence.ensemble) / before) if before else 1.0


@dataclass(frozen=True)
class Limit:
    """Refuse an edge whose score is above a threshold.

    Args:
        score: one of this module, such as `validation_drop`, or your own.
        threshold: the largest score that is accepted, in the unit of the score; `calibrate` finds
            one from the core's own data.

    Examples:
        >>> from flwr_cloned_kd import Limit, validation_drop
        >>> guard = Limit(validation_drop, 0.05)  # pass it as Core(guard=...)
    """

    score: Score
    threshold: float

    def __call__(self, evidence: Evidence) -> str | None:
        value = self.score(evidence)
        if value is None or value <= self.threshold:
            return None
        name = getattr(self.score, "__name__", type(self.score).__name__).replace("_", " ")
        return f"{name}: expected at most {self.threshold:.3f}, got {value:.3f}"


DEFAULT_GUARD = Limit(drop_confidence, 0.99)
"""The guard of a core by default: it refuses an edge after which the core is worse on the
validation data, by more than chance explains."""


@dataclass(frozen=True)
class AnyOf:
    """Refuse an edge that at least one guard refuses; the first reason counts.

    Args:
        guards: asked in this order.

    Examples:
        >>> from flwr_cloned_kd import AnyOf, Limit, TrainAccuracyDrop, movement
        >>> guard = AnyOf([TrainAccuracyDrop(0.1), Limit(movement, 2.0)])
    """

    guards: Sequence[Guard]

    def __call__(self, evidence: Evidence) -> str | None:
        reasons = (guard(evidence) for guard in self.guards)
        return next((reason for reason in reasons if reason is not None), None)


@dataclass(frozen=True)
class AllOf:
    """Refuse an edge that every guard refuses at the same time.

    Args:
        guards: at least one; without a guard no edge is refused.

    Examples:
        >>> from flwr_cloned_kd import AllOf, Limit, class_drop, movement
        >>> guard = AllOf([Limit(class_drop, 0.2), Limit(movement, 2.0)])
    """

    guards: Sequence[Guard]

    def __call__(self, evidence: Evidence) -> str | None:
        reasons = [guard(evidence) for guard in self.guards]
        refusals = [reason for reason in reasons if reason is not None]
        return "; ".join(refusals) if reasons and len(refusals) == len(reasons) else None


@dataclass(frozen=True)
class TrainAccuracyJump:
    """Refuse a round after which the core fits its own training data suspiciously well.

    Sec. 5.3: after an edge with corrupted labels the core memorises the core data instead of
    learning from it, and its *training* accuracy jumps while the test accuracy drops. The paper
    suggests a threshold for the jump and leaves the value of the threshold open. Our default of 0.1
    is not from the paper. While the core does not yet fit its data, honest edges raise the training
    accuracy too, and this guard refuses them. Once the core fits its data, noisy edges lower the
    training accuracy (docs/results.md, Fig. 8); use `TrainAccuracyDrop` there.

    Args:
        threshold: the largest rise above the mean of the history that is still accepted; a
            fraction, in [0, 1].

    Examples:
        >>> from flwr_cloned_kd import TrainAccuracyJump
        >>> TrainAccuracyJump(threshold=0.2)
        TrainAccuracyJump(threshold=0.2)
    """

    threshold: float = 0.1

    def __call__(self, evidence: Evidence) -> str | None:
        return Limit(train_accuracy_jump, self.threshold)(evidence)


@dataclass(frozen=True)
class TrainAccuracyDrop:
    """Refuse a round after which the core has unlearned its own, correctly labelled data.

    Args:
        threshold: the largest fall since the last accepted round that is still accepted; a
            fraction, in [0, 1].

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Core, Recipe, TrainAccuracyDrop
        >>> data = torch.randn(16, 2), torch.arange(16) % 2
        >>> core = Core(
        ...     model=torch.nn.Linear(2, 2),
        ...     dataset=data,
        ...     recipe=Recipe(epochs=2),
        ...     guard=TrainAccuracyDrop(0.1),
        ... )
    """

    threshold: float = 0.1

    def __call__(self, evidence: Evidence) -> str | None:
        return Limit(train_accuracy_drop, self.threshold)(evidence)
