"""The methods that figures compare, as changes of the base settings, and their runs over seeds."""

from dataclasses import fields, replace
from typing import Any

from ..apps.settings import Settings
from ..method.variants import VARIANTS
from .runs import Run

Changes = dict[str, Any]
"""Field of `Run` or `Settings` -> its value, or a function of the base settings that returns it."""

Plan = dict[str, list[Run]]
"""Name of a row -> its runs, one per seed."""


def every_edge(base: Settings) -> int:
    """Return the number of edges."""
    return base.num_edges


OURS = "practical"
METHODS: dict[str, Changes] = {
    **{name: {"variant": name, "preset": "paper"} for name in VARIANTS},
    OURS: {"variant": "CEM", "preset": "practical"},
}
"""The rows of Fig. 5's table, and our method."""

UNSELECTIVE: Changes = {"variant": "CEM", "preset": "unselective"}
AVERAGE: Changes = {**METHODS["CPP"], "combine": "average"}
FEDAVG: Changes = {**AVERAGE, "edges_per_round": every_edge, "num_rounds": every_edge}
FEDAVG_2: Changes = {**FEDAVG, "num_rounds": 2}
FEDPROX: Changes = {"proximal_mu": 0.01}
FEDDF: Changes = {
    "variant": "CPP",
    "preset": "unselective",
    "edges_per_round": every_edge,
    "num_rounds": 2,
}


def over_seeds(base: Settings, seeds: int, changes: Changes) -> list[Run]:
    """Make one run for each of the seeds 0, 1, ...; `changes` apply to all of them."""
    values = {name: value(base) if callable(value) else value for name, value in changes.items()}
    of_run = {field.name for field in fields(Run)} & values.keys()
    of_settings = {name: value for name, value in values.items() if name not in of_run}
    return [
        Run(
            settings=replace(base, seed=seed, **of_settings),
            **{name: values[name] for name in of_run},
        )
        for seed in range(seeds)
    ]
