"""The attacks by their names, with one number that says how strong each is."""

from collections.abc import Callable
from typing import NamedTuple

from ..method.core import Core
from .adaptive import StayBelow, loss_of_copy
from .data import Backdoor, DataAttack, OneLabel, ShiftLabels, ShuffleLabels
from .models import (
    AddNoise,
    FreeRider,
    ModelAttack,
    SameDirection,
    ScaleMovement,
    SlowPoison,
    first_answer_again,
    first_model_again,
    random_weights,
)


class Attack(NamedTuple):
    """What a bad edge does to its data before it trains, and to its clones after.

    Attributes:
        data: changes the data; None trains on honest data.
        model: changes the clones; None sends them as they were trained.

    Examples:
        >>> from flwr_cloned_kd.attacks import Attack, ScaleMovement, ShuffleLabels
        >>> bad = Attack(data=ShuffleLabels(), model=ScaleMovement(3.0))
    """

    data: DataAttack | None = None
    model: ModelAttack | None = None


Make = Callable[[float, Core, int], Attack]
"""(strength, the attacker's copy of the core with the attacker's data, number of classes)."""

ATTACKS: dict[str, Make] = {
    "labels shuffled": lambda share, core, num_classes: Attack(ShuffleLabels(share)),
    "labels y + 1": lambda share, core, num_classes: Attack(ShiftLabels(num_classes, share)),
    "labels all 0": lambda share, core, num_classes: Attack(OneLabel(0, share)),
    "backdoor": lambda share, core, num_classes: Attack(Backdoor(share=share)),
    "movement reversed": lambda factor, core, num_classes: Attack(model=ScaleMovement(-factor)),
    "movement scaled": lambda factor, core, num_classes: Attack(model=ScaleMovement(factor)),
    "noise": lambda share, core, num_classes: Attack(model=AddNoise(share)),
    "random weights": lambda _, core, num_classes: Attack(model=random_weights),
    "free rider": lambda noise, core, num_classes: Attack(model=FreeRider(noise)),
    "first answer again": lambda _, core, num_classes: Attack(model=first_answer_again),
    "first model again": lambda _, core, num_classes: Attack(model=first_model_again),
    "slow poison": lambda step, core, num_classes: Attack(model=SlowPoison(step)),
    "two collude": lambda factor, core, num_classes: Attack(model=SameDirection(factor)),
    "adaptive": lambda threshold, core, num_classes: Attack(
        model=StayBelow(threshold, loss_of_copy(core))
    ),
}
"""Name of an attack -> a function that makes it with a strength.

The strength is the share of the samples for an attack on data, and the multiple of the honest
movement for "movement reversed", "movement scaled", "noise" and "two collude". It is the noise of
a "free rider", the step of "slow poison" and the threshold of the guard for "adaptive". The other
attacks have no strength.

Examples:
    >>> import torch
    >>> from flwr_cloned_kd import Core, Recipe
    >>> from flwr_cloned_kd.attacks import ATTACKS
    >>> data = torch.randn(8, 2), torch.arange(8) % 2
    >>> core = Core(model=torch.nn.Linear(2, 2), dataset=data, recipe=Recipe(epochs=2))
    >>> ATTACKS["movement scaled"](10.0, core, 2)
    Attack(data=None, model=ScaleMovement(factor=10.0))
"""
