"""What ensembles teach, computed once and kept from epoch to epoch and from round to round."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..engine.ensemble import Ensemble, size
from ..engine.fit import epoch_views, forward
from ..engine.inputs import Dataset, FiniteViews
from ..engine.losses import Batch, Targets, soft_target
from ..engine.recipe import Recipe
from ..engine.runtime import Runtime, plan, samples_at_once
from .knowledge import Selection


class TargetBank:
    """The target of one ensemble: the mean of its clones' tempered predictions.

    With a selection, each row is multiplied by what the ensemble may teach of that sample. Row
    sums below 1 need no change in the loss: the row stands for its divergence times the row's sum.

    With a finite augmentation the views of an epoch are those of `epoch_views`, the same in every
    round: so the targets `[N, C]` of an epoch are computed at once, in order, and serve as long
    as the ensemble stays in the memory; without augmentation one epoch's targets serve all. They
    are float32, or float16 where the models run in bfloat16. Beyond `most_bytes`, and for an
    augmentation that is any function, each batch is computed when it comes.

    Args:
        ensemble: `[E, ...]`.
        dataset: inputs `[N, ...]` and labels `[N]`, the data that batches are drawn from.
        recipe: of the phase that learns: its epochs and augmentation.
        view_seed: what `fit` is given.
        temperature: t of Eq. (1), above 0.
        most_bytes: of all kept targets.
        selection: how much of each sample this ensemble teaches; None is all of every sample.
    """

    def __init__(
        self,
        model: nn.Module,
        ensemble: Ensemble,
        dataset: Dataset,
        recipe: Recipe,
        *,
        view_seed: int,
        temperature: float,
        most_bytes: int,
        selection: Selection | None = None,
        runtime: Runtime = Runtime(),
    ) -> None:
        self.ensemble = ensemble
        self._inputs, self._labels = (tensor.to(runtime.target) for tensor in dataset)
        self._selection = selection
        self._augment, self._view_seed = recipe.augment, view_seed
        self._temperature, self._most_bytes = temperature, most_bytes
        self._weights = [1 / size(ensemble)] * size(ensemble)
        self._forward = forward(
            model, ensemble, runtime, num_samples=len(self._inputs) * recipe.epochs
        )
        rounded = plan(model, self._inputs, runtime).bf16
        self._dtype = torch.float16 if rounded else torch.float32
        self._kept: dict[int, Tensor] = {}
        self._epoch_bytes: int | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Return the target `[B, C]` of a batch, float32."""
        if self._augment is not None and not isinstance(self._augment, FiniteViews):
            return self._target(batch.inputs, self._labels[batch.rows])
        epoch = 0 if self._augment is None else batch.epoch
        if epoch not in self._kept:
            if not self._room(batch):
                return self._target(batch.inputs, self._labels[batch.rows])
            self._kept[epoch] = self._epoch(epoch)
        return self._kept[epoch][batch.rows].float()

    @property
    def num_bytes(self) -> int:
        """Of all targets that are kept now."""
        return sum(kept.nbytes for kept in self._kept.values())

    def _room(self, batch: Batch) -> bool:
        if self._epoch_bytes is None:
            # Of two samples: some models take no lone one, and they choose how models are run.
            two = self._target(batch.inputs[:2], self._labels[batch.rows[:2]])
            one = two[:1].to(self._dtype)
            self._epoch_bytes = len(self._inputs) * one.nbytes
        return self.num_bytes + self._epoch_bytes <= self._most_bytes

    def _epoch(self, epoch: int) -> Tensor:
        """Compute the targets `[N, C]` of every sample in the views of one epoch."""
        at_once = samples_at_once(self._inputs.device, self._inputs)
        pieces = self._inputs.split(at_once)  # type: ignore[no-untyped-call]
        if isinstance(self._augment, FiniteViews):
            views = epoch_views(self._augment, len(self._inputs), self._view_seed, epoch)
            chosen = views.to(self._inputs.device).split(at_once)
            pieces = map(self._augment.view, pieces, chosen)
        labels = self._labels.split(at_once)  # type: ignore[no-untyped-call]
        return torch.cat([self._target(*pair).to(self._dtype) for pair in zip(pieces, labels)])

    def _target(self, inputs: Tensor, labels: Tensor) -> Tensor:
        target = soft_target(self._forward(inputs), self._weights, self._temperature)
        if self._selection is None:
            return target
        return target * self._selection(target, labels)[:, None]


def weighted(teachers: Sequence[Callable[[Batch], Tensor]], weights: Sequence[float]) -> Targets:
    """Fold the targets of several ensembles into one: the sum of Eq. (2) over the memory."""

    @torch.no_grad()
    def targets(batch: Batch) -> Tensor:
        total = weights[0] * teachers[0](batch)
        for weight, teacher in zip(weights[1:], teachers[1:]):
            total += weight * teacher(batch)
        return total

    return targets
