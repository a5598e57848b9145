"""Datasets as two tensors, and their split into core and edges."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.inputs import Dataset

UNREADABLE = (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What an archive that was cut or altered, or is none, raises when NumPy reads it."""


def load_digits(test_size: int = 360) -> tuple[Dataset, Dataset]:
    """Load scikit-learn's 1,797 handwritten digits, 8x8 grey: (train, test), standardised.

    The split is fixed and stratified; the package embeds the data, nothing is downloaded.
    """
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("load_digits needs scikit-learn: pip install scikit-learn") from error
    images, labels = load(return_X_y=True)
    halves = train_test_split(images, labels, test_size=test_size, stratify=labels, random_state=0)
    train, test = (half.reshape(-1, 8, 8, 1) for half in halves[:2])
    return _read((train, halves[2]), (test, halves[3]))


def load_cifar100(root: str | Path, *, download: bool = True) -> tuple[Dataset, Dataset]:
    """Load CIFAR-100 through torchvision: (train, test), uint8.

    Args:
        root: folder that holds, or receives, torchvision's `cifar-100-python`.
    """
    from torchvision.datasets import CIFAR100

    parts = [CIFAR100(str(root), train=train, download=download) for train in (True, False)]
    return _read(*((part.data, np.asarray(part.targets)) for part in parts))


def load_npz(path: str | Path) -> tuple[Dataset, Dataset]:
    """Load an archive of `x_train`, `y_train`, `x_test`, `y_test`: (train, test).

    Images are `[N, H, W]`, `[N, H, W, C]` or, with C of 1 or 3 first, `[N, C, H, W]`. uint8 ones
    stay so, others are standardised.

    Raises:
        ValueError: naming the archive and the array that is missing, misshaped or no numbers; or
            for a file that is damaged or no archive.
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    with Path(path).open("rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            arrays = {name: loaded[name] for name in names if name in loaded.files}
        except UNREADABLE as error:
            raise ValueError(
                f"{path}: expected an .npz archive of numbers, got {error!r}"
            ) from None
    missing = sorted(set(names) - arrays.keys())
    if missing:
        raise ValueError(f"{path}: expected {', '.join(names)}, missing {', '.join(missing)}")
    parts = [(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")]
    for part, (images, labels) in zip(("train", "test"), parts):
        if images.ndim not in (3, 4) or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(f"{path}: expected x_{part} [N, H, W(, C)] and y_{part} [N], "
                             f"got {images.shape} and {labels.shape}")  # fmt: skip
        if images.dtype.kind not in "fiu" or labels.dtype.kind not in "iu":
            raise ValueError(f"{path}: expected numbers in x_{part} and integers in y_{part}, "
                             f"got {images.dtype} and {labels.dtype}")  # fmt: skip
        if not np.isfinite(images).all():
            raise ValueError(f"{path}: expected finite pixels in x_{part}")
    if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
        raise ValueError(f"{path}: expected images of one shape, got x_train "
                         f"{parts[0][0].shape} and x_test {parts[1][0].shape}")  # fmt: skip
    return _read(*parts)


def load_huggingface(
    name: str, *, image_key: str = "img", label_key: str = "fine_label"
) -> tuple[Dataset, Dataset]:
    """Load the `train` and `test` splits of a HuggingFace dataset through flwr-datasets, uint8.

    Args:
        name: a dataset on the hub, such as "uoft-cs/cifar100", or a local folder of one.
        image_key: column of images, all of one size.
        label_key: column of integer labels.

    Raises:
        ImportError: without flwr-datasets.
        ValueError: if the dataset has no such column.
    """
    try:
        from flwr_datasets import FederatedDataset
    except ImportError as error:
        raise ImportError(
            'load_huggingface needs flwr-datasets: pip install "flwr-cloned-kd[datasets]"'
        ) from error
    hub = FederatedDataset(dataset=name, partitioners={})
    parts = []
    for split in ("train", "test"):
        rows = hub.load_split(split)
        for key in (image_key, label_key):
            if key not in rows.column_names:
                raise ValueError(f"{name}: expected a column {key!r}, got {rows.column_names}")
        images = np.stack([np.asarray(image) for image in rows[image_key]])
        parts.append((images, np.asarray(rows[label_key])))
    return _read(*parts)


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the deviation `[C]` of images `[N, C, H, W]`, per channel."""
    channels = [images[:, channel].float() for channel in range(images.shape[1])]
    found = [torch.std_mean(pixels) for pixels in channels]
    return torch.stack([m for _, m in found]), torch.stack([d for d, _ in found]).clamp(min=1e-8)


def standardise(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """Make images float32 of mean 0 and deviation 1 per channel; the moments are those of train."""
    mean, deviation = (moment[:, None, None] for moment in moments(train[0]))
    (x, y), (x_test, y_test) = train, test
    return ((x - mean) / deviation, y), ((x_test - mean) / deviation, y_test)


def _read(train: tuple[Any, Any], test: tuple[Any, Any]) -> tuple[Dataset, Dataset]:
    """Turn NumPy (images, labels) into datasets; standardise what is not uint8."""
    parts = _tensors(*train), _tensors(*test)
    kept = all(images.dtype == torch.uint8 for images, _ in parts)
    return parts if kept else standardise(*parts)


def _tensors(images: Any, labels: Any) -> Dataset:
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] in (1, 3) or images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    kind = np.uint8 if images.dtype == np.uint8 else np.float32
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=kind))
    return pixels, torch.from_numpy(np.array(labels, dtype=np.int64))


def partition(num_samples: int, num_parts: int, *, seed: int = 0) -> list[Tensor]:
    """Split row numbers at random into disjoint parts of even size (Sec. 5).

    50,000 CIFAR-100 images in 10 parts: 50 per class with a standard deviation of 6.7.

    Returns:
        `num_parts` int64 tensors of row numbers, sizes differing by at most one.

    Raises:
        ValueError: if there are more parts than samples, or fewer than 1.
    """
    if not 1 <= num_parts <= num_samples:
        raise ValueError(f"num_parts: expected 1 to {num_samples}, got {num_parts}")
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(num_parts))


def partition_with(partitioner: Any, labels: Tensor) -> list[Tensor]:
    """Split rows with a partitioner of flwr-datasets, for data that is not identically spread.

    Args:
        partitioner: for example `DirichletPartitioner(9, partition_by="label", alpha=0.3)`.
        labels: `[N]`; the partitioner sees them as the column "label".

    Returns:
        One int64 tensor of row numbers per partition.
    """
    from datasets import Dataset as Table

    partitioner.dataset = Table.from_dict(
        {"row": list(range(len(labels))), "label": labels.tolist()}
    )
    return [
        torch.tensor(partitioner.load_partition(part)["row"], dtype=torch.int64)
        for part in range(partitioner.num_partitions)
    ]


def take(dataset: Dataset, rows: Tensor | Sequence[int]) -> Dataset:
    """Return the named rows of a dataset, copied."""
    index = torch.as_tensor(rows)
    if not len(index):
        index = index.long()  # no rows have no type of their own
    return dataset[0][index], dataset[1][index]
