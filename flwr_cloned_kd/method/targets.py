"""Targets of teachers, computed once and kept from epoch to epoch and from round to round."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..engine.ensemble import Ensemble, size
from ..engine.fit import Predictor, epoch_views
from ..engine.inputs import Dataset, FiniteViews
from ..engine.losses import Batch, Targets, soft_target
from ..engine.nested import Inputs, on_device, rows_of, split_rows
from ..engine.recipe import Recipe
from ..engine.runtime import Runtime, plan, samples_at_once
from ..engine.tasks import Task, classification
from .knowledge import Selection


class TargetBank:
    """The target of one ensemble: the mean of the targets of its clones, see `Task.target`.

    With a selection, each row of the target is multiplied by the weight of its sample. The loss
    needs no change: such a row stands for its divergence times its weight.

    A finite augmentation has the same views in an epoch of every round, those of `epoch_views`. The
    targets `[N, ..., C]` of an epoch are therefore computed at once and used again as long as the
    ensemble stays in the memory. Without augmentation the targets of one epoch serve all epochs.
    Kept targets are float32, or float16 where the models run in bfloat16. The target of a batch is
    computed on the spot if the targets of its epoch would exceed `max_bytes`, if the recipe has
    fewer steps than one epoch, or if the augmentation is not a finite one.

    Args:
        ensemble: `[E, ...]`.
        dataset: inputs `[N, ...]` and labels `[N, ...]`, the data that batches are drawn from.
        recipe: the recipe of Phase 2; the bank uses its number of epochs and its augmentation.
        view_seed: the `view_seed` that `fit` gets.
        temperature: t of Eq. (1), above 0.
        max_bytes: the limit for all kept targets together.
        selection: the weight of each sample; None is 1 for every sample.
        task: what the outputs of the model mean.
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
        max_bytes: int,
        selection: Selection | None = None,
        task: Task = classification,
        runtime: Runtime = Runtime(),
    ) -> None:
        self.ensemble = ensemble
        self._inputs, self._labels = on_device(dataset, runtime.target)
        self._task = task
        self._selection = selection
        self._augment = recipe.augment
        self._view_seed = view_seed
        self._temperature = temperature
        self._max_bytes = max_bytes
        # Made once: a GPU waits for the CPU whenever a tensor is made of Python's numbers.
        self._weights = torch.full(
            (size(ensemble),), 1 / size(ensemble), dtype=torch.float32, device=runtime.target
        )
        self._outputs = Predictor(
            model,
            ensemble,
            runtime,
            num_samples=len(self._labels) * recipe.num_epochs(len(self._labels)),
        )
        in_bf16 = plan(model, self._inputs, runtime).bf16
        self._dtype = torch.float16 if in_bf16 else torch.float32
        # Targets of a whole epoch would be more work than those of the few batches drawn from it.
        num_batches = len(recipe.batch_sizes(len(self._labels)))
        self._keeps = recipe.num_steps(len(self._labels)) >= num_batches
        self._kept: dict[int, Tensor] = {}
        self._epoch_bytes: int | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Return the target `[B, ..., C]` of a batch, float32."""
        if self._augment is not None and not isinstance(self._augment, FiniteViews):
            return self._target(batch.inputs, self._labels[batch.rows])
        epoch = 0 if self._augment is None else batch.epoch
        if epoch not in self._kept:
            if not (self._keeps and self._has_room(epoch)):
                return self._target(batch.inputs, self._labels[batch.rows])
            self._kept[epoch] = self._epoch_targets(epoch)
        return self._kept[epoch][batch.rows].float()

    @property
    def num_bytes(self) -> int:
        """Bytes held by the kept targets."""
        return sum(targets.nbytes for targets in self._kept.values())

    def _has_room(self, epoch: int) -> bool:
        """Return whether the targets of one more epoch fit into `max_bytes`."""
        if self._epoch_bytes is None:
            # Measure with two samples: some models cannot run a single one. The first inputs that
            # a predictor gets also decide how it runs the models.
            two = rows_of(self._inputs, slice(2))
            if isinstance(self._augment, FiniteViews):
                views = epoch_views(self._augment, len(self._labels), self._view_seed, epoch)
                two = self._augment.view(two, views[:2].to(two.device))
            targets = self._target(two, self._labels[:2])
            self._epoch_bytes = len(self._labels) * targets[:1].to(self._dtype).nbytes
        return self.num_bytes + self._epoch_bytes <= self._max_bytes

    def _epoch_targets(self, epoch: int) -> Tensor:
        """Compute the targets `[N, ..., C]` of every sample in the views of one epoch."""
        device = self._labels.device
        piece_size = samples_at_once(device, self._inputs)
        pieces = split_rows(self._inputs, piece_size)
        if isinstance(self._augment, FiniteViews):
            views = epoch_views(self._augment, len(self._labels), self._view_seed, epoch)
            views_of_pieces = split_rows(views.to(device), piece_size)
            pieces = map(self._augment.view, pieces, views_of_pieces)
        labels = split_rows(self._labels, piece_size)
        return torch.cat([self._target(*pair).to(self._dtype) for pair in zip(pieces, labels)])

    def _target(self, inputs: Inputs, labels: Tensor) -> Tensor:
        target = soft_target(self._outputs(inputs), self._weights, self._temperature, self._task)
        if self._selection is None:
            return target
        weights = self._selection(self._task.prediction(target), labels)
        # One weight per sample or per element; the target has more axes than either.
        return target * weights.reshape(*weights.shape, *[1] * (target.dim() - weights.dim()))


class TargetCache:
    """The target banks of one temporal memory, kept from round to round.

    The cache holds the banks of the latest call only: its size is bounded by the size of the memory
    and by the `max_bytes` of each bank. It changes the speed of a core and never the result.
    """

    def __init__(self) -> None:
        # One attribute, set in one step: another thread never sees banks of another origin.
        self._kept: tuple[tuple[object, ...], tuple[TargetBank, ...]] = ((), ())

    def banks(
        self,
        memory: Sequence[Ensemble],
        make: Callable[[Ensemble], TargetBank],
        origin: tuple[object, ...],
    ) -> list[TargetBank]:
        """Return a bank for each ensemble of a memory, a kept bank where there is one.

        Args:
            memory: a kept bank serves the very same ensemble; a copy gets a new bank.
            make: ensemble -> new bank.
            origin: all objects that `make` depends on. Banks are used again only if they were made
                from the very same objects.
        """
        kept_origin, kept = self._kept
        same_origin = list(map(id, origin)) == list(map(id, kept_origin))
        usable = {id(bank.ensemble): bank for bank in kept} if same_origin else {}
        banks = [usable.get(id(ensemble)) or make(ensemble) for ensemble in memory]
        self._kept = (origin, tuple(banks))
        return banks

    @property
    def num_bytes(self) -> int:
        """Bytes held by the targets of all banks."""
        return sum(bank.num_bytes for bank in self._kept[1])


def weighted_sum(
    teachers: Sequence[Callable[[Batch], Tensor]], weights: Sequence[float]
) -> Targets:
    """Add up the weighted targets of several ensembles: the sum of Eq. (2) over the memory."""

    @torch.no_grad()
    def targets(batch: Batch) -> Tensor:
        total = weights[0] * teachers[0](batch)
        for weight, teacher in zip(weights[1:], teachers[1:]):
            total += weight * teacher(batch)
        return total

    return targets
