"""Guards look at a round before it counts and may refuse it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Guard = Callable[[Sequence[float], float], bool]
"""(core training accuracy after each accepted round so far, that of this round) -> refuse it?

Fractions in [0, 1], oldest first; the first is Phase 0's.
"""


@dataclass(frozen=True)
class TrainAccuracyJump:
    """Refuse a round after which the core fits its own training data suspiciously well.

    Sec. 5.3: after an edge with corrupted labels the core memorises the core data instead of
    learning from it, and its *training* accuracy jumps while the test accuracy drops. The paper
    suggests a threshold on it and leaves its value open; ours is a plain default. Where the core
    does not fit its data yet, honest edges raise it as well, and are refused; where it does, noise
    lowers it (docs/results.md, Fig. 8). See `TrainAccuracyDrop`.

    Args:
        threshold: the largest rise over the mean of the rounds before that still counts as
            learning; a fraction, in [0, 1].
    """

    threshold: float = 0.1

    def __call__(self, history: Sequence[float], found: float) -> bool:
        return bool(history) and found - sum(history) / len(history) > self.threshold


@dataclass(frozen=True)
class TrainAccuracyDrop:
    """Refuse a round after which the core has unlearned its own, correctly labelled data.

    Args:
        threshold: the largest fall since the last accepted round that still counts as learning;
            a fraction, in [0, 1].
    """

    threshold: float = 0.1

    def __call__(self, history: Sequence[float], found: float) -> bool:
        return bool(history) and history[-1] - found > self.threshold
