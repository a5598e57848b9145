"""An attacker who knows the guard of the server, and stays just below its threshold."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..engine.ensemble import Ensemble, StateDict
from ..method.core import Core
from .models import ModelAttack, ScaleMovement, Visit, scaled

Loss = Callable[[StateDict, Ensemble], float]
"""(model that was sent, clones) -> training accuracy that the core would lose by these clones.

A fraction; negative if the core would gain accuracy.
"""


@dataclass(frozen=True)
class StayBelow:
    """Move as far in a wrong direction as the guard allows, found by bisection.

    The guard of the server looks at the core data, which the attacker does not have. The attacker
    measures on data of its own instead, so it can be wrong about the last step.

    Args:
        threshold: the loss of training accuracy from which the guard refuses, a fraction.
        loss: estimates the loss, for example `loss_of_copy`.
        wrong: makes the clones at factor 1; the attack scales their movement.
        max_factor: largest multiple of this movement.
        num_halvings: number of bisections after the largest multiple was found too large.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd.attacks import StayBelow, attack_model
        >>> def loss(sent, edge):  # `loss_of_copy` returns such a function
        ...     return (edge["w"] - sent["w"]).abs().max().item()
        >>> sent, edge = {"w": torch.tensor([-1.0])}, {"w": torch.tensor([[0.0]])}
        >>> models, visit = attack_model(StayBelow(0.5, loss), sent, edge)
        >>> -1.5 < models["w"].item() < -1.3  # away from the honest clone, and less than 0.5
        True
    """

    threshold: float
    loss: Loss
    wrong: ModelAttack = ScaleMovement(-1.0)
    max_factor: float = 10.0
    num_halvings: int = 6

    def __call__(
        self, sent: StateDict, edge: Ensemble, generator: torch.Generator, visit: Visit
    ) -> Ensemble:
        wrong = self.wrong(sent, edge, generator, visit)

        def is_below(factor: float) -> bool:
            return self.loss(sent, scaled(sent, wrong, factor)) < self.threshold

        if is_below(self.max_factor):
            return scaled(sent, wrong, self.max_factor)
        low = 0.0
        high = self.max_factor
        for _ in range(self.num_halvings):
            middle = (low + high) / 2
            if is_below(middle):
                low = middle
            else:
                high = middle
        return scaled(sent, wrong, low)


def loss_of_copy(core: Core) -> Loss:
    """Return the loss that a copy of the core has: Phase 2 on the attacker's own data.

    Args:
        core: the attacker's copy, with the recipes of the core and the data of the attacker. It
            needs neither a guard nor held-out data.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Core, Recipe, clone
        >>> from flwr_cloned_kd.attacks import loss_of_copy
        >>> data = torch.randn(8, 2), torch.arange(8) % 2
        >>> core = Core(model=torch.nn.Linear(2, 2), dataset=data, recipe=Recipe(epochs=2))
        >>> sent = core.pretrain()
        >>> -1 <= loss_of_copy(core)(sent, clone(sent, 3)) <= 1
        True
    """

    def loss(sent: StateDict, edge: Ensemble) -> float:
        state = core.state(sent)
        try:
            _, metrics = core.distill(state, edge)
        except ValueError:  # The predictions are not finite, so the core would refuse the clones.
            return 1.0
        return state.train_accuracy[0] - float(metrics["train-accuracy"])

    return loss
