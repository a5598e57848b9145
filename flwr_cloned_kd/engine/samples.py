"""Data as people have it, converted to inputs and labels and checked once."""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)
from torch.utils.data import TensorDataset

from .inputs import Dataset
from .nested import (
    Inputs,
    each_tensor,
    num_rows,
    on_device,
    output_tensor,
    rows_of,
    run,
    tensors_of,
)
from .progress import log_once
from .tasks import Task

LABEL_KEYS = ("labels", "label")
"""Keys of the labels in a sample or in columns, in the order in which they are looked up."""
GIGABYTE = 1e9


def as_dataset(
    data: Any,
    model: nn.Module | None = None,
    task: Task | None = None,
    *,
    label_key: str | None = None,
    name: str = "dataset",
) -> Dataset:
    """Convert data to a pair of inputs and labels, and check it.

    A pair of tensors that needs no conversion is returned as the same object.

    Args:
        data: one of these forms:

            - a tuple (inputs, labels) of tensors or NumPy arrays with one row per sample; the
              inputs may be a dict or a tuple, nested to any depth;
            - columns: a dict of tensors or arrays, one of them the labels;
            - a `torch.utils.data.Dataset` or any other sequence. A sample is a tuple whose last
              entry is the label, or a dict with the label. Every sample is read once, so that a
              random transform is drawn once too.

            Of a dict the labels are taken out; a single remaining entry becomes a plain tensor.
        model: float64 inputs stay as they are for a model with float64 weights; for any other
            model, and for None, they are cast to float32.
        task: also check that the outputs of the model fit the labels, by a forward pass of two
            samples in evaluation mode. The model and the global generator stay unchanged.
        label_key: key of the labels in a dict; None: "labels" or "label".
        name: of the data, for messages.

    Returns:
        Inputs `[N, ...]` and labels `[N, ...]`; labels are float32, int64 or bool.

    Raises:
        ValueError: naming what was expected and what was found.

    Examples:
        >>> import numpy as np
        >>> from flwr_cloned_kd import as_dataset
        >>> inputs, labels = as_dataset({"image": np.zeros((5, 1, 8, 8)), "label": np.arange(5)})
        >>> inputs.shape, inputs.dtype, labels.dtype
        (torch.Size([5, 1, 8, 8]), torch.float32, torch.int64)
        >>> as_dataset((np.zeros(3), np.zeros(4)))
        Traceback (most recent call last):
        ValueError: dataset: expected inputs and labels of one length above 0, got 3 and 4
    """
    try:
        for argument, value in (("model", model), ("task", task)):
            if isinstance(value, type):
                raise ValueError(f"{argument}: expected an object, got the class {value.__name__}")
        if _is_converted(data):
            dataset: Dataset = data
        else:
            inputs, labels = _split(data, label_key)
            dataset = as_inputs(inputs, model), _labels(_tensor(labels, "labels"))
        _check(*dataset)
        if model is not None and task is not None:
            _check_model(model, dataset, task)
    except ValueError as error:
        # The cause is what the user's own model raised, if it did.
        raise ValueError(f"{name}: {error}") from error.__cause__
    return dataset


def as_inputs(inputs: Any, model: nn.Module | None = None) -> Inputs:
    """Convert a tensor or array, or a nested dict or tuple of such, to tensors.

    A tensor that needs no conversion is returned as the same object. Only a model with float64
    weights gets float64 inputs; other inputs are cast to float32, and one log line says so.

    Raises:
        ValueError: naming the part that holds something else than numbers.
    """
    tensors = _nested_tensors(inputs, "inputs")
    weights = () if model is None else model.parameters()
    if any(weight.dtype == torch.float64 for weight in weights):
        return tensors
    if any(tensor.dtype == torch.float64 for tensor in tensors_of(tensors)):
        log_once("inputs: cast from float64 to float32, the type of the model's weights")
    return each_tensor(lambda x: x.float() if x.dtype == torch.float64 else x, tensors)


def _split(data: Any, label_key: str | None) -> tuple[Any, Any]:
    """Return the inputs and the labels of data in any form."""
    if isinstance(data, tuple) and len(data) == 2:
        return data
    if isinstance(data, Mapping):
        return _without_label(data, label_key)
    if isinstance(data, TensorDataset):
        return _without_last(data.tensors)
    return _collected(data, label_key)


def _is_converted(data: Any) -> bool:
    """Return whether data is (inputs, labels) in tensors that need no conversion."""
    if not isinstance(data, tuple) or len(data) != 2:
        return False
    tensors = tree_leaves(data)
    return (
        all(isinstance(tensor, Tensor) for tensor in tensors)
        and all(tensor.dtype != torch.float64 for tensor in tensors)
        and isinstance(data[1], Tensor)
        and data[1].dtype in (torch.int64, torch.float32, torch.bool)
    )


def _nested_tensors(value: Any, name: str) -> Inputs:
    if isinstance(value, Mapping):
        return {key: _nested_tensors(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, tuple):
        parts = enumerate(value)
        return tuple(_nested_tensors(part, f"{name}[{index}]") for index, part in parts)
    return _tensor(value, name)


def _labels(labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return labels.float()
    return labels if labels.dtype == torch.bool else labels.long()


def _tensor(value: Any, name: str) -> Tensor:
    """Convert a tensor, an array or a number to a tensor."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool | int | float):
        return torch.tensor(value)
    if isinstance(value, list) or hasattr(value, "__array__"):  # such as a table of pandas
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        kind = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name}: expected numbers in a tensor or an array, got {kind}")
    array = value
    if array.dtype.kind == "u" and array.itemsize > 1:
        array = array.astype(np.int64)  # PyTorch has few operations for these types
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # PyTorch warns about arrays that are not writable, and refuses negative strides.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _without_label(sample: Mapping[str, Any], label_key: str | None) -> tuple[Any, Any]:
    """Take the label out of a dict; a single remaining entry stands for itself."""
    keys = LABEL_KEYS if label_key is None else (label_key,)
    key = next((key for key in keys if key in sample), None)
    if key is None:
        expected = " or ".join(map(repr, keys))
        raise ValueError(f"expected a key {expected} for the labels, got {list(sample)}")
    inputs = {name: value for name, value in sample.items() if name != key}
    if not inputs:
        raise ValueError(f"expected inputs beside the labels {key!r}, got none")
    return (next(iter(inputs.values())) if len(inputs) == 1 else inputs), sample[key]


def _without_last(parts: Sequence[Any]) -> tuple[Any, Any]:
    """Split off the label, the last part; a single remaining part stands for itself."""
    *inputs, label = parts
    return (inputs[0] if len(inputs) == 1 else tuple(inputs)), label


def _collected(data: Any, label_key: str | None) -> tuple[Inputs, Tensor]:
    """Read every sample of a dataset into memory that is allocated once."""
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not sized or isinstance(data, str | bytes):
        hint = "; pass its .dataset" if hasattr(data, "dataset") else ""  # of a DataLoader
        raise ValueError(
            "expected (inputs, labels), a dict of columns or a dataset with a length, "
            f"got {type(data).__name__}{hint}"
        )
    if not len(data):
        raise ValueError("expected at least one sample, got none")
    first, form = tree_flatten(_sample(data, 0, label_key))
    check_memory(len(data) * sum(tensor.nbytes for tensor in first), "samples")
    columns = [torch.empty((len(data), *tensor.shape), dtype=tensor.dtype) for tensor in first]
    for index in range(len(data)):
        tensors, form_of_sample = tree_flatten(_sample(data, index, label_key))
        shapes = [[*tensor.shape] for tensor in tensors]
        expected = [[*tensor.shape] for tensor in first]
        if form_of_sample != form or shapes != expected:
            raise ValueError(
                f"sample {index}: expected the shapes of sample 0, {expected}, got {shapes}; "
                "samples of different sizes must be padded or cropped"
            )
        for column, tensor in zip(columns, tensors):
            column[index] = tensor
    inputs, labels = tree_unflatten(columns, form)
    return inputs, labels


def _sample(data: Any, index: int, label_key: str | None) -> tuple[Inputs, Tensor]:
    """Read one sample as tensors: (inputs, label)."""
    try:
        sample = data[index]
    except (KeyError, TypeError) as error:  # such as a table of pandas, whose keys are columns
        raise ValueError(
            f"sample {index}: expected a dataset with samples 0 to {len(data) - 1}, got "
            f"{type(data).__name__} without {error}"
        ) from error
    try:
        if isinstance(sample, Mapping):
            inputs, label = _without_label(sample, label_key)
        elif isinstance(sample, tuple | list) and len(sample) > 1:
            inputs, label = _without_last(sample)
        else:
            kind = type(sample).__name__
            raise ValueError(f"expected (input, label) or a dict, got {kind}")
        return _nested_tensors(inputs, "inputs"), _labels(_tensor(label, "label"))
    except ValueError as error:
        raise ValueError(f"sample {index}: {error}") from None


def check_memory(num_bytes: int, what: str) -> None:
    """Refuse what does not fit into the free memory.

    Raises:
        ValueError: with both sizes.
    """
    available = available_bytes()
    if num_bytes > available:
        raise ValueError(
            f"expected at most the {available / GIGABYTE:.1f} GB of free memory, "
            f"got {num_bytes / GIGABYTE:.1f} GB of {what}"
        )


def available_bytes() -> int:
    """Return how much memory new tensors can take without swapping."""
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.virtual_memory().available)


def _check(inputs: Inputs, labels: Tensor) -> None:
    """Check lengths and values."""
    named = [
        (f"inputs{keystr(path)}", tensor) for path, tensor in tree_flatten_with_path(inputs)[0]
    ]
    named = [*named, ("labels", labels)]
    if len(named) == 1:
        raise ValueError("inputs: expected at least one tensor, got none")
    for name, tensor in named:
        if not tensor.dim():
            raise ValueError(f"{name}: expected one row per sample, got a single number")
    lengths = [len(tensor) for _, tensor in named]
    if min(lengths) != max(lengths) or not lengths[0]:
        all_inputs = " and ".join(map(str, dict.fromkeys(lengths[:-1])))
        raise ValueError(
            f"expected inputs and labels of one length above 0, got {all_inputs} and {lengths[-1]}"
        )
    for name, tensor in named:
        # The extremes are NaN if any value is, and need no memory of the size of the data.
        if tensor.is_floating_point() and tensor.numel():
            extremes = torch.stack(torch.aminmax(tensor))
            if not extremes.isfinite().all():
                bad = extremes[~extremes.isfinite()][0].item()
                raise ValueError(f"{name}: expected finite values, got {bad}")


def _check_model(model: nn.Module, dataset: Dataset, task: Task) -> None:
    """Check the outputs of a model for two samples, on a copy of the model."""
    inputs, labels = dataset
    probe = copy.deepcopy(model).eval()
    device = next((tensor.device for tensor in probe.state_dict().values()), labels.device)
    two = on_device(rows_of(inputs, slice(2)), device)
    shapes = [f"{[*tensor.shape]} {tensor.dtype}" for tensor in tensors_of(two)]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] * (device.type == "cuda")):
            outputs = run(probe, two)
    except Exception as error:  # the model is the user's and may raise anything
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model: expected to run on inputs {', '.join(shapes)}, got: {cause}"
        ) from error
    outputs = output_tensor(outputs)
    if not outputs.dim() or len(outputs) != num_rows(two):
        raise ValueError(
            f"model: expected outputs [B, ...] for B samples, got {[*outputs.shape]} for "
            f"{num_rows(two)} samples"
        )
    task.check(outputs, labels)
