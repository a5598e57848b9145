"""The strategies that a run compares cloned KD with."""

import time
from functools import partial
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedProx

from ..asynchronous.callbacks import Callbacks, RunStart
from ..baselines.fedasync import FedAsync
from ..baselines.fedbuff import FedBuff
from ..engine.ensemble import StateDict
from ..method.core import Core
from .build import max_staleness, staleness_weight
from .report import Report
from .settings import Settings
from .watch import watchers


def run_baseline(
    name: str, settings: Settings, core: Core, params: StateDict, grid: Grid, report: Report
) -> None:
    """Run one of fedavg, fedprox, fedasync and fedbuff with the edges of cloned KD.

    Args:
        core: measures the models of the baseline on its held-out data.
        params: where the baseline starts: the core's model after Phase 0.
        report: records every round.
    """
    log(INFO, "Baseline: %s", name)
    run = run_asynchronous if name in ("fedasync", "fedbuff") else run_synchronous
    run(name, settings, core, params, grid, report)


def run_asynchronous(
    name: str, settings: Settings, core: Core, params: StateDict, grid: Grid, report: Report
) -> None:
    """Run FedAsync or FedBuff: edges over and over, as many answers as FedAvg has."""
    options: dict[str, Any] = {
        "max_in_flight": settings.max_in_flight,
        "max_staleness": max_staleness(settings),
        "measure": lambda model: {"core-accuracy": core.held_out_accuracy(model) or 0.0},
        "on_round": partial(report.add, name),
        "callbacks": watchers(settings, report.folder, name),
    }
    weight = staleness_weight(settings)
    if weight is not None:
        options["staleness_weight"] = weight
    strategy: FedAsync | FedBuff
    if name == "fedasync":
        strategy = FedAsync(alpha=settings.fedasync_alpha, **options)
    else:
        strategy = FedBuff(
            buffer_size=settings.fedbuff_size, server_lr=settings.fedbuff_lr, **options
        )
    strategy.start(
        grid,
        ArrayRecord(params),
        num_rounds=settings.baseline_rounds * settings.num_edges,
        timeout=settings.timeout,
    )
    report.keep(name, strategy)


def run_synchronous(
    name: str, settings: Settings, core: Core, params: StateDict, grid: Grid, report: Report
) -> None:
    """Run Flower's FedAvg or FedProx: all edges in every round, with the same client app."""
    options: dict[str, Any] = {
        "fraction_evaluate": 0.0,
        "min_train_nodes": settings.num_edges,
        "min_available_nodes": settings.num_edges,
    }
    if name == "fedprox":
        strategy: FedAvg = FedProx(proximal_mu=settings.proximal_mu, **options)
    else:
        strategy = FedAvg(**options)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        accuracy = core.held_out_accuracy(arrays.to_torch_state_dict(keep_input=True)) or 0.0
        if server_round:
            num_bytes = settings.num_edges * sum(len(array.data) for array in arrays.values())
            row = {
                "round": server_round,
                "edge": "all",
                "accepted": 1.0,
                "core-accuracy": accuracy,
                "bytes-down": num_bytes,
                "bytes-up": num_bytes,
            }
            report.add(name, row)
            callbacks.settle(row)
        return MetricRecord({"core-accuracy": accuracy})

    began = time.monotonic()
    callbacks = Callbacks(watchers(settings, report.folder, name))
    run = RunStart(
        strategy=type(strategy).__name__,
        num_rounds=settings.baseline_rounds,
        settings={"num_edges": settings.num_edges, "seed": settings.seed},
        history=[],
        events=[],
        now=lambda: time.monotonic() - began,
    )
    with callbacks.watch(run):
        strategy.start(
            grid,
            ArrayRecord(params),
            num_rounds=settings.baseline_rounds,
            timeout=settings.timeout,
            evaluate_fn=evaluate,
        )
