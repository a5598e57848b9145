"""Batch normalisation folded into the convolutions before it, for models that only predict."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-3
"""Relative to the largest logit; rounding in float32 stays below 1e-5."""


@torch.no_grad()
def folded(module: nn.Module, inputs: Tensor) -> nn.Module:
    """Return a model that predicts the same with fewer passes over memory, or the model itself.

    Which normalisation takes what a convolution returns is seen by watching one pass, so that any
    module will do. Somebody else may take it too, or a convolution may run twice: then the folded
    model predicts something else on these inputs, and is dropped.

    Args:
        module: in evaluation mode.
        inputs: `[B, ...]`, a few samples.
    """
    pairs, expected = _watch(module, inputs)
    if not pairs or any(len(set(parts)) < len(pairs) for parts in zip(*pairs)):
        return module  # a part of two pairs cannot be folded into both
    candidate = copy.deepcopy(module)
    for convolution, normalisation in pairs:
        parts = (candidate.get_submodule(name) for name in (convolution, normalisation))
        fused: nn.Module = fuse_conv_bn_eval(*parts)  # type: ignore[type-var, arg-type]
        candidate.set_submodule(convolution, fused)
        candidate.set_submodule(normalisation, nn.Identity())
    worst = (candidate(inputs) - expected).abs().max()
    same = bool(worst <= TOLERANCE * expected.abs().max())
    return channels_last(candidate) if same else module


def channels_last(module: nn.Module) -> nn.Module:
    """Lay out a model's weights with the channels last, unless some are of convolutions in 3-D."""
    tensors = (*module.parameters(), *module.buffers())
    if any(tensor.dim() == 5 for tensor in tensors):
        return module
    return module.to(memory_format=torch.channels_last)


def _watch(module: nn.Module, inputs: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """Run a model; return the names of its (convolution, normalisation) pairs and its logits."""
    made: list[tuple[Tensor, str]] = []
    pairs: list[tuple[str, str]] = []

    def hook(name: str) -> object:
        def see(part: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> None:
            if isinstance(part, nn.Conv2d):
                made.append((found, name))
            else:
                # Nothing is given by position to a part that is called by keyword.
                pairs.extend((conv, name) for tensor, conv in made if given and tensor is given[0])

        return see

    handles = [
        part.register_forward_hook(hook(name))  # type: ignore[arg-type]
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d)
        or (isinstance(part, nn.BatchNorm2d) and part.running_var is not None and part.affine)
    ]
    try:
        logits = module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(pairs)), logits
