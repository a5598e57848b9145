"""Cloned KD beside FedAvg at equal bytes: what the small example apps share."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from ..engine.counts import check_count
from ..engine.ensemble import StateDict
from ..flower.cloned_kd import ClonedKD
from ..method.core import Core
from .plots import draw_accuracy

Row = dict[str, Any]


def read_counts(config: Mapping[str, Any], *keys: str) -> list[int]:
    """Return the values of some keys of a run-config, which are counts or a seed.

    Raises:
        ValueError: naming the key and what was expected, for a value that is no integer or below 0.
        KeyError: for a key that the run-config does not have.
    """
    for key in keys:
        check_count(f"run-config {key}", config[key], minimum=0)
    return [int(config[key]) for key in keys]


def compare(
    core: Core, grid: Grid, *, num_clones: int, num_edges: int, folder: str = ""
) -> dict[str, float]:
    """Run cloned KD with every edge once, then FedAvg from the same first core for as many bytes.

    The results folder gets "rounds.jsonl", one line per round, and the picture "accuracy.png".

    Args:
        core: with held-out data.
        num_edges: number of clients, which are all online.
        folder: the results folder; "" is "results" in the current folder.

    Returns:
        The accuracy on held-out data of the "first core", and after the last round of "cloned-kd"
        and "fedavg"; fractions in [0, 1].
    """
    first = core.pretrain()
    cloned: list[Row] = []
    strategy = ClonedKD(core, num_clones=num_clones, on_round=cloned.append)
    strategy.start(grid, ArrayRecord(first), num_rounds=num_edges)
    budget = sum(row["bytes-down"] + row["bytes-up"] for row in cloned)
    runs = {"cloned-kd": cloned, "fedavg": _fedavg(core, grid, first, num_edges, budget)}
    accuracies = {"first core": core.held_out_accuracy(first) or 0.0}
    print(f"first core: accuracy {accuracies['first core']:.3f}")
    for name, run in runs.items():
        accepted = [row["core-accuracy"] for row in run if row["accepted"]]
        accuracies[name] = accepted[-1] if accepted else accuracies["first core"]
        megabytes = sum(row["bytes-down"] + row["bytes-up"] for row in run) / 1e6
        print(
            f"{name}: accuracy {accuracies[name]:.3f} after {len(run)} rounds "
            f"and {megabytes:.2f} MB"
        )
    _write(runs, accuracies["first core"], Path(folder or "results").absolute())
    return accuracies


def _fedavg(core: Core, grid: Grid, first: StateDict, num_edges: int, budget: int) -> list[Row]:
    """Run Flower's FedAvg until it has exchanged `budget` bytes, to the nearest round."""
    num_bytes = num_edges * sum(len(array.data) for array in ArrayRecord(first).values())
    rows: list[Row] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        accuracy = core.held_out_accuracy(arrays.to_torch_state_dict(keep_input=True)) or 0.0
        row = {"round": server_round, "accepted": True, "core-accuracy": accuracy}
        if server_round:
            rows.append(row | {"bytes-down": num_bytes, "bytes-up": num_bytes})
        return MetricRecord({"accuracy": accuracy})

    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=num_edges, min_available_nodes=num_edges
    )
    num_rounds = max(1, round(budget / (2 * num_bytes)))
    strategy.start(grid, ArrayRecord(first), num_rounds=num_rounds, evaluate_fn=evaluate)
    return rows


def _write(runs: dict[str, list[Row]], first: float, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"strategy": name} | row for name, run in runs.items() for row in run]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_accuracy(rows, first, folder / "accuracy.png")
    print(f"Results: {folder}")
