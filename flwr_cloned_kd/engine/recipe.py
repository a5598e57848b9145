"""Seeds, schedules, stopping rules and the recipe of one phase: what changes a result."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from operator import index
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor

from .counts import check_count


def fold_in(seed: int, *path: int | str) -> int:
    """Derive the seed of one purpose from the seed of a run: 63 bits, by SHA-256 of the path.

    Args:
        seed: of the run.
        path: what the seed is for, such as "phase-1" and the number of the round.

    Examples:
        >>> from flwr_cloned_kd import fold_in
        >>> fold_in(0, "phase-1", 3) == fold_in(0, "phase-1", 3)
        True
        >>> fold_in(0, "phase-1", 3) == fold_in(0, "phase-1", 4)
        False
    """
    # The `repr` of a NumPy integer or string differs from that of the same Python value.
    plain = (str(part) if isinstance(part, str) else index(part) for part in path)
    digest = hashlib.sha256(repr((int(seed), *plain)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def step_decay(progress: float) -> float:
    """Return the factor of the learning rate: 1, then 0.1 and 0.01 (He et al. 2016).

    Args:
        progress: share of the steps already taken, in [0, 1). The factor becomes 0.1 at 1/2 and
            0.01 at 3/4.

    Examples:
        >>> from flwr_cloned_kd import step_decay
        >>> [step_decay(progress) for progress in (0.0, 0.5, 0.9)]
        [1.0, 0.1, 0.01]
    """
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


class Epoch(NamedTuple):
    """Mean loss and accuracy over the training samples of one epoch and over all clones."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class AccuracyReached:
    """Stop when the training accuracy of an epoch reaches the learning threshold (Phase 1).

    Args:
        threshold: a fraction, in [0, 1].

    Examples:
        >>> from flwr_cloned_kd import AccuracyReached, Recipe
        >>> recipe = Recipe(epochs=164, stop=AccuracyReached(0.99))
    """

    threshold: float

    def __call__(self, history: Sequence[Epoch]) -> bool:
        return history[-1].accuracy >= self.threshold


@dataclass(frozen=True)
class Plateau:
    """Stop when the loss has not improved on its minimum for some epochs (Phase 2).

    Args:
        patience: number of epochs without improvement, at least 1.
        min_improvement: the smallest decrease of the loss that is an improvement.

    Raises:
        ValueError: if `patience` is below 1.

    Examples:
        >>> from flwr_cloned_kd import Plateau, Recipe
        >>> recipe = Recipe(epochs=164, stop=Plateau(patience=5))
    """

    patience: int = 10
    min_improvement: float = 1e-3

    def __post_init__(self) -> None:
        check_count("patience", self.patience)

    def __call__(self, history: Sequence[Epoch]) -> bool:
        recent, before = history[-self.patience :], history[: -self.patience]
        best = min((epoch.loss for epoch in before), default=float("inf"))
        return bool(before) and min(epoch.loss for epoch in recent) > best - self.min_improvement


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one phase trains; every option changes the result.

    The defaults are the original ResNet schedule for CIFAR (He et al. 2016, Sec. 4.2), which the
    paper keeps in every phase.

    Args:
        epochs: passes over the data of the phase, at least 1.
        steps: number of optimisation steps instead of epochs, for data too large for a whole
            pass; at least 1. None trains `epochs`.
        batch_size: the last batch of an epoch may be smaller. A single left-over sample is
            skipped, because batch normalisation cannot train on one sample.
        lr: learning rate, at least 0.
        momentum: of the default optimizer, SGD, at least 0.
        weight_decay: of the default optimizer, SGD, at least 0.
        optimizer: (parameters, lr=...) -> optimizer, such as `torch.optim.AdamW` or
            `partial(torch.optim.AdamW, weight_decay=0.01)`. It gets the `lr` of the recipe. None is
            SGD with `momentum` and `weight_decay`, which no other optimizer reads.
        schedule: share of the steps already taken, in [0, 1) -> factor of the learning rate.
        max_grad_norm: limit for the norm of the gradient of one clone over all its parameters,
            above 0; None: no limit.
        augment: (inputs `[B, ...]`, generator) -> inputs; None: no augmentation.
        label_noise: (labels `[B]`, generator) -> labels, for noisy edges; None: no noise.
        proximal_mu: mu of FedProx (Li et al. 2020), the weight of the term that pulls the weights
            towards their start; 0: no such term.
        stop: epochs so far -> True to stop; None trains all `epochs`.

    Raises:
        ValueError: for a number out of range, for both epochs and steps, or if something else than
            a function stands in the place of one.

    Examples:
        >>> from functools import partial
        >>> import torch
        >>> from flwr_cloned_kd import Recipe
        >>> sgd = Recipe(epochs=40, batch_size=32)
        >>> sgd.num_steps(100)  # 40 epochs of 32, 32, 32 and 4 samples
        160
        >>> adamw = partial(torch.optim.AdamW, weight_decay=0.01)
        >>> recipe = Recipe(steps=2_000, lr=1e-3, optimizer=adamw)
        >>> Recipe(lr=-1.0)
        Traceback (most recent call last):
        ValueError: lr: expected at least 0, got -1.0
    """

    epochs: int = 164
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Callable[[float], float] = step_decay
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    label_noise: Callable[[Tensor, torch.Generator], Tensor] | None = None
    proximal_mu: float = 0.0
    stop: Callable[[Sequence[Epoch]], bool] | None = None
    steps: int | None = None
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("lr", "momentum", "weight_decay", "proximal_mu"):
            number = getattr(self, name)
            if not isinstance(number, SupportsFloat) or not 0 <= float(number) < float("inf"):
                raise ValueError(f"{name}: expected at least 0, got {number!r}")
        for name in ("schedule", "augment", "label_noise", "stop", "optimizer"):
            function = getattr(self, name)
            if not callable(function) and (function is not None or name == "schedule"):
                raise ValueError(f"{name}: expected a function, got {function!r}")
        if self.steps is not None:
            check_count("steps", self.steps)
        if self.steps is not None and self.epochs != Recipe.epochs:
            raise ValueError(
                f"epochs: expected either epochs or steps, got {self.epochs} and {self.steps}"
            )
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < float("inf"):
            raise ValueError(f"max_grad_norm: expected above 0, got {self.max_grad_norm}")

    def batch_sizes(self, num_samples: int) -> list[int]:
        """Return the sizes of the batches of one epoch; a single left-over sample is skipped."""
        sizes = [self.batch_size] * (num_samples // self.batch_size)
        num_left = num_samples % self.batch_size
        return [*sizes, num_left] if num_left > 1 or not sizes else sizes

    def num_steps(self, num_samples: int) -> int:
        """Return how many steps one clone trains on a number of samples."""
        return self.steps or self.epochs * len(self.batch_sizes(num_samples))

    def num_epochs(self, num_samples: int) -> int:
        """Return how many epochs one clone begins; with `steps` the last one may be cut short."""
        if self.steps is None:
            return self.epochs
        return ceil(self.steps / len(self.batch_sizes(num_samples)))
