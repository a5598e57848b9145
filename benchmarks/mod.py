"""Compare `train_clones` around a training loop of one's own with `EdgeClient`, on digits.

Nine edges train three clones each by the same recipe, and the core distils them. The edges differ
in their client apps only; see `CLIENTS`. `python -m benchmarks.mod --help`
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from flwr_cloned_kd import (
    ClonedKD,
    Core,
    Dataset,
    EdgeClient,
    Recipe,
    StateDict,
    VirtualGrid,
    digits_cnn,
    edge_app,
    fold_in,
    load_digits,
    partition,
    practical,
    take,
    train_clones,
)
from flwr_cloned_kd.apps.machine import capability
from flwr_cloned_kd.flower.mods import CallNext, Mod
from flwr_cloned_kd.io.checkpoint import write_atomically

from .bytes import spread

NUM_EDGES = 9
NUM_CLONES = 3
CORE_EPOCHS = 12

Draw = Callable[[Dataset, Recipe, int], Iterator[tuple[Tensor, Tensor]]]
"""(data, recipe, seed) -> the batches of all epochs."""


def by_generator(dataset: Dataset, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw the batches that `fit` draws for one clone from the same seed."""
    inputs, labels = dataset
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        for rows in torch.split(
            torch.randperm(len(labels), generator=generator), recipe.batch_size
        ):
            yield inputs[rows], labels[rows]


def by_loader(dataset: Dataset, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw the batches as most training loops do."""
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(*dataset), recipe.batch_size, shuffle=True)
    for _ in range(recipe.epochs):
        yield from loader


def own_loop(draw: Draw, dataset: Dataset, recipe: Recipe, mods: list[Mod]) -> ClientApp:
    """Make a client app with a loop in plain PyTorch that trains one model."""
    app = ClientApp(mods=mods)
    num_steps = recipe.epochs * math.ceil(len(dataset[1]) / recipe.batch_size)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = digits_cnn()
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        model.train()
        optimiser = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: recipe.schedule(step / num_steps)
        )
        seed = message.content.config_records["config"]["seed"]
        assert isinstance(seed, int)
        for inputs, labels in draw(dataset, recipe, seed):
            optimiser.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        arrays = ArrayRecord(model.state_dict())
        metrics = MetricRecord({"num-examples": len(dataset[1])})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def edge_client(dataset: Dataset, recipe: Recipe, mods: list[Mod]) -> ClientApp:
    """Make a client app of an `EdgeClient`."""
    return edge_app(lambda context: EdgeClient(digits_cnn(), dataset, recipe), mods=mods)


Make = Callable[[Dataset, Recipe, list[Mod]], ClientApp]

REFERENCE = "EdgeClient"
CLIENTS: dict[str, tuple[Make, bool]] = {
    REFERENCE: (edge_client, False),
    "EdgeClient, mod": (edge_client, True),
    "own loop, mod, draws of fit": (
        lambda *arguments: own_loop(by_generator, *arguments),
        True,
    ),
    "own loop, mod, DataLoader": (lambda *arguments: own_loop(by_loader, *arguments), True),
}
"""Kind of client -> the function that makes its app, and whether the app gets `train_clones`."""


def timed(durations: list[float]) -> Mod:
    """Make a client mod that records the CPU seconds of each training.

    Other processes of a shared machine do not change the CPU time much. With one thread it is the
    time that a training takes on a machine of its own.
    """

    def measure(message: Message, context: Context, call_next: CallNext) -> Message:
        started = time.process_time()
        reply = call_next(message, context)
        if message.metadata.message_type == "train":
            durations.append(time.process_time() - started)
        return reply

    return measure


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run every kind of client with every seed; print accuracies and seconds."""
    options = _options(argv)
    torch.set_num_threads(1)
    clients: dict[str, dict[str, list[float]]] = {
        name: {"accuracy": [], "seconds-per-clone": [], "overhead-per-clone": []}
        for name in CLIENTS
    }
    results = {
        "hardware": capability(torch.device("cpu")),
        "torch": torch.__version__,
        "clients": clients,
    }
    for seed in range(options.seeds):
        core, parts, recipe = study(seed, options.epochs)
        first = core.pretrain()
        for name in CLIENTS:
            for key, number in play(name, core, first, parts, recipe).items():
                clients[name][key].append(number)
            if options.json:
                write_atomically(options.json, json.dumps(results, indent=1) + "\n")
    Console(width=130).print(table_of(results))
    return results


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mod", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="number of seeds, from 0 (default: 5)")
    add("--epochs", type=int, default=20, help="of the clones and of Phase 2 (default: 20)")
    add("--json", type=Path, help="save the results after every run")
    return parser.parse_args(argv)


def study(seed: int, epochs: int) -> tuple[Core, list[Dataset], Recipe]:
    """Return the core, the data of the edges, and the recipe of their clones."""
    train, test = load_digits()
    core_rows, *edge_rows = partition(len(train[1]), 1 + NUM_EDGES, seed=fold_in(seed, "split"))
    recipe = Recipe(epochs=epochs)
    core = Core(
        model=digits_cnn(seed=fold_in(seed, "model")),
        dataset=take(train, core_rows),
        recipe=Recipe(epochs=CORE_EPOCHS),
        distillation=practical(recipe),
        held_out=test,
        seed=seed,
    )
    return core, [take(train, rows) for rows in edge_rows], recipe


def play(
    name: str, core: Core, first: StateDict, parts: list[Dataset], recipe: Recipe
) -> dict[str, float]:
    """Run nine rounds with one kind of client.

    Returns:
        The accuracy of the last core, the CPU seconds of the client app per clone, and those that
        the mod takes per clone to copy requests, and to decode, check and stack replies.
    """
    make, with_mod = CLIENTS[name]
    around, inside = list[float](), list[float]()
    mods = [timed(around), *([train_clones()] if with_mod else []), timed(inside)]
    grid = VirtualGrid([make(part, recipe, mods) for part in parts])
    strategy = ClonedKD(core, num_clones=NUM_CLONES)
    strategy.start(grid, ArrayRecord(first), num_rounds=NUM_EDGES, timeout=60)
    accuracy = core.held_out_accuracy(strategy.current.params)
    assert accuracy is not None
    num_clones = NUM_CLONES * NUM_EDGES
    return {
        "accuracy": accuracy,
        "seconds-per-clone": sum(around) / num_clones,
        "overhead-per-clone": (sum(around) - sum(inside)) / num_clones,
    }


def table_of(results: dict[str, Any]) -> Table:
    """Lay out accuracies and seconds; differences to `EdgeClient` are paired by seed."""
    clients = results["clients"]
    base = clients[REFERENCE]["accuracy"]
    table = Table(title=f"digits, {len(base)} seeds: {results['hardware']}")
    for column in ("client", "accuracy per seed", "mean", "sd", "difference", "se"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for column in ("CPU s per clone", "of it the mod, ms"):
        table.add_column(column, justify="right")
    for name, measured in clients.items():
        accuracies = measured["accuracy"]
        mean, deviation = spread(accuracies)
        difference, of_difference = spread([a - b for a, b in zip(accuracies, base)])
        table.add_row(
            name,
            " ".join(f"{accuracy:.3f}" for accuracy in accuracies),
            f"{mean:.4f}",
            f"{deviation:.4f}",
            f"{difference:+.4f}",
            f"{of_difference / sqrt(len(base)):.4f}",
            f"{fmean(measured['seconds-per-clone']):.2f}",
            f"{1000 * fmean(measured['overhead-per-clone']):.1f}",
        )
    return table


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.WARNING)
    main()
