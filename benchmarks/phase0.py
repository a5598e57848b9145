"""Measure what the first core's accuracy depends on: Phase 0 with one change at a time, over seeds.

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
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

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
from flwr_cloned_kd.apps.machine import capability
from flwr_cloned_kd.data.datasets import moments
from flwr_cloned_kd.data.models import Moments
from flwr_cloned_kd.engine.inputs import Dataset, FiniteViews
from flwr_cloned_kd.engine.losses import Batch, Loss
from flwr_cloned_kd.engine.runtime import plan, settings
from flwr_cloned_kd.io.checkpoint import write_atomically
from flwr_cloned_kd.paper.statistics import spread

BASELINE = "baseline"
DEPTH = 8
NUM_PARTS = 10

Module = TypeVar("Module", bound=nn.Module)
Schedule = Callable[[float], float]
Edit = Callable[[nn.Module, torch.Generator], None]
"""(model, generator) -> None; changes the model in place."""
Results = dict[str, dict[str, Any]]
"""Name of a row -> its description and its measurements, as in the JSON file."""


@dataclass(frozen=True, kw_only=True)
class OwnLoop:
    """Options that a `Recipe` does not have; with the defaults, the loop trains as `fit` does.

    Args:
        nesterov: use Nesterov momentum.
        decay_all: False: no weight decay for tensors of one axis (batch normalisation, biases).
        drop_last: leave out the smaller last batch of an epoch.
    """

    nesterov: bool = False
    decay_all: bool = True
    drop_last: bool = False


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to run Phase 0.

    Args:
        recipe: how to train, without the warm-up.
        moments: mean and deviation `[C]` of all training images.
        pixels: mean and deviation `[C]` by which the model standardises.
        edits: applied to the built model in this order.
        loss: what to minimise.
        warm_up: epochs in which the learning rate grows from 0, linearly in the steps.
        bf16: passed to `Runtime`.
        loop: options of `train_alone`. None: train by the library's `fit`.
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
    """One change: how it differs from the baseline, in words and as a function."""

    words: str
    change: Change


def with_fields(**fields: Any) -> Change:
    """Change fields of the trial."""
    return lambda trial: replace(trial, **fields)


def with_recipe(**fields: Any) -> Change:
    """Change fields of the recipe."""
    return lambda trial: replace(trial, recipe=replace(trial.recipe, **fields))


def with_edit(edit: Edit) -> Change:
    """Edit the built model."""
    return lambda trial: replace(trial, edits=(*trial.edits, edit))


def with_modules(kind: type[Module], change: Callable[[Module, torch.Generator], object]) -> Change:
    """Change all modules of a class in the built model."""

    def edit(model: nn.Module, generator: torch.Generator) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                change(module, generator)

    return with_edit(edit)


def with_weights(draw: Callable[..., Tensor]) -> Change:
    """Draw the initial weights of all convolutions by a function of `torch.nn.init`."""
    return with_modules(
        nn.Conv2d, lambda convolution, generator: draw(convolution.weight, generator=generator)
    )


def with_head(factor: float) -> Change:
    """Multiply the initial weights and biases of the last layer."""
    return with_modules(
        nn.Linear, lambda head, _: [tensor.data.mul_(factor) for tensor in head.parameters()]
    )


def with_momentum(momentum: float) -> Change:
    """Set how fast the running statistics of batch normalisation move, in [0, 1]."""
    return with_modules(nn.BatchNorm2d, lambda norm, _: setattr(norm, "momentum", momentum))


def with_loop(**fields: bool) -> Change:
    """Train by `train_alone`, with these options."""
    return lambda trial: replace(trial, loop=replace(trial.loop or OwnLoop(), **fields))


def drops_at(first: float, second: float) -> Schedule:
    """Scale the learning rate by 0.1 after one share of the steps, by 0.01 after another."""
    return lambda progress: 1.0 if progress < first else 0.1 if progress < second else 0.01


def warmed_up(schedule: Schedule, share: float) -> Schedule:
    """Let the learning rate grow from 0 over the first `share` of the steps."""
    return lambda progress: min(1.0, progress / share) * schedule(progress)


@dataclass(frozen=True)
class ReflectedCrop(CropAndFlip):
    """`CropAndFlip` with the same draws, padded by reflection."""

    def view(self, images: Tensor, views: Tensor) -> Tensor:
        """Return view `views[i]` of image i."""
        # `super().view` pads zeros around the reflection; the largest shift does not reach them.
        wide = F.pad(images.float(), (self.pad,) * 4, mode="reflect")
        inner = slice(self.pad, -self.pad)
        return super().view(wide, views)[..., inner, inner]


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanPaddedCrop(CropAndFlip):
    """`CropAndFlip` with the same draws, padded with a colour.

    Args:
        colour: value `[C]` of the padding.
    """

    colour: Tensor

    def view(self, images: Tensor, views: Tensor) -> Tensor:
        """Return view `views[i]` of image i."""
        colour = self.colour.to(images.device)[:, None, None]
        return super().view(images - colour, views) + colour


def pad_with_mean(trial: Trial) -> Trial:
    """Pad with the channels' means, which the model's standardisation maps to zero."""
    augment = MeanPaddedCrop(colour=trial.moments[0])
    return replace(trial, recipe=replace(trial.recipe, augment=augment))


def only_divide(trial: Trial) -> Trial:
    """Divide pixels by 255 and do not subtract their mean."""
    mean = trial.moments[0]
    return replace(trial, pixels=(torch.zeros_like(mean), torch.full_like(mean, 255)))


def standardise_together(trial: Trial) -> Trial:
    """Standardise all channels by one mean and one deviation."""
    mean, deviation = trial.moments
    spread = (deviation.square().mean() + mean.var(correction=0)).sqrt()
    return replace(trial, pixels=(mean.mean().expand_as(mean), spread.expand_as(mean)))


class ProjectingBlock(nn.Module):
    """A residual block with a shortcut that has weights: option B of He et al. 2016.

    Args:
        block: the block of option A; its convolutions and normalisations are used.
        generator: draws the weights of the shortcut.
    """

    def __init__(self, block: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        conv1 = block.get_submodule("conv1")
        if not isinstance(conv1, nn.Conv2d):
            raise TypeError(f"conv1: expected a convolution, got {type(conv1).__name__}")
        self.conv1 = conv1
        self.bn1 = block.get_submodule("bn1")
        self.conv2 = block.get_submodule("conv2")
        self.bn2 = block.get_submodule("bn2")
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
    """Add a convolution to each shortcut that changes the shape: option A becomes option B."""
    blocks = model.get_submodule("blocks")
    for name, block in blocks.named_children():
        conv1 = block.get_submodule("conv1")
        if isinstance(conv1, nn.Conv2d) and conv1.in_channels != conv1.out_channels:
            blocks.add_module(name, ProjectingBlock(block, generator))


def smoothed(amount: float) -> Loss:
    """Return a cross entropy that spreads a share of each label over all classes."""
    return lambda logits, batch: F.cross_entropy(logits, batch.labels, label_smoothing=amount)


ROWS: dict[str, Row] = {
    BASELINE: Row("the library's fit, resnet, Recipe and CropAndFlip", with_fields()),
    "own-loop": Row("the loop of this file, as it stands", with_loop()),
    "float32": Row("no bfloat16", with_fields(bf16=False)),
    # Shortcuts come before initialisations, which thus apply to the new convolutions too.
    "shortcut-B": Row("1x1 convolution and BN on shortcuts", with_edit(project_shortcuts)),
    # PyTorch's default, and He et al. (2015) for the forward pass; ours fit the backward pass.
    "init-uniform": Row(
        "convolutions: kaiming_uniform, a = sqrt 5",
        with_weights(partial(nn.init.kaiming_uniform_, a=math.sqrt(5))),
    ),
    "init-fan-in": Row(
        "convolutions: He normal, fan_in",
        with_weights(partial(nn.init.kaiming_normal_, nonlinearity="relu")),
    ),
    "head-x0.1": Row("last layer's initial weights x0.1", with_head(0.1)),
    "head-zero": Row("last layer's initial weights zero", with_head(0.0)),
    "head-x3": Row("last layer's initial weights x3", with_head(3.0)),
    "bn-0.01": Row("BN momentum 0.01", with_momentum(0.01)),
    "bn-0.3": Row("BN momentum 0.3", with_momentum(0.3)),
    "warm-up": Row("one epoch of warm-up", with_fields(warm_up=1)),
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
    "smooth-0.1": Row("label smoothing 0.1", with_fields(loss=smoothed(0.1))),
}


def parts(name: str) -> list[str]:
    """Split the name of a combination, "cosine+lr-0.2", into rows, in the order of `ROWS`.

    Raises:
        ValueError: for an unknown row.
    """
    names = set(name.split("+"))
    if unknown := names - ROWS.keys():
        raise ValueError(f"row: expected some of {', '.join(ROWS)}, got {', '.join(unknown)}")
    return [row for row in ROWS if row in names]


def words(name: str) -> str:
    """Describe how a row or a combination differs from the baseline."""
    return "; ".join(ROWS[part].words for part in parts(name))


@dataclass(frozen=True)
class Task:
    """One run: a row with one seed."""

    name: str
    seed: int
    epochs: int
    data: str
    device: str


class Measured(NamedTuple):
    """The measurements of a run."""

    accuracy: float
    """On held-out data, a fraction."""
    seconds: float
    device: str


def run(task: Task) -> Measured:
    """Train a first core as the example apps do, and measure it on the held-out data."""
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
    return Measured(float(accuracy(logits, test[1])), seconds, capability(runtime.target))


@lru_cache(maxsize=1)
def _load_once(path: str) -> tuple[Dataset, Dataset, Moments]:
    train, test = load_npz(path)
    return train, test, moments(train[0])


def build(trial: Trial, num_classes: int, *, seed: int) -> nn.Module:
    """Build the model of a trial and apply its edits."""
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
    """Run Phase 0 by the library's `fit` or by `train_alone`."""
    recipe = trial.recipe
    if trial.warm_up:
        schedule = warmed_up(recipe.schedule, trial.warm_up / recipe.epochs)
        recipe = replace(recipe, schedule=schedule)
    if trial.loop is not None:
        return train_alone(
            model, dataset, recipe, trial.loop, loss=trial.loss, seed=seed, runtime=runtime
        )
    start = clone(model.state_dict(), 1)
    trained = fit(model, start, dataset, recipe, loss=trial.loss, seed=seed, runtime=runtime)
    return member(trained, 0)


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
    """Train one model as `fit` does, with the same draws and with the options of the loop."""
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
    decayed = [tensor for tensor in model.parameters() if tensor.dim() > 1 or loop.decay_all]
    spared = [tensor for tensor in model.parameters() if tensor.dim() == 1 and not loop.decay_all]
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


def compare(names: Sequence[str], options: argparse.Namespace) -> Results:
    """Run rows and combinations with seeds 0, 1, ... as the command line says; return all results.

    The file of results is written after every row. A row that is in it already, with the same
    description and at least as many seeds, is not run again.
    """
    path: Path | None = options.json
    results: Results = json.loads(path.read_text()) if path is not None and path.exists() else {}
    described = {
        name: {"words": words(name), "data": Path(options.data).name, "epochs": options.epochs}
        for name in names
    }
    missing = [
        name for name in names if not _is_there(results.get(name), described[name], options.seeds)
    ]
    tasks = [
        Task(name, seed, options.epochs, options.data, options.device)
        for name in missing
        for seed in range(options.seeds)
    ]
    started = time.perf_counter()
    with _mapping(min(options.jobs, len(tasks))) as mapping:
        measured = iter(mapping(tasks))
        for index, name in enumerate(missing, start=1):
            runs = list(islice(measured, options.seeds))
            accuracies = [run.accuracy for run in runs]
            seconds = [run.seconds for run in runs]
            results[name] = {
                **described[name],
                "device": runs[0].device,
                "accuracy": accuracies,
                "seconds": seconds,
            }
            if path is not None:
                write_atomically(path, json.dumps(results, indent=2) + "\n")
            print(
                f"{index} of {len(missing)}, {name}: {fmean(accuracies):.4f}, "
                f"{fmean(seconds):.1f} s a run, {time.perf_counter() - started:.0f} s in all",
                flush=True,
            )
    return results


@contextmanager
def _mapping(jobs: int) -> Iterator[Callable[[Sequence[Task]], Iterator[Measured]]]:
    """Yield a function that runs tasks and yields their measurements in order."""
    if jobs <= 1:
        yield lambda tasks: map(run, tasks)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    # One thread per process: more threads would compete for the same cores.
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        yield lambda tasks: pool.map(run, tasks)


def _is_there(result: Mapping[str, Any] | None, described: dict[str, Any], seeds: int) -> bool:
    if result is None or len(result["accuracy"]) < seeds:
        return False
    return described.items() <= result.items()


def difference(row: Sequence[float], baseline: Sequence[float]) -> str:
    """Return the mean over seeds of row minus baseline ± its standard error, if it has one."""
    differences = [changed - unchanged for changed, unchanged in zip(row, baseline)]
    mean = f"{fmean(differences):+.4f}"
    if len(differences) == 1:
        return mean
    return f"{mean} ± {stdev(differences) / math.sqrt(len(differences)):.4f}"


def show(names: Sequence[str], results: Results, seeds: int) -> Table:
    """Make the table of some rows, with their first seeds."""
    reference = results[BASELINE]
    title = f"Phase 0, {reference['epochs']} epochs, {seeds} seeds: {reference['device']}"
    table = Table(title=title)
    for column in ("row", "how it differs"):
        table.add_column(column)
    for column in ("mean", "sd", "to baseline ± standard error"):
        table.add_column(column, justify="right")
    baseline = reference["accuracy"][:seeds]
    for name in names:
        values = results[name]["accuracy"][:seeds]
        spread = f"{stdev(values):.4f}" if len(values) > 1 else "-"
        mean = f"{fmean(values):.4f}"
        table.add_row(name, results[name]["words"], mean, spread, difference(values, baseline))
    return table


def summary(names: Sequence[str], results: Results) -> dict[str, Any]:
    """Return the mean and the spread of each row over its seeds, for the numbers of a page."""
    return {
        "figure": "phase0",
        "epochs": results[BASELINE]["epochs"],
        "played on": results[BASELINE]["device"],
        "result": {
            name: {"words": results[name]["words"], "accuracy": spread(results[name]["accuracy"])}
            for name in names
        },
    }


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the baseline and the rows of `--only`; print a table."""
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; resumed from")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", help="mean and spread of each row, for docs/results"
    )
    options = parser.parse_args(argv)
    for name in ("seeds", "epochs", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    try:
        requested = ["+".join(parts(name)) for name in options.only or ROWS]
    except ValueError as error:
        parser.error(str(error))
    names = list(dict.fromkeys([BASELINE, *requested]))
    results = compare(names, options)
    Console(width=110).print(show(names, results, options.seeds))
    if options.summary:
        content = json.dumps(summary(names, results), indent=1) + "\n"
        write_atomically(options.summary, content)
    return results


if __name__ == "__main__":
    main()
