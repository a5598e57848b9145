"""One training loop for every phase and baseline."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from .ensemble import Ensemble, size
from .inputs import Dataset, FiniteViews
from .lanes import Lane, lanes, repeated
from .losses import Batch, Loss, Targets, supervised
from .nested import Inputs, num_rows, on_device, rows_of, split_rows
from .optimizers import can_batch, can_record, optimizer_name
from .progress import Progress, log_once
from .recipe import Epoch, Recipe, fold_in
from .runtime import Plan, Runtime, available_threads, samples_at_once, settings
from .samples import as_dataset, as_inputs, check_memory
from .step import Outcome, RecordedStep, Step, StepFunction
from .tasks import Task, classification, counting


def fit(
    model: nn.Module,
    ensemble: Ensemble,
    dataset: Dataset,
    recipe: Recipe,
    *,
    task: Task = classification,
    loss: Loss | None = None,
    targets: Targets | None = None,
    seed: int = 0,
    view_seed: int | None = None,
    runtime: Runtime = Runtime(),
    phase: str = "training",
) -> Ensemble:
    """Train every clone of an ensemble on one dataset, each with batches of its own.

    Clone e draws its shuffles and augmentations from `fold_in(seed, e)` alone. Its result is
    therefore the same beside other clones and by itself, with two exceptions: dropout draws for
    all clones in turn, and `Recipe.stop` ends all clones together.

    Args:
        model: the architecture; its own weights are neither read nor written.
        ensemble: the starts `[E, ...]`; E = 1 trains a single model.
        dataset: inputs `[N, ...]` and labels `[N, ...]`, or data in any form that `as_dataset`
            converts.
        recipe: how to train.
        task: what the outputs mean; `Recipe.stop` gets its accuracy.
        loss: (outputs, batch) -> scalar; None is the loss of the task.
        targets: batch -> targets of the teachers, which become `batch.targets` for the loss.
        seed: of the shuffles, augmentations and label noise.
        view_seed: draw the views of a finite augmentation from this seed and the number of the
            epoch, the same views for every clone; see `epoch_views`. None draws them from `seed`.
        runtime: speed only.
        phase: name of the phase in the progress lines.

    Returns:
        The trained ensemble, `[E, ...]`, on the CPU.

    Raises:
        ValueError: if the dataset is empty, its tensors differ in length or hold a value that is
            not finite, if no parameter of the model requires a gradient, or if the factory of the
            recipe does not return an optimizer.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Recipe, clone, fit
        >>> data = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> model = torch.nn.Linear(1, 2)
        >>> start = clone(model.state_dict(), 3)
        >>> fit(model, start, data, Recipe(epochs=5, batch_size=2))["weight"].shape
        torch.Size([3, 2, 1])
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model: expected a parameter that requires a gradient, got none")
    inputs, labels = on_device(as_dataset(dataset, model), runtime.target)
    loss = supervised(task) if loss is None else loss
    num_samples = len(labels)
    num_clones = size(ensemble)
    num_batches = len(recipe.batch_sizes(num_samples))
    num_steps = recipe.num_steps(num_samples)
    num_epochs = recipe.num_epochs(num_samples)
    if not can_batch(recipe):
        runtime = replace(runtime, batch_clones=False)
    generators = [torch.Generator().manual_seed(fold_in(seed, e)) for e in range(num_clones)]
    with settings(runtime, seed):
        clone_lanes, plan = lanes(
            model,
            ensemble,
            inputs,
            runtime,
            training=True,
            batch_size=recipe.batch_size,
            num_samples=num_clones * min(num_samples * num_epochs, num_steps * recipe.batch_size),
        )
        if plan.cuda_graphs and not can_record(recipe):
            log_once(
                "cuda_graphs: expected SGD of the recipe or an optimizer with the option "
                f"capturable, got {optimizer_name(recipe)}; training with plain steps"
            )
            plan = plan._replace(cuda_graphs=False)
        steps = make_steps(clone_lanes, recipe, loss, num_clones, plan)
        progress = Progress(runtime.log, phase, num_epochs, num_clones * num_samples, len(steps))
        clones_per_step = num_clones // len(steps)

        def train_epoch(place: int, epoch: int) -> Tensor:
            """Train the clones of one step for one epoch; return the sums of `_Meter`."""
            first = place * clones_per_step
            feeds = [
                _epoch_batches(inputs, labels, recipe, generator, epoch, view_seed)
                for generator in generators[first : first + clones_per_step]
            ]
            meter = _Meter(task, needed=recipe.stop is not None)
            steps_before = epoch * num_batches
            for index, batches in enumerate(islice(zip(*feeds), num_steps - steps_before)):
                if targets is not None:
                    batches = tuple(b._replace(targets=targets(b)) for b in batches)
                share_done = (steps_before + index) / num_steps
                lr = recipe.lr * recipe.schedule(share_done)
                meter.add(steps[place](batches, lr), batches)
                progress.step(epoch, (index + 1) / num_batches, place)
            return meter.sums()

        history = list[Epoch]()
        with side_by_side(plan) as run_all:
            for epoch in range(num_epochs):
                sums = run_all(partial(train_epoch, epoch=epoch), range(len(steps)))
                if recipe.stop is not None:
                    history.append(_mean_of_epoch(sums))
                    if recipe.stop(history):
                        break
        parts = [lane.read() for lane in clone_lanes]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in ensemble}


class Predictor:
    """A whole ensemble in evaluation mode: inputs `[B, ...]` -> outputs `[E, B, ...]`.

    The models are put on the device at the first call, because its inputs are needed to choose the
    way to run them.

    Args:
        batch_size: B of most calls; None is `samples_at_once`.
        num_samples: approximate number of inputs over all calls, for the choice of the fastest way.
    """

    def __init__(
        self,
        model: nn.Module,
        ensemble: Ensemble,
        runtime: Runtime = Runtime(),
        *,
        batch_size: int | None = None,
        num_samples: int = 0,
    ) -> None:
        self._model = model
        self._ensemble = ensemble
        self._runtime = runtime
        self._batch_size = batch_size
        self._num_samples = num_samples
        self._lanes: list[Lane] | None = None

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Tensor:
        inputs = on_device(inputs, self._runtime.target)
        if self._lanes is None:
            self._lanes = self._make_lanes(inputs)
        clones_per_lane = size(self._ensemble) // len(self._lanes)
        views = repeated(inputs, clones_per_lane)
        return torch.cat([lane.forward(views) for lane in self._lanes])

    def _make_lanes(self, inputs: Inputs) -> list[Lane]:
        clone_lanes, _ = lanes(
            self._model,
            self._ensemble,
            inputs,
            self._runtime,
            training=False,
            batch_size=self._batch_size or samples_at_once(self._runtime.target, inputs),
            num_samples=self._num_samples * size(self._ensemble),
        )
        return clone_lanes


def predict(
    model: nn.Module,
    ensemble: Ensemble,
    inputs: Inputs,
    *,
    runtime: Runtime = Runtime(),
    batch_size: int | None = None,
) -> Tensor:
    """Compute the outputs `[E, N, ...]` of every clone for inputs `[N, ...]`, on the CPU.

    Args:
        model: the architecture; its own weights are not used.
        ensemble: the clones `[E, ...]`.
        inputs: a tensor or array `[N, ...]`, or a nested dict or tuple of such.
        runtime: speed only.
        batch_size: samples at once, at least 1; None: as many as the device takes well.

    Raises:
        ValueError: if the outputs do not fit into the free memory.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import clone, predict
        >>> model = torch.nn.Linear(4, 10)
        >>> predict(model, clone(model.state_dict(), 3), torch.zeros(7, 4)).shape  # [E, N, classes]
        torch.Size([3, 7, 10])
    """
    inputs = as_inputs(inputs, model)
    batch_size = batch_size or samples_at_once(runtime.target, inputs)
    with settings(runtime, 0):
        logits_of = Predictor(
            model, ensemble, runtime, batch_size=batch_size, num_samples=num_rows(inputs)
        )
        outputs: list[Tensor] = []
        for part in split_rows(inputs, batch_size):
            outputs.append(logits_of(part).cpu())
            if len(outputs) == 1:
                share = num_rows(part) / num_rows(inputs)
                check_memory(int(outputs[0].nbytes / share), "predictions")
        return torch.cat(outputs, dim=1)


def accuracy(outputs: Tensor, labels: Tensor, task: Task = classification) -> Tensor:
    """Return the fraction of correct predictions, `[...]` for outputs `[..., N, *]`.

    Args:
        outputs: of one model `[N, *]`, or of an ensemble `[E, N, *]`.
        labels: `[N, *]`.
        task: says which predictions are correct, and which elements count.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import accuracy
        >>> logits = torch.tensor([[[2.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
        >>> accuracy(logits, torch.tensor([0, 1]))  # of two clones
        tensor([1.0000, 0.5000])
    """
    return counting(task.correct(outputs, labels), labels, task).float().mean(-1)


def epoch_views(augment: FiniteViews, num_images: int, view_seed: int, epoch: int) -> Tensor:
    """Draw the view `[N]` of every image in one epoch; the same arguments give the same views."""
    generator = torch.Generator().manual_seed(fold_in(view_seed, "views", epoch))
    return augment.draw(num_images, generator)


def make_steps(
    clone_lanes: list[Lane], recipe: Recipe, loss: Loss, num_clones: int, plan: Plan
) -> list[StepFunction]:
    """Make the steps that a plan chose: one for all lanes, or one for each lane."""
    step = Step(clone_lanes, recipe, loss, num_clones, recorded=plan.cuda_graphs)
    if plan.cuda_graphs:
        return [RecordedStep(step.parallel, torch.device(plan.device))]
    if plan.workers == 1:
        return [step]
    return [partial(step.step_lane, index) for index in range(len(clone_lanes))]


@contextmanager
def side_by_side(plan: Plan) -> Iterator[Callable[[Callable[[int], Tensor], range], list[Tensor]]]:
    """Give a function that calls another one for each place: in turn, or on threads of its own.

    PyTorch releases Python's lock while it computes. Each thread uses its share of PyTorch's
    threads: many threads for one small operation wait for each other more than they compute.
    """
    if plan.workers == 1:
        yield lambda call, places: [call(place) for place in places]
        return
    before = torch.get_num_threads()
    share = max(1, available_threads() // plan.workers)
    try:
        with ThreadPoolExecutor(
            plan.workers, "flwr-cloned-kd-clone", torch.set_num_threads, (share,)
        ) as pool:
            yield lambda call, places: list(pool.map(call, places))
    finally:
        torch.set_num_threads(before)


def _epoch_batches(
    inputs: Inputs,
    labels: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    epoch: int,
    view_seed: int | None,
) -> Iterator[Batch]:
    """Draw the batches of one clone in one epoch."""
    augment = recipe.augment
    views = None
    num_samples, device = len(labels), labels.device
    order = torch.randperm(num_samples, generator=generator)
    if isinstance(augment, FiniteViews):
        # Draw all views of an epoch at once: a GPU then waits for the CPU once, not in every step.
        views = (
            augment.draw(num_samples, generator)
            if view_seed is None
            else epoch_views(augment, num_samples, view_seed, epoch)
        ).to(device)
    order = order[: sum(recipe.batch_sizes(num_samples))].to(device)
    piece_size = samples_at_once(device, inputs, recipe.batch_size)
    for piece in torch.split(order, piece_size):
        drawn = rows_of(inputs, piece)
        if isinstance(augment, FiniteViews) and views is not None:
            drawn = augment.view(drawn, views[piece])
        pairs = zip(*(split_rows(part, recipe.batch_size) for part in (piece, drawn)))
        for rows, x in pairs:
            y = labels[rows]
            if augment is not None and views is None:
                x = augment(x, generator)
            if recipe.label_noise is not None:
                y = recipe.label_noise(y, generator)
            yield Batch(x, y, rows, epoch)


class _Meter:
    """Loss and accuracy of one epoch, summed on the device, and only if they are needed."""

    def __init__(self, task: Task, *, needed: bool) -> None:
        self._task = task
        self._needed = needed
        self._sums = list[Tensor]()

    def add(self, outcome: Outcome, batches: tuple[Batch, ...]) -> None:
        if self._needed:
            labels = torch.stack([batch.labels for batch in batches])
            # In float64 the sums do not depend on the order in which the clones are added.
            loss = outcome.losses.double().sum() * labels.shape[1]
            correct = counting(self._task.correct(outcome.logits, labels), labels, self._task)
            num_correct = correct.sum().to(loss.dtype)
            num_samples = labels.shape[0] * labels.shape[1]
            # `full_like`: a GPU waits for the CPU whenever a tensor is made of Python's numbers.
            counts = [torch.full_like(loss, n) for n in (num_samples, correct.numel())]
            self._sums.append(torch.stack([loss, num_correct, *counts]))

    def sums(self) -> Tensor:
        """Return the sums of the loss and of the correct elements, and the numbers of both."""
        return torch.stack(self._sums).sum(0) if self._sums else torch.zeros(4, dtype=torch.float64)


def _mean_of_epoch(sums: list[Tensor]) -> Epoch:
    loss, num_correct, num_samples, num_elements = torch.stack(sums).sum(0)
    return Epoch(float(loss / num_samples), float(num_correct / num_elements))
