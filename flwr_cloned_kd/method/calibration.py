"""The threshold of a guard from honest stand-ins, which a core trains on its own data."""

from dataclasses import replace
from statistics import NormalDist, fmean, stdev

import torch

from ..engine.nested import rows_of
from ..engine.recipe import Recipe, fold_in
from .core import Core
from .edge import train_edge
from .evidence import Evidence
from .guards import Limit, Score
from .state import CoreState
from .targets import TargetCache

MIN_STAND_INS = 3
"""The spread of fewer scores says too little."""


def calibrate(
    core: Core,
    state: CoreState,
    score: Score,
    *,
    false_alarms: float = 0.01,
    stand_ins: int = 10,
    num_clones: int = 3,
    recipe: Recipe | None = None,
) -> Limit:
    """Find the threshold of a score that honest edges rarely exceed.

    Each stand-in trains on a bootstrap sample of the core data, and the core distils it; nothing of
    this changes the state. The threshold is the bound below which the score of one more honest
    edge lies with probability 1 - `false_alarms`, if the scores are normal: mean + z sd
    sqrt(1 + 1/n). It is at least the largest score that was seen. Edges whose data differs from the
    core's, such as edges with few classes, may exceed it more often.

    Args:
        core: with the data, the recipes and the validation data of the run; its guard and its
            rule of trust are not used.
        state: where the stand-ins start, usually the core after Phase 0.
        score: the score whose threshold is wanted, such as `validation_drop`.
        false_alarms: probability to refuse an honest edge, above 0 and below 1.
        stand_ins: number of trained stand-ins, at least 3; each costs one edge and one Phase 2, or
            the edge alone if the score is known before the distillation.
        num_clones: clones of each stand-in, as in the run.
        recipe: how edges train; None is the recipe of the core.

    Raises:
        ValueError: for a number out of range, or a score that is None for a stand-in.

    Examples:
        >>> import torch
        >>> from dataclasses import replace
        >>> from flwr_cloned_kd import Core, Recipe, calibrate, ensemble_gap
        >>> data = torch.randn(16, 2), torch.arange(16) % 2
        >>> core = Core(model=torch.nn.Linear(2, 2), dataset=data, recipe=Recipe(epochs=2))
        >>> state = core.state(core.pretrain())
        >>> guard = calibrate(core, state, ensemble_gap, stand_ins=3)
        >>> guarded = replace(core, guard=guard)
    """
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms: expected above 0 and below 1, got {false_alarms}")
    if stand_ins < MIN_STAND_INS:
        raise ValueError(f"stand_ins: expected at least {MIN_STAND_INS}, got {stand_ins}")
    scores = [
        _score_of(core, state, score, index, num_clones, recipe or core.recipe)
        for index in range(stand_ins)
    ]
    quantile = NormalDist().inv_cdf(1 - false_alarms)
    bound = fmean(scores) + quantile * stdev(scores) * (1 + 1 / stand_ins) ** 0.5
    return Limit(score, max(bound, *scores))


def _score_of(
    core: Core, state: CoreState, score: Score, index: int, num_clones: int, recipe: Recipe
) -> float:
    """Train one stand-in and return its score, the first that is not None."""
    seed = fold_in(core.seed, "calibration", index)
    generator = torch.Generator().manual_seed(seed)
    count = len(core.dataset[1])
    rows = torch.randint(count, (count,), generator=generator)
    edge = train_edge(
        core.model,
        state.params,
        rows_of(core.dataset, rows),
        recipe,
        task=core.task,
        num_clones=num_clones,
        seed=seed,
        runtime=core.runtime,
    )
    scores: list[float] = []

    def keep(evidence: Evidence) -> str | None:
        value = score(evidence)
        if value is not None:
            scores.append(value)
        return None if value is None else "the score is known"

    watched = replace(core, guard=keep, trust=None, held_out=None, target_cache=TargetCache())
    watched.distill(state, edge)
    if not scores:
        raise ValueError(f"score: expected a number for every edge, got None from {score!r}")
    return scores[0]
