"""Measure how much faster a CEM round of the engine is than a textbook implementation of it."""

import argparse
import copy
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.machine import ceilings, demand, peak_bytes, reset_peak, seconds
from flwr_cloned_kd import (
    Recipe,
    Runtime,
    __version__,
    clone,
    crop_and_flip,
    digits_cnn,
    distillation,
    fit,
    load_digits,
    load_npz,
    partition,
    take,
    train_edge,
)
from flwr_cloned_kd.apps.machine import capability
from flwr_cloned_kd.data.datasets import moments
from flwr_cloned_kd.data.models import resnet
from flwr_cloned_kd.engine.inputs import Dataset
from flwr_cloned_kd.engine.runtime import Plan, plan
from flwr_cloned_kd.method.targets import TargetBank, weighted_sum

TEMPERATURE = 4.0
LOAD_START_SECONDS = 5.0
"""Time for a competing process to import PyTorch."""
PHASES = ("phase1", "phase2", "round")
CHOICES = {"auto": None, "on": True, "off": False}


@dataclass(frozen=True)
class Setup:
    """The work of both implementations."""

    model: nn.Module
    """The core."""
    plain_model: nn.Module
    """The core, for images that are standardised already."""
    data: Dataset
    images: reference.Images
    recipe: Recipe
    num_clones: int
    memory_size: int
    device: torch.device


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, save."""
    options = _options().parse_args(argv)
    if options.quick:
        options.samples = 384
        options.epochs = 1
        options.repetitions = 3
    setup = build(options)
    chosen = choose(options, setup)
    console = Console(width=110)
    console.print(f"{capability(setup.device)}; PyTorch {torch.__version__}; {_words(chosen)}")
    runtime = Runtime(**chosen._asdict())
    times, peaks, warm_up_seconds = measure(setup, runtime, options.repetitions, console)
    results = summary(options, setup, chosen, times, peaks)
    if options.load:
        results["load"] = beside_load(setup, runtime, options, results, console)
    results["warm-up-seconds"] = warm_up_seconds
    show(results, console)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    return results


def build(options: argparse.Namespace) -> Setup:
    """Load the data, and build the core with weights that a seed determines."""
    device = Runtime(device=options.device).target
    digits = options.dataset == "digits"
    if digits:
        train = load_digits()[0]
        data = take(train, partition(len(train[1]), 10)[0])
    elif options.dataset == "npz":
        train = load_npz(options.data_path)[0]
        data = take(train, partition(len(train[1]), 10)[0][: options.samples])
    else:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (options.samples, 3, 32, 32), generator=generator)
        data = noise.to(torch.uint8), torch.arange(options.samples) % 100
    num_classes = int(data[1].max()) + 1
    if digits:
        model = plain_model = digits_cnn(num_classes)
        images = reference.Images(*data)
    else:
        depth = int(options.model.partition("-")[2] or 8)
        pixels = moments(data[0])
        model = resnet(depth, num_classes, pixels=pixels)
        plain_model = resnet(depth, num_classes)
        mean, deviation = (moment.tolist() for moment in pixels)
        transform = reference.crop_flip_and_normalise(data[0].shape[-1], mean, deviation)
        images = reference.Images(*data, transform)
    return Setup(
        model=model,
        plain_model=plain_model,
        data=data,
        images=images,
        recipe=Recipe(epochs=options.epochs, augment=None if digits else crop_and_flip),
        num_clones=options.num_clones,
        memory_size=options.memory_size,
        device=device,
    )


def choose(options: argparse.Namespace, setup: Setup) -> Plan:
    """Choose as the options say; for an option "auto" the rules of the engine choose."""
    runtime = Runtime(
        device=options.device,
        bf16=CHOICES[options.bf16],
        compile=CHOICES[options.compile],
        batch_clones=CHOICES[options.batch_clones],
        workers=options.workers,
        cuda_graphs=options.cuda_graphs,
    )
    samples = len(setup.data[1]) * options.epochs * setup.num_clones
    return plan(
        setup.model, setup.data[0], runtime, num_clones=setup.num_clones, num_samples=samples
    )


def measure(
    setup: Setup, runtime: Runtime, repetitions: int, console: Console
) -> tuple[dict[str, list[float]], dict[str, int], float]:
    """Time both, in turns; return seconds per phase, peaks of memory, seconds of the warm-up."""
    started = time.perf_counter()
    engine = Engine(setup, runtime)
    engine.phase1()
    engine.phase2()
    textbook = Textbook(setup)
    warm_up_seconds = time.perf_counter() - started
    console.print(f"Warmed up in {warm_up_seconds:.0f} s; {repetitions} repetitions, in turns:")
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for repetition in range(repetitions):
        for name, side in (("reference", textbook), ("engine", engine)):
            reset_peak(setup.device)
            for phase, call in (("phase1", side.phase1), ("phase2", side.phase2)):
                times.setdefault(f"{name} {phase}", []).append(seconds(call, setup.device))
            peaks[name] = max(peaks.get(name, 0), peak_bytes(setup.device))
            both = times[f"{name} phase1"][-1] + times[f"{name} phase2"][-1]
            times.setdefault(f"{name} round", []).append(both)
        line = [f"{phase} {_ratios(times, phase)[-1]:.2f}x" for phase in PHASES]
        console.print(f"  {repetition + 1} of {repetitions}: {', '.join(line)}")
    return times, peaks, warm_up_seconds


def beside_load(
    setup: Setup,
    runtime: Runtime,
    options: argparse.Namespace,
    results: dict[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Time the engine once more beside processes that keep a processor busy each.

    Returns:
        "processes"; and per phase the median seconds, as "seconds", and the share of the quiet
        speed that is left, as "kept".
    """
    engine = Engine(setup, runtime)
    times: dict[str, list[float]] = {"phase1": [], "phase2": []}
    with competing(options.load):
        for _ in range(options.repetitions):
            times["phase1"].append(seconds(engine.phase1, setup.device))
            times["phase2"].append(seconds(engine.phase2, setup.device))
    loaded = {phase: median(values) for phase, values in times.items()}
    quiet = {phase: median(results["seconds"][f"engine {phase}"]) for phase in times}
    kept = {phase: quiet[phase] / loaded[phase] for phase in times}
    console.print(
        f"Beside {options.load} busy processes: Phase 1 keeps {kept['phase1']:.0%} of its speed, "
        f"Phase 2 {kept['phase2']:.0%}"
    )
    return {"processes": options.load, "seconds": loaded, "kept": kept}


@contextmanager
def competing(num_processes: int) -> Iterator[None]:
    """Run processes that multiply matrices on one thread each."""
    code = "import torch; torch.set_num_threads(1); x = torch.randn(256, 256)\nwhile True: x @ x"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(num_processes)]
    try:
        time.sleep(LOAD_START_SECONDS)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Engine:
    """A round of the engine with a full memory, whose older targets are computed already."""

    def __init__(self, setup: Setup, runtime: Runtime) -> None:
        self._setup = setup
        self._runtime = runtime
        start = setup.model.state_dict()
        self._edges = [clone(start, setup.num_clones) for _ in range(setup.memory_size)]
        self._banks = [self._bank(edge) for edge in self._edges]

    def phase1(self) -> None:
        """Train the clones of an edge."""
        setup = self._setup
        self._edges[-1] = train_edge(
            setup.model,
            setup.model.state_dict(),
            setup.data,
            setup.recipe,
            num_clones=setup.num_clones,
            runtime=self._runtime,
        )

    def phase2(self) -> None:
        """Distil the memory; the targets of the newest ensemble are computed here."""
        setup = self._setup
        self._banks[-1] = self._bank(self._edges[-1])
        fit(
            setup.model,
            clone(setup.model.state_dict(), 1),
            setup.data,
            setup.recipe,
            loss=distillation(TEMPERATURE),
            targets=weighted_sum(self._banks, [1.0] * len(self._banks)),
            view_seed=0,
            runtime=self._runtime,
        )

    def _bank(self, edge: dict[str, Tensor]) -> TargetBank:
        setup = self._setup
        return TargetBank(
            setup.model,
            edge,
            setup.data,
            setup.recipe,
            view_seed=0,
            temperature=TEMPERATURE,
            max_bytes=self._runtime.target_bytes // setup.memory_size,
            runtime=self._runtime,
        )


class Textbook:
    """The same round by `benchmarks.reference`."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        core = setup.plain_model
        self._memory = [
            [copy.deepcopy(core) for _ in range(setup.num_clones)] for _ in range(setup.memory_size)
        ]

    def phase1(self) -> None:
        """Train the clones of an edge."""
        setup = self._setup
        self._memory[-1] = reference.train_clones(
            setup.plain_model,
            setup.images,
            num_clones=setup.num_clones,
            epochs=setup.recipe.epochs,
            device=str(setup.device),
        )

    def phase2(self) -> None:
        """Distil the memory."""
        reference.distill(
            self._setup.plain_model,
            self._memory,
            self._setup.images,
            epochs=self._setup.recipe.epochs,
            temperature=TEMPERATURE,
            device=str(self._setup.device),
        )


def summary(
    options: argparse.Namespace,
    setup: Setup,
    chosen: Plan,
    times: dict[str, list[float]],
    peaks: dict[str, int],
) -> dict[str, Any]:
    """Collect the measurements."""
    num_samples = len(setup.data[1]) * setup.recipe.epochs
    work = {"phase1": setup.num_clones * num_samples, "phase2": num_samples}
    rates = {
        f"{side} {phase}": [count / t for t in times[f"{side} {phase}"]]
        for side in ("reference", "engine")
        for phase, count in work.items()
    }
    ratios = {phase: _ratios(times, phase) for phase in PHASES}
    top = ceilings(setup.device)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": capability(setup.device),
        "versions": {"python": platform.python_version(), "flwr-cloned-kd": __version__}
        | {name: version(name) for name in ("torch", "torchvision")},
        "dataset": options.dataset,
        "model": "digits-cnn" if options.dataset == "digits" else options.model,
        "samples": len(setup.data[1]),
        "epochs": setup.recipe.epochs,
        "num-clones": setup.num_clones,
        "memory-size": setup.memory_size,
        "runtime": chosen._asdict(),
        "seconds": times,
        "samples-per-second": rates,
        "ratios": {phase: median(values) for phase, values in ratios.items()},
        "spread": {phase: [min(values), max(values)] for phase, values in ratios.items()},
        "ceilings": top,
        "shares": shares(setup, chosen, rates, top),
        "peak-megabytes": {name: peak / 2**20 for name, peak in peaks.items()},
    }


def shares(
    setup: Setup, chosen: Plan, rates: dict[str, list[float]], top: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Return the speed of Phase 1 as fractions of the machine's ceilings."""
    fractions = {}
    images = setup.data[0][:128]
    for side, bf16 in (("reference", False), ("engine", chosen.bf16)):
        cost = demand(copy.deepcopy(setup.model), images, bf16=bf16)
        rate = median(rates[f"{side} phase1"])
        peak = top["bfloat16-gflops" if bf16 else "float32-gflops"]
        fractions[side] = {
            "of-multiply-peak": rate * cost["flop"] / 1e9 / peak,
            "of-bandwidth-if-unfused": rate * cost["bytes"] / 1e9 / top["copy-gb-per-s"],
        }
    return fractions


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    title = (
        f"{results['model']}, {results['num-clones']} clones, memory {results['memory-size']}: "
        f"engine against textbook"
    )
    table = Table(title=title)
    for column in ("", "textbook", "engine", "ratio", "spread"):
        table.add_column(column, justify="left" if not column else "right")
    names = ("Phase 1, samples/s", "Phase 2, samples/s", "round, s")
    for phase, name in zip(PHASES, names):
        kind = "seconds" if phase == "round" else "samples-per-second"
        digits = 1 if phase == "round" else 0
        sides = [median(results[kind][f"{side} {phase}"]) for side in ("reference", "engine")]
        low, high = results["spread"][phase]
        numbers = [f"{value:,.{digits}f}" for value in sides]
        ratio = f"{results['ratios'][phase]:.2f}"
        table.add_row(name, *numbers, ratio, f"{low:.2f} to {high:.2f}")
    rows = {
        "of-multiply-peak": "Phase 1, share of the multiply peak",
        "of-bandwidth-if-unfused": "Phase 1, share of bandwidth, if unfused",
    }
    for key, name in rows.items():
        values = [results["shares"][side][key] for side in ("reference", "engine")]
        table.add_row(name, *(f"{value:.0%}" for value in values), "", "")
    peaks = [results["peak-megabytes"][side] for side in ("reference", "engine")]
    table.add_row("peak memory, MB", *(f"{value:,.0f}" for value in peaks), "", "")
    console.print(table)
    top = results["ceilings"]
    console.print(
        f"Ceilings: {top['float32-gflops']:,.0f} GFLOP/s float32, {top['bfloat16-gflops']:,.0f} "
        f"bfloat16, {top['copy-gb-per-s']:.1f} GB/s copy"
    )


def _ratios(times: dict[str, list[float]], phase: str) -> list[float]:
    pairs = zip(times[f"reference {phase}"], times[f"engine {phase}"])
    return [textbook / engine for textbook, engine in pairs]


def _words(chosen: Plan) -> str:
    words = ["bfloat16" if chosen.bf16 else "float32"]
    if chosen.compile:
        words.append("compiled")
    if chosen.cuda_graphs:
        words.append("CUDA graphs")
    in_turn = "clones batched" if chosen.batch_clones else "clones one by one"
    side_by_side = f"{chosen.workers} clones side by side"
    words.append(side_by_side if chosen.workers > 1 else in_turn)
    return ", ".join(words)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description="Time a CEM round of the engine and of a textbook implementation, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add: Callable[..., Any] = parser.add_argument
    add("--dataset", choices=("digits", "synthetic-cifar", "npz"), default="synthetic-cifar")
    add("--data-path", help="the archive of npz")
    add("--model", default="resnet-32", help="resnet-DEPTH; digits always takes digits-cnn")
    add("--samples", type=int, default=1280, help="images of the core and of the edge")
    add("--epochs", type=int, default=2, help="epochs of each timed phase")
    add("--num-clones", type=int, default=3)
    add("--memory-size", type=int, default=3)
    add("--repetitions", type=int, default=5)
    add("--device", default="auto")
    add("--workers", type=int, help="clones that train side by side on a CPU")
    add("--load", type=int, default=0, help="then time the engine beside so many busy processes")
    for name in ("bf16", "compile", "batch-clones"):
        add(f"--{name}", choices=tuple(CHOICES), default="auto")
    add("--cuda-graphs", action="store_true")
    add("--json", metavar="FILE", help="save all measurements")
    add("--quick", action="store_true", help="384 images, 1 epoch, 3 repetitions: under 3 minutes")
    return parser


if __name__ == "__main__":
    main()
