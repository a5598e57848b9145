"""Check a GPU in one command.

The checks, in their order:
  ceilings   matrix products and a large copy
  equality   every path on the GPU against the CPU (tests/engine, those marked gpu)
  engine-*   the engine against the textbook, with one choice of switches each (benchmarks.engine)
  steps      a training step, plain and recorded as a CUDA graph (benchmarks.steps)
  round      one CEM round of the paper's schedule, without Phase 0
  flower     `flwr run` with four clients that share the GPU (examples/run.py)
  full       Phase 0 and nine CEM rounds (flwr_cloned_kd.paper); the same command resumes it

Each check is a process of its own, with its output in FOLDER/CHECK.log. The results are saved after
every check. The exit status is 0 if no check failed.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch

from benchmarks.checks import ROOT, Check, Numbers, do_all
from benchmarks.machine import ceilings, peak_bytes, reset_peak
from flwr_cloned_kd import CoreState, take, train_edge
from flwr_cloned_kd.apps import build
from flwr_cloned_kd.apps.machine import hardware, versions
from flwr_cloned_kd.io.checkpoint import write_atomically
from flwr_cloned_kd.paper.__main__ import base_settings, parser

SWITCHES = {
    "auto": "",
    "recorded": "--cuda-graphs",
    "float32": "--bf16 off",
    "bfloat16": "--bf16 on --batch-clones off",
    "batched": "--batch-clones on --bf16 off",
    "compiled": "--compile on --batch-clones off",
    "compiled-recorded": "--compile on --batch-clones off --cuda-graphs",
}
"""Options of `benchmarks.engine`."""
FAST = ("auto", "recorded")
"""Choices of switches with which a GPU must be at least as fast as the textbook."""
APP = (
    "dataset='npz' model='resnet-8' augment='crop-and-flip' max-in-flight=4 core-epochs=2 "
    "edge-epochs=2 distill-epochs=2 device='cuda' client-device='cuda' cuda-graphs=true"
)
"""The run-config of the app that `flwr run` runs."""


class Work(NamedTuple):
    """The amount of work: options of the commands, and (number, side, classes) of the images."""

    engine: str
    steps: str
    paper: str
    images: tuple[int, int, int]


WORK = {
    "cuda": Work(
        engine="--samples 1280 --epochs 4 --repetitions 3",
        steps="",
        paper="--schedule full --cuda-graphs",
        images=(50_000, 32, 100),
    ),
    "cpu": Work(
        engine="--model resnet-8 --samples 16 --epochs 1 --repetitions 1",
        steps="--depths 8 --clones 1 --epochs 1 2 --images 128",
        paper="--model resnet-8 --epochs 1 --num-edges 2",
        images=(96, 8, 4),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do the checks in turn; return 0 if none failed."""
    command = _parser()
    options = command.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        command.error("--device: expected a GPU, got none; --device cpu does tiny checks")
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    archive = options.data.absolute() if options.data else folder / "synthetic.npz"
    checks = {check.name: check for check in all_checks(options.device, archive, folder)}
    if unknown := set(options.only) - checks.keys():
        command.error(f"--only: expected some of {', '.join(checks)}, got {', '.join(unknown)}")
    if not options.data:
        write_synthetic(archive, *WORK[options.device].images)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(torch.device(options.device)),
        "versions": versions(),
        "data": archive.name,
    }
    chosen = [check for name, check in checks.items() if name in (options.only or checks)]
    return do_all(chosen, 60 * options.minutes, folder, options.json or folder / "gpu.json", facts)


def all_checks(device: str, archive: Path, folder: Path) -> list[Check]:
    """List the checks in their order.

    Args:
        archive: the images of the checks "round", "flower" and "full".
        folder: absolute; gets what the commands write.
    """
    work = WORK[device]
    needs_gpu = "" if device == "cuda" else "needs a GPU"

    def timed(name: str, module: str, words: str, read: Callable[[Path], Numbers]) -> Check:
        output = folder / f"{name}.json"
        options = ["--device", device, *words.split(), "--json", str(output)]
        missing = "" if name in ("engine-auto", "steps") else needs_gpu
        return Check(name, [sys.executable, "-m", module, *options], output, read, missing)

    def called(name: str, function: Callable[..., None], *arguments: str) -> Check:
        output = folder / f"{name}.json"
        code = f"import sys; from benchmarks import gpu; gpu.{function.__name__}(*sys.argv[1:])"
        command = [sys.executable, "-c", code, str(output), *arguments]
        return Check(name, command, output, read_numbers)

    results = folder / "equality.xml"
    tests = ["pytest", "-m", "gpu", "tests/engine", f"--junitxml={results}"]
    data = ["--dataset", "npz", "--data-path", str(archive), "--device", device]
    paper = [*data, "--out", str(folder / "full"), *work.paper.split()]
    figure = ["flwr_cloned_kd.paper", "fig5", "--rows", "CEM", "--seeds", "1", *paper]
    config = f"{APP} data-path='{archive}'"
    clients = ["--num-edges", "4", "--num-gpus", "0.25", "--results", str(folder / "flower")]
    runner = [sys.executable, str(ROOT / "examples" / "run.py"), "quickstart_digits"]
    modules = [sys.executable, "-m"]
    return [
        called("ceilings", measure_ceilings, device),
        Check("equality", [*modules, *tests], results, read_tests, needs_gpu or lacking("pytest")),
        *(
            timed(
                f"engine-{name}",
                "benchmarks.engine",
                f"{work.engine} {switches}",
                partial(read_engine, least=float(name in FAST and not needs_gpu)),
            )
            for name, switches in SWITCHES.items()
        ),
        timed("steps", "benchmarks.steps", work.steps, read_steps),
        called("round", play_round, "fig5", *paper),
        Check(
            "flower",
            [*runner, *clients, "--run-config", config],
            folder / "flower",
            read_flower,
            needs_gpu or lacking("ray", "psutil"),
        ),
        Check("full", [*modules, *figure], folder / "full" / "fig5.json", read_full, resumes=True),
    ]


def lacking(*modules: str) -> str:
    """Name the modules that are not installed; empty if all are."""
    names = ", ".join(name for name in modules if find_spec(name) is None)
    return f"needs {names}" if names else ""


def write_synthetic(path: Path, num_images: int, side: int, num_classes: int) -> None:
    """Write images that a network can learn: a coarse pattern for each class, and noise."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(128, size=(num_classes, 4, 4, 3), dtype=np.uint8)
    patterns = patterns.repeat(side // 4, axis=1).repeat(side // 4, axis=2)
    arrays: dict[str, Any] = {}
    for part, count in (("train", num_images), ("test", num_images // 5)):
        labels = np.arange(count) % num_classes
        noise = generator.integers(128, size=(count, side, side, 3), dtype=np.uint8)
        arrays |= {f"x_{part}": patterns[labels] + noise, f"y_{part}": labels}
    np.savez(path, **arrays)


def measure_ceilings(path: str, device: str) -> None:
    """Write what the machine can do; for a process of its own."""
    write_atomically(Path(path), json.dumps(ceilings(torch.device(device))))


def play_round(path: str, *arguments: str) -> None:
    """Train three clones of an untrained core, distil them, and write how long that took.

    Args:
        arguments: as of `flwr_cloned_kd.paper`.

    Raises:
        ValueError: if a core that a GPU trained is not twice as good as chance.
    """
    settings = replace(base_settings(parser().parse_args(arguments)), preset="paper")
    core = build.build_core(settings)
    train, _ = build.load(settings)
    data = take(train, build.split(settings, train[1])[1])
    state = CoreState(core.model.state_dict())
    reset_peak(core.runtime.target)
    started = time.perf_counter()
    recipe = build.edge_recipe(settings, 0)
    clones = train_edge(core.model, state.params, data, recipe, runtime=core.runtime)
    trained = time.perf_counter()
    _, metrics = core.distill(state, clones)
    numbers = {
        "phase1-seconds": trained - started,
        "phase2-seconds": time.perf_counter() - trained,
        "peak-megabytes": peak_bytes(core.runtime.target) / 2**20,
        "core-accuracy": metrics["core-accuracy"],
        "edge-accuracy": metrics["edge-accuracy"],
    }
    write_atomically(Path(path), json.dumps(numbers))
    least = 2 / (1 + int(train[1].max()))
    if settings.device == "cuda" and metrics["core-accuracy"] < least:
        got = metrics["core-accuracy"]
        raise ValueError(f"core-accuracy: expected at least {least:.3f}, got {got:.3f}")


def read_numbers(path: Path) -> Numbers:
    """Read numbers by their names."""
    numbers: Numbers = json.loads(path.read_text())
    return numbers


def read_tests(path: Path) -> Numbers:
    """Count the tests of a JUnit file; only skipped tests are an error."""
    suite = ElementTree.parse(path).getroot()[0].attrib
    numbers = {name: float(suite[name]) for name in ("tests", "skipped")}
    if numbers["tests"] == numbers["skipped"]:
        raise ValueError(f"equality: expected a test that runs, got {suite['skipped']} skipped")
    return numbers


def read_engine(path: Path, least: float = 0.0) -> Numbers:
    """Read how many times as fast as the textbook the engine is; below `least` is an error."""
    results = json.loads(path.read_text())
    if results["ratios"]["round"] < least:
        got = f"{results['ratios']['round']:.2f}"
        raise ValueError(f"ratio of a round: expected at least {least}, got {got}")
    return {**results["ratios"], "warm-up-seconds": results["warm-up-seconds"]}


def read_steps(path: Path) -> Numbers:
    """Read milliseconds; a recorded step that takes longer than a plain one is an error."""
    numbers: Numbers = {}
    for row in json.loads(path.read_text())["rows"]:
        model = f"ResNet-{row['depth']} x {row['clones']}"
        times = row["milliseconds"]
        if "recorded" in times and times["recorded"] > times["plain"]:
            limit = f"{times['plain']:.2f} ms"
            raise ValueError(f"{model}: expected at most {limit}, got {times['recorded']:.2f} ms")
        numbers |= {f"{model} {kind}": value for kind, value in times.items()}
    return numbers


def read_flower(folder: Path) -> Numbers:
    """Read the accuracies of the latest run in a folder."""
    path = max(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    summary = json.loads(path.read_text())
    return {name: summary[name] for name in ("first_core_accuracy", "final_core_accuracy")}


def read_full(path: Path) -> Numbers:
    """Read the accuracies of the first and the last core."""
    row = json.loads(path.read_text())["result"]["CEM"]
    return {"first core": row["core"]["mean"][0], "last core": row["final"]["mean"]}


def _parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add: Callable[..., Any] = command.add_argument
    add("--device", choices=[*WORK], default="cuda", help="cpu tries tiny sizes (default: cuda)")
    add("--minutes", type=float, default=20, help="for all checks together (default: 20)")
    add("--only", nargs="+", default=[], metavar="CHECK", help="these checks only")
    add("--data", type=Path, metavar="NPZ", help="images to train on (default: synthetic ones)")
    add("--folder", type=Path, default=Path("results/gpu"), help="(default: ./results/gpu)")
    add("--json", type=Path, metavar="FILE", help="the results (default: FOLDER/gpu.json)")
    return command


if __name__ == "__main__":
    sys.exit(main())
