"""The data, the model and the recipe, which the core and the edges share."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flwr_cloned_kd import Recipe, load_digits, partition, take
from flwr_cloned_kd.engine.ensemble import seeded

NUM_PUBLIC = 400
"""Digits that stand for public data: the backbone is trained on them, and on no others."""
Digits = tuple[Tensor, Tensor]


def load_public() -> Digits:
    """Return the public digits."""
    return take(load_digits()[0], range(NUM_PUBLIC))


def load(num_edges: int, seed: int) -> tuple[list[Digits], Digits]:
    """Return the parts of the core and of each edge, and the held-out digits."""
    train, held_out = load_digits()
    rows = torch.arange(NUM_PUBLIC, len(train[1]))
    parts = partition(len(rows), 1 + num_edges, seed=seed)
    return [take(train, rows[part]) for part in parts], held_out


class Net(nn.Module):
    """A backbone with batch normalisation, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def build_model(path: str, seed: int) -> nn.Module:
    """Build the model: the backbone from a file and frozen, and a new head."""
    if not Path(path).is_file():
        raise ValueError(
            f"backbone: expected the absolute path of a file that pretrain.py wrote, got {path!r}"
        )
    model = seeded(Net(), seed)
    model.backbone.load_state_dict(load_file(path))
    model.backbone.requires_grad_(False)
    return model


def recipe_of(epochs: int) -> Recipe:
    """Return the recipe of all phases."""
    return Recipe(epochs=epochs, batch_size=16, lr=0.02)
