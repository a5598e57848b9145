"""The example apps: every knob as a run-config key, and what they assemble from it."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedProx, Result
from torch import Tensor, nn

from .client import EdgeClient
from .core import Core
from .data import (
    CropAndFlip,
    Dataset,
    load_cifar100,
    load_digits,
    load_huggingface,
    load_npz,
    partition,
    partition_with,
    shuffle_labels,
    take,
)
from .engine import Runtime
from .guard import TrainAccuracyJump
from .models import digits_cnn, resnet
from .recipe import AccuracyReached, Plateau, Recipe, fold_in
from .report import Report
from .strategy import ClonedKD
from .variants import PRESETS, VARIANTS

DATASETS = ("digits", "cifar100", "npz", "huggingface")
STRATEGIES = ("cloned-kd", "fedavg", "fedprox")
AUGMENTATIONS = {
    "none": None,
    "crop": CropAndFlip(flip=False),
    "crop-and-flip": CropAndFlip(),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `[tool.flwr.app.config]` of the example apps holds, with `_` for `-`.

    Args:
        dataset: digits, cifar100, npz or huggingface.
        data_path: where cifar100 is or goes to; the archive of npz; the name of huggingface's.
        num_edges: parts of the data besides the core's.
        split: "random" (even) or "dirichlet" (labels skewed over the edges, the core even).
        dirichlet_alpha: above 0; the smaller, the more skewed.
        model: digits-cnn or resnet-DEPTH.
        variant: a row of Fig. 5: what an edge starts from, clones, memory.
        num_clones, memory_size: 0 takes the variant's.
        preset: "paper" or "practical" (Phase 2).
        core_epochs, edge_epochs, distill_epochs: of Phases 0, 1 and 2.
        distill_lr, temperature: 0 takes the preset's.
        edge_accuracy_stop: Phase 1 ends at this training accuracy; 0 trains all epochs.
        plateau_patience: Phase 2 ends after so many epochs without progress; 0 trains all.
        noisy_edges: comma-separated partition ids whose labels are shuffled (Sec. 5.3).
        guard_threshold: refuse an edge after which the core's training accuracy jumps by more;
            0 is no guard.
        strategy: one of cloned-kd, fedavg, fedprox, or several, comma-separated, run in turn.
        num_rounds: of cloned-kd; 0 visits every edge once.
        baseline_rounds: of fedavg and fedprox, each with all edges.
        device, client_device: see `Runtime`.
        results: absolute folder for the results; "" writes into ./results.
        timeout: seconds to wait for an edge.

    Raises:
        ValueError: naming the key, what was expected and what was found.
    """

    dataset: str = "digits"
    data_path: str = ""
    num_edges: int = 9
    split: str = "random"
    dirichlet_alpha: float = 0.3
    model: str = "digits-cnn"
    variant: str = "CEM"
    num_clones: int = 0
    memory_size: int = 0
    preset: str = "practical"
    core_epochs: int = 40
    edge_epochs: int = 40
    distill_epochs: int = 40
    batch_size: int = 128
    lr: float = 0.1
    distill_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: str = "none"
    temperature: float = 0.0
    edge_accuracy_stop: float = 0.0
    plateau_patience: int = 0
    noisy_edges: str = ""
    noise_probability: float = 1.0
    guard_threshold: float = 0.0
    strategy: str = "cloned-kd"
    num_rounds: int = 0
    baseline_rounds: int = 9
    proximal_mu: float = 0.01
    max_in_flight: int = 1
    seed: int = 0
    device: str = "auto"
    client_device: str = "auto"
    bf16: bool = False
    compile: bool = False
    results: str = ""
    timeout: float = 3600.0

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Settings":
        """Check a run-config and take it over; keys are kebab-case."""
        known = {field.name.replace("_", "-"): field for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in config.items():
            if key not in known:
                raise ValueError(f"run-config {key}: expected one of {', '.join(known)}")
            default = known[key].default
            kind = str if default is MISSING else type(default)
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                raise ValueError(f"run-config {key}: expected {kind.__name__}, got {value!r}")
            values[known[key].name] = value
        return cls(**values)

    def __post_init__(self) -> None:
        self._among("dataset", DATASETS)
        self._among("split", ("random", "dirichlet"))
        self._among("variant", tuple(VARIANTS))
        self._among("preset", tuple(PRESETS))
        self._among("augment", tuple(AUGMENTATIONS))
        for name in self.strategies:
            if name not in STRATEGIES:
                self._fail("strategy", f"some of {', '.join(STRATEGIES)}")
        for name in ("num_edges", "core_epochs", "edge_epochs", "distill_epochs", "batch_size",
                     "baseline_rounds", "max_in_flight"):  # fmt: skip
            if getattr(self, name) < 1:
                self._fail(name, "at least 1")
        for name in ("num_clones", "memory_size", "num_rounds", "plateau_patience", "lr",
                     "distill_lr", "momentum", "weight_decay", "proximal_mu", "temperature",
                     "guard_threshold"):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                self._fail(name, "at least 0")
        for name in ("noise_probability", "edge_accuracy_stop"):
            if not 0 <= getattr(self, name) <= 1:
                self._fail(name, "a fraction, 0 to 1")
        for name in ("dirichlet_alpha", "timeout"):
            if not getattr(self, name) > 0:
                self._fail(name, "above 0")
        if self.dataset in ("npz", "huggingface") and not self.data_path:
            self._fail("data_path", f"where the {self.dataset} data is")
        if not all(edge.isdecimal() and int(edge) < self.num_edges for edge in self.noisy):
            self._fail("noisy_edges", f"partition ids below {self.num_edges}, comma-separated")
        build_model(self, 10)

    @property
    def strategies(self) -> list[str]:
        """The strategies to run, in turn."""
        return [name.strip() for name in self.strategy.split(",")]

    @property
    def noisy(self) -> list[str]:
        """The partition ids of noisy edges."""
        return [edge.strip() for edge in self.noisy_edges.split(",") if edge.strip()]

    def _among(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            self._fail(name, f"one of {', '.join(choices)}")

    def _fail(self, name: str, expected: str) -> None:
        key = name.replace("_", "-")
        raise ValueError(f"run-config {key}: expected {expected}, got {getattr(self, name)!r}")


def build_model(settings: Settings, num_classes: int, channels: int = 3) -> nn.Module:
    """Build the model of a run, with weights determined by its seed."""
    seed = fold_in(settings.seed, "model")
    family, _, depth = settings.model.partition("-")
    try:
        if settings.model == "digits-cnn":
            return digits_cnn(num_classes, seed=seed)
        if family == "resnet":
            return resnet(int(depth), num_classes, channels=channels, seed=seed)
    except ValueError:
        pass
    raise ValueError(
        f"run-config model: expected digits-cnn or resnet-DEPTH with DEPTH 8, 14, 20, 32, ..., "
        f"got {settings.model!r}"
    )


@lru_cache(maxsize=1)
def _load(dataset: str, path: str) -> tuple[Dataset, Dataset]:
    loaders: dict[str, Callable[[], tuple[Dataset, Dataset]]] = {
        "digits": load_digits,
        "cifar100": lambda: load_cifar100(path or "data"),
        "npz": lambda: load_npz(path),
        "huggingface": lambda: load_huggingface(path),
    }
    return loaders[dataset]()


def split(settings: Settings, labels: Tensor) -> list[Tensor]:
    """Return the core's rows, then each edge's: disjoint parts of the training data."""
    parts = partition(len(labels), 1 + settings.num_edges, seed=fold_in(settings.seed, "split"))
    if settings.split == "random":
        return parts
    try:
        from flwr_datasets.partitioner import DirichletPartitioner
    except ImportError as error:
        raise ImportError(
            'split=dirichlet needs flwr-datasets: pip install "flwr-cloned-kd[datasets]"'
        ) from error
    rest = torch.cat(parts[1:])
    partitioner = DirichletPartitioner(
        settings.num_edges,
        partition_by="label",
        alpha=settings.dirichlet_alpha,
        min_partition_size=2,
        seed=fold_in(settings.seed, "dirichlet") % 2**32,
    )
    return [parts[0], *(rest[rows] for rows in partition_with(partitioner, labels[rest]))]


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


def build_core(settings: Settings) -> Core:
    """Assemble the core: its part of the data, its model, its recipes."""
    train, test = _load(settings.dataset, settings.data_path)
    num_classes = int(train[1].max()) + 1
    stop = Plateau(settings.plateau_patience) if settings.plateau_patience else None
    how = PRESETS[settings.preset](recipe(settings, settings.distill_epochs, stop=stop))
    if settings.distill_lr:
        how = replace(how, recipe=replace(how.recipe, lr=settings.distill_lr))
    return Core(
        model=build_model(settings, num_classes, train[0].shape[1]),
        dataset=take(train, split(settings, train[1])[0]),
        recipe=recipe(settings, settings.core_epochs),
        distillation=replace(
            how,
            temperature=settings.temperature or how.temperature,
            memory_size=settings.memory_size or VARIANTS[settings.variant].memory_size,
        ),
        guard=TrainAccuracyJump(settings.guard_threshold) if settings.guard_threshold else None,
        held_out=test,
        seed=settings.seed,
        runtime=Runtime(device=settings.device, bf16=settings.bf16, compile=settings.compile),
    )


def build_edge(context: Context) -> EdgeClient:
    """Assemble the edge that a node's partition id stands for."""
    settings = Settings.read(context.run_config)
    edge = int(context.node_config["partition-id"])
    if edge >= settings.num_edges:
        raise ValueError(
            f"partition-id: expected below num-edges ({settings.num_edges}), got {edge}; "
            f"start as many supernodes as there are edges"
        )
    train, test = _load(settings.dataset, settings.data_path)
    noisy = partial(shuffle_labels, p=settings.noise_probability)
    threshold = settings.edge_accuracy_stop
    return EdgeClient(
        build_model(settings, int(train[1].max()) + 1, train[0].shape[1]),
        take(train, split(settings, train[1])[1 + edge]),
        recipe(
            settings,
            settings.edge_epochs,
            label_noise=noisy if str(edge) in settings.noisy else None,
            stop=AccuracyReached(threshold) if threshold else None,
        ),
        held_out=test,
        seed=fold_in(settings.seed, "edge", edge),
        runtime=Runtime(
            device=settings.client_device, bf16=settings.bf16, compile=settings.compile
        ),
    )


def serve(grid: Grid, context: Context) -> Report:
    """Run the strategies of a run in turn, all from the same first core, and report on them."""
    settings = Settings.read(context.run_config)
    core = build_core(settings)
    first = core.pretrain()
    report = Report(settings, core, core.held_out_accuracy(first) or 0.0)
    for name in settings.strategies:
        if name == "cloned-kd":
            run_cloned_kd(settings, core, grid, ArrayRecord(first), report)
        else:
            run_baseline(name, settings, core, grid, ArrayRecord(first), report)
    report.finish()
    return report


def run_cloned_kd(
    settings: Settings, core: Core, grid: Grid, first: ArrayRecord, report: Report
) -> Result:
    """Run the paper's method: one edge a round, each edge once."""
    variant = VARIANTS[settings.variant]
    strategy = ClonedKD(
        core,
        num_clones=settings.num_clones or variant.num_clones,
        max_in_flight=settings.max_in_flight,
        revisit=settings.num_rounds > settings.num_edges,
        send=variant.init(core),
        on_round=partial(report.add, "cloned-kd"),
    )
    num_rounds = settings.num_rounds or settings.num_edges
    return strategy.start(grid, first, num_rounds=num_rounds, timeout=settings.timeout)


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
