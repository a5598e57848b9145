"""Measure what it costs and what it brings to distil several waiting answers in one Phase 2.

`python -m benchmarks.together --help`

First the processor seconds of one distillation with k new ensembles, on this machine. Then a
federation in virtual time whose answers arrive faster than the core can learn from one after the
other: digits, edges that train for a log-normal time (median 60 s), a core that needs 20 s for one
answer, and for each further answer the share of 20 s that was measured.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.asynchrony import CORE_SECONDS, Curve, Study
from flwr_cloned_kd import CoreState, clone, fold_in, initialise
from flwr_cloned_kd.io.checkpoint import write_atomically
from flwr_cloned_kd.method.results import EdgeResult

TOGETHER = (1, 2, 4, 8)


def seconds_of(study: Study, num_clones: int, repetitions: int) -> dict[int, float]:
    """Return the median processor seconds of a distillation with k new ensembles."""
    core = study.core
    memory_size = core.distillation.memory_size
    edges = [
        clone(initialise(core.model, fold_in(0, "edge", index)), num_clones)
        for index in range(memory_size - 1 + max(TOGETHER))
    ]
    state = CoreState(study.first, tuple(edges[: memory_size - 1]))
    seconds: dict[int, list[float]] = {count: [] for count in TOGETHER}
    for _ in range(1 + repetitions):  # the first one warms up and fills the kept targets
        for count in TOGETHER:
            new = edges[memory_size - 1 :][:count]
            began = time.process_time()
            core.distill_all(state, [EdgeResult(dict(edge)) for edge in new])
            seconds[count].append(time.process_time() - began)
            core.distill_all(state, [EdgeResult(edges[0])])  # keeps the targets of the memory
    return {count: median(times[1:]) for count, times in seconds.items()}


def further_share(seconds: dict[int, float]) -> float:
    """Return what each further answer adds, as a share of the time of one answer."""
    most = max(seconds)
    return max(0.0, seconds[most] / seconds[1] - 1) / (most - 1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the cost, then play what the file of results lacks, and print both tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.together",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--edges", type=int, default=32)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--clones", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30, help="of Phases 1 and 2")
    parser.add_argument("--repetitions", type=int, default=3, help="of the timed distillations")
    parser.add_argument("--json", default="results/together.json", help="resumed from")
    options = parser.parse_args(argv)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    console = Console(width=110)
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    settings = {
        name: value
        for name, value in vars(options).items()
        if name not in ("json", "seeds", "repetitions")
    }
    if saved.get("settings", settings) != settings:
        parser.error(f"--json: expected a file with {settings}, got {saved['settings']}")
    saved.setdefault("settings", settings)
    saved.setdefault("curves", {})
    studies = {seed: Study(options.edges, seed, options.epochs) for seed in range(options.seeds)}
    if "seconds" not in saved:
        seconds = seconds_of(studies[0], options.clones, options.repetitions)
        saved["seconds"] = {str(count): value for count, value in seconds.items()}
    share = further_share({int(count): value for count, value in saved["seconds"].items()})
    saved["further-share"] = share
    for seed, study in studies.items():
        for count in TOGETHER:
            key = f"{count} together, seed {seed}"
            if key not in saved["curves"]:
                saved["curves"][key] = study.cloned_kd(
                    options.in_flight,
                    num_clones=options.clones,
                    together=count,
                    further=share * CORE_SECONDS,
                )
                write_atomically(path, json.dumps(saved, indent=1) + "\n")
            minutes, accuracy = saved["curves"][key][-1]
            console.print(f"{key}: {accuracy:.3f} at {minutes / 60:.0f} virtual minutes")
    console.print(cost_table(saved["seconds"]))
    console.print(table(saved["curves"], options.seeds, options.edges))
    return saved


def cost_table(seconds: dict[str, float]) -> Table:
    """Make the table of the measured seconds."""
    rows = Table(title="One Phase 2 with k new ensembles")
    for column in ("k", "seconds", "of k = 1", "seconds per answer"):
        rows.add_column(column, justify="right")
    for count, value in seconds.items():
        ratio = value / seconds["1"]
        rows.add_row(count, f"{value:.2f}", f"{ratio:.2f}", f"{value / int(count):.2f}")
    return rows


def table(curves: dict[str, Curve], num_seeds: int, num_edges: int) -> Table:
    """Make the table of answers per virtual hour and accuracies, with the mean over seeds."""
    rows = Table(title=f"Digits, {num_edges} edges in virtual time, {num_seeds} seeds")
    for column in ("together", "answers per hour", "accuracy, per seed", "mean", "minus 1"):
        rows.add_column(column, justify="right")
    finals: dict[int, list[float]] = {}
    for count in TOGETHER:
        seeds = [curves[f"{count} together, seed {seed}"] for seed in range(num_seeds)]
        finals[count] = [curve[-1][1] for curve in seeds]
        rates = [3600 * (len(curve) - 1) / curve[-1][0] for curve in seeds]
        differences = [final - one for final, one in zip(finals[count], finals[TOGETHER[0]])]
        spread = f" (sd {stdev(differences):.3f})" if num_seeds > 1 and count > 1 else ""
        rows.add_row(
            str(count),
            f"{fmean(rates):.0f}",
            " ".join(f"{final:.3f}" for final in finals[count]),
            f"{fmean(finals[count]):.3f}",
            f"{fmean(differences):+.3f}{spread}" if count > 1 else "",
        )
    return rows


if __name__ == "__main__":
    main()
