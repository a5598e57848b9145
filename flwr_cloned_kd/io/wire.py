"""Smaller forms of float32 tensors on the wire, and the checked decoding of replies.

`wire_dtype` names the form of a reply:

- "float32": as it is, bit for bit.
- "float16": rounded to float16.
- "bfloat16": rounded to bfloat16. NumPy has no such type, so the bits travel as uint16.
- "int8": each clone's movement from the model that the edge was sent, as codes from -127 to 127
  with one float32 scale per tensor and clone. Tensors with fewer than two axes, such as running
  statistics, travel as float32: coded, a running variance could become negative.

A request is readable for every client: float32, or float16 if `wire_dtype` is not "float32". Only
float32 tensors change their form. A tensor with a value too large for its form stays as it is.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.ensemble import Ensemble, StateDict, as_ensemble

WIRE_DTYPES = ("float32", "float16", "bfloat16", "int8")
KEY = "wire-dtype"
"""The key of a request's config that names the form of the reply."""
MAX_CODE = 127
MIN_CODED_AXES = 2
SCALES = "..scale"
"""Ends the name of a tensor's scales. PyTorch forbids a dot in the name of a module, a parameter or
a buffer, and forbids empty names, so that two dots never follow each other in a state dict."""


def check_wire_dtype(wire_dtype: object, name: str = "wire_dtype") -> None:
    """Raise ValueError unless `wire_dtype` names a form."""
    if wire_dtype not in WIRE_DTYPES:
        expected = ", ".join(WIRE_DTYPES)
        raise ValueError(f"{name}: expected one of {expected}, got {str(wire_dtype)[:80]!r}")


def encode_request(params: StateDict, wire_dtype: str) -> StateDict:
    """Return a model in the form in which an edge is sent it."""
    if wire_dtype == "float32":
        return params
    return {name: _narrow(tensor, torch.float16) for name, tensor in params.items()}


def decode_request(arrays: StateDict) -> StateDict:
    """Return the float32 model that an edge trains from."""
    return {
        name: tensor.float() if tensor.dtype == torch.float16 else tensor
        for name, tensor in arrays.items()
    }


def received(params: StateDict, wire_dtype: str) -> StateDict:
    """Return the model as an edge receives it, in the dtypes of `params`: rounded on the way."""
    if wire_dtype == "float32":
        return params
    encoded = encode_request(params, wire_dtype)
    return {name: tensor.to(params[name].dtype) for name, tensor in encoded.items()}


def encode_reply(edge: Mapping[str, Tensor], sent: StateDict, wire_dtype: str) -> StateDict:
    """Return the arrays that an edge sends.

    Args:
        edge: clones `[E, *shape]`, or one plain model `[*shape]`.
        sent: the model that the edge was sent, as `decode_request` or `received` returns it.

    Returns:
        Tensors with the names of `edge`; for "int8" the scales `[E]` follow in the same order.
    """
    match wire_dtype:
        case "float16":
            return {name: _narrow(tensor, torch.float16) for name, tensor in edge.items()}
        case "bfloat16":
            rounded = {name: _narrow(tensor, torch.bfloat16) for name, tensor in edge.items()}
            return {
                name: tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
                for name, tensor in rounded.items()
            }
        case "int8":
            return _encode_movement(edge, sent)
    return dict(edge)


def scale_names(like: Mapping[str, Tensor], wire_dtype: str) -> list[str]:
    """Return the names of the scales, in the order in which they follow the arrays of a reply.

    Args:
        like: a state dict of the model.
    """
    if wire_dtype != "int8":
        return []
    return [name + SCALES for name, tensor in like.items() if _is_coded(tensor)]


def decode_reply(arrays: Mapping[str, Any], sent: StateDict, wire_dtype: str) -> dict[str, Any]:
    """Widen the arrays of a reply to float32; `as_ensemble` must check the result.

    An edge may always reply in float32 or in the form of the request. An array in another form than
    these and the requested one stays as it is, so that `as_ensemble` refuses its dtype.

    Args:
        arrays: what the edge sent, by name.
        sent: the model that the edge was sent, as `received` returns it.

    Raises:
        ValueError: for int8 codes of another shape than the tensor's; for scales that are missing,
            or whose dtype or shape is wrong; for a scale that is negative or not finite.
    """
    decoded = dict(arrays)
    if wire_dtype == "float32":
        return decoded
    for name, base in sent.items():
        array = decoded.get(name)
        if base.dtype != torch.float32 or not isinstance(array, np.ndarray):
            continue
        dtype = array.dtype.newbyteorder("=")
        if dtype == np.float16:
            decoded[name] = _tensor(array).float()
        elif dtype == np.uint16 and wire_dtype == "bfloat16":
            decoded[name] = _tensor(array).view(torch.bfloat16).float()
        elif dtype == np.int8 and wire_dtype == "int8" and _is_coded(base):
            scales = decoded.pop(name + SCALES, None)
            decoded[name] = _decode_movement(name, _tensor(array), scales, base)
    return decoded


def transfer(edge: Ensemble, sent: StateDict, wire_dtype: str) -> tuple[Ensemble, int]:
    """Encode and decode an ensemble, as on its way from an edge to the core.

    Args:
        sent: the model that the edge was sent, as `received` returns it.

    Returns:
        The ensemble as the core receives it, and the bytes of the values that travel.
    """
    encoded = encode_reply(edge, sent, wire_dtype)
    num_bytes = sum(tensor.nbytes for tensor in encoded.values())
    if wire_dtype == "float32":
        return edge, num_bytes
    arrays = {name: tensor.numpy() for name, tensor in encoded.items()}
    return as_ensemble(decode_reply(arrays, sent, wire_dtype), sent), num_bytes


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values to `dtype`, unless one of them would not be finite any more."""
    if tensor.dtype != torch.float32:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if bool(narrow.isfinite().all()) else tensor


def _is_coded(tensor: Tensor) -> bool:
    """Return whether a tensor of the model travels as int8."""
    return tensor.dtype == torch.float32 and tensor.dim() >= MIN_CODED_AXES and tensor.numel() > 0


def _encode_movement(edge: Mapping[str, Tensor], sent: StateDict) -> StateDict:
    encoded = dict(edge)
    all_scales: StateDict = {}
    for name, base in sent.items():
        tensor = edge.get(name)
        if tensor is None or not _is_coded(base):
            continue
        num_axes = tensor.dim() - base.dim()
        if tensor.dtype != base.dtype or tensor.shape[num_axes:] != base.shape:
            continue  # The core refuses the tensor, and names its dtype or shape.
        movement = tensor - base
        values = tuple(range(num_axes, tensor.dim()))
        scales = movement.abs().amax(values) / MAX_CODE
        divisors = torch.where(scales > 0, scales, 1.0).view(*scales.shape, *[1] * base.dim())
        # A tiny scale is rounded so coarsely that a code could exceed 127 without the limit.
        codes = (movement / divisors).round().clamp(-MAX_CODE, MAX_CODE)
        encoded[name] = codes.nan_to_num().to(torch.int8)
        all_scales[name + SCALES] = scales
    return encoded | all_scales


def _decode_movement(name: str, codes: Tensor, scales: Any, base: Tensor) -> Tensor:
    """Return clones `[E, *shape]`, or one model `[*shape]`, from codes of the same shape."""
    num_axes = codes.dim() - base.dim()
    if num_axes not in (0, 1) or codes.shape[num_axes:] != base.shape:
        shape = tuple(base.shape)
        raise ValueError(f"{name}: expected shape {shape} per clone, got {tuple(codes.shape)}")
    shape = tuple(codes.shape[:num_axes])
    if not isinstance(scales, np.ndarray):
        kind = "none" if scales is None else type(scales).__name__
        raise ValueError(f"{name}{SCALES}: expected scales of shape {shape}, got {kind}")
    if scales.dtype.newbyteorder("=") != np.float32:
        raise ValueError(f"{name}{SCALES}: expected dtype float32, got {scales.dtype}")
    if scales.shape != shape:
        raise ValueError(f"{name}{SCALES}: expected shape {shape}, got {scales.shape}")
    valid = np.isfinite(scales) & (scales >= 0)
    if not valid.all():
        raise ValueError(
            f"{name}{SCALES}: expected finite scales, at least 0, got {scales[~valid].flat[0]}"
        )
    factors = _tensor(scales).view(*shape, *[1] * base.dim())
    return base + factors * codes


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Copy an array of numbers into a tensor, in this machine's byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
