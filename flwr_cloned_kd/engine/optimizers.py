"""The optimizer of a phase, its learning rate, and the limit of its gradients."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, optim

from .recipe import Recipe

ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
)
"""Optimizers that update each number of a tensor by itself."""
CAPTURABLE = (optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop)
"""Optimizers with the option `capturable`, which a CUDA graph needs."""


def make_optimizer(
    leaves: list[Tensor], recipe: Recipe, *, recorded: bool = False
) -> optim.Optimizer:
    """Make the optimizer of some parameters.

    Args:
        recorded: prepare the optimizer for a CUDA graph.

    Raises:
        ValueError: if the factory of the recipe fails, or if it does not return an optimizer that
            has a learning rate and whose `step` works without a closure.
    """
    if recipe.optimizer is None:
        return optim.SGD(
            leaves,
            recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=all(leaf.is_floating_point() for leaf in leaves),
        )
    try:
        optimizer = recipe.optimizer(leaves, lr=recipe.lr)
    except Exception as error:  # the factory is the user's and may raise anything
        cause = " ".join(str(error).split())
        raise ValueError(
            f"optimizer: expected a function to call with (parameters, lr={recipe.lr}), "
            f"got: {cause}"
        ) from error
    if not isinstance(optimizer, optim.Optimizer) or isinstance(optimizer, optim.LBFGS):
        raise ValueError(
            "optimizer: expected an optimizer of PyTorch that needs no closure, "
            f"got {type(optimizer).__name__}"
        )
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError(
            'optimizer: expected a learning rate "lr" in each of its groups of parameters, got none'
        )
    if recorded:
        for group in optimizer.param_groups:
            group["capturable"] = True
    return optimizer


def rate_ratios(optimizer: optim.Optimizer, recipe: Recipe) -> list[float]:
    """Return the learning rate of each group of a new optimizer, as a multiple of the recipe's."""
    return [group["lr"] / recipe.lr if recipe.lr else 1.0 for group in optimizer.param_groups]


def set_rate(optimizer: optim.Optimizer, lr: float | Tensor, ratios: Sequence[float]) -> None:
    """Set the learning rate of every group."""
    for group, ratio in zip(optimizer.param_groups, ratios):
        group["lr"] = lr if ratio == 1 else lr * ratio


def can_batch(recipe: Recipe) -> bool:
    """Return whether stacked clones, `[E, *shape]`, get the updates of clones one by one.

    The optimizer must update each number by itself, and its factory must not look at shapes. A
    function of the user might do either, so that only classes of PyTorch count as safe.
    """
    return recipe.optimizer is None or _class_of(recipe) in ELEMENTWISE


def can_record(recipe: Recipe) -> bool:
    """Return whether a CUDA graph can contain a step of the optimizer."""
    return recipe.optimizer is None or _class_of(recipe) in CAPTURABLE


def optimizer_name(recipe: Recipe) -> str:
    """Return the name of the optimizer for messages."""
    return str(getattr(_class_of(recipe), "__name__", recipe.optimizer))


def _class_of(recipe: Recipe) -> Any:
    """Return the factory of a recipe without the arguments that `partial` adds."""
    factory: Any = recipe.optimizer
    while isinstance(factory, partial):
        factory = factory.func
    return factory


def limit_gradients(leaves: Sequence[Tensor], num_clones: int, max_norm: float) -> None:
    """Scale the gradient of each clone down to a norm of at most `max_norm`.

    The norm is taken over all parameters of one clone, as in `torch.nn.utils.clip_grad_norm_`.

    Args:
        leaves: parameters `[*shape]` of one clone, or `[num_clones, *shape]` of several.
    """
    gradients = [
        leaf.grad if num_clones > 1 else leaf.grad.unsqueeze(0)  # a view: the same memory
        for leaf in leaves
        if leaf.grad is not None
    ]
    norms = [
        torch.linalg.vector_norm(gradient.reshape(num_clones, -1), dim=1) for gradient in gradients
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    factors = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(num_clones, *[1] * (gradient.dim() - 1)))
