"""The text, the model and the recipe, which the core and the edges share."""

import importlib
import inspect
from functools import cache, partial

import torch
from torch import Tensor, nn

from flwr_cloned_kd import Classification, Dataset, Recipe, partition, take
from flwr_cloned_kd.engine.ensemble import seeded

MODULES = ("argparse", "collections", "datetime", "decimal", "logging", "os", "pathlib", "zipfile")
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;'\"()[]-_=/*"
LENGTH = 32
NUM_HELD_OUT = 300
IGNORED = -100
TASK = Classification(ignore_index=IGNORED)
"""One class per character; the padding does not count."""


@cache
def sentences() -> list[str]:
    """Collect lines of the documentation of Python's standard library: real English text."""
    lines: dict[str, None] = {}  # a dict keeps the order and drops repeated lines
    for name in MODULES:
        module = importlib.import_module(name)
        members = (member for _, member in sorted(vars(module).items(), key=lambda item: item[0]))
        for part in (module, *members):
            text = inspect.getdoc(part) if callable(part) or inspect.ismodule(part) else None
            for line in (text or "").lower().splitlines():
                kept = "".join(character for character in line.strip() if character in CHARACTERS)
                if len(kept) >= 20:
                    lines[kept[: LENGTH + 1]] = None
    return list(lines)


def encode(lines: list[str]) -> Dataset:
    """Turn lines into inputs, a dict of characters and mask, and the next characters as labels.

    Number 0 stands for padding; its labels are ignored.
    """
    ids = torch.zeros(len(lines), LENGTH + 1, dtype=torch.int64)
    for row, line in zip(ids, lines):
        row[: len(line)] = torch.tensor([1 + CHARACTERS.index(character) for character in line])
    inputs, labels = ids[:, :-1], ids[:, 1:]
    mask = (inputs > 0).long()
    return {"input_ids": inputs, "attention_mask": mask}, labels.masked_fill(labels == 0, IGNORED)


def load(num_edges: int, seed: int) -> tuple[list[Dataset], Dataset]:
    """Return the parts of the core and of each edge, and held-out lines."""
    lines = sentences()
    dataset = encode(lines)
    held_out, train = torch.randperm(
        len(lines), generator=torch.Generator().manual_seed(seed)
    ).tensor_split([NUM_HELD_OUT])
    parts = partition(len(train), 1 + num_edges, seed=seed)
    return [take(dataset, train[part]) for part in parts], take(dataset, held_out)


class NextCharacter(nn.Module):
    """A small transformer: `[B, T]` characters to `[B, T, C]` logits of the next character."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(1 + len(CHARACTERS), width)
        self.place = nn.Embedding(LENGTH, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 1 + len(CHARACTERS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        length = input_ids.shape[1]
        places = torch.arange(length, device=input_ids.device)
        later = places[None, :] > places[:, None]
        hidden = self.embed(input_ids) + self.place(places)
        hidden = self.layer(hidden, src_mask=later, src_key_padding_mask=attention_mask == 0)
        return {"logits": self.head(hidden)}


def build_model(seed: int) -> nn.Module:
    """Build the network with the first weights that a seed determines."""
    return seeded(NextCharacter(), seed)


def recipe_of(steps: int) -> Recipe:
    """Return the recipe of all phases: AdamW with limited gradients and a falling rate."""
    return Recipe(
        steps=steps,
        batch_size=32,
        lr=5e-3,
        optimizer=partial(torch.optim.AdamW, weight_decay=0.01),
        max_grad_norm=1.0,
        schedule=lambda done: 1 - done,
    )
