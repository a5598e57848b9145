"""Asynchronous edge learning by cloned knowledge distillation, for Flower.

Lee, Yoo and Kwak, "Asynchronous Edge Learning using Cloned Knowledge Distillation", 2020.
"""

from .asynchronous.accounts import accounts
from .asynchronous.callbacks import Callback, RunStart
from .asynchronous.staleness import ConstantStaleness, HingeStaleness, PolynomialStaleness
from .asynchronous.strategy import AsyncStrategy
from .asynchronous.timeline import Event, draw_timeline
from .baselines.fedasync import FedAsync
from .baselines.fedbuff import FedBuff
from .data.datasets import (
    load_cifar100,
    load_digits,
    load_huggingface,
    load_npz,
    partition,
    partition_with,
    take,
)
from .data.models import digits_cnn, resnet, resnet32
from .engine.ensemble import (
    Ensemble,
    StateDict,
    as_ensemble,
    clone,
    initialise,
    member,
    trained_state,
)
from .engine.fit import accuracy, fit, predict
from .engine.inputs import CropAndFlip, Dataset, crop_and_flip, shuffle_labels
from .engine.losses import cross_entropy, distillation
from .engine.recipe import AccuracyReached, Plateau, Recipe, fold_in, step_decay
from .engine.runtime import Runtime
from .engine.samples import as_dataset
from .engine.tasks import Classification, Regression, SeveralLabels, Task
from .flower.client import EdgeClient, edge_app, in_wire_dtype
from .flower.cloned_kd import ClonedKD
from .flower.legacy import LegacyClonedKD
from .flower.mods import ClipClones, LocalDpClones
from .flower.train_clones import train_clones
from .loggers.live import LiveView
from .loggers.mlflow import MlflowLogger
from .loggers.tensorboard import TensorBoardLogger
from .loggers.wandb import WandbLogger
from .method.calibration import calibrate
from .method.consensus import Venn
from .method.core import Core
from .method.distillation import Distillation
from .method.edge import edge_seed, train_edge
from .method.evidence import Evidence
from .method.guards import (
    AllOf,
    AnyOf,
    Limit,
    TrainAccuracyDrop,
    TrainAccuracyJump,
    class_drop,
    disagreement,
    drop_confidence,
    edge_drop,
    ensemble_gap,
    loss_rise,
    movement,
    relative_accuracy,
    validation_drop,
)
from .method.knowledge import (
    Knowledge,
    correct,
    ensemble_share,
    label_probability,
    retained,
)
from .method.presets import PRESETS, practical, unselective
from .method.state import CoreState
from .method.variants import VARIANTS, Variant, cloned
from .reading.runs import LoadedRun, load_run, load_runs
from .virtual.durations import Constant, Draw, Exponential, LogNormal, Trace
from .virtual.grid import VirtualGrid

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "VARIANTS",
    "AccuracyReached",
    "AllOf",
    "AnyOf",
    "AsyncStrategy",
    "Callback",
    "Classification",
    "ClipClones",
    "ClonedKD",
    "Constant",
    "ConstantStaleness",
    "Core",
    "CoreState",
    "CropAndFlip",
    "Dataset",
    "Distillation",
    "Draw",
    "EdgeClient",
    "Ensemble",
    "Event",
    "Evidence",
    "Exponential",
    "FedAsync",
    "FedBuff",
    "HingeStaleness",
    "Knowledge",
    "LegacyClonedKD",
    "Limit",
    "LiveView",
    "LoadedRun",
    "LocalDpClones",
    "LogNormal",
    "MlflowLogger",
    "Plateau",
    "PolynomialStaleness",
    "Recipe",
    "Regression",
    "RunStart",
    "Runtime",
    "SeveralLabels",
    "StateDict",
    "Task",
    "TensorBoardLogger",
    "Trace",
    "TrainAccuracyDrop",
    "TrainAccuracyJump",
    "Variant",
    "Venn",
    "VirtualGrid",
    "WandbLogger",
    "accounts",
    "accuracy",
    "as_dataset",
    "as_ensemble",
    "calibrate",
    "class_drop",
    "clone",
    "cloned",
    "correct",
    "crop_and_flip",
    "cross_entropy",
    "digits_cnn",
    "disagreement",
    "distillation",
    "draw_timeline",
    "drop_confidence",
    "edge_app",
    "edge_drop",
    "edge_seed",
    "ensemble_gap",
    "ensemble_share",
    "fit",
    "fold_in",
    "in_wire_dtype",
    "initialise",
    "label_probability",
    "load_cifar100",
    "load_digits",
    "load_huggingface",
    "load_npz",
    "load_run",
    "load_runs",
    "loss_rise",
    "member",
    "movement",
    "partition",
    "partition_with",
    "practical",
    "predict",
    "relative_accuracy",
    "resnet",
    "resnet32",
    "retained",
    "shuffle_labels",
    "step_decay",
    "take",
    "train_clones",
    "train_edge",
    "trained_state",
    "unselective",
    "validation_drop",
]
