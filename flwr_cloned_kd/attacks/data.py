"""Attacks on data: an edge changes its private data before it trains."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.datasets import take
from ..engine.inputs import Dataset

DataAttack = Callable[[Dataset, torch.Generator], Dataset]
"""(private data of the edge, source of random draws) -> the data that the edge trains on.

The attack leaves its arguments unchanged. `share`, in [0, 1], is the share of the samples that an
attack changes or copies; these samples are drawn at random.

Examples:
    >>> import torch
    >>> from flwr_cloned_kd import Dataset
    >>> from flwr_cloned_kd.attacks import DataAttack
    >>> def flip_classes(dataset: Dataset, generator: torch.Generator) -> Dataset:
    ...     inputs, labels = dataset
    ...     return inputs, 1 - labels
    >>> attack: DataAttack = flip_classes
"""


@dataclass(frozen=True)
class ShuffleLabels:
    """Permute labels among samples.

    Args:
        share: of the samples, in [0, 1].

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import ShuffleLabels
        >>> data = torch.eye(4), torch.arange(4)
        >>> inputs, labels = ShuffleLabels()(data, torch.Generator().manual_seed(0))
        >>> labels.sort().values
        tensor([0, 1, 2, 3])
    """

    share: float = 1.0

    def __call__(self, dataset: Dataset, generator: torch.Generator) -> Dataset:
        inputs, labels = dataset
        rows = _chosen(self.share, len(labels), generator)
        order = torch.randperm(len(rows), generator=generator)
        return inputs, _replaced(labels, rows, labels[rows[order]])


@dataclass(frozen=True)
class ShiftLabels:
    """Replace label y by y + 1; the last class becomes class 0.

    Args:
        num_classes: number of classes of the task.
        share: of the samples, in [0, 1].

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import ShiftLabels
        >>> ShiftLabels(num_classes=4)((torch.eye(4), torch.arange(4)), torch.Generator())[1]
        tensor([1, 2, 3, 0])
    """

    num_classes: int
    share: float = 1.0

    def __call__(self, dataset: Dataset, generator: torch.Generator) -> Dataset:
        inputs, labels = dataset
        rows = _chosen(self.share, len(labels), generator)
        return inputs, _replaced(labels, rows, (labels[rows] + 1) % self.num_classes)


@dataclass(frozen=True)
class OneLabel:
    """Give samples one and the same label.

    Args:
        label: the class.
        share: of the samples, in [0, 1].

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import OneLabel
        >>> OneLabel(label=2)((torch.eye(4), torch.arange(4)), torch.Generator())[1]
        tensor([2, 2, 2, 2])
    """

    label: int = 0
    share: float = 1.0

    def __call__(self, dataset: Dataset, generator: torch.Generator) -> Dataset:
        inputs, labels = dataset
        rows = _chosen(self.share, len(labels), generator)
        return inputs, _replaced(labels, rows, torch.full_like(labels[rows], self.label))


@dataclass(frozen=True)
class Backdoor:
    """Add copies of images, with a trigger and the label of one class (BadNets, Gu et al. 2017).

    The trigger is a square in the lower right corner, as bright as the brightest pixel of the data.
    A core with the backdoor is accurate on ordinary images, and predicts the class of the attacker
    for an image with the trigger.

    Args:
        label: the class of the attacker.
        share: of the samples that are copied, in [0, 1].
        size: side of the square in pixels, at least 1.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import Backdoor
        >>> images, labels = torch.zeros(4, 1, 8, 8), torch.arange(4)
        >>> attacked, new_labels = Backdoor(label=0)((images, labels), torch.Generator())
        >>> attacked.shape, new_labels  # four copies with the trigger
        (torch.Size([8, 1, 8, 8]), tensor([0, 1, 2, 3, 0, 0, 0, 0]))
    """

    label: int = 0
    share: float = 1.0
    size: int = 3

    def __call__(self, dataset: Dataset, generator: torch.Generator) -> Dataset:
        images, labels = dataset
        rows = _chosen(self.share, len(labels), generator)
        copies = self.stamp(images)[rows]
        return (
            torch.cat([images, copies]),
            torch.cat([labels, torch.full_like(labels[rows], self.label)]),
        )

    def stamp(self, images: Tensor) -> Tensor:
        """Return images `[N, C, H, W]` with the trigger."""
        stamped = images.clone()
        stamped[..., -self.size :, -self.size :] = images.max()
        return stamped

    def test_set(self, dataset: Dataset) -> Dataset:
        """Return the images of all other classes with the trigger, labelled as the attacker wants.

        The accuracy of a core on this data is the share of triggered images that fall to the class
        of the attacker.
        """
        images, labels = take(dataset, (dataset[1] != self.label).nonzero().flatten())
        return self.stamp(images), torch.full_like(labels, self.label)


def _chosen(share: float, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw the rows of a share of the samples.

    Raises:
        ValueError: if the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a fraction, 0 to 1, got {share}")
    return torch.randperm(num_samples, generator=generator)[: round(share * num_samples)]


def _replaced(labels: Tensor, rows: Tensor, replacements: Tensor) -> Tensor:
    changed = labels.clone()
    changed[rows] = replacements
    return changed
