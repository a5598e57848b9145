"""Attacks on models: an edge changes the clones that it has trained before it sends them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.ensemble import Ensemble, StateDict, clone, mean, size
from ..engine.recipe import fold_in


class Visit(NamedTuple):
    """What a bad edge remembers of its visits.

    Attributes:
        number: of this visit; the first is 0.
        sent: the model that the edge was sent at its first visit.
        edge: `[E, ...]`, the clones that the edge had trained at its first visit.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import Visit
        >>> Visit(number=0, sent={"w": torch.zeros(2)}, edge={"w": torch.ones(3, 2)}).number
        0
    """

    number: int
    sent: StateDict
    edge: Ensemble


ModelAttack = Callable[[StateDict, Ensemble, torch.Generator, Visit], Ensemble]
"""(model that was sent, clones that the edge has trained, source of random draws, visit) -> clones.

The attack returns the ensemble that the edge sends and leaves its arguments unchanged. An ensemble
of another shape or with a value that is not finite is no attack: the core refuses it by its form.

Examples:
    >>> from flwr_cloned_kd import member, clone
    >>> from flwr_cloned_kd.attacks import ModelAttack
    >>> def copy_the_first_clone(sent, edge, generator, visit):
    ...     return clone(member(edge, 0), 3)
    >>> attack: ModelAttack = copy_the_first_clone
"""


def attack_model(
    change: ModelAttack,
    sent: StateDict,
    edge: Ensemble,
    *,
    last: Visit | None = None,
    seed: int = 0,
) -> tuple[Ensemble, Visit]:
    """Apply an attack to the clones of one visit, in a loop without Flower.

    Args:
        change: the attack.
        sent: the model that the edge was sent.
        edge: `[E, ...]`, the clones that the edge has trained.
        last: what this function returned at the visit before; None at the first visit.
        seed: of the random draws. Edges with the same seed draw the same numbers.

    Returns:
        The ensemble that the edge sends, and the visit, which the next call needs.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import ScaleMovement, attack_model
        >>> sent, edge = {"w": torch.ones(1)}, {"w": torch.tensor([[1.5]])}
        >>> models, visit = attack_model(ScaleMovement(-1.0), sent, edge)
        >>> models
        {'w': tensor([[0.5000]])}
        >>> models, visit = attack_model(ScaleMovement(-1.0), sent, edge, last=visit)
        >>> visit.number
        1
    """
    visit = Visit(0, sent, edge) if last is None else last._replace(number=last.number + 1)
    generator = torch.Generator().manual_seed(fold_in(seed, "attack", visit.number))
    return change(sent, edge, generator, visit), visit


@dataclass(frozen=True)
class ScaleMovement:
    """Multiply the movement of each clone, which is the clone minus the model that was sent.

    Args:
        factor: -1 reverses the movement; 10 is ten times the movement; 1 changes nothing.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import ScaleMovement, attack_model
        >>> sent, edge = {"w": torch.ones(1)}, {"w": torch.tensor([[1.5]])}
        >>> attack_model(ScaleMovement(10.0), sent, edge)[0]
        {'w': tensor([[6.]])}
    """

    factor: float

    def __call__(
        self, sent: StateDict, edge: Ensemble, generator: torch.Generator, visit: Visit
    ) -> Ensemble:
        return scaled(sent, edge, self.factor)


@dataclass(frozen=True)
class AddNoise:
    """Add Gaussian noise to each clone.

    Args:
        share: the norm of the noise as a multiple of the norm of the clone's movement, at least 0.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import AddNoise, attack_model
        >>> sent, edge = {"w": torch.tensor([-1.0, 1.0])}, {"w": torch.tensor([[2.0, 5.0]])}
        >>> noisy = attack_model(AddNoise(share=2.0), sent, edge)[0]["w"]
        >>> round((noisy - edge["w"]).norm().item(), 3)  # twice the movement, which has the norm 5
        10.0
    """

    share: float

    def __call__(
        self, sent: StateDict, edge: Ensemble, generator: torch.Generator, visit: Visit
    ) -> Ensemble:
        noise = _gaussian(edge, generator)
        factors = self.share * movement_norms(sent, edge) / _norms(noise)
        return _with_positive_variances(
            {
                name: tensor + _per_clone(factors, tensor) * noise[name]
                if name in noise
                else tensor
                for name, tensor in edge.items()
            },
            sent,
            edge,
        )


@dataclass(frozen=True)
class SameDirection:
    """Move all clones in one random direction, the same for all edges with this seed.

    Edges with the same seed collude: at every visit they move the core in the same direction, and
    their ensembles agree with each other while both are in the temporal memory.

    Args:
        factor: the length of the step as a multiple of the norm of the clones' mean movement.
        seed: determines the direction.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import SameDirection, attack_model
        >>> sent = {"w": torch.tensor([-1.0, 1.0])}
        >>> edges = [{"w": torch.tensor([[2.0, 5.0]])}, {"w": torch.tensor([[-6.0, 1.0]])}]
        >>> one, other = (attack_model(SameDirection(2.0), sent, edge)[0]["w"] for edge in edges)
        >>> torch.allclose(one, other)
        True
    """

    factor: float
    seed: int = 0

    def __call__(
        self, sent: StateDict, edge: Ensemble, generator: torch.Generator, visit: Visit
    ) -> Ensemble:
        centre = {name: tensor[None] for name, tensor in mean(edge).items()}
        shared = torch.Generator().manual_seed(fold_in(self.seed, "direction"))
        direction = _gaussian(centre, shared)
        length = self.factor * movement_norms(sent, centre) / _norms(direction)
        start = clone(sent, size(edge))
        moved = {
            name: tensor + float(length) * direction[name] if name in direction else edge[name]
            for name, tensor in start.items()
        }
        return _with_positive_variances(moved, sent, edge)


@dataclass(frozen=True)
class FreeRider:
    """Send the model that was sent, as if it had been trained.

    Args:
        noise: standard deviation of Gaussian noise that hides this, as a multiple of the standard
            deviation of the values of each tensor. 0 adds no noise, so all clones are equal.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import FreeRider, attack_model
        >>> attack_model(FreeRider(), {"w": torch.ones(1)}, {"w": torch.tensor([[1.5]])})[0]
        {'w': tensor([[1.]])}
    """

    noise: float = 0.0

    def __call__(
        self, sent: StateDict, edge: Ensemble, generator: torch.Generator, visit: Visit
    ) -> Ensemble:
        copies = clone(sent, size(edge))
        if not self.noise:
            return copies
        noise = _gaussian(copies, generator)
        noisy = {
            name: tensor + self.noise * sent[name].std(correction=0) * noise[name]
            if name in noise
            else tensor
            for name, tensor in copies.items()
        }
        return _with_positive_variances(noisy, sent, copies)


def random_weights(
    sent: StateDict, edge: Ensemble, generator: torch.Generator, visit: Visit
) -> Ensemble:
    """Send untrained weights: the values of each tensor that was sent, in random order.

    Each tensor so keeps the scale of its values, and variances stay positive. Each clone has an
    order of its own.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import attack_model, random_weights
        >>> sent, edge = {"w": torch.arange(4.0)}, {"w": torch.zeros(1, 4)}
        >>> attack_model(random_weights, sent, edge)[0]["w"].sort().values
        tensor([[0., 1., 2., 3.]])
    """

    def in_random_order(tensor: Tensor) -> Tensor:
        order = torch.randperm(tensor.numel(), generator=generator)
        return tensor.flatten()[order].view_as(tensor)

    return {
        name: torch.stack([in_random_order(sent[name]) for _ in range(size(edge))])
        if tensor.is_floating_point()
        else tensor
        for name, tensor in edge.items()
    }


@dataclass(frozen=True)
class SlowPoison:
    """Send the core, moved a small step towards one bad model, which is the same at every visit.

    The bad model is made at the first visit, from the clones that the edge had trained there.

    Args:
        step: the share of the way from the model that was sent to the bad model, above 0 to 1.
        wrong: makes the bad model.
        seed: of the random draws of `wrong`.

    Raises:
        ValueError: if the step is out of range.

    Examples:
        >>> from flwr_cloned_kd.attacks import SlowPoison
        >>> attack = SlowPoison(step=0.1)
        >>> SlowPoison(step=0.0)
        Traceback (most recent call last):
        ValueError: step: expected above 0, at most 1, got 0.0
    """

    step: float
    wrong: ModelAttack = random_weights
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise ValueError(f"step: expected above 0, at most 1, got {self.step}")

    def __call__(
        self, sent: StateDict, edge: Ensemble, generator: torch.Generator, visit: Visit
    ) -> Ensemble:
        fixed = torch.Generator().manual_seed(fold_in(self.seed, "bad model"))
        bad = self.wrong(visit.sent, visit.edge, fixed, visit._replace(number=0))
        return scaled(sent, clone(mean(bad), size(edge)), self.step)


def first_answer_again(
    sent: StateDict, edge: Ensemble, generator: torch.Generator, visit: Visit
) -> Ensemble:
    """Send the clones of the first visit at every visit (stale replay).

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import attack_model, first_answer_again
        >>> sent = {"w": torch.zeros(1)}
        >>> first, second = {"w": torch.ones(1, 1)}, {"w": torch.zeros(1, 1)}
        >>> models, visit = attack_model(first_answer_again, sent, first)
        >>> attack_model(first_answer_again, sent, second, last=visit)[0]
        {'w': tensor([[1.]])}
    """
    return visit.edge


def first_model_again(
    sent: StateDict, edge: Ensemble, generator: torch.Generator, visit: Visit
) -> Ensemble:
    """Send the model that was sent at the first visit at every visit (stale replay).

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import attack_model, first_model_again
        >>> edge = {"w": torch.ones(2, 1)}
        >>> models, visit = attack_model(first_model_again, {"w": torch.zeros(1)}, edge)
        >>> attack_model(first_model_again, {"w": torch.ones(1)}, edge, last=visit)[0]
        {'w': tensor([[0.],
                [0.]])}
    """
    return clone(visit.sent, size(edge))


def scaled(sent: StateDict, edge: Ensemble, factor: float) -> Ensemble:
    """Return `sent + factor (edge - sent)` for every clone, with the integer tensors of `edge`."""
    moved = {
        name: sent[name] + factor * (tensor - sent[name]) if tensor.is_floating_point() else tensor
        for name, tensor in edge.items()
    }
    return _with_positive_variances(moved, sent, edge)


def movement_norms(sent: StateDict, edge: Ensemble) -> Tensor:
    """Return the L2 norm `[E]` of each clone's movement, over all floating tensors together."""
    return _norms(
        {name: tensor - sent[name] for name, tensor in edge.items() if tensor.is_floating_point()}
    )


def _norms(tensors: Ensemble) -> Tensor:
    squares = [tensor.double().flatten(1).square().sum(1) for tensor in tensors.values()]
    return torch.stack(squares).sum(0).sqrt()


def _gaussian(like: Ensemble, generator: torch.Generator) -> Ensemble:
    """Draw standard normal values in the shapes of the floating tensors."""
    return {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in like.items()
        if tensor.is_floating_point()
    }


def _per_clone(factors: Tensor, tensor: Tensor) -> Tensor:
    """Shape factors `[E]` so that they multiply a tensor `[E, *shape]`, in its dtype."""
    return factors.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))


def _with_positive_variances(attacked: Ensemble, sent: StateDict, edge: Ensemble) -> Ensemble:
    """Keep the honest value where an attack would make a variance negative.

    A model with a negative running variance predicts NaN, which the core refuses. A tensor without
    a negative value, in the model that was sent and in the clones, is treated as variances.
    """

    def is_variance(name: str) -> bool:
        return bool((sent[name] >= 0).all() and (edge[name] >= 0).all())

    return {
        name: torch.where(tensor > 0, tensor, edge[name])
        if tensor.is_floating_point() and is_variance(name)
        else tensor
        for name, tensor in attacked.items()
    }
