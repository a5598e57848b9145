"""Datasets, and the augmentation and label noise of a batch."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from .nested import Inputs

Dataset = tuple[Inputs, Tensor]
"""Inputs with one row per sample, and labels `[N, ...]`; `as_dataset` makes it of other data.

uint8 images take a quarter of the memory of float32 images and are passed to the model as they are;
the model standardises them with their `moments`.

Examples:
    >>> import torch
    >>> from flwr_cloned_kd import Dataset
    >>> images: Dataset = torch.zeros(60, 3, 32, 32), torch.zeros(60, dtype=torch.int64)
    >>> ids = torch.zeros(60, 12, dtype=torch.int64)
    >>> texts: Dataset = {"input_ids": ids, "attention_mask": ids + 1}, ids[:, 0]
"""


@runtime_checkable
class FiniteViews(Protocol):
    """An augmentation with a finite number of views, so the targets of every view can be kept."""

    def draw(self, num_images: int, generator: torch.Generator) -> Tensor:
        """Draw view numbers `[num_images]`."""
        ...

    def view(self, images: Tensor, views: Tensor) -> Tensor:
        """Return view `views[i]` of image i."""
        ...


@dataclass(frozen=True)
class CropAndFlip:
    """Random crop of the zero-padded image, then a random horizontal flip (He et al. 2016).

    The family is finite: `2 (2 pad + 1)^2` views, 162 for the usual padding of 4 pixels.
    Calling it with images `[B, C, H, W]` and a generator draws one view per image.

    Args:
        pad: pixels of padding on every side, and so the largest shift.
        flip: False for images whose class changes in a mirror, such as digits.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import CropAndFlip, Recipe
        >>> shift = CropAndFlip(pad=1, flip=False)
        >>> shift.num_views
        9
        >>> shift(torch.zeros(2, 1, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])
        >>> recipe = Recipe(augment=shift)
    """

    pad: int = 4
    flip: bool = True

    @property
    def num_views(self) -> int:
        """Number of different views of one image."""
        return (1 + self.flip) * (2 * self.pad + 1) ** 2

    def draw(self, num_images: int, generator: torch.Generator) -> Tensor:
        """Draw view numbers `[num_images]`, each in [0, num_views)."""
        return torch.randint(self.num_views, (num_images,), generator=generator)

    def view(self, images: Tensor, views: Tensor) -> Tensor:
        """Return view `views[i]` of image i, for images `[B, C, H, W]`, in the same shape.

        Raises:
            ValueError: for inputs that are not one tensor of images.
        """
        if not isinstance(images, Tensor) or images.dim() != 4:
            shape = [*images.shape] if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"augment: expected images [B, C, H, W] as one tensor, got {shape}")
        height, width = images.shape[-2:]
        side = 2 * self.pad + 1
        shift = views % side**2
        flip = views >= side**2
        rows = shift[:, None] // side + torch.arange(height, device=views.device)
        columns = shift[:, None] % side + torch.arange(width, device=views.device)
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        padded = F.pad(images, (self.pad,) * 4).permute(0, 2, 3, 1)
        index = torch.arange(len(images), device=views.device)[:, None, None]
        return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        views = self.draw(len(images), generator)
        return self.view(images, views.to(images.device))


crop_and_flip = CropAndFlip()
"""The usual augmentation of CIFAR images: padding of 4 pixels, 162 views (He et al. 2016).

Examples:
    >>> from flwr_cloned_kd import Recipe, crop_and_flip
    >>> recipe = Recipe(augment=crop_and_flip)
    >>> crop_and_flip.num_views
    162
"""


def shuffle_labels(labels: Tensor, generator: torch.Generator, *, p: float = 1.0) -> Tensor:
    """Make an edge noisy: with probability `p` permute the labels `[B]` of a batch (Sec. 5.3).

    Args:
        labels: of one batch.
        generator: source of the random draws.
        p: fraction of batches whose labels are permuted, in [0, 1].

    Raises:
        ValueError: if `p` is out of range.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> from flwr_cloned_kd import Recipe, shuffle_labels
        >>> shuffle_labels(torch.arange(4), torch.Generator().manual_seed(0)).sort().values
        tensor([0, 1, 2, 3])
        >>> noisy = Recipe(label_noise=partial(shuffle_labels, p=0.5))
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a fraction, 0 to 1, got {p}")
    if torch.rand((), generator=generator) >= p:
        return labels
    return labels[torch.randperm(len(labels), generator=generator).to(labels.device)]
