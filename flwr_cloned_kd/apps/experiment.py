"""The example apps: what they assemble from their settings."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from logging import INFO
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.common import NDArrays, Scalar, log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedProx, Result
from torch import Tensor

from ..asynchronous.staleness import (
    ConstantStaleness,
    HingeStaleness,
    PolynomialStaleness,
    StalenessWeight,
)
from ..baselines.fedasync import FedAsync
from ..baselines.fedbuff import FedBuff
from ..data.datasets import (
    load_cifar100,
    load_digits,
    load_huggingface,
    load_npz,
    partition,
    partition_with,
    take,
)
from ..engine.inputs import Dataset, shuffle_labels
from ..engine.recipe import AccuracyReached, Plateau, Recipe, fold_in
from ..engine.runtime import Runtime, plan
from ..flower.client import EdgeClient
from ..flower.cloned_kd import ClonedKD
from ..method.core import Core
from ..method.distillation import Distillation
from ..method.variants import PRESETS, VARIANTS
from .report import Report
from .settings import AUGMENTATIONS, CHOICES, GUARDS, Settings, build_model


def load(settings: Settings) -> tuple[Dataset, Dataset]:
    """Load the data of a run, (train, test), and keep the latest in memory."""
    return _load_once(settings.dataset, settings.data_path, settings.image_key, settings.label_key)


@lru_cache(maxsize=1)
def _load_once(dataset: str, path: str, image_key: str, label_key: str) -> tuple[Dataset, Dataset]:
    loaders: dict[str, Callable[[], tuple[Dataset, Dataset]]] = {
        "digits": load_digits,
        "cifar100": lambda: load_cifar100(path or "data"),
        "npz": lambda: load_npz(path),
        "huggingface": lambda: load_huggingface(path, image_key=image_key, label_key=label_key),
    }
    return loaders[dataset]()


def split(settings: Settings, labels: Tensor) -> list[Tensor]:
    """Return the core's rows, then each edge's: disjoint parts of the training data."""
    parts = partition(len(labels), 1 + settings.num_edges, seed=fold_in(settings.seed, "split"))
    if settings.split == "random":
        return parts
    rest = torch.cat(parts[1:])
    if settings.split == "one-class":
        return [parts[0], *one_class_each(settings, labels, rest)]
    try:
        from flwr_datasets.partitioner import DirichletPartitioner
    except ImportError as error:
        raise ImportError(
            'split=dirichlet needs flwr-datasets: pip install "flwr-cloned-kd[datasets]"'
        ) from error
    partitioner = DirichletPartitioner(
        settings.num_edges,
        partition_by="label",
        alpha=settings.dirichlet_alpha,
        min_partition_size=2,
        seed=fold_in(settings.seed, "dirichlet") % 2**32,
    )
    return [parts[0], *(rest[rows] for rows in partition_with(partitioner, labels[rest]))]


def one_class_each(settings: Settings, labels: Tensor, rows: Tensor) -> list[Tensor]:
    """Give every edge the rows of one class, drawn without repetition as long as there are more."""
    num_classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(fold_in(settings.seed, "one-class"))
    classes = torch.randperm(num_classes, generator=generator).tolist()
    chosen = [classes[edge % num_classes] for edge in range(settings.num_edges)]
    return [rows[labels[rows] == label] for label in chosen]


def recipe(settings: Settings, epochs: int, **changes: Any) -> Recipe:
    """Make the recipe that all phases share, for so many epochs."""
    shared = Recipe(
        epochs=epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        augment=AUGMENTATIONS[settings.augment],
    )
    return replace(shared, **changes)


def edge_recipe(settings: Settings, edge: int, **changes: Any) -> Recipe:
    """Make the recipe of Phase 1 on one edge, counted from 0; its labels are noisy if it is."""
    noisy = partial(shuffle_labels, p=settings.noise_probability)
    threshold = settings.edge_accuracy_stop
    return recipe(
        settings,
        settings.edge_epochs,
        label_noise=noisy if str(edge) in settings.noisy else None,
        stop=AccuracyReached(threshold) if threshold else None,
        **changes,
    )


def runtime(settings: Settings, device: str) -> Runtime:
    """Make the runtime of the server or of an edge."""
    return Runtime(
        device=device,
        bf16=CHOICES[settings.bf16],
        compile=CHOICES[settings.compile],
        batch_clones=CHOICES[settings.batch_clones],
        cuda_graphs=settings.cuda_graphs,
        log=partial(log, INFO),
    )


def phase_2(settings: Settings) -> Distillation:
    """Make the distillation: the preset, and what the settings change of it."""
    stop = Plateau(settings.plateau_patience) if settings.plateau_patience else None
    augment = AUGMENTATIONS[settings.distill_augment or settings.augment]
    shared = recipe(settings, settings.distill_epochs, stop=stop, augment=augment)
    chosen = PRESETS[settings.preset](shared)
    lr = settings.distill_lr or chosen.recipe.lr
    return replace(
        chosen,
        recipe=replace(chosen.recipe, lr=lr),
        temperature=settings.temperature or chosen.temperature,
        memory_size=settings.memory_size or VARIANTS[settings.variant].memory_size,
    )


def build_core(settings: Settings) -> Core:
    """Assemble the core: its part of the data, its model, its recipes."""
    train, test = load(settings)
    num_classes, guard = int(train[1].max()) + 1, GUARDS[settings.guard]
    return Core(
        model=build_model(settings, num_classes, train[0]),
        dataset=take(train, split(settings, train[1])[0]),
        recipe=recipe(settings, settings.core_epochs),
        distillation=phase_2(settings),
        guard=guard(settings.guard_threshold) if guard is not None else None,
        held_out=test,
        seed=settings.seed,
        runtime=runtime(settings, settings.device),
    )


class SlowEdge(EdgeClient):
    """An edge that sleeps before it answers.

    Args:
        delay: seconds.
        options: of `EdgeClient`.
    """

    def __init__(self, delay: float, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.delay = delay

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train, then sleep."""
        found = super().fit(parameters, config)
        time.sleep(self.delay)
        return found


def build_edge(context: Context) -> EdgeClient:
    """Assemble the edge that a node's partition id stands for."""
    settings = Settings.read(context.run_config)
    edge = int(context.node_config["partition-id"])
    if edge >= settings.num_edges:
        raise ValueError(
            f"partition-id: expected below num-edges ({settings.num_edges}), got {edge}; "
            f"start as many supernodes as there are edges"
        )
    train, test = load(settings)
    delay = settings.delays[edge] if edge < len(settings.delays) else 0.0
    return SlowEdge(
        delay,
        build_model(settings, int(train[1].max()) + 1, train[0]),
        take(train, split(settings, train[1])[1 + edge]),
        edge_recipe(settings, edge),
        held_out=test,
        seed=fold_in(settings.seed, "edge", edge),
        runtime=runtime(settings, settings.client_device),
    )


def serve(grid: Grid, context: Context) -> Report:
    """Run the strategies of a run in turn, all from the same first core, and report on them."""
    settings = Settings.read(context.run_config)
    core = build_core(settings)
    first = core.pretrain()
    report = Report(settings, core, core.held_out_accuracy(first) or 0.0, plans(settings, core))
    for name in settings.strategies:
        if name == "cloned-kd":
            run_cloned_kd(settings, core, grid, ArrayRecord(first), report)
        elif name in ("fedasync", "fedbuff"):
            run_asynchronous(name, settings, core, grid, ArrayRecord(first), report)
        else:
            run_baseline(name, settings, core, grid, ArrayRecord(first), report)
    report.finish()
    return report


def plans(settings: Settings, core: Core) -> dict[str, dict[str, Any]]:
    """Say how each phase runs; Phase 1 as it would on this machine."""
    inputs, num_core = core.dataset[0], len(core.dataset[1])
    num_clones = settings.num_clones or VARIANTS[settings.variant].num_clones
    edge = runtime(settings, settings.client_device)
    phases = {
        "phase-0": (core.runtime, 1, settings.core_epochs),
        "phase-1": (edge, num_clones, settings.edge_epochs),
        "phase-2": (core.runtime, 1, settings.distill_epochs),
    }
    return {
        phase: plan(
            core.model,
            inputs,
            where,
            num_clones=clones,
            num_samples=clones * epochs * num_core,
        )._asdict()
        for phase, (where, clones, epochs) in phases.items()
    }


def run_cloned_kd(
    settings: Settings, core: Core, grid: Grid, first: ArrayRecord, report: Report
) -> Result:
    """Run the paper's method: one edge a round, each edge once."""
    variant = VARIANTS[settings.variant]
    strategy = ClonedKD(
        core,
        num_clones=settings.num_clones or variant.num_clones,
        max_in_flight=settings.max_in_flight,
        max_staleness=None if settings.max_staleness < 0 else settings.max_staleness,
        staleness_weight=staleness_weight(settings),
        revisit=settings.num_rounds > settings.num_edges,
        checkpoint=settings.checkpoint or None,
        send=variant.init(core),
        on_round=partial(report.add, "cloned-kd"),
    )
    num_rounds = settings.num_rounds or settings.num_edges
    result = strategy.start(grid, first, num_rounds=num_rounds, timeout=settings.timeout)
    report.precede("cloned-kd", strategy.history)
    report.keep("cloned-kd", strategy.events)
    return result


def staleness_weight(settings: Settings) -> StalenessWeight | None:
    """Return the function that was asked for, or None."""
    choices: dict[str, Callable[[], StalenessWeight]] = {
        "constant": ConstantStaleness,
        "polynomial": lambda: PolynomialStaleness(settings.staleness_a),
        "hinge": lambda: HingeStaleness(settings.staleness_a, settings.staleness_b),
    }
    kind = settings.staleness_weight
    return choices[kind]() if kind else None


def run_asynchronous(
    name: str, settings: Settings, core: Core, grid: Grid, first: ArrayRecord, report: Report
) -> Result:
    """Run FedAsync or FedBuff: edges over and over, as many answers as FedAvg has."""
    weight = staleness_weight(settings)
    options: dict[str, Any] = {
        "max_in_flight": settings.max_in_flight,
        "max_staleness": None if settings.max_staleness < 0 else settings.max_staleness,
        "measure": lambda params: {"core-accuracy": core.held_out_accuracy(params) or 0.0},
        "on_round": partial(report.add, name),
    }
    if weight is not None:
        options["staleness_weight"] = weight
    strategy: FedAsync | FedBuff = (
        FedAsync(alpha=settings.fedasync_alpha, **options)
        if name == "fedasync"
        else FedBuff(buffer_size=settings.fedbuff_size, server_lr=settings.fedbuff_lr, **options)
    )
    log(20, "Baseline: %s", name)
    num_rounds = settings.baseline_rounds * settings.num_edges
    result = strategy.start(grid, first, num_rounds=num_rounds, timeout=settings.timeout)
    report.keep(name, strategy.events)
    return result


def run_baseline(
    name: str, settings: Settings, core: Core, grid: Grid, first: ArrayRecord, report: Report
) -> Result:
    """Run Flower's FedAvg or FedProx: all edges in every round, with the same client app."""
    everybody = {
        "fraction_evaluate": 0.0,
        "min_train_nodes": settings.num_edges,
        "min_available_nodes": settings.num_edges,
    }
    if name == "fedavg":
        strategy = FedAvg(**everybody)  # type: ignore[arg-type]
    else:
        strategy = FedProx(**everybody, proximal_mu=settings.proximal_mu)  # type: ignore[arg-type]

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        accuracy = core.held_out_accuracy(arrays.to_torch_state_dict(keep_input=True)) or 0.0
        if server_round:
            size = settings.num_edges * sum(len(array.data) for array in arrays.values())
            row = {"round": server_round, "edge": "all", "accepted": 1.0, "core-accuracy": accuracy,
                   "bytes-down": size, "bytes-up": size}  # fmt: skip
            report.add(name, row)
        return MetricRecord({"core-accuracy": accuracy})

    log(20, "Baseline: %s", name)
    return strategy.start(
        grid,
        first,
        num_rounds=settings.baseline_rounds,
        timeout=settings.timeout,
        evaluate_fn=evaluate,
    )
