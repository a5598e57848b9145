"""Measure how long one training step takes, plain and recorded as a CUDA graph.

`python -m benchmarks.steps --help`
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import seconds
from flwr_cloned_kd import CropAndFlip, Recipe, Runtime, clone, fit, resnet
from flwr_cloned_kd.apps.machine import capability
from flwr_cloned_kd.data.datasets import moments

NUM_IMAGES = 5_000
NUM_CLASSES = 100
BATCH_SIZE = 128


def measure(
    depth: int, num_clones: int, runtime: Runtime, epochs: tuple[int, int], num_images: int
) -> float:
    """Return the milliseconds of one step of all clones: batch 128 of 32x32 images, ResNet.

    The result is the difference of a long and a short training, divided by the difference of their
    numbers of steps. It leaves out the work of a training's start: copies, warm-up, recording.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, 3, 32, 32)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, NUM_CLASSES, (num_images,), generator=generator)
    model = resnet(depth, NUM_CLASSES, pixels=moments(images))
    start = clone(model.state_dict(), num_clones)

    def train(num_epochs: int) -> None:
        recipe = Recipe(epochs=num_epochs, batch_size=BATCH_SIZE, augment=CropAndFlip())
        fit(model, start, (images, labels), recipe, runtime=runtime)

    train(1)  # libraries load, and cuDNN chooses its algorithms
    short, long = (seconds(partial(train, num_epochs), runtime.target) for num_epochs in epochs)
    steps = (epochs[1] - epochs[0]) * math.ceil(num_images / BATCH_SIZE)
    return 1e3 * (long - short) / steps


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every combination, print a table, and save it if `--json` names a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--depths", type=int, nargs="+", default=[8, 32], help="of ResNets (default: 8 32)")
    add("--clones", type=int, nargs="+", default=[1, 3], help="(default: 1 3)")
    add("--epochs", type=int, nargs=2, default=[3, 10], help="short and long (default: 3 10)")
    add("--images", type=int, default=NUM_IMAGES, help=f"in an epoch (default: {NUM_IMAGES})")
    add("--json", type=Path, help="save the results")
    options = parser.parse_args(argv)
    short, long = options.epochs
    if not 0 < short < long:
        parser.error(f"--epochs: expected two numbers, 0 < short < long, got {short} and {long}")
    plain = Runtime(device=options.device, bf16=None, batch_clones=False)
    recorded = Runtime(device=options.device, bf16=None, batch_clones=False, cuda_graphs=True)
    kinds = {"plain": plain}
    if plain.target.type == "cuda":
        kinds["recorded"] = recorded
    rows = []
    table = Table(title=f"Milliseconds of a training step: {capability(plain.target)}")
    for column in ("model", "clones", *kinds):
        table.add_column(column, justify="right")
    for depth, num_clones in product(options.depths, options.clones):
        times = {
            name: measure(depth, num_clones, runtime, (short, long), options.images)
            for name, runtime in kinds.items()
        }
        rows.append({"depth": depth, "clones": num_clones, "milliseconds": times})
        table.add_row(
            f"ResNet-{depth}", str(num_clones), *(f"{time:.2f}" for time in times.values())
        )
    Console(width=100).print(table)
    results = {"rows": rows, "hardware": capability(plain.target), "torch": torch.__version__}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
