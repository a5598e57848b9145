"""Attacks by edges, to test what a core, a guard or another strategy withstands."""

from .adaptive import StayBelow, loss_of_copy
from .data import Backdoor, DataAttack, OneLabel, ShiftLabels, ShuffleLabels
from .mod import attack
from .models import (
    AddNoise,
    FreeRider,
    ModelAttack,
    SameDirection,
    ScaleMovement,
    SlowPoison,
    Visit,
    attack_model,
    first_answer_again,
    first_model_again,
    random_weights,
)
from .suite import ATTACKS, Attack

__all__ = [
    "ATTACKS",
    "AddNoise",
    "Attack",
    "Backdoor",
    "DataAttack",
    "FreeRider",
    "ModelAttack",
    "OneLabel",
    "SameDirection",
    "ScaleMovement",
    "ShiftLabels",
    "ShuffleLabels",
    "SlowPoison",
    "StayBelow",
    "Visit",
    "attack",
    "attack_model",
    "first_answer_again",
    "first_model_again",
    "loss_of_copy",
    "random_weights",
]
