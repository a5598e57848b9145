"""One training loop for every phase and baseline."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .ensemble import Ensemble, size
from .inputs import Dataset, FiniteViews
from .lanes import Lane, lanes
from .losses import Batch, Loss, Targets, cross_entropy
from .recipe import Epoch, Recipe, fold_in
from .runtime import Plan, Progress, Runtime, samples_at_once, settings
from .step import Outcome, Run, Step, recorded


def fit(
    model: nn.Module,
    ensemble: Ensemble,
    dataset: Dataset,
    recipe: Recipe,
    *,
    loss: Loss = cross_entropy,
    targets: Targets | None = None,
    seed: int = 0,
    view_seed: int | None = None,
    runtime: Runtime = Runtime(),
    phase: str = "training",
) -> Ensemble:
    """Train every clone of an ensemble on one dataset, each with batches of its own.

    Clone e draws its shuffles and augmentations from `fold_in(seed, e)` alone, so that it ends
    the same whether it trains beside others or by itself; but dropout draws for all clones
    in turn, and `Recipe.stop` ends them together.

    Args:
        model: the architecture; its own weights are neither read nor written.
        ensemble: `[E, ...]` starts; E = 1 trains a single model.
        dataset: inputs `[N, ...]` and labels `[N]`.
        loss: (logits, batch) -> scalar.
        targets: batch -> what the teachers say of it, `batch.targets` for the loss.
        view_seed: draw the views of a finite augmentation from this seed and the epoch's number
            instead, the same for every clone; see `epoch_views`.
        phase: what the progress lines call it.

    Returns:
        The trained ensemble, `[E, ...]`, on the CPU.

    Raises:
        ValueError: if the dataset is empty, its tensors differ in length, or no parameter of the
            model requires a gradient.
    """
    inputs, labels = (tensor.to(runtime.target) for tensor in dataset)
    if not len(inputs) or len(inputs) != len(labels):
        raise ValueError(f"dataset: expected inputs and labels of one length above 0, "
                         f"got {len(inputs)} and {len(labels)}")  # fmt: skip
    num_clones, num_batches = size(ensemble), len(_split(len(inputs), recipe.batch_size))
    generators = [torch.Generator().manual_seed(fold_in(seed, e)) for e in range(num_clones)]
    progress = Progress(runtime.log, phase, recipe.epochs, num_clones * len(inputs))
    with settings(runtime, seed):
        parts, chosen = lanes(
            model,
            ensemble,
            inputs,
            runtime,
            training=True,
            batch_size=recipe.batch_size,
            num_samples=num_clones * len(inputs) * recipe.epochs,
        )
        if not parts[0].leaves:
            raise ValueError("model: expected a parameter that requires a gradient, got none")
        step = _step(parts, recipe, loss, num_clones, chosen)
        history = list[Epoch]()
        for epoch in range(recipe.epochs):
            feeds = [
                _epoch(inputs, labels, recipe, generator, epoch, view_seed)
                for generator in generators
            ]
            meter = _Meter(recipe.stop is not None)
            for index, batches in enumerate(zip(*feeds)):
                if targets is not None:
                    batches = tuple(b._replace(targets=targets(b)) for b in batches)
                taken = (epoch * num_batches + index) / (recipe.epochs * num_batches)
                lr = recipe.lr * recipe.schedule(taken)
                meter.add(step(batches, lr), batches)
                progress.step(epoch, (index + 1) / num_batches)
            if recipe.stop is not None:
                history.append(meter.epoch())
                if recipe.stop(history):
                    break
        found = [part.read() for part in parts]
    return {name: torch.cat([part[name] for part in found]).cpu() for name in ensemble}


def forward(
    model: nn.Module,
    ensemble: Ensemble,
    runtime: Runtime = Runtime(),
    *,
    batch_size: int | None = None,
    num_samples: int = 0,
) -> Callable[[Tensor], Tensor]:
    """Return inputs `[B, ...]` -> logits `[E, B, C]` of the whole ensemble in evaluation mode.

    Args:
        batch_size: B of most calls; None is `samples_at_once`.
        num_samples: about how many inputs will pass, for the choice of the fastest way.
    """
    parts: list[Lane] = []

    @torch.no_grad()
    def call(inputs: Tensor) -> Tensor:
        inputs = inputs.to(runtime.target)
        if not parts:
            found, _ = lanes(
                model,
                ensemble,
                inputs,
                runtime,
                training=False,
                batch_size=batch_size or samples_at_once(runtime.target, inputs),
                num_samples=num_samples * size(ensemble),
            )
            parts.extend(found)
        views = inputs.expand(size(ensemble) // len(parts), *inputs.shape)
        return torch.cat([part.forward(views) for part in parts])

    return call


def predict(
    model: nn.Module,
    ensemble: Ensemble,
    inputs: Tensor,
    *,
    runtime: Runtime = Runtime(),
    batch_size: int | None = None,
) -> Tensor:
    """Compute the logits `[E, N, C]` of every clone for inputs `[N, ...]`, on the CPU."""
    batch_size = batch_size or samples_at_once(runtime.target, inputs)
    with settings(runtime, 0):
        call = forward(model, ensemble, runtime, batch_size=batch_size, num_samples=len(inputs))
        parts = [call(part).cpu() for part in torch.split(inputs, batch_size)]
        return torch.cat(parts, dim=1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction of correct predictions, `[...]` for logits `[..., N, C]`."""
    return (logits.argmax(-1) == labels).float().mean(-1)


def epoch_views(augment: FiniteViews, num_images: int, view_seed: int, epoch: int) -> Tensor:
    """Draw the view `[N]` of every image in one epoch, the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(fold_in(view_seed, "views", epoch))
    return augment.draw(num_images, generator)


def _step(parts: list[Lane], recipe: Recipe, loss: Loss, num_clones: int, chosen: Plan) -> Run:
    step = Step(parts, recipe, loss, num_clones)
    return recorded(step, torch.device(chosen.device)) if chosen.cuda_graphs else step


def _split(num_samples: int, batch_size: int) -> list[int]:
    sizes = [batch_size] * (num_samples // batch_size)
    rest = num_samples % batch_size
    return [*sizes, rest] if rest > 1 or not sizes else sizes


def _epoch(
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    epoch: int,
    view_seed: int | None,
) -> Iterator[Batch]:
    augment, views = recipe.augment, None
    order = torch.randperm(len(inputs), generator=generator)
    if isinstance(augment, FiniteViews):
        # All draws of an epoch at once: a GPU then waits for the CPU once, not at every step.
        views = (
            augment.draw(len(inputs), generator)
            if view_seed is None
            else epoch_views(augment, len(inputs), view_seed, epoch)
        ).to(inputs.device)
    sizes = _split(len(inputs), recipe.batch_size)
    order = order[: sum(sizes)].to(inputs.device)
    for several in torch.split(order, samples_at_once(inputs.device, inputs, recipe.batch_size)):
        pixels = inputs[several]
        if isinstance(augment, FiniteViews) and views is not None:
            pixels = augment.view(pixels, views[several])
        pairs = zip(*(torch.split(part, recipe.batch_size) for part in (several, pixels)))
        for rows, x in pairs:
            y = labels[rows]
            if augment is not None and views is None:
                x = augment(x, generator)
            if recipe.label_noise is not None:
                y = recipe.label_noise(y, generator)
            yield Batch(x, y, rows, epoch)


class _Meter:
    """Sums of one epoch, kept on the device and only where somebody will read them."""

    def __init__(self, wanted: bool) -> None:
        self._wanted, self._sums, self._count = wanted, list[Tensor](), 0

    def add(self, outcome: Outcome, batches: tuple[Batch, ...]) -> None:
        if self._wanted:
            labels = torch.stack([batch.labels for batch in batches])
            loss = outcome.values.sum() * labels.shape[1]
            self._sums.append(torch.stack([loss, (outcome.logits.argmax(-1) == labels).sum()]))
            self._count += labels.numel()

    def epoch(self) -> Epoch:
        return Epoch(*(torch.stack(self._sums).sum(0) / self._count).tolist())
