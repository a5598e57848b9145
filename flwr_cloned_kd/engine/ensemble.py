"""An ensemble is a state dict whose tensors carry a leading clone axis, `[E, *shape]`."""

import copy
from collections.abc import Callable, Mapping
from statistics import mode
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .counts import check_count

StateDict = dict[str, Tensor]
"""Name -> tensor `[*shape]`: one model, as PyTorch's `state_dict()` returns it.

Examples:
    >>> import torch
    >>> from flwr_cloned_kd import StateDict
    >>> params: StateDict = {"w": torch.zeros(2, 3)}
"""
Ensemble = dict[str, Tensor]
"""Name -> tensor `[E, *shape]`: E clones of one model, with the clone axis first.

Examples:
    >>> import torch
    >>> from flwr_cloned_kd import Ensemble, member
    >>> ensemble: Ensemble = {"w": torch.zeros(4, 2, 3)}
    >>> member(ensemble, 0)["w"].shape
    torch.Size([2, 3])
"""

MAX_NAMES = 3
"""Number of array names in an error message."""
MAX_NAME_CHARACTERS = 80


def clone(params: Mapping[str, Tensor], num_clones: int) -> Ensemble:
    """Copy one model `num_clones` times: every `[*shape]` becomes `[num_clones, *shape]`.

    Args:
        params: the model.
        num_clones: E, at least 1.

    Raises:
        ValueError: if `num_clones` is below 1.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import clone
        >>> clone({"w": torch.tensor([1.0, 2.0])}, 3)["w"].shape
        torch.Size([3, 2])
    """
    check_count("num_clones", num_clones)
    return {name: torch.stack([tensor.detach()] * num_clones) for name, tensor in params.items()}


def member(ensemble: Mapping[str, Tensor], index: int) -> StateDict:
    """Return clone `index` of an ensemble as an ordinary state dict (views, not copies).

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import member
        >>> member({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, 1)
        {'w': tensor([3., 4.])}
    """
    return {name: tensor[index] for name, tensor in ensemble.items()}


def size(ensemble: Mapping[str, Tensor]) -> int:
    """Return E, the number of clones.

    Raises:
        ValueError: for an ensemble without a tensor.
    """
    if not ensemble:
        raise ValueError("ensemble: expected at least one tensor, got none")
    return len(next(iter(ensemble.values())))


def mean(ensemble: Mapping[str, Tensor]) -> StateDict:
    """Average the clones; integer tensors are counters and are taken from the first clone."""
    return {
        name: tensor.mean(0) if tensor.is_floating_point() else tensor[0]
        for name, tensor in ensemble.items()
    }


def check_finite(params: Mapping[str, Tensor], what: str = "") -> None:
    """Refuse NaN and infinity.

    Args:
        what: prefix of the name in the error message.

    Raises:
        ValueError: for the first tensor with a value that is not finite.
    """
    for name, tensor in params.items():
        num_bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if num_bad:
            raise ValueError(
                f"{what}{name}: expected finite values, "
                f"got {num_bad} of {tensor.numel()} not finite"
            )


def as_ensemble(arrays: Mapping[str, Any], like: Mapping[str, Tensor]) -> Ensemble:
    """Check the arrays of an edge against the core and return them as an ensemble.

    Arrays with exactly the shapes of the core are an ensemble of one. The reply of an ordinary
    federated client is therefore an ensemble too.

    Args:
        arrays: NumPy arrays or tensors by name, all `[*shape]` or all `[E, *shape]`.
        like: state dict of the core, with the expected names, shapes and dtypes.

    Raises:
        ValueError: for a missing or unknown name, a wrong type, dtype, shape or clone count, or
            a value that is not finite: "conv1.weight: expected ..., got ...".

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> from flwr_cloned_kd import as_ensemble
        >>> core = {"w": torch.zeros(2)}
        >>> as_ensemble({"w": np.ones((3, 2), np.float32)}, core)["w"].shape
        torch.Size([3, 2])
        >>> as_ensemble({"w": np.ones(2, np.float32)}, core)["w"].shape  # a plain model
        torch.Size([1, 2])
        >>> as_ensemble({"w": np.ones((3, 5), np.float32)}, core)
        Traceback (most recent call last):
        ValueError: w: expected shape (3, 2), got (3, 5)
    """
    if not like:
        raise ValueError("core: expected a model with at least one tensor, got none")
    missing = sorted(like.keys() - arrays.keys())
    unknown = sorted(arrays.keys() - like.keys())
    if missing or unknown:
        raise ValueError(
            f"array names: expected the core's {len(like)}, "
            f"missing {_some(missing)}, unknown {_some(unknown)}"
        )
    tensors = {name: _as_tensor(name, arrays[name]) for name in like}
    for name, tensor in tensors.items():
        if tensor.dtype != like[name].dtype:
            raise ValueError(f"{name}: expected dtype {like[name].dtype}, got {tensor.dtype}")
    clone_axes = _clone_axes(tensors, like)
    for name, tensor in tensors.items():
        expected = (*clone_axes, *like[name].shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
    check_finite(tensors)
    if clone_axes:
        return tensors
    return {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}


def _clone_axes(tensors: StateDict, like: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the axes before the core's shape: (E,) for an ensemble, () for one plain model.

    The most frequent value counts, so that an error names the tensor that differs from the others.
    """
    axes = mode(
        tuple(tensor.shape[: max(tensor.dim() - like[name].dim(), 0)])
        for name, tensor in tensors.items()
    )
    return (1,) if len(axes) > 1 or 0 in axes else axes


def _as_tensor(name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    # `Array.numpy()` of Flower may return an NpzFile or an object array; reject both here.
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        kind = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: expected an array of numbers, got {kind}")
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError:  # a type that PyTorch does not have, such as longdouble
        raise ValueError(f"{name}: expected an array of numbers, got dtype {array.dtype}") from None


def _some(names: list[str]) -> str:
    """List the first names of arrays in a form that is safe for a log line."""
    if not names:
        return "none"
    num_more = len(names) - MAX_NAMES
    # An edge chooses these names: limit their length, and escape line breaks by `repr`.
    listed = ", ".join(repr(name[:MAX_NAME_CHARACTERS]) for name in names[:MAX_NAMES])
    return f"{listed} and {num_more} more" if num_more > 0 else listed


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the largest submodules that have parameters, none of which requires a gradient.

    The model itself is one of them if it has no parameter that requires a gradient.
    """
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [model]
    return [module for child in model.children() for module in frozen_modules(child)]


def trained_state(model: nn.Module) -> StateDict:
    """Return the part of a model's state dict that training can change.

    These are the parameters that require a gradient, and the buffers outside of `frozen_modules`.
    This part travels, is remembered and is written to checkpoints; for a model without a frozen
    parameter it is the whole state dict. Load it into a model that has the same frozen part with
    `load_state_dict(..., strict=False)`.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import trained_state
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> model[0].requires_grad_(False)
        Linear(in_features=8, out_features=4, bias=True)
        >>> list(trained_state(model))
        ['1.weight', '1.bias']
    """
    frozen_tensors = {id(p) for p in model.parameters() if not p.requires_grad}
    for module in frozen_modules(model):
        frozen_tensors |= {id(buffer) for buffer in module.buffers()}
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in frozen_tensors
    }


def frozen_state(model: nn.Module) -> StateDict:
    """Return the part of a model's state dict that training cannot change."""
    trained = trained_state(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in trained}


def initialise(model: nn.Module, seed: int) -> StateDict:
    """Draw new initial weights for a model; the model and the global generator stay unchanged.

    Every submodule with a `reset_parameters` method, PyTorch's convention, is reset. So is every
    attention module, whose method is called `_reset_parameters`. An `nn.Parameter` of any other
    module keeps its value.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import initialise
        >>> model = torch.nn.Linear(2, 1)
        >>> first, again, other = (initialise(model, seed)["weight"] for seed in (0, 0, 1))
        >>> torch.equal(first, again), torch.equal(first, other)
        (True, False)
    """
    fresh = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would also seed the GPUs, whose generators are not forked here.
        torch.default_generator.manual_seed(seed)
        # An attention module initialises the weights of its submodules again: reset these modules
        # last, inner modules before outer ones.
        attention = reversed(_methods(fresh, "_reset_parameters"))
        for reset in (*_methods(fresh, "reset_parameters"), *attention):
            reset()
    return {name: tensor.detach() for name, tensor in fresh.state_dict().items()}


def _methods(model: nn.Module, name: str) -> list[Callable[[], None]]:
    attributes = [getattr(module, name, None) for module in model.modules()]
    return [attribute for attribute in attributes if callable(attribute)]


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """Give a model the initial weights that `seed` determines and return the model."""
    model.load_state_dict(initialise(model, seed))
    return model
