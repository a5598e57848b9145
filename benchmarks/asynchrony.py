"""Measure the virtual time to an accuracy: cloned KD, FedAvg, FedAsync and FedBuff, on digits.

`python -m benchmarks.asynchrony --help`
"""

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from rich.console import Console
from rich.table import Table

from flwr_cloned_kd import (
    ClonedKD,
    Core,
    EdgeClient,
    FedAsync,
    FedBuff,
    LogNormal,
    Recipe,
    VirtualGrid,
    digits_cnn,
    edge_app,
    fold_in,
    load_digits,
    partition,
    practical,
    take,
)
from flwr_cloned_kd.asynchronous.palette import BLUE, ORANGE, PURPLE, VERMILION
from flwr_cloned_kd.io.checkpoint import write_atomically

TRAIN_SECONDS = 60.0
"""Median time of an edge to train one clone."""
SPREAD = 1.0
"""Standard deviation of the logarithm of that time."""
CORE_SECONDS = 20.0
BYTES_PER_SECOND = 100_000.0
GOALS = (0.90, 0.95)
IN_FLIGHT = (1, 2, 4, 8)
STYLES = {
    "cloned KD, 1 in flight": (BLUE, "-"),
    "cloned KD, 2 in flight": (BLUE, "--"),
    "cloned KD, 4 in flight": (BLUE, "-."),
    "cloned KD, 8 in flight": (BLUE, ":"),
    "FedAvg, waits": (VERMILION, "-"),
    "FedAsync, 8 in flight": (PURPLE, "-"),
    "FedBuff, 8 in flight": (ORANGE, "-"),
}

Curve = list[tuple[float, float]]
"""(virtual seconds, accuracy of the global model), with the first core at 0 seconds."""


class Study:
    """The core, the edges and the speeds of a federation, all drawn from one seed."""

    def __init__(self, num_edges: int, seed: int, epochs: int) -> None:
        train, test = load_digits()
        rows = partition(len(train[1]), 10, seed=fold_in(seed, "split"))
        edge_rows = torch.cat(rows[1:])
        self._parts = [
            take(train, edge_rows[part])
            for part in partition(len(edge_rows), num_edges, seed=fold_in(seed, "edges"))
        ]
        self._seed = seed
        self._recipe = Recipe(epochs=epochs)
        self.core = Core(
            model=digits_cnn(seed=fold_in(seed, "model")),
            dataset=take(train, rows[0]),
            recipe=Recipe(epochs=12),
            distillation=practical(self._recipe),
            held_out=test,
            seed=seed,
        )
        self.first = self.core.pretrain()

    def grid(self, num_clones: int, further: float = 0.0) -> VirtualGrid:
        """Make the federation; the time to train is proportional to the number of clones.

        Args:
            further: seconds of the core for each further answer that is distilled together.
        """
        return VirtualGrid(
            [self._edge(index) for index in range(len(self._parts))],
            compute=LogNormal(median=num_clones * TRAIN_SECONDS, sigma=SPREAD),
            down=BYTES_PER_SECOND,
            up=BYTES_PER_SECOND,
            core=CORE_SECONDS,
            further=further,
            seed=self._seed,
        )

    def cloned_kd(
        self, in_flight: int, *, num_clones: int = 3, together: int = 1, further: float = 0.0
    ) -> Curve:
        """Run cloned KD: each edge trains once."""
        strategy = ClonedKD(
            self.core, num_clones=num_clones, max_in_flight=in_flight, max_together=together
        )
        strategy.start(
            self.grid(num_clones, further),
            ArrayRecord(self.first),
            num_rounds=len(self._parts),
            timeout=1e6,
        )
        return self._curve(strategy.history)

    def averaging(
        self, kind: type[FedAsync] | type[FedBuff], answers: int, **options: Any
    ) -> Curve:
        """Run an averaging strategy: edges train repeatedly, eight at a time."""
        strategy = kind(max_in_flight=8, measure=self._measure, **options)
        # The time of an average is negligible against that of a distillation.
        grid = self.grid(1)
        grid.core_seconds = lambda answers: 0.0  # type: ignore[method-assign]
        strategy.start(grid, ArrayRecord(self.first), num_rounds=answers, timeout=1e6)
        return self._curve(strategy.history)

    def fedavg(self, num_rounds: int, per_round: int) -> Curve:
        """Run Flower's FedAvg, which waits for every edge of its round."""
        grid = self.grid(1)
        curve = [(0.0, self._accuracy(self.first))]

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round:
                params = arrays.to_torch_state_dict(keep_input=True)
                curve.append((grid.now(), self._accuracy(params)))
            return None

        strategy = FedAvg(
            fraction_train=per_round / len(self._parts),
            fraction_evaluate=0.0,
            min_train_nodes=per_round,
            min_available_nodes=len(self._parts),
        )
        strategy.start(
            grid,
            ArrayRecord(self.first),
            num_rounds=num_rounds,
            timeout=1e6,
            evaluate_fn=evaluate,
        )
        return curve

    def _edge(self, index: int) -> Callable[..., Any]:
        client = EdgeClient(
            self.core.model,
            self._parts[index],
            self._recipe,
            seed=fold_in(self._seed, "edge", index),
        )
        return edge_app(lambda context: client)

    def _measure(self, params: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"core-accuracy": self._accuracy(params)}

    def _accuracy(self, params: dict[str, torch.Tensor]) -> float:
        return self.core.held_out_accuracy(params) or 0.0

    def _curve(self, rows: Sequence[dict[str, Any]]) -> Curve:
        accepted = [(row["time"], row["core-accuracy"]) for row in rows if row["accepted"]]
        return [(0.0, self._accuracy(self.first)), *accepted]


def runs(num_edges: int) -> dict[str, Callable[[Study], Curve]]:
    """List the runs to compare; an averaging run trains at least as many models as cloned KD."""
    answers = 3 * min(num_edges, 30)
    per_round = min(num_edges, 10)
    cloned_kd: dict[str, Callable[[Study], Curve]] = {
        f"cloned KD, {count} in flight": partial(Study.cloned_kd, in_flight=count)
        for count in IN_FLIGHT
    }
    return cloned_kd | {
        "FedAvg, waits": lambda study: study.fedavg(answers // per_round, per_round),
        "FedAsync, 8 in flight": lambda study: study.averaging(FedAsync, answers),
        "FedBuff, 8 in flight": lambda study: study.averaging(
            FedBuff, answers, buffer_size=3, server_lr=0.5
        ),
    }


def time_to(curve: Curve, goal: float) -> float | None:
    """Return the virtual seconds until a run first reaches an accuracy; None if it never does."""
    return next((time for time, accuracy in curve if accuracy >= goal), None)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the file of results lacks, print a table, draw a picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.asynchrony",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--edges", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30, help="of Phases 1 and 2")
    parser.add_argument(
        "--out", default="results/asynchrony", help="path without its ending; resumed from"
    )
    options = parser.parse_args(argv)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    console = Console(width=110)
    path = Path(f"{options.out}-{options.edges}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    saved: dict[str, Curve] = json.loads(path.read_text()) if path.exists() else {}
    curves: dict[str, list[Curve]] = {name: [] for name in runs(options.edges)}
    for seed in range(options.seeds):
        study = None
        for name, run in runs(options.edges).items():
            key = f"{name}, seed {seed}, {options.epochs} epochs"
            if key not in saved:
                study = study or Study(options.edges, seed, options.epochs)
                saved[key] = run(study)
                write_atomically(path, json.dumps(saved) + "\n")
            seconds, accuracy = saved[key][-1]
            console.print(f"{key}: {accuracy:.3f} at {seconds:,.0f} s")
            curves[name].append(saved[key])
    console.print(table(curves, options.edges))
    draw(curves, options.edges, path.with_suffix(".png"))
    console.print(f"{path} and {path.with_suffix('.png')}")
    return curves


def table(curves: dict[str, list[Curve]], num_edges: int) -> Table:
    """Make the table of the times at which each run reached each goal, one number per seed."""
    rows = Table(title=f"Digits, {num_edges} edges: virtual minutes to an accuracy, per seed")
    for column in ("", *(f"to {goal:.2f}" for goal in GOALS), "answers", "ends at", "with"):
        rows.add_column(column, justify="right" if column else "left")
    for name, seeds in curves.items():
        minutes = []
        for goal in GOALS:
            times = [time_to(curve, goal) for curve in seeds]
            minutes.append(" ".join("-" if time is None else f"{time / 60:.0f}" for time in times))
        ends = " ".join(f"{curve[-1][0] / 60:.0f}" for curve in seeds)
        finals = " ".join(f"{curve[-1][1]:.3f}" for curve in seeds)
        rows.add_row(name, *minutes, str(len(seeds[0]) - 1), ends, finals)
    return rows


def mean_curve(
    seeds: Sequence[Curve], times: Sequence[float]
) -> tuple[list[float], list[float], list[float]]:
    """Return the mean, the lowest and the highest accuracy over seeds at each time."""
    accuracies = [
        [[accuracy for time, accuracy in curve if time <= limit][-1] for curve in seeds]
        for limit in times
    ]
    means = [fmean(values) for values in accuracies]
    return means, [min(values) for values in accuracies], [max(values) for values in accuracies]


def draw(curves: dict[str, list[Curve]], num_edges: int, path: Path) -> None:
    """Draw accuracy over virtual time: left, edges in flight; right, the other strategies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    own = [name for name in curves if name.startswith("cloned KD")]
    others = ["cloned KD, 4 in flight", *(name for name in curves if name not in own)]
    last = max(curve[-1][0] for seeds in curves.values() for curve in seeds)
    times = [last ** (step / 400) for step in range(401)]
    for axes, names in zip(panels, (own, others)):
        for name in names:
            colour, dash = STYLES[name]
            mean, low, high = mean_curve(curves[name], times)
            minutes = [time / 60 for time in times]
            axes.plot(minutes, mean, color=colour, linestyle=dash, linewidth=1.8, label=name)
            if axes is panels[1]:
                axes.fill_between(minutes, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="virtual minutes", xscale="log", ylim=(0.7, 1.0), xlim=(0.2, last / 60))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    panels[0].set_ylabel("accuracy of the global model")
    figure.suptitle(
        f"Digits, {num_edges} edges, log-normal training times: mean of {len(curves[own[0]])} seeds"
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
