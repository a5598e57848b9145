"""The rows of the table in Fig. 5."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..engine.ensemble import StateDict, initialise, trained_state
from ..engine.recipe import fold_in
from .core import Core
from .state import CoreState

Send = Callable[[CoreState], StateDict]
"""State of the core -> model to send to the next edge."""


def cloned(state: CoreState) -> StateDict:
    """Send the core itself: cloned distillation (C-).

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import CoreState, cloned
        >>> cloned(CoreState({"w": torch.zeros(2)}))
        {'w': tensor([0., 0.])}
    """
    return state.params


def independent(core: Core) -> Send:
    """Send one model that was initialised with another seed and trained on the core data (I-)."""
    start = _initial(core, fold_in(core.seed, "independent"))
    model = replace(core, seed=fold_in(core.seed, "independent-phase-0")).pretrain(start)
    return lambda state: model


def scratch(core: Core) -> Send:
    """Send new initial weights for each version of the core, so edges train from scratch (Is-)."""
    return lambda state: _initial(core, fold_in(core.seed, "scratch", state.version))


def _initial(core: Core, seed: int) -> StateDict:
    fresh = initialise(core.model, seed)
    return {name: fresh[name] for name in trained_state(core.model)}


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        init: core -> function that returns the model an edge starts from.
        num_clones: number of clones that an edge trains.
        memory_size: number of ensembles in the temporal memory, the newest included.

    Examples:
        >>> from flwr_cloned_kd import Variant, cloned
        >>> five = Variant(init=lambda core: cloned, num_clones=5, memory_size=1)
    """

    init: Callable[[Core], Send]
    num_clones: int
    memory_size: int


VARIANTS = {
    "IsPP": Variant(scratch, 1, 1),
    "IPP": Variant(independent, 1, 1),
    "IEP": Variant(independent, 3, 1),
    "IPM": Variant(independent, 1, 3),
    "IEM": Variant(independent, 3, 3),
    "CPP": Variant(lambda core: cloned, 1, 1),
    "CEP": Variant(lambda core: cloned, 3, 1),
    "CPM": Variant(lambda core: cloned, 1, 3),
    "CEM": Variant(lambda core: cloned, 3, 3),
}
"""I: independent (s: from scratch), C: cloned; E: ensemble; M: temporal memory; P: plain (Fig. 5).

The paper prints neither the number of clones nor M; 3 and 3 are what Fig. 2 draws.

Examples:
    >>> import torch
    >>> from flwr_cloned_kd import VARIANTS, ClonedKD, Core, Distillation, Recipe
    >>> row = VARIANTS["CPM"]
    >>> core = Core(
    ...     model=torch.nn.Linear(2, 2),
    ...     dataset=(torch.randn(8, 2), torch.arange(8) % 2),
    ...     distillation=Distillation(recipe=Recipe(epochs=2), memory_size=row.memory_size),
    ... )
    >>> strategy = ClonedKD(core, send=row.init(core), num_clones=row.num_clones)
"""
