"""Guards: rules that refuse an edge for what its answer shows on data of the core."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Evidence:
    """What a core has measured of the answer of one edge, on data of its own.

    A guard gets it twice. The first time is before the distillation: `after` and `train_accuracy`
    are None, and a refusal saves the distillation. The second time is after it.

    The masks say which elements of the validation data a model predicts correctly; that is
    `Core.validation`, or the core data without it. An element is a sample, or a token or pixel that
    counts, by the task.

    Args:
        labels: of these elements, `[N]`.
        before: mask `[N]` of the core before the round.
        clones: masks `[E, N]` of the clones.
        ensemble: mask `[N]` of the mean of the clones' predictions.
        movement: L2 norm of the mean of the clones minus the model that the edge was sent, over all
            parameters that train; in units of the norm of that model, at least 0.
        direction: cosine between this movement and the mean way from the core to the ensembles of
            the memory, in [-1, 1]; None if the memory is empty or a movement is zero.
        history: the core's accuracy on its own data after Phase 0 and after each accepted round,
            oldest first; fractions in [0, 1].
        after: mask `[N]` of the core after the distillation.
        train_accuracy: of that core on its own data.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Core, Evidence
        >>> def refuse_long_steps(evidence: Evidence) -> str | None:  # a guard of your own
        ...     return "it moved too far" if evidence.movement > 2 else None
        >>> right = torch.ones(4, dtype=torch.bool)
        >>> evidence = Evidence(
        ...     labels=torch.arange(4),
        ...     before=right,
        ...     clones=right[None],
        ...     ensemble=right,
        ...     movement=3.0,
        ...     direction=None,
        ...     history=(0.9,),
        ... )
        >>> refuse_long_steps(evidence)
        'it moved too far'
    """

    labels: Tensor
    before: Tensor
    clones: Tensor
    ensemble: Tensor
    movement: float
    direction: float | None
    history: tuple[float, ...]
    after: Tensor | None = None
    train_accuracy: float | None = None

    def metrics(self) -> dict[str, float]:
        """Return the numbers that a round reports; accuracies are fractions in [0, 1]."""
        numbers = {
            "validation-before": share(self.before),
            "validation-ensemble": share(self.ensemble),
            "movement": self.movement,
        }
        if self.direction is not None:
            numbers["direction"] = self.direction
        if self.after is not None:
            numbers["validation-after"] = share(self.after)
        return numbers

    def recall(self, mask: Tensor) -> dict[int, float]:
        """Return the share of correct elements of each class that has any; class -> fraction."""
        labels = sorted(set(self.labels.tolist()))
        return {label: share(mask[self.labels == label]) for label in labels}


Guard = Callable[[Evidence], str | None]
"""Evidence -> why the edge is refused, in one line; None accepts it."""

Score = Callable[[Evidence], float | None]
"""Evidence -> a number that is the higher, the worse the edge; None before it can be known."""


def share(mask: Tensor) -> float:
    """Return the share of True in a mask, a fraction in [0, 1]."""
    return float(mask.double().mean())


def train_accuracy_jump(evidence: Evidence) -> float | None:
    """Return how far the core's training accuracy rose above the mean of its history (Sec. 5.3)."""
    if evidence.train_accuracy is None or not evidence.history:
        return None
    return evidence.train_accuracy - sum(evidence.history) / len(evidence.history)


def train_accuracy_drop(evidence: Evidence) -> float | None:
    """Return how far the core's training accuracy fell since the last accepted round."""
    if evidence.train_accuracy is None or not evidence.history:
        return None
    return evidence.history[-1] - evidence.train_accuracy


def validation_drop(evidence: Evidence) -> float | None:
    """Return how far the core's accuracy on the validation data fell by the distillation.

    Examples:
        >>> from flwr_cloned_kd import Limit, validation_drop
        >>> guard = Limit(validation_drop, 0.05)  # at most five points
    """
    if evidence.after is None:
        return None
    return share(evidence.before) - share(evidence.after)


def class_drop(evidence: Evidence) -> float | None:
    """Return the largest fall of the core's accuracy on one class of the validation data.

    Examples:
        >>> from flwr_cloned_kd import Limit, class_drop
        >>> guard = Limit(class_drop, 0.2)  # at most twenty points of any class
    """
    if evidence.after is None:
        return None
    before, after = evidence.recall(evidence.before), evidence.recall(evidence.after)
    return max(before[label] - after[label] for label in before)


def ensemble_gap(evidence: Evidence) -> float:
    """Return by how much the ensemble is less accurate than the core; known before Phase 2.

    Examples:
        >>> from flwr_cloned_kd import Limit, ensemble_gap
        >>> guard = Limit(ensemble_gap, 0.3)  # refuses before the distillation is paid for
    """
    return share(evidence.before) - share(evidence.ensemble)


def movement(evidence: Evidence) -> float:
    """Return the length of the movement, relative to the model that was sent.

    Examples:
        >>> from flwr_cloned_kd import Limit, movement
        >>> guard = Limit(movement, 2.0)  # at most twice the norm of the model that was sent
    """
    return evidence.movement


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


@dataclass(frozen=True)
class AnyOf:
    """Refuse an edge that at least one guard refuses; the first reason counts.

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
