"""How long one training step takes, plain and recorded as a CUDA graph.

`python -m benchmarks.steps --help`
"""

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import hardware, seconds
from flwr_cloned_kd import CropAndFlip, Recipe, Runtime, clone, fit, resnet
from flwr_cloned_kd.data.datasets import moments

NUM_IMAGES = 5_000
NUM_CLASSES = 100
BATCHES_PER_EPOCH = 40


def measure(depth: int, num_clones: int, runtime: Runtime, epochs: tuple[int, int]) -> float:
    """Return the milliseconds of one step of all clones: batch 128 of 32x32 images, ResNet.

    A short and a long training are timed, and their difference is divided by the steps between
    them, so that what a training needs once (copies, warm-up, recording) is left out.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_IMAGES, 3, 32, 32)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, NUM_CLASSES, (NUM_IMAGES,), generator=generator)
    model = resnet(depth, NUM_CLASSES, pixels=moments(images))
    start = clone(model.state_dict(), num_clones)

    def train(num_epochs: int) -> None:
        recipe = Recipe(epochs=num_epochs, augment=CropAndFlip())
        fit(model, start, (images, labels), recipe, runtime=runtime)

    train(1)  # libraries load, and cuDNN chooses its algorithms
    short, long = (seconds(lambda n=n: train(n), runtime.target) for n in epochs)  # type: ignore[misc]
    return 1e3 * (long - short) / ((epochs[1] - epochs[0]) * BATCHES_PER_EPOCH)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every combination, print a table, and save it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--depths", type=int, nargs="+", default=[8, 32], help="of ResNets (default: 8 32)")
    add("--clones", type=int, nargs="+", default=[1, 3], help="(default: 1 3)")
    add("--epochs", type=int, nargs=2, default=[3, 10], help="short and long (default: 3 10)")
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
    table = Table(title=f"Milliseconds of a training step: {hardware(plain.target)}")
    for column in ("model", "clones", *kinds):
        table.add_column(column, justify="right")
    for depth, num_clones in product(options.depths, options.clones):
        times = {
            name: measure(depth, num_clones, runtime, (short, long))
            for name, runtime in kinds.items()
        }
        rows.append({"depth": depth, "clones": num_clones, "milliseconds": times})
        table.add_row(
            f"ResNet-{depth}", str(num_clones), *(f"{time:.2f}" for time in times.values())
        )
    Console(width=100).print(table)
    found = {"rows": rows, "hardware": hardware(plain.target), "torch": torch.__version__}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
