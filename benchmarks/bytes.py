"""Measure what smaller numbers on the wire save, and what they cost in accuracy.

`python -m benchmarks.bytes --help`
"""

import argparse
import importlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flwr_cloned_kd import Runtime
from flwr_cloned_kd.apps.machine import capability
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.engine.ensemble import Ensemble, StateDict
from flwr_cloned_kd.io.checkpoint import write_atomically
from flwr_cloned_kd.io.wire import WIRE_DTYPES, encode_reply
from flwr_cloned_kd.paper.rounds import play
from flwr_cloned_kd.paper.run_state import RunState
from flwr_cloned_kd.paper.runs import Run

MEGABYTE = 1e6
CIFAR: dict[str, Any] = {
    "dataset": "npz",
    "model": "resnet-8",
    "core_epochs": 12,
    "edge_epochs": 4,
    "distill_epochs": 4,
    "augment": "crop-and-flip",
}
"""CIFAR-100 with the short schedule of `python -m flwr_cloned_kd.paper`."""

Compress = Callable[[bytes], bytes]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Play every form of the wire with every seed; print accuracies and bytes."""
    options = _options(argv)
    settings = Settings()
    if options.data:
        settings = Settings(data_path=str(options.data.absolute()), **CIFAR)
    settings = replace(settings, device=options.device, cuda_graphs=options.cuda_graphs)
    if options.epochs:
        epochs = ("core_epochs", "edge_epochs", "distill_epochs")
        settings = replace(settings, **dict.fromkeys(epochs, options.epochs))
    compressor, compress = compression()
    results: dict[str, Any] = {
        "hardware": capability(Runtime(device=options.device).target),
        "torch": torch.__version__,
        "dataset": settings.dataset,
        "compressor": compressor,
        "forms": {form: {"accuracy": [], "down": [], "up": []} for form in options.forms},
    }
    for seed in range(options.seeds):
        for form, measured in results["forms"].items():
            run = Run(settings=replace(settings, seed=seed), wire_dtype=form)
            played = list(play(run))
            records = [record for record, _ in played]
            measured["accuracy"].append(records[-1]["core-accuracy"])
            for way in ("down", "up"):
                measured[way].append(sum(record[f"bytes-{way}"] for record in records))
            if seed == 0 and form == "float32":
                results["compressed"] = compressed([state for _, state in played], compress)
            if options.json:
                write_atomically(options.json, json.dumps(results, indent=1) + "\n")
    Console(width=110).print(accuracy_table(results), *compression_tables(results))
    return results


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytes", description=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="number of seeds, from 0 (default: 5)")
    add("--forms", choices=WIRE_DTYPES, nargs="+", default=[*WIRE_DTYPES], help="(default: all)")
    add("--data", type=Path, help="CIFAR-100 as .npz, ResNet-8, short schedule (default: digits)")
    add("--epochs", type=int, help="epochs of each phase (default: those of the demo)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--cuda-graphs", action="store_true", help="record training steps, on a GPU")
    add("--json", type=Path, help="save the results after every run")
    return parser.parse_args(argv)


def compression() -> tuple[str, Compress]:
    """Return the name of a compressor and its function: zstd if it is installed, else zlib."""
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        return "zlib, level 6", lambda data: zlib.compress(data, 6)
    return "zstd, level 3", zstandard.ZstdCompressor(level=3).compress


def compressed(states: Sequence[RunState], compress: Compress) -> dict[str, list[int]]:
    """Count the bytes of all replies of a run in float32, before and after compression.

    Args:
        states: after each round, Phase 0 included. An edge was sent the core of the round before.

    Returns:
        What travels -> [bytes, bytes after compression].
    """
    sizes: dict[str, list[int]] = {}
    for before, after in pairwise(states):
        for name, tensors in contents(after.core.memory[-1], before.core.params).items():
            data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
            size = sizes.setdefault(name, [0, 0])
            size[0] += len(data)
            size[1] += len(compress(data))
    return sizes


def contents(edge: Ensemble, sent: StateDict) -> dict[str, StateDict]:
    """Return what could travel from an edge: clones, or their differences from the model sent."""
    difference = {
        name: tensor - sent[name] if tensor.is_floating_point() else tensor
        for name, tensor in edge.items()
    }
    tensors: dict[str, StateDict] = {}
    for form in ("float32", "float16", "bfloat16"):
        tensors[f"clones, {form}"] = encode_reply(edge, sent, form)
        tensors[f"differences, {form}"] = encode_reply(difference, sent, form)
    tensors["differences, int8"] = encode_reply(edge, sent, "int8")
    return tensors


def accuracy_table(results: dict[str, Any]) -> Table:
    """Lay out the accuracy and the bytes of every form; differences are paired by seed."""
    forms = results["forms"]
    num_seeds = len(next(iter(forms.values()))["accuracy"])
    table = Table(title=f"{results['dataset']}, {num_seeds} seeds: {results['hardware']}")
    columns = ("form", "accuracy", "sd", "minus float32", "se", "MB down", "MB up", "of float32")
    for column in columns:
        table.add_column(column, justify="right")
    base = forms.get("float32")
    for form, measured in forms.items():
        total = fmean(measured["down"]) + fmean(measured["up"])
        cells = ["", "", ""]
        if base is not None:
            pairs = zip(measured["accuracy"], base["accuracy"])
            mean, deviation = spread([accuracy - reference for accuracy, reference in pairs])
            share = total / (fmean(base["down"]) + fmean(base["up"]))
            cells = [f"{mean:+.4f}", f"{deviation / sqrt(num_seeds):.4f}", f"{share:.2f}"]
        mean, deviation = spread(measured["accuracy"])
        megabytes = [f"{fmean(measured[way]) / MEGABYTE:.3f}" for way in ("down", "up")]
        table.add_row(form, f"{mean:.4f}", f"{deviation:.4f}", *cells[:2], *megabytes, cells[2])
    return table


def compression_tables(results: dict[str, Any]) -> list[Table]:
    """Lay out the sizes of all replies of the run with seed 0, if it was played in float32."""
    if "compressed" not in results:
        return []
    table = Table(title=f"All replies of one run, after {results['compressor']}")
    for column in ("what travels", "MB", "MB compressed", "ratio"):
        table.add_column(column, justify="right")
    for name, (plain, small) in results["compressed"].items():
        megabytes = [f"{size / MEGABYTE:.3f}" for size in (plain, small)]
        table.add_row(name, *megabytes, f"{small / plain:.2f}")
    return [table]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, 0 for one value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
