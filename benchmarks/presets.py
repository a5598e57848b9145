"""Measure how long one distillation takes, by preset and with or without teachers.

`python -m benchmarks.presets --help`
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import seconds
from flwr_cloned_kd import (
    PRESETS,
    Core,
    CropAndFlip,
    Recipe,
    Runtime,
    digits_cnn,
    fold_in,
    load_digits,
    partition,
    resnet,
    take,
    train_edge,
)
from flwr_cloned_kd.apps.machine import capability
from flwr_cloned_kd.data.datasets import moments
from flwr_cloned_kd.engine.inputs import Dataset
from flwr_cloned_kd.method.state import CoreState

ROUNDS = 3
"""Distillations of a run. The memory is full in the last one, and only the last one is timed."""


def digits() -> tuple[torch.nn.Module, list[Dataset], Recipe]:
    """Return the demo's model, the data of its core and edges, and its recipe."""
    train, _ = load_digits()
    parts = partition(len(train[1]), 10, seed=fold_in(0, "split"))
    return digits_cnn(), [take(train, rows) for rows in parts[: 1 + ROUNDS]], Recipe(epochs=30)


def images() -> tuple[torch.nn.Module, list[Dataset], Recipe]:
    """Return a ResNet-8 and random images of CIFAR's shape, 320 for each party."""
    generator = torch.Generator().manual_seed(0)
    data = list[Dataset]()
    for _ in range(1 + ROUNDS):
        pixels = torch.randint(0, 256, (320, 3, 32, 32), generator=generator, dtype=torch.uint8)
        data.append((pixels, torch.randint(0, 100, (320,), generator=generator)))
    model = resnet(8, 100, pixels=moments(data[0][0]))
    return model, data, Recipe(epochs=8, batch_size=64, augment=CropAndFlip())


SETUPS = {"digits": digits, "images": images}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Time every preset, in turns; print the medians and their ratios to `unselective`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.presets", description=__doc__)
    add = parser.add_argument
    add("--setup", choices=[*SETUPS], nargs="+", default=[*SETUPS], help="(default: both)")
    add("--repeats", type=int, default=5, help="(default: 5)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--json", type=Path, help="save the results")
    options = parser.parse_args(argv)
    runtime = Runtime(device=options.device, bf16=None)
    results: dict[str, Any] = {"hardware": capability(runtime.target), "torch": torch.__version__}
    table = Table(title=f"Seconds of one distillation: {results['hardware']}")
    for column in ("setup", "preset", "median", "all", "of unselective"):
        table.add_column(column, justify="right")
    for setup in options.setup:
        times = measure(setup, options.repeats, runtime)
        results[setup] = times
        base = median(times["unselective"])
        for name, values in times.items():
            numbers = " ".join(f"{value:.2f}" for value in values)
            ratio = f"{median(values) / base:.2f}"
            table.add_row(setup, name, f"{median(values):.2f}", numbers, ratio)
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def measure(setup: str, repeats: int, runtime: Runtime) -> dict[str, list[float]]:
    """Return the seconds of each preset's third distillation, several times and in turns."""
    model, (core_data, *edge_data), recipe = SETUPS[setup]()
    base = Core(model=model, dataset=core_data, recipe=recipe, runtime=runtime)
    first = base.pretrain()
    edges = [
        train_edge(model, first, data, recipe, num_clones=3, seed=index, runtime=runtime)
        for index, data in enumerate(edge_data)
    ]
    presets = {name: make(recipe) for name, make in PRESETS.items()}
    times: dict[str, list[float]] = {name: [] for name in (*presets, "practical, no teachers")}
    for _ in range(repeats):
        for name, values in times.items():
            distillation = presets[name.split(",")[0]]
            weight = 1.0
            if name not in presets:
                distillation = replace(distillation, memory_size=1, core_as_teacher=False)
                weight = 0.0
            core = replace(base, distillation=distillation)
            values.append(_last_round(core, first, edges, weight))
    return times


def _last_round(
    core: Core, first: dict[str, Any], edges: list[dict[str, Any]], weight: float
) -> float:
    state = CoreState(first)
    for edge in edges[:-1]:
        state, _ = core.distill(state, edge, weight=weight)
    return seconds(lambda: core.distill(state, edges[-1], weight=weight), core.runtime.target)


if __name__ == "__main__":
    main()
