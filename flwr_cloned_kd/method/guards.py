"""Guards: rules that refuse a round after looking at the core's training accuracy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Refuses = Callable[[Sequence[float], float], bool]
"""(history, accuracy) -> True to refuse the round, False to accept it.

`history` holds the core's training accuracy after Phase 0 and after each accepted round, oldest
first; `accuracy` is the training accuracy that the core has after the round in question. Fractions
in [0, 1].
"""


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
    """

    threshold: float = 0.1

    def __call__(self, history: Sequence[float], accuracy: float) -> bool:
        return bool(history) and accuracy - sum(history) / len(history) > self.threshold


@dataclass(frozen=True)
class TrainAccuracyDrop:
    """Refuse a round after which the core has unlearned its own, correctly labelled data.

    Args:
        threshold: the largest fall since the last accepted round that is still accepted; a
            fraction, in [0, 1].
    """

    threshold: float = 0.1

    def __call__(self, history: Sequence[float], accuracy: float) -> bool:
        return bool(history) and history[-1] - accuracy > self.threshold
