"""The textbook implementation: the engine is timed against it and, on tiny data, tested by it.

It is the code that a competent user writes in a day: torchvision transforms in a Dataset, a
DataLoader, one model at a time, float32, every teacher run at every step. It imports nothing of
flwr_cloned_kd.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2


class Images(Dataset[tuple[Tensor, int]]):
    """Images `[N, C, H, W]` and labels, transformed one by one as they are read."""

    def __init__(
        self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return image if self.transform is None else self.transform(image), int(self.labels[index])


def crop_flip_and_normalise(
    size: int, mean: Sequence[float], deviation: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """Compose the transforms of the usual CIFAR tutorial, for uint8 pixels."""
    transform: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.RandomCrop(size, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32),
            v2.Normalize(list(mean), list(deviation)),
        ]
    )
    return transform


def train_clones(
    core: nn.Module, data: Images, *, num_clones: int, epochs: int, device: str = "cpu"
) -> list[nn.Module]:
    """Phase 1: train clones of the core one after the other."""
    clones = []
    for index in range(num_clones):
        model = copy.deepcopy(core).to(device)
        loader = _loader(data, seed=index)
        optimiser, scheduler = _optimiser(model, epochs * len(loader))
        model.train()
        for _ in range(epochs):
            for images, labels in loader:
                images, labels = images.to(device), labels.to(device)
                loss = F.cross_entropy(model(images), labels)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                scheduler.step()
        clones.append(model)
    return clones


def distill(
    core: nn.Module,
    memory: Sequence[Sequence[nn.Module]],
    data: Images,
    *,
    epochs: int,
    temperature: float = 4.0,
    device: str = "cpu",
) -> nn.Module:
    """Phase 2: Eq. (2), cross entropy plus one divergence per clone of every ensemble."""
    model = copy.deepcopy(core).to(device)
    teachers = [[clone.to(device).eval() for clone in ensemble] for ensemble in memory]
    loader = _loader(data, seed=0)
    optimiser, scheduler = _optimiser(model, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            student = F.log_softmax(logits / temperature, dim=1)
            for ensemble in teachers:
                for teacher in ensemble:
                    with torch.no_grad():
                        soft = F.softmax(teacher(images) / temperature, dim=1)
                    divergence = F.kl_div(student, soft, reduction="batchmean")
                    loss = loss + temperature**2 / len(ensemble) * divergence
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            scheduler.step()
    return model


def _loader(data: Images, *, seed: int) -> DataLoader[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=128, shuffle=True, generator=generator)


def _optimiser(
    model: nn.Module, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    steps = [num_steps // 2, 3 * num_steps // 4]
    return optimiser, torch.optim.lr_scheduler.MultiStepLR(optimiser, steps)
