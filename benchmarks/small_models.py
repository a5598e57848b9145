"""Measure the ways to train three clones of a small model: the evidence for the rule of `plan`.

`python -m benchmarks.small_models --help`
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import seconds
from flwr_cloned_kd import Recipe, Runtime, clone, digits_cnn, fit, load_digits, partition, take
from flwr_cloned_kd.apps.machine import capability
from flwr_cloned_kd.engine.ensemble import seeded

NUM_CLONES = 3
WAYS: dict[str, dict[str, Any]] = {
    "one pass": {"batch_clones": True},
    "one by one": {"batch_clones": False, "workers": 1},
    "side by side": {"batch_clones": False, "workers": 2},
}
CONVOLUTIONS = (
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
)
MODELS: dict[str, nn.Module] = {
    "linear": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "perceptron": nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    "two convolutions": nn.Sequential(*CONVOLUTIONS, nn.Flatten(), nn.Linear(128, 10)),
    "digits-cnn": digits_cnn(),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train every model in every way, in turns; print the medians in milliseconds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_models", description=__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--epochs", type=int, default=20, help="of 144 handwritten digits (default: 20)")
    add("--repeats", type=int, default=7, help="(default: 7)")
    add("--json", type=Path, help="save the results")
    options = parser.parse_args(argv)
    train, _ = load_digits()
    data = take(train, partition(len(train[1]), 10)[0])
    recipe = Recipe(epochs=options.epochs)
    runtimes = {way: Runtime(device=options.device, **how) for way, how in WAYS.items()}
    device = runtimes["one pass"].target
    results: dict[str, Any] = {"hardware": capability(device), "torch": torch.__version__}
    table = Table(title=f"Milliseconds of Phase 1, three clones: {results['hardware']}")
    for column in ("model", "parameters", *WAYS):
        table.add_column(column, justify="right")
    for name, model in MODELS.items():
        seeded(model, 0)
        start = clone(model.state_dict(), NUM_CLONES)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.repeats):
            for way, runtime in runtimes.items():
                call = partial(fit, model, start, data, recipe, runtime=runtime)
                times[way].append(1e3 * seconds(call, device))
        results[name] = times
        parameters = sum(parameter.numel() for parameter in model.parameters())
        medians = (f"{median(values):.0f}" for values in times.values())
        table.add_row(name, f"{parameters:,}", *medians)
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
