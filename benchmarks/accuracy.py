"""Check on digits, over seeds, that the switches of `Runtime` do not change the accuracy.

`python -m benchmarks.accuracy --help`
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
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
    take,
    train_edge,
)
from flwr_cloned_kd.apps.machine import capability

RUNTIMES = {
    "plain: one by one, no kept targets": Runtime(batch_clones=False, target_bytes=0),
    "kept targets": Runtime(batch_clones=False),
    "batched clones": Runtime(batch_clones=True, target_bytes=0),
    "batched, kept": Runtime(batch_clones=True),
    "the rules' choice": Runtime(bf16=None, compile=None),
    "bfloat16, batched, kept": Runtime(bf16=True, batch_clones=True),
    "bfloat16, compiled, kept": Runtime(bf16=True, compile=True, batch_clones=False),
}


def run(runtime: Runtime, *, seed: int, num_edges: int, epochs: int) -> tuple[float, float]:
    """Run Algorithm 1 on digits, CEM with the practical preset; return (accuracy, seconds)."""
    train, test = load_digits()
    parts = partition(len(train[1]), 10, seed=fold_in(seed, "split"))
    recipe = Recipe(epochs=epochs)
    core = Core(
        model=digits_cnn(seed=fold_in(seed, "model")),
        dataset=take(train, parts[0]),
        recipe=Recipe(epochs=12),
        distillation=practical(recipe),
        held_out=test,
        seed=seed,
        runtime=runtime,
    )
    started = time.perf_counter()
    state = core.state(core.pretrain())
    for server_round, rows in enumerate(parts[1 : 1 + num_edges], start=1):
        edge = train_edge(
            core.model,
            state.params,
            take(train, rows),
            recipe,
            seed=edge_seed(seed, server_round),
            runtime=runtime,
        )
        state, metrics = core.distill(state, edge)
    return metrics["core-accuracy"], time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run every choice of `RUNTIMES` with every seed, in turns; print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--edges", type=int, default=9, choices=range(1, 10), metavar="1..9")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    console = Console(width=110)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in RUNTIMES}
    for seed in range(options.seeds):
        for name, runtime in RUNTIMES.items():
            accuracy, seconds = run(
                runtime, seed=seed, num_edges=options.edges, epochs=options.epochs
            )
            results[name].append((accuracy, seconds))
            console.print(f"seed {seed}, {name}: {accuracy:.3f} in {seconds:.0f} s")
    device = capability(Runtime().target)
    table = Table(title=f"Digits, CEM practical, {options.edges} edges: {device}")
    for column in ("runtime", "core accuracy, per seed", "mean", "seconds, mean"):
        table.add_column(column)
    for name, pairs in results.items():
        accuracies, seconds_of_runs = zip(*pairs)
        numbers = " ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        table.add_row(name, numbers, f"{fmean(accuracies):.3f}", f"{fmean(seconds_of_runs):.0f}")
    console.print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
