"""The data and the objects of a run, made from its settings."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from logging import INFO
from typing import Any

import torch
from flwr.app import Context, Message, MessageType
from flwr.common import log
from torch import Tensor, nn

from ..asynchronous.staleness import (
    ConstantStaleness,
    HingeStaleness,
    PolynomialStaleness,
    StalenessWeight,
)
from ..data.datasets import (
    load_cifar100,
    load_digits,
    load_huggingface,
    load_npz,
    moments,
    partition,
    partition_with,
    take,
)
from ..data.models import resnet
from ..engine.inputs import Dataset, shuffle_labels
from ..engine.recipe import AccuracyReached, Plateau, Recipe, fold_in
from ..engine.runtime import Runtime, plan
from ..method.calibration import calibrate
from ..method.core import Core
from ..method.distillation import Distillation
from ..method.guards import (
    DEFAULT_GUARD,
    Guard,
    Limit,
    TrainAccuracyDrop,
    TrainAccuracyJump,
    drop_confidence,
    ensemble_gap,
)
from ..method.presets import PRESETS
from ..method.variants import VARIANTS
from .settings import AUGMENTATIONS, CHOICES, TRUSTS, Settings, model_depth


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
    """Return the core's rows, then the rows of every edge: disjoint parts of the training data."""
    parts = partition(len(labels), 1 + settings.num_edges, seed=fold_in(settings.seed, "split"))
    if settings.split == "random":
        return parts
    private = torch.cat(parts[1:])
    if settings.split == "one-class":
        return [parts[0], *one_class_each(settings, labels, private)]
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
    return [parts[0], *(private[rows] for rows in partition_with(partitioner, labels[private]))]


def one_class_each(settings: Settings, labels: Tensor, rows: Tensor) -> list[Tensor]:
    """Give every edge the rows of one class; a class repeats only if there are more edges."""
    num_classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(fold_in(settings.seed, "one-class"))
    classes = torch.randperm(num_classes, generator=generator).tolist()
    chosen = [classes[edge % num_classes] for edge in range(settings.num_edges)]
    return [rows[labels[rows] == label] for label in chosen]


# A client process builds its model anew for every message, from the same images.
_moments_once = lru_cache(maxsize=1)(moments)


def model(settings: Settings) -> nn.Module:
    """Build the model of a run for its images and classes, with weights determined by its seed."""
    (images, labels), _ = load(settings)
    return resnet(
        model_depth(settings.model),
        int(labels.max()) + 1,
        channels=images.shape[1],
        width=8 if settings.model == "digits-cnn" else 16,
        seed=fold_in(settings.seed, "model"),
        pixels=None if images.is_floating_point() else _moments_once(images),
    )


def recipe(settings: Settings, epochs: int, **changes: Any) -> Recipe:
    """Make the recipe that all phases share, for this number of epochs."""
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
    """Make the recipe of Phase 1 on an edge, counted from 0, which may be a noisy one."""
    noisy = partial(shuffle_labels, p=settings.noise_probability)
    threshold = settings.edge_accuracy_stop
    return recipe(
        settings,
        settings.edge_epochs,
        label_noise=noisy if str(edge) in settings.noisy else None,
        stop=AccuracyReached(threshold) if threshold else None,
        **changes,
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


def guard(settings: Settings, core: Core) -> Guard | None:
    """Make the guard of a run, if it has one; "gap" runs Phase 0 and trains stand-ins for edges."""
    threshold = settings.guard_threshold
    match settings.guard:
        case "auto":
            return None if settings.preset == "paper" else DEFAULT_GUARD
        case "jump":
            return TrainAccuracyJump(threshold)
        case "drop":
            return TrainAccuracyDrop(threshold)
        case "validation":
            return Limit(drop_confidence, 1 - threshold)
        case "gap":
            return calibrate(
                core,
                core.state(core.pretrain()),
                ensemble_gap,
                false_alarms=threshold,
                num_clones=num_clones(settings),
                recipe=recipe(settings, settings.edge_epochs),
            )
    return None


def runtime(settings: Settings, device: str) -> Runtime:
    """Make the runtime of the core or of an edge."""
    return Runtime(
        device=device,
        bf16=CHOICES[settings.bf16],
        compile=CHOICES[settings.compile],
        batch_clones=CHOICES[settings.batch_clones],
        workers=settings.workers or None,
        cuda_graphs=settings.cuda_graphs,
        log=partial(log, INFO),
    )


def core_rows(settings: Settings, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the rows of the core into those that it trains on and those for validation."""
    num_trained = max(1, len(rows) - round(settings.validation_share * len(rows)))
    return rows[:num_trained], rows[num_trained:]


def build_core(settings: Settings) -> Core:
    """Assemble the core: its part of the data, its model, its recipes."""
    train, held_out = load(settings)
    trained, validation = core_rows(settings, split(settings, train[1])[0])
    core = Core(
        model=model(settings),
        dataset=take(train, trained),
        recipe=recipe(settings, settings.core_epochs),
        distillation=phase_2(settings),
        trust=TRUSTS[settings.trust],
        validation=take(train, validation) if len(validation) else None,
        held_out=held_out,
        seed=settings.seed,
        runtime=runtime(settings, settings.device),
    )
    return replace(core, guard=guard(settings, core))


def num_clones(settings: Settings) -> int:
    """Return how many clones an edge trains."""
    return settings.num_clones or VARIANTS[settings.variant].num_clones


def max_staleness(settings: Settings) -> int | None:
    """Return by how many versions an answer may be late; None is any number."""
    return None if settings.max_staleness < 0 else settings.max_staleness


def staleness_weight(settings: Settings) -> StalenessWeight | None:
    """Return the function that the settings name; None stands for the strategy's default."""
    match settings.staleness_weight:
        case "constant":
            return ConstantStaleness()
        case "polynomial":
            return PolynomialStaleness(settings.staleness_a)
        case "hinge":
            return HingeStaleness(settings.staleness_a, settings.staleness_b)
    return None


def edge_of(settings: Settings, context: Context) -> int:
    """Return the edge, counted from 0, that a node stands for by its partition id.

    Raises:
        ValueError: if there are fewer edges.
    """
    edge = int(context.node_config["partition-id"])
    if edge >= settings.num_edges:
        raise ValueError(
            f"partition-id: expected below num-edges ({settings.num_edges}), got {edge}; "
            f"start as many supernodes as there are edges"
        )
    return edge


def slow_edge(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Client mod: after training, sleep for as long as "edge-delays" says."""
    reply = call_next(message, context)
    settings = Settings.read(context.run_config)
    edge = edge_of(settings, context)
    if message.metadata.message_type == MessageType.TRAIN and edge < len(settings.delays):
        time.sleep(settings.delays[edge])
    return reply


def plans(settings: Settings, core: Core) -> dict[str, dict[str, Any]]:
    """Return how each phase runs; Phase 1 as it would run on this machine."""
    inputs, labels = core.dataset
    clones_of_edge = num_clones(settings)
    edge_runtime = runtime(settings, settings.client_device)
    phases = {
        "phase-0": (core.runtime, 1, settings.core_epochs),
        "phase-1": (edge_runtime, clones_of_edge, settings.edge_epochs),
        "phase-2": (core.runtime, 1, settings.distill_epochs),
    }
    return {
        phase: plan(
            core.model,
            inputs,
            phase_runtime,
            num_clones=clones,
            num_samples=clones * epochs * len(labels),
        )._asdict()
        for phase, (phase_runtime, clones, epochs) in phases.items()
    }
