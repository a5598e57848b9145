"""The rows of the table in Fig. 5, and presets of Phase 2."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..engine.ensemble import StateDict, initialise
from ..engine.recipe import Recipe, fold_in
from .core import Core, CoreState
from .distillation import Distillation
from .knowledge import (
    Selection,
    StartRule,
    correct,
    ensemble_share,
    label_probability,
    retained,
)

Send = Callable[[CoreState], StateDict]
"""State of the core -> model to send to the next edge."""


def cloned(state: CoreState) -> StateDict:
    """Send the core itself: cloned distillation (C-)."""
    return state.params


def independent(core: Core) -> Send:
    """Send one model that was initialised with another seed and trained on the core data (I-)."""
    start = initialise(core.model, fold_in(core.seed, "independent"))
    model = replace(core, seed=fold_in(core.seed, "independent-phase-0")).pretrain(start)
    return lambda state: model


def scratch(core: Core) -> Send:
    """Send new initial weights for each version of the core, so edges train from scratch (Is-)."""
    return lambda state: initialise(core.model, fold_in(core.seed, "scratch", state.version))


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        init: core -> function that returns the model an edge starts from.
        num_clones: number of clones that an edge trains.
        memory_size: number of ensembles in the temporal memory, the newest included.
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
"""


def paper(recipe: Recipe) -> Distillation:
    """Run Phase 2 as in the paper: the recipe of all phases, summed KD terms, start at the core."""
    return Distillation(recipe=recipe)


def unselective(recipe: Recipe) -> Distillation:
    """Run Phase 2 at a fifth of the learning rate, with averaged KD terms, from the clones' mean.

    Every ensemble is a teacher of every sample, as in the paper. That is good for edges with the
    same class distribution as the core, and harmful for edges with few classes (docs/results.md).
    """
    return Distillation(
        recipe=replace(recipe, lr=recipe.lr / 5), student_start=1.0, mean_over_memory=True
    )


def practical(recipe: Recipe) -> Distillation:
    """Run Phase 2 with the options that worked best for us on even and on skewed edges.

    The preset changes `unselective` in four ways. An ensemble is a teacher only of the samples that
    it classifies correctly. The core before the round is a teacher too. The KD terms have less
    weight (t = 2). The student starts towards the clones only as far as the core keeps its accuracy
    on the core data (`retained`).
    """
    return replace(
        unselective(recipe),
        temperature=2.0,
        core_as_teacher=True,
        selection=correct,
        student_start=retained,
    )


PRESETS = {"paper": paper, "practical": practical, "unselective": unselective}
"""Presets of Phase 2, by their names in run-configs."""

SELECTIONS: dict[str, Selection | None] = {
    "all": None,
    "correct": correct,
    "label-probability": label_probability,
}
"""Selections of samples, by their names in run-configs."""

START_RULES: dict[str, StartRule] = {"retained": retained, "ensemble-share": ensemble_share}
"""Rules for the start of the student, by their names in run-configs."""
