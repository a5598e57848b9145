"""The rows of Fig. 5's table, and two presets of Phase 2."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..engine.ensemble import StateDict, initialise
from ..engine.recipe import Recipe, fold_in
from .core import Core, CoreState, Distillation
from .knowledge import (
    Selection,
    StartRule,
    correct,
    ensemble_share,
    label_probability,
    retained,
)

Send = Callable[[CoreState], StateDict]
"""The core's progress -> the model to send to the next edge."""


def cloned(state: CoreState) -> StateDict:
    """Send the core itself: cloned distillation (C-)."""
    return state.params


def independent(core: Core) -> Send:
    """Send a model with a seed of its own, trained on the core data once (I-)."""
    start = initialise(core.model, fold_in(core.seed, "independent"))
    model = replace(core, seed=fold_in(core.seed, "independent-phase-0")).pretrain(start)
    return lambda state: model


def scratch(core: Core) -> Send:
    """Send weights newly drawn for each version of the core: edges train from scratch (Is-)."""
    return lambda state: initialise(core.model, fold_in(core.seed, "scratch", state.version))


@dataclass(frozen=True)
class Variant:
    """One row: what an edge starts from, how many clones it trains, how many rounds teach."""

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
    """Phase 2 as the paper has it: the phases' recipe, KD terms summed, starting at the core."""
    return Distillation(recipe=recipe)


def unselective(recipe: Recipe) -> Distillation:
    """Phase 2 with a fifth of the learning rate, KD terms averaged, starting at the clones' mean.

    Every teacher teaches every sample, as in the paper: good on edges whose labels are spread
    alike, harmful on edges that know few classes. See docs/results.md.
    """
    return Distillation(
        recipe=replace(recipe, lr=recipe.lr / 5), student_start=1.0, mean_over_memory=True
    )


def practical(recipe: Recipe) -> Distillation:
    """Phase 2 as we found it to work best on even and on skewed edges alike.

    As `unselective`, but a teacher teaches only the samples that it classifies correctly, the core
    before the round teaches too, the KD terms are lighter (t = 2), and the student starts only as
    far towards the clones as the core's own knowledge survives.
    """
    return replace(
        unselective(recipe),
        temperature=2.0,
        core_as_teacher=True,
        selection=correct,
        student_start=retained,
    )


PRESETS = {"paper": paper, "practical": practical, "unselective": unselective}
"""Ways to run Phase 2, by the names that run-configs use."""

SELECTIONS: dict[str, Selection | None] = {
    "all": None,
    "correct": correct,
    "label-probability": label_probability,
}
"""Which samples a teacher teaches, by name."""

START_RULES: dict[str, StartRule] = {"retained": retained, "ensemble-share": ensemble_share}
"""Rules for the student's start, by name."""
