"""Batch normalisation folded into the convolutions before it, for models that only predict."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .nested import Inputs, outputs_of

MAX_RELATIVE_ERROR = 1e-3
"""Relative to the largest logit; rounding in float32 stays below 1e-5."""


@torch.no_grad()
def folded(module: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a model that predicts the same with fewer passes over memory, or the model itself.

    One forward pass with hooks finds the normalisation that gets the output of each convolution,
    so no assumption on the structure of the module is needed. If another part gets that output
    too, or if a convolution runs twice, the folded model predicts other logits for `inputs`. The
    folded model is therefore compared with the module, and dropped if they differ.

    Args:
        module: in evaluation mode.
        inputs: `[B, ...]`, a few samples.
    """
    pairs, expected = _watch(module, inputs)
    if not pairs or any(len(set(parts)) < len(pairs) for parts in zip(*pairs)):
        return module  # a part that belongs to two pairs cannot be folded
    candidate = copy.deepcopy(module)
    for convolution, normalisation in pairs:
        parts = (candidate.get_submodule(name) for name in (convolution, normalisation))
        fused: nn.Module = fuse_conv_bn_eval(*parts)  # type: ignore[type-var, arg-type]
        candidate.set_submodule(convolution, fused)
        candidate.set_submodule(normalisation, nn.Identity())
    error = (outputs_of(candidate, inputs) - expected).abs().max()
    is_equal = bool(error <= MAX_RELATIVE_ERROR * expected.abs().max())
    return candidate if is_equal else module


def _watch(module: nn.Module, inputs: Inputs) -> tuple[list[tuple[str, str]], Tensor]:
    """Run a model; return the names of its (convolution, normalisation) pairs and its logits."""
    convolved: list[tuple[Tensor, str]] = []
    pairs: list[tuple[str, str]] = []

    def hook(name: str) -> object:
        def record(part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(part, nn.Conv2d):
                convolved.append((output, name))
            elif args:  # empty if the module is called with keyword arguments
                pairs.extend((conv, name) for tensor, conv in convolved if tensor is args[0])

        return record

    handles = [
        part.register_forward_hook(hook(name))  # type: ignore[arg-type]
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d)
        or (isinstance(part, nn.BatchNorm2d) and part.running_var is not None and part.affine)
    ]
    try:
        logits = outputs_of(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(pairs)), logits
