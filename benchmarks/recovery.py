"""Measure what an edge of one class costs a core, by the number of epochs of Phase 2.

The student may start from a model that classifies only a part of what the core did: by default at
least half, see `retained`. Phase 2 trains it from there, and a short Phase 2 may end before it has
recovered. The core of this benchmark learns from honest edges first. Then each class in turn is
the only class of the next edge. `python -m benchmarks.recovery --help`
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from flwr_cloned_kd import (
    Core,
    Recipe,
    Runtime,
    digits_cnn,
    edge_seed,
    fold_in,
    load_digits,
    partition,
    practical,
    retained,
    take,
    train_edge,
)
from flwr_cloned_kd.apps.machine import capability

NUM_CLASSES = 10
NUM_HONEST = 4
"""Honest edges before the edge of one class."""
EDGE_RECIPE = Recipe(epochs=30)


class Round(NamedTuple):
    """What one edge of one class did."""

    change: float
    """Held-out accuracy of the distilled core minus that before the round, a fraction."""
    accepted: bool
    """Whether the default guard accepted the edge; if not, the core stays as it was."""
    num_steps: int
    """Training steps of Phase 2."""


def play(epochs: int, min_retained: float, seed: int) -> list[Round]:
    """Let a core with so many epochs of Phase 2 learn from an edge of each class, in turn."""
    train, test = load_digits()
    parts = partition(len(train[1]), 10, seed=fold_in(seed, "split"))
    recipe = Recipe(epochs=epochs)
    core = Core(
        model=digits_cnn(seed=fold_in(seed, "model")),
        dataset=take(train, parts[0]),
        recipe=Recipe(epochs=12),
        distillation=replace(
            practical(recipe), student_start=partial(retained, min_retained=min_retained)
        ),
        held_out=test,
        seed=seed,
    )
    state = core.state(core.pretrain())
    metrics: dict[str, Any] = {}
    for server_round in range(1, NUM_HONEST + 1):
        data = take(train, parts[server_round])
        edge = train_edge(
            core.model, state.params, data, EDGE_RECIPE, seed=edge_seed(seed, server_round)
        )
        state, metrics = core.distill(state, edge)
    before = metrics["core-accuracy"]
    rounds = []
    for label in range(NUM_CLASSES):
        rows = (train[1] == label).nonzero().flatten()[: len(parts[0])]
        edge = train_edge(
            core.model,
            state.params,
            take(train, rows),
            EDGE_RECIPE,
            seed=edge_seed(seed, NUM_HONEST + 1 + label),
        )
        _, metrics = core.distill(state, edge)
        change = metrics["core-accuracy"] - before
        rounds.append(Round(change, bool(metrics["accepted"]), recipe.num_steps(len(parts[0]))))
    return rounds


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Play every number of epochs with every seed; print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    add = parser.add_argument
    add("--epochs", type=int, nargs="+", default=[2, 5, 10, 30], help="(default: 2 5 10 30)")
    add(
        "--min-retained",
        type=float,
        nargs="+",
        default=[0.5, 0.8],
        help="part of what the core knew that the student's start keeps (default: 0.5 0.8)",
    )
    add("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    add("--json", type=Path, help="save the results")
    options = parser.parse_args(argv)
    table = Table(title="Digits: points that an edge of one class adds to the core")
    columns = ("epochs of Phase 2", "steps", "start keeps", "worst", "worst accepted")
    for column in (*columns, "mean accepted", "refused"):
        table.add_column(column, justify="right")
    results: dict[str, Any] = {"hardware": capability(Runtime().target)}
    for epochs, min_retained in product(options.epochs, options.min_retained):
        name = f"{epochs} epochs, start keeps {min_retained:g}"
        seeds = track(range(options.seeds), name)
        rounds = [one for seed in seeds for one in play(epochs, min_retained, seed)]
        accepted = [one.change for one in rounds if one.accepted] or [nan]
        numbers = [min(one.change for one in rounds), min(accepted), fmean(accepted)]
        table.add_row(
            str(epochs),
            str(rounds[0].num_steps),
            f"{min_retained:g}",
            *(f"{100 * number:+.1f}" for number in numbers),
            f"{sum(not one.accepted for one in rounds)} of {len(rounds)}",
        )
        results[name] = [one._asdict() for one in rounds]
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
