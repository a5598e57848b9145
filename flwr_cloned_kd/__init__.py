"""Asynchronous edge learning by cloned knowledge distillation, for Flower.

Lee, Yoo and Kwak, "Asynchronous Edge Learning using Cloned Knowledge Distillation", 2020.
"""

from .asynchronous import AsyncStrategy
from .baselines import FedAsync, FedBuff
from .client import EdgeClient, edge_app
from .consensus import Venn
from .core import Core, CoreState, Distillation, edge_seed, train_edge
from .data import (
    CropAndFlip,
    crop_and_flip,
    load_cifar100,
    load_digits,
    load_huggingface,
    load_npz,
    partition,
    partition_with,
    shuffle_labels,
    take,
)
from .draws import Constant, Draw, Exponential, LogNormal, Trace
from .engine import accuracy, fit, predict
from .ensemble import Ensemble, StateDict, as_ensemble, clone, member
from .guard import TrainAccuracyDrop, TrainAccuracyJump
from .knowledge import Knowledge, correct, ensemble_share, label_probability, retained
from .legacy import LegacyClonedKD
from .losses import cross_entropy, distillation
from .models import digits_cnn, initialise, resnet, resnet32
from .mods import ClipClones, LocalDpClones
from .recipe import AccuracyReached, Plateau, Recipe, fold_in, step_decay
from .runtime import Runtime
from .staleness import ConstantStaleness, HingeStaleness, PolynomialStaleness
from .strategy import ClonedKD
from .timeline import Event, accounts, draw_timeline
from .variants import PRESETS, VARIANTS, Variant, cloned, practical, unselective
from .virtual import VirtualGrid

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "VARIANTS",
    "AccuracyReached",
    "AsyncStrategy",
    "ClipClones",
    "ClonedKD",
    "Constant",
    "ConstantStaleness",
    "Core",
    "CoreState",
    "CropAndFlip",
    "Distillation",
    "Draw",
    "EdgeClient",
    "Ensemble",
    "Event",
    "Exponential",
    "FedAsync",
    "FedBuff",
    "HingeStaleness",
    "Knowledge",
    "LegacyClonedKD",
    "LocalDpClones",
    "LogNormal",
    "Plateau",
    "PolynomialStaleness",
    "Recipe",
    "Runtime",
    "StateDict",
    "Trace",
    "TrainAccuracyDrop",
    "TrainAccuracyJump",
    "Variant",
    "Venn",
    "VirtualGrid",
    "accounts",
    "accuracy",
    "as_ensemble",
    "clone",
    "cloned",
    "correct",
    "crop_and_flip",
    "cross_entropy",
    "digits_cnn",
    "distillation",
    "draw_timeline",
    "edge_app",
    "edge_seed",
    "ensemble_share",
    "fit",
    "fold_in",
    "initialise",
    "label_probability",
    "load_cifar100",
    "load_digits",
    "load_huggingface",
    "load_npz",
    "member",
    "partition",
    "partition_with",
    "practical",
    "predict",
    "resnet",
    "resnet32",
    "retained",
    "shuffle_labels",
    "step_decay",
    "take",
    "train_edge",
    "unselective",
]
