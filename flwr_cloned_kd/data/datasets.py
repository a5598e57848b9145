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
from ..engine.nested import rows_of

NUMPY_READ_ERRORS = (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Exceptions that NumPy raises for a truncated, corrupt or non-archive file."""
ARCHIVE_NAMES = ("x_train", "y_train", "x_test", "y_test")


def load_digits(test_size: int = 360) -> tuple[Dataset, Dataset]:
    """Load the 1,797 handwritten digits of scikit-learn, 8x8 grey: (train, test), standardised.

    The split is fixed and stratified. The data is part of scikit-learn; nothing is downloaded.

    Args:
        test_size: number of test images, below 1,797.

    Raises:
        ImportError: without scikit-learn.

    Examples:
        >>> from flwr_cloned_kd import load_digits
        >>> train, test = load_digits()
        >>> train[0].shape, test[1].shape
        (torch.Size([1437, 1, 8, 8]), torch.Size([360]))
    """
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            'load_digits needs scikit-learn: pip install "flwr-cloned-kd[digits]"'
        ) from error
    images, labels = load(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=test_size, stratify=labels, random_state=0
    )
    return _datasets(
        (train.reshape(-1, 8, 8, 1), train_labels), (test.reshape(-1, 8, 8, 1), test_labels)
    )


def load_cifar100(root: str | Path, *, download: bool = True) -> tuple[Dataset, Dataset]:
    """Load CIFAR-100 through torchvision: (train, test), uint8.

    Args:
        root: folder that holds torchvision's `cifar-100-python`, or to which it is downloaded.
        download: whether to download the data if the folder does not hold them.

    Raises:
        RuntimeError: if the folder does not hold the data and `download` is False.

    Examples:
        >>> from flwr_cloned_kd import load_cifar100
        >>> train, test = load_cifar100("data")  # doctest: +SKIP
    """
    from torchvision.datasets import CIFAR100

    parts = [CIFAR100(str(root), train=train, download=download) for train in (True, False)]
    return _datasets(*((part.data, np.asarray(part.targets)) for part in parts))


def load_npz(path: str | Path) -> tuple[Dataset, Dataset]:
    """Load an archive of `x_train`, `y_train`, `x_test`, `y_test`: (train, test).

    Images are `[N, H, W]`, `[N, H, W, C]` or, if C is 1 or 3, also `[N, C, H, W]`. uint8 images are
    kept as they are; images of another type are standardised.

    Raises:
        ValueError: for a damaged file, a file that is not an archive, or an array that is missing
            or has a wrong shape or type; the message names the file and the array.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from flwr_cloned_kd import load_npz
        >>> images, labels = np.zeros((6, 8, 8), np.uint8), np.arange(6)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "images.npz")
        ...     np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
        ...     train, test = load_npz(path)
        >>> train[0].shape, train[0].dtype
        (torch.Size([6, 1, 8, 8]), torch.uint8)
    """
    with Path(path).open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            arrays = {name: archive[name] for name in ARCHIVE_NAMES if name in archive.files}
        except NUMPY_READ_ERRORS as error:
            raise ValueError(
                f"{path}: expected an .npz archive of numbers, got {error!r}"
            ) from None
    missing = sorted(set(ARCHIVE_NAMES) - arrays.keys())
    if missing:
        raise ValueError(
            f"{path}: expected {', '.join(ARCHIVE_NAMES)}, missing {', '.join(missing)}"
        )
    train, test = ((arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test"))
    for part, (images, labels) in (("train", train), ("test", test)):
        if images.ndim not in (3, 4) or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"{path}: expected x_{part} [N, H, W(, C)] and y_{part} [N], "
                f"got {images.shape} and {labels.shape}"
            )
        if images.dtype.kind not in "fiu" or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{path}: expected numbers in x_{part} and integers in y_{part}, "
                f"got {images.dtype} and {labels.dtype}"
            )
        if not np.isfinite(images).all():
            raise ValueError(f"{path}: expected finite pixels in x_{part}")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"{path}: expected images of one shape, "
            f"got x_train {train[0].shape} and x_test {test[0].shape}"
        )
    return _datasets(train, test)


def load_huggingface(
    name: str, *, image_key: str = "img", label_key: str = "fine_label"
) -> tuple[Dataset, Dataset]:
    """Load the `train` and `test` splits of a HuggingFace dataset through flwr-datasets, uint8.

    Args:
        name: a dataset on the hub, such as "uoft-cs/cifar100", or a local folder with a dataset.
        image_key: column of images, which all have the same size.
        label_key: column of integer labels.

    Raises:
        ImportError: without flwr-datasets.
        ValueError: if the dataset has no such column.

    Examples:
        >>> from flwr_cloned_kd import load_huggingface
        >>> train, test = load_huggingface("uoft-cs/cifar100")  # doctest: +SKIP
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
    return _datasets(*parts)


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation `[C]` of each channel of images `[N, C, H, W]`."""
    channels = [images[:, channel].float() for channel in range(images.shape[1])]
    deviations, means = zip(*(torch.std_mean(pixels) for pixels in channels))
    return torch.stack(means), torch.stack(deviations).clamp(min=1e-8)


def standardise(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """Scale images to float32 with mean 0 and deviation 1 in each channel of the training images.

    The test images are scaled with the moments of the training images.
    """
    mean, deviation = (moment[:, None, None] for moment in moments(train[0]))

    def scaled(dataset: Dataset) -> Dataset:
        images, labels = dataset
        return (images - mean) / deviation, labels

    return scaled(train), scaled(test)


def _datasets(train: tuple[Any, Any], test: tuple[Any, Any]) -> tuple[Dataset, Dataset]:
    """Turn NumPy (images, labels) into datasets; standardise them unless both are uint8."""
    datasets = _dataset(*train), _dataset(*test)
    if all(images.dtype == torch.uint8 for images, _ in datasets):
        return datasets
    return standardise(*datasets)


def _dataset(images: Any, labels: Any) -> Dataset:
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] in (1, 3) or images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    dtype = np.uint8 if images.dtype == np.uint8 else np.float32
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=dtype))
    return pixels, torch.from_numpy(np.array(labels, dtype=np.int64))


def partition(num_samples: int, num_parts: int, *, seed: int = 0) -> list[Tensor]:
    """Split row numbers at random into disjoint parts of even size (Sec. 5).

    Each of 10 parts of the 50,000 CIFAR-100 images has 50 images per class on average, with a
    standard deviation of 6.7.

    Args:
        num_samples: number of rows.
        num_parts: number of parts, at least 1.
        seed: determines the split.

    Returns:
        `num_parts` int64 tensors of row numbers, sizes differing by at most one.

    Raises:
        ValueError: if there are more parts than samples, or fewer than 1.

    Examples:
        >>> from flwr_cloned_kd import partition
        >>> core_rows, *edge_rows = partition(1437, num_parts=10)
        >>> len(core_rows), len(edge_rows)
        (144, 9)
    """
    if not 1 <= num_parts <= num_samples:
        raise ValueError(f"num_parts: expected 1 to {num_samples}, got {num_parts}")
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(num_parts))


def partition_with(partitioner: Any, labels: Tensor) -> list[Tensor]:
    """Split rows with a partitioner of flwr-datasets, so that class distributions can differ.

    Args:
        partitioner: for example `DirichletPartitioner(9, partition_by="label", alpha=0.3)`.
        labels: `[N]`, the column "label" for the partitioner.

    Returns:
        One int64 tensor of row numbers per partition.

    Examples:
        >>> import torch
        >>> from flwr_datasets.partitioner import IidPartitioner
        >>> from flwr_cloned_kd import partition_with
        >>> [len(rows) for rows in partition_with(IidPartitioner(3), torch.zeros(9))]
        [3, 3, 3]
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
    """Return a copy of some rows of a dataset, given their numbers.

    Args:
        dataset: inputs and labels.
        rows: row numbers from 0, in the order of the result.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import take
        >>> inputs, labels = take((torch.eye(3), torch.tensor([5, 6, 7])), [2, 0])
        >>> labels
        tensor([7, 5])
    """
    index = torch.as_tensor(rows)
    if not len(index):
        index = index.long()  # an empty list becomes float32, which cannot index
    part: Dataset = rows_of(dataset, index)
    return part
