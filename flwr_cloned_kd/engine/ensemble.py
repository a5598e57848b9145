"""An ensemble is a state dict whose tensors carry a leading clone axis, `[E, *shape]`."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]
Ensemble = dict[str, Tensor]


def clone(params: Mapping[str, Tensor], num_clones: int) -> Ensemble:
    """Copy one model `num_clones` times: every `[*shape]` becomes `[num_clones, *shape]`.

    Raises:
        ValueError: if `num_clones` is below 1.
    """
    if num_clones < 1:
        raise ValueError(f"num_clones: expected at least 1, got {num_clones}")
    return {name: torch.stack([tensor.detach()] * num_clones) for name, tensor in params.items()}


def member(ensemble: Mapping[str, Tensor], index: int) -> StateDict:
    """Return clone `index` of an ensemble as an ordinary state dict (views, not copies)."""
    return {name: tensor[index] for name, tensor in ensemble.items()}


def size(ensemble: Mapping[str, Tensor]) -> int:
    """Return E, the number of clones.

    Raises:
        ValueError: if there is no tensor that could tell.
    """
    if not ensemble:
        raise ValueError("ensemble: expected at least one tensor, got none")
    return len(next(iter(ensemble.values())))


def mean(ensemble: Mapping[str, Tensor]) -> StateDict:
    """Average the clones; integer tensors, which count, are taken from the first one."""
    return {
        name: tensor.mean(0) if tensor.is_floating_point() else tensor[0]
        for name, tensor in ensemble.items()
    }


def check_finite(params: Mapping[str, Tensor], what: str = "") -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: naming the first tensor that holds one, after the prefix `what`.
    """
    for name, tensor in params.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise ValueError(
                f"{what}{name}: expected finite values, got {bad} of {tensor.numel()} not finite"
            )


def as_ensemble(arrays: Mapping[str, Any], like: Mapping[str, Tensor]) -> Ensemble:
    """Check what an edge sent against the core and return it as an ensemble.

    Arrays shaped exactly as the core's are an ensemble of one, so the reply of any ordinary
    federated client is one too.

    Args:
        arrays: NumPy arrays or tensors by name, all `[*shape]` or all `[E, *shape]`.
        like: the core's state dict; it says which names, shapes and dtypes are expected.

    Raises:
        ValueError: for a missing or unknown name, a wrong type, dtype, shape or clone count, or
            a value that is not finite: "conv1.weight: expected ..., got ...".
    """
    if not like:
        raise ValueError("core: expected a model with at least one tensor, got none")
    missing, unknown = sorted(like.keys() - arrays.keys()), sorted(arrays.keys() - like.keys())
    if missing or unknown:
        raise ValueError(
            f"array names: expected the core's {len(like)}, "
            f"missing {_some(missing)}, unknown {_some(unknown)}"
        )
    found = {name: _as_tensor(name, arrays[name]) for name in like}
    for name, tensor in found.items():
        if tensor.dtype != like[name].dtype:
            raise ValueError(f"{name}: expected dtype {like[name].dtype}, got {tensor.dtype}")
    axes = _clone_axes(found, like)
    for name, tensor in found.items():
        expected = (*axes, *like[name].shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
    check_finite(found)
    return found if axes else {name: tensor.unsqueeze(0) for name, tensor in found.items()}


def _clone_axes(found: StateDict, like: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return what most tensors have before the core's shape: (E,), or () for one plain model."""
    counts = Counter(
        tuple(tensor.shape[: max(tensor.dim() - like[name].dim(), 0)])
        for name, tensor in found.items()
    )
    axes = counts.most_common(1)[0][0]
    return (1,) if len(axes) > 1 or 0 in axes else axes


def _as_tensor(name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    # An archive or an object array in disguise must not get further than this line.
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        kind = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: expected an array of numbers, got {kind}")
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError:  # a number that PyTorch does not have, such as longdouble
        raise ValueError(f"{name}: expected an array of numbers, got dtype {array.dtype}") from None


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    # What an edge calls its arrays ends in our log: cut it, and escape line breaks.
    return ", ".join(repr(name[:80]) for name in names[:most]) + more if names else "none"


def initialise(model: nn.Module, seed: int) -> StateDict:
    """Draw new initial weights for a model, leaving it and the global generator as they are.

    Every submodule with a `reset_parameters` method, PyTorch's convention, is reset, or with the
    `_reset_parameters` of its attention; a bare `nn.Parameter` elsewhere keeps the value it has.
    """
    fresh = copy.deepcopy(model).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone: GPUs' are not forked here
        # Attention sets weights of its parts after they did: so last, and from the inside out.
        attention = reversed(_methods(fresh, "_reset_parameters"))
        for reset in (*_methods(fresh, "reset_parameters"), *attention):
            reset()
    return {name: tensor.detach() for name, tensor in fresh.state_dict().items()}


def _methods(model: nn.Module, name: str) -> list[Callable[[], None]]:
    found = [getattr(module, name, None) for module in model.modules()]
    return [method for method in found if callable(method)]


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """Give a model the weights that `seed` determines and return it."""
    model.load_state_dict(initialise(model, seed))
    return model
