"""Presets of Phase 2: a recipe becomes a `Distillation`."""

from dataclasses import replace
from functools import partial

from ..engine.recipe import Recipe
from .distillation import Distillation
from .knowledge import (
    Selection,
    StartRule,
    correct,
    ensemble_share,
    label_probability,
    retained,
)


def paper(recipe: Recipe) -> Distillation:
    """Run Phase 2 as in the paper: the recipe of all phases, summed KD terms, start at the core."""
    return Distillation(recipe=recipe)


def unselective(recipe: Recipe) -> Distillation:
    """Run Phase 2 at a fifth of the learning rate, with averaged KD terms, from the clones' mean.

    Every ensemble is a teacher of every sample, as in the paper. That is good for edges with the
    same class distribution as the core, and harmful for edges with few classes (docs/results.md).

    Examples:
        >>> from flwr_cloned_kd import Recipe, unselective
        >>> phase_2 = unselective(Recipe(lr=0.1))
        >>> phase_2.recipe.lr, phase_2.student_start, phase_2.selection
        (0.02, 1.0, None)
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

    Examples:
        >>> from dataclasses import replace
        >>> from flwr_cloned_kd import Recipe, practical
        >>> phase_2 = replace(practical(Recipe(epochs=40)), memory_size=1)
        >>> phase_2.temperature, phase_2.core_as_teacher
        (2.0, True)
    """
    return replace(
        unselective(recipe),
        temperature=2.0,
        core_as_teacher=True,
        selection=correct,
        student_start=retained,
    )


PRESETS = {"paper": paper, "practical": practical, "unselective": unselective}
"""Presets of Phase 2, by their names in run-configs.

Examples:
    >>> from flwr_cloned_kd import PRESETS, Recipe
    >>> phase_2 = PRESETS["paper"](Recipe(epochs=40))
    >>> phase_2.temperature, phase_2.student_start
    (4.0, 0.0)
"""

SELECTIONS: dict[str, Selection | None] = {
    "all": None,
    "correct": correct,
    "label-probability": label_probability,
}
"""Selections of samples, by their names in run-configs."""

START_RULES: dict[str, StartRule] = {
    "retained": retained,
    "retained-0.8": partial(retained, min_retained=0.8),
    "ensemble-share": ensemble_share,
}
"""Rules for the start of the student, by their names in the experiments of `paper`."""
