"""The data, the model and the recipe, which the core and the edges share."""

from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from flwr_cloned_kd import Recipe, partition
from flwr_cloned_kd.engine.ensemble import seeded

NUM_HELD_OUT = 169
Table = tuple[np.ndarray, np.ndarray]


def load(num_edges: int, seed: int) -> tuple[list[Table], Table]:
    """Return the parts of the core and of each edge, and the held-out rows, as NumPy arrays.

    The 569 rows are measurements of breast tumours; the label says which ones are benign. Every
    column is scaled by the moments of the core's own rows, which the service may know.
    """
    rows, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out, train = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
    parts = [train[part.numpy()] for part in partition(len(train), 1 + num_edges, seed=seed)]
    core_rows = rows[parts[0]]
    scaled = (rows - core_rows.mean(0)) / core_rows.std(0)
    return [(scaled[part], labels[part]) for part in parts], (scaled[held_out], labels[held_out])


def build_model(seed: int) -> nn.Module:
    """Build a network from 30 measurements to 2 classes."""
    layers = [nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)]
    return seeded(nn.Sequential(*layers), seed)


def recipe_of(epochs: int) -> Recipe:
    """Return the recipe of all phases: AdamW, whose learning rate falls in two steps."""
    adamw = partial(torch.optim.AdamW, weight_decay=0.01)
    return Recipe(epochs=epochs, batch_size=16, lr=3e-3, optimizer=adamw)
