"""The model, the data and the training loop. Nothing here knows of clones: replace it by yours."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from flwr_cloned_kd import load_digits, partition, take


class Net(nn.Module):
    """A small CNN for 8x8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def load_part(index: int, num_edges: int, seed: int) -> tuple[Tensor, Tensor]:
    """Load part 0, the core's, or part 1 + k, edge k's. All parts are disjoint and of one size."""
    train_set, _ = load_digits()
    return take(train_set, partition(len(train_set[1]), 1 + num_edges, seed=seed)[index])


class ShiftedDigits(Dataset):
    """Digits that are shifted by up to one pixel in each direction, at random."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = F.pad(images, (1, 1, 1, 1), value=images.min().item())
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(3, (2,)).tolist()
        return self.images[index, :, top : top + 8, left : left + 8], self.labels[index]


def train(model: nn.Module, dataset: tuple[Tensor, Tensor], epochs: int) -> float:
    """Train a model; return the mean loss of the last epoch."""
    loader = DataLoader(ShiftedDigits(*dataset), batch_size=16, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    losses: list[float] = []
    for _ in range(epochs):
        losses.clear()
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)
