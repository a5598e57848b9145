"""What does the first core's accuracy depend on? Phase 0 alone, one change at a time, over seeds.

`python -m benchmarks.phase0 --help`
"""

import argparse
import copy
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import hardware
from flwr_cloned_kd import (
    CropAndFlip,
    Recipe,
    Runtime,
    StateDict,
    accuracy,
    clone,
    cross_entropy,
    fit,
    fold_in,
    load_npz,
    member,
    partition,
    predict,
    resnet,
    take,
)
from flwr_cloned_kd.data.datasets import moments
from flwr_cloned_kd.data.models import Moments
from flwr_cloned_kd.engine.inputs import Dataset, FiniteViews
from flwr_cloned_kd.engine.losses import Batch, Loss
from flwr_cloned_kd.engine.runtime import plan, settings
from flwr_cloned_kd.io.checkpoint import write_atomically

BASELINE = "baseline"
DEPTH = 8
NUM_PARTS = 10

Schedule = Callable[[float], float]
Edit = Callable[[nn.Module, torch.Generator], None]
"""(model, generator) -> nothing; the model changes."""
Results = dict[str, dict[str, Any]]
"""Name of a row -> what it was and what it found, as the JSON file holds it."""


@dataclass(frozen=True, kw_only=True)
class OwnLoop:
    """What a `Recipe` cannot say; as it stands, the loop does what `fit` does.

    Args:
        nesterov: take the gradient where the momentum leads.
        decay_all: False spares what has one axis: batch normalisation and biases.
        drop_last: leave out the smaller last batch of an epoch.
    """

    nesterov: bool = False
    decay_all: bool = True
    drop_last: bool = False


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to run Phase 0.

    Args:
        recipe: but for the warm-up.
        moments: mean and deviation `[C]` of all training images.
        pixels: by which the model standardises.
        edits: made to the built model, in turn.
        warm_up: epochs over which the learning rate grows from 0, in proportion to the steps.
        bf16: of `Runtime`.
        loop: None trains by the library's `fit`.
    """

    recipe: Recipe
    moments: Moments
    pixels: Moments
    edits: tuple[Edit, ...] = ()
    loss: Loss = cross_entropy
    warm_up: int = 0
    bf16: bool | None = None
    loop: OwnLoop | None = None


Change = Callable[[Trial], Trial]


class Row(NamedTuple):
    """One change: how it differs from the baseline, in words and in deeds."""

    words: str
    change: Change


def with_recipe(**fields: Any) -> Change:
    """Change fields of the recipe."""
    return lambda trial: replace(trial, recipe=replace(trial.recipe, **fields))


def with_edit(edit: Edit) -> Change:
    """Edit the built model."""
    return lambda trial: replace(trial, edits=(*trial.edits, edit))


def with_loop(**fields: bool) -> Change:
    """Train by the loop of this file, with these options."""
    return lambda trial: replace(trial, loop=replace(trial.loop or OwnLoop(), **fields))


def drops_at(first: float, second: float) -> Schedule:
    """Scale the learning rate by 0.1 from one share of the steps on, by 0.01 from another."""
    return lambda progress: 1.0 if progress < first else 0.1 if progress < second else 0.01


def warmed_up(schedule: Schedule, share: float) -> Schedule:
    """Let the learning rate grow from 0 over the first `share` of the steps."""
    return lambda progress: min(1.0, progress / share) * schedule(progress)


@dataclass(frozen=True)
class ReflectedCrop(CropAndFlip):
    """`CropAndFlip` with the same draws, but the image goes on as its mirror image."""

    def view(self, images: Tensor, views: Tensor) -> Tensor:
        """Return view `views[i]` of image i."""
        # The zeros are padded outside the reflection, and the largest shift does not reach them.
        wide = F.pad(images.float(), (self.pad,) * 4, mode="reflect")
        inner = slice(self.pad, -self.pad)
        return super().view(wide, views)[..., inner, inner]


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanPaddedCrop(CropAndFlip):
    """`CropAndFlip` with the same draws, but padded with a colour.

    Args:
        colour: `[C]`.
    """

    colour: Tensor

    def view(self, images: Tensor, views: Tensor) -> Tensor:
        """Return view `views[i]` of image i."""
        colour = self.colour.to(images.device)[:, None, None]
        return super().view(images - colour, views) + colour


def pad_with_mean(trial: Trial) -> Trial:
    """Pad with what the model's standardisation makes zero."""
    augment = MeanPaddedCrop(colour=trial.moments[0])
    return replace(trial, recipe=replace(trial.recipe, augment=augment))


def only_divide(trial: Trial) -> Trial:
    """Divide pixels by 255 and leave their mean where it is."""
    mean = trial.moments[0]
    return replace(trial, pixels=(torch.zeros_like(mean), torch.full_like(mean, 255)))


def standardise_together(trial: Trial) -> Trial:
    """Standardise all channels by one mean and one deviation."""
    mean, deviation = trial.moments
    spread = (deviation.square().mean() + mean.var(correction=0)).sqrt()
    return replace(trial, pixels=(mean.mean().expand_as(mean), spread.expand_as(mean)))


def initialise_convolutions(draw: Callable[[Tensor, torch.Generator], object]) -> Edit:
    """Draw the weights of all convolutions anew."""

    def edit(model: nn.Module, generator: torch.Generator) -> None:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                draw(module.weight, generator)

    return edit


def draw_uniform(weight: Tensor, generator: torch.Generator) -> None:
    """Draw as PyTorch does by default."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def draw_fan_in(weight: Tensor, generator: torch.Generator) -> None:
    """Draw as He et al. (2015) do for the forward pass; ours is for the backward pass."""
    nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu", generator=generator)


def scale_head(factor: float) -> Edit:
    """Multiply the initial weights and biases of the last layer."""

    def edit(model: nn.Module, generator: torch.Generator) -> None:
        for parameter in model.get_submodule("head").parameters():
            parameter.data.mul_(factor)

    return edit


def set_momentum(momentum: float) -> Edit:
    """Set how fast the running statistics of batch normalisation move, in [0, 1]."""

    def edit(model: nn.Module, generator: torch.Generator) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum

    return edit


class ProjectingBlock(nn.Module):
    """A residual block with a shortcut that has weights: option B of He et al. 2016.

    Args:
        block: whose convolutions and normalisations it takes over.
    """

    def __init__(self, block: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        names = ("conv1", "bn1", "conv2", "bn2")
        conv1, *others = (block.get_submodule(name) for name in names)
        if not isinstance(conv1, nn.Conv2d):
            raise TypeError(f"conv1: expected a convolution, got {type(conv1).__name__}")
        self.conv1 = conv1
        self.bn1, self.conv2, self.bn2 = others
        self.projection = nn.Conv2d(
            conv1.in_channels, conv1.out_channels, 1, conv1.stride[0], bias=False
        )
        nn.init.kaiming_normal_(
            self.projection.weight, mode="fan_out", nonlinearity="relu", generator=generator
        )
        self.norm = nn.BatchNorm2d(conv1.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.norm(self.projection(x))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


def project_shortcuts(model: nn.Module, generator: torch.Generator) -> None:
    """Give shortcuts that change the shape a convolution: option A becomes option B."""
    blocks = model.get_submodule("blocks")
    for name, block in blocks.named_children():
        conv1 = block.get_submodule("conv1")
        if isinstance(conv1, nn.Conv2d) and conv1.in_channels != conv1.out_channels:
            blocks.add_module(name, ProjectingBlock(block, generator))


def smoothed(amount: float) -> Loss:
    """Cross entropy against labels of which a share is spread over all classes."""
    return lambda logits, batch: F.cross_entropy(logits, batch.labels, label_smoothing=amount)


ROWS: dict[str, Row] = {
    BASELINE: Row("the library's fit, resnet, Recipe and CropAndFlip", lambda trial: trial),
    "own-loop": Row("the loop of this file, as it stands", with_loop()),
    "float32": Row("no bfloat16", lambda trial: replace(trial, bf16=False)),
    # Shortcuts before initialisations, which then reach the new convolutions too.
    "shortcut-B": Row("1x1 convolution and BN on shortcuts", with_edit(project_shortcuts)),
    "init-uniform": Row(
        "convolutions: kaiming_uniform, a = sqrt 5",
        with_edit(initialise_convolutions(draw_uniform)),
    ),
    "init-fan-in": Row(
        "convolutions: He normal, fan_in", with_edit(initialise_convolutions(draw_fan_in))
    ),
    "head-x0.1": Row("last layer's initial weights x0.1", with_edit(scale_head(0.1))),
    "head-zero": Row("last layer's initial weights zero", with_edit(scale_head(0.0))),
    "head-x3": Row("last layer's initial weights x3", with_edit(scale_head(3.0))),
    "bn-0.01": Row("BN momentum 0.01", with_edit(set_momentum(0.01))),
    "bn-0.3": Row("BN momentum 0.3", with_edit(set_momentum(0.3))),
    "warm-up": Row("one epoch of warm-up", lambda trial: replace(trial, warm_up=1)),
    "drop-late": Row("lr drops at 0.6 and 0.85", with_recipe(schedule=drops_at(0.6, 0.85))),
    "no-drop": Row("lr constant", with_recipe(schedule=lambda progress: 1.0)),
    "linear": Row("lr linear to 0", with_recipe(schedule=lambda progress: 1 - progress)),
    "cosine": Row(
        "lr cosine to 0",
        with_recipe(schedule=lambda progress: (1 + math.cos(math.pi * progress)) / 2),
    ),
    "lr-0.05": Row("lr 0.05", with_recipe(lr=0.05)),
    "lr-0.2": Row("lr 0.2", with_recipe(lr=0.2)),
    "lr-0.3": Row("lr 0.3", with_recipe(lr=0.3)),
    "batch-64": Row("batches of 64", with_recipe(batch_size=64)),
    "batch-256": Row("batches of 256", with_recipe(batch_size=256)),
    "drop-last": Row("no smaller last batch", with_loop(drop_last=True)),
    "nesterov": Row("Nesterov momentum", with_loop(nesterov=True)),
    "decay-weights": Row("no weight decay on BN and biases", with_loop(decay_all=False)),
    "decay-5e-4": Row("weight decay 5e-4", with_recipe(weight_decay=5e-4)),
    "pad-mean": Row("crops padded with the channels' means", pad_with_mean),
    "pad-reflect": Row("crops padded by reflection", with_recipe(augment=ReflectedCrop())),
    "crop-only": Row("crop, no flip", with_recipe(augment=CropAndFlip(flip=False))),
    "flip-only": Row("flip, no crop", with_recipe(augment=CropAndFlip(pad=0))),
    "no-augment": Row("no augmentation", with_recipe(augment=None)),
    "pixels-255": Row("pixels / 255, not standardised", only_divide),
    "pixels-global": Row("one mean and deviation for all channels", standardise_together),
    "smooth-0.1": Row("label smoothing 0.1", lambda trial: replace(trial, loss=smoothed(0.1))),
}


def parts(name: str) -> list[str]:
    """Split the name of a combination, "cosine+lr-0.2", into rows, in the order of `ROWS`.

    Raises:
        ValueError: for a row that is not there.
    """
    found = set(name.split("+"))
    if unknown := found - ROWS.keys():
        raise ValueError(f"row: expected some of {', '.join(ROWS)}, got {', '.join(unknown)}")
    return [row for row in ROWS if row in found]


def words(name: str) -> str:
    """Say how a row or a combination differs from the baseline."""
    return "; ".join(ROWS[part].words for part in parts(name))


@dataclass(frozen=True)
class Task:
    """One run: a row with one seed."""

    name: str
    seed: int
    epochs: int
    data: str
    device: str


class Found(NamedTuple):
    """What a run found, and on what."""

    accuracy: float
    """On held-out data, a fraction."""
    seconds: float
    device: str


def run(task: Task) -> Found:
    """Train a first core as an experiment does, and measure it on the held-out data."""
    train, test, pixels = _load_once(task.data)
    recipe = Recipe(epochs=task.epochs, augment=CropAndFlip())
    trial = Trial(recipe=recipe, moments=pixels, pixels=pixels)
    for part in parts(task.name):
        trial = ROWS[part].change(trial)
    started = time.perf_counter()
    rows = partition(len(train[1]), NUM_PARTS, seed=fold_in(task.seed, "split"))[0]
    model = build(trial, int(train[1].max()) + 1, seed=task.seed)
    runtime = Runtime(device=task.device, bf16=trial.bf16, compile=False)
    seed = fold_in(task.seed, "phase-0")
    params = pretrain(model, take(train, rows), trial, seed=seed, runtime=runtime)
    logits = predict(model, clone(params, 1), test[0], runtime=runtime)
    seconds = time.perf_counter() - started
    return Found(float(accuracy(logits, test[1])), seconds, hardware(runtime.target))


@lru_cache(maxsize=1)
def _load_once(path: str) -> tuple[Dataset, Dataset, Moments]:
    train, test = load_npz(path)
    return train, test, moments(train[0])


def build(trial: Trial, num_classes: int, *, seed: int) -> nn.Module:
    """Build the model of a trial, its edits made."""
    channels = len(trial.pixels[0])
    model_seed = fold_in(seed, "model")
    model = resnet(DEPTH, num_classes, channels=channels, seed=model_seed, pixels=trial.pixels)
    generator = torch.Generator().manual_seed(fold_in(seed, "edit"))
    for edit in trial.edits:
        edit(model, generator)
    return model


def pretrain(
    model: nn.Module, dataset: Dataset, trial: Trial, *, seed: int, runtime: Runtime
) -> StateDict:
    """Run Phase 0, by the library or by the loop of this file."""
    recipe = trial.recipe
    if trial.warm_up:
        schedule = warmed_up(recipe.schedule, trial.warm_up / recipe.epochs)
        recipe = replace(recipe, schedule=schedule)
    if trial.loop is not None:
        return train_alone(
            model, dataset, recipe, trial.loop, loss=trial.loss, seed=seed, runtime=runtime
        )
    start = clone(model.state_dict(), 1)
    return member(
        fit(model, start, dataset, recipe, loss=trial.loss, seed=seed, runtime=runtime), 0
    )


def train_alone(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    loop: OwnLoop,
    *,
    loss: Loss,
    seed: int,
    runtime: Runtime,
) -> StateDict:
    """Train one model as `fit` does, with the same draws, and with the options of the loop."""
    inputs, labels = (tensor.to(runtime.target) for tensor in dataset)
    bf16 = plan(model, inputs, runtime).bf16
    trained = copy.deepcopy(model).to(runtime.target).train()
    trained = trained.to(memory_format=torch.channels_last)
    optimiser = _optimiser(trained, recipe, loop)
    generator = torch.Generator().manual_seed(fold_in(seed, 0))
    with settings(runtime, seed):
        for epoch in range(recipe.epochs):
            batches = _epoch(inputs, labels, epoch, recipe, loop, generator)
            for index, batch in enumerate(batches):
                progress = (epoch + index / len(batches)) / recipe.epochs
                x = batch.inputs.contiguous(memory_format=torch.channels_last)
                with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                    logits = trained(x)
                optimiser.zero_grad()
                loss(logits.float(), batch).backward()  # type: ignore[no-untyped-call]
                for group in optimiser.param_groups:
                    group["lr"] = recipe.lr * recipe.schedule(progress)
                optimiser.step()
    return {name: tensor.detach().cpu() for name, tensor in trained.state_dict().items()}


def _optimiser(model: nn.Module, recipe: Recipe, loop: OwnLoop) -> torch.optim.SGD:
    spared = [p for p in model.parameters() if p.dim() == 1 and not loop.decay_all]
    decayed = [p for p in model.parameters() if p.dim() > 1 or loop.decay_all]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups,
        recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=loop.nesterov,
        fused=True,
    )


def _epoch(
    inputs: Tensor,
    labels: Tensor,
    epoch: int,
    recipe: Recipe,
    loop: OwnLoop,
    generator: torch.Generator,
) -> list[Batch]:
    order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    if isinstance(recipe.augment, FiniteViews):
        views = recipe.augment.draw(len(inputs), generator).to(inputs.device)
        inputs = recipe.augment.view(inputs, views)
    # A single left-over sample is skipped as in `fit`: batch normalisation cannot train on it.
    smallest = recipe.batch_size if loop.drop_last else 2
    batches: tuple[Tensor, ...] = order.split(recipe.batch_size)  # type: ignore[no-untyped-call]
    return [
        Batch(inputs[rows], labels[rows], rows, epoch) for rows in batches if len(rows) >= smallest
    ]


def compare(
    names: Sequence[str],
    *,
    data: str,
    seeds: int,
    epochs: int,
    device: str,
    jobs: int = 1,
    path: Path | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Run rows with seeds 0, 1, ... side by side, and return what all of them found.

    Args:
        names: of rows or combinations.
        jobs: processes; 1 runs in this one.
        path: JSON file of results, written after every row. A row that is there already, with
            the same description and as many seeds or more, is not run again.
        say: takes one line per row.
    """
    found: Results = json.loads(path.read_text()) if path is not None and path.exists() else {}
    described = {name: _describe(name, data, epochs) for name in names}
    missing = [name for name in names if not _is_there(found.get(name), described[name], seeds)]
    tasks = [Task(name, seed, epochs, data, device) for name in missing for seed in range(seeds)]
    started = time.perf_counter()
    with _mapping(min(jobs, len(tasks))) as mapping:
        results = iter(mapping(tasks))
        for index, name in enumerate(missing, start=1):
            runs = [next(results) for _ in range(seeds)]
            found[name] = {
                **described[name],
                "device": runs[0].device,
                "accuracy": [one.accuracy for one in runs],
                "seconds": [one.seconds for one in runs],
            }
            if path is not None:
                write_atomically(path, json.dumps(found, indent=2) + "\n")
            mean = fmean(one.accuracy for one in runs)
            seconds = fmean(one.seconds for one in runs)
            say(
                f"{index} of {len(missing)}, {name}: {mean:.4f}, {seconds:.1f} s a run, "
                f"{time.perf_counter() - started:.0f} s in all"
            )
    return found


@contextmanager
def _mapping(jobs: int) -> Iterator[Callable[[Sequence[Task]], Iterator[Found]]]:
    """Give a way to run tasks that yields what they find in their order, as it is there."""
    if jobs <= 1:
        yield lambda tasks: map(run, tasks)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    # One thread each: more of them would wait for the same cores.
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        yield lambda tasks: pool.map(run, tasks)


def _describe(name: str, data: str, epochs: int) -> dict[str, Any]:
    return {"words": words(name), "data": Path(data).name, "epochs": epochs}


def _is_there(kept: Mapping[str, Any] | None, described: Mapping[str, Any], seeds: int) -> bool:
    if kept is None or len(kept["accuracy"]) < seeds:
        return False
    return all(kept.get(key) == value for key, value in described.items())


def difference(row: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds of row minus baseline, and its standard error.

    A single seed has no standard error: NaN.
    """
    each = [ours - theirs for ours, theirs in zip(row, baseline)]
    error = stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return fmean(each), error


def show(names: Sequence[str], found: Results, seeds: int) -> Table:
    """Make the table of the first seeds of some rows."""
    reference = found[BASELINE]
    title = f"Phase 0, {reference['epochs']} epochs, {seeds} seeds: {reference['device']}"
    table = Table(title=title)
    for column in ("row", "how it differs"):
        table.add_column(column)
    for column in ("mean", "sd", "to baseline ± standard error"):
        table.add_column(column, justify="right")
    baseline = reference["accuracy"][:seeds]
    for name in names:
        values = found[name]["accuracy"][:seeds]
        spread = f"{stdev(values):.4f}" if len(values) > 1 else "-"
        mean, error = difference(values, baseline)
        against = f"{mean:+.4f}" if math.isnan(error) else f"{mean:+.4f} ± {error:.4f}"
        table.add_row(name, found[name]["words"], f"{fmean(values):.4f}", spread, against)
    return table


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the rows that were asked for, and the baseline; print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.phase0", description=__doc__)
    parser.add_argument("--data", required=True, metavar="FILE", help="such as cifar100.npz")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"rows besides the baseline, or combinations such as cosine+lr-0.2: {', '.join(ROWS)}",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; go on from them")
    options = parser.parse_args(argv)
    for name in ("seeds", "epochs", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    try:
        asked = ["+".join(parts(name)) for name in options.only or ROWS]
    except ValueError as error:
        parser.error(str(error))
    names = list(dict.fromkeys([BASELINE, *asked]))
    console = Console(width=110)
    found = compare(
        names,
        data=options.data,
        seeds=options.seeds,
        epochs=options.epochs,
        device=options.device,
        jobs=options.jobs,
        path=options.json,
        say=console.print,
    )
    console.print(show(names, found, options.seeds))
    return found


if __name__ == "__main__":
    main()
