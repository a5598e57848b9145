"""Runs that differ only in the seed, as one group for each strategy, and what groups differ in."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .curves import Point, curve
from .runs import LoadedRun

NOT_COMPARED = ("seed", "strategy", "results", "checkpoint", "keep-rounds", "watch")
"""Keys of a run-config that make no difference between configs: a run may have several strategies,
and the last four say what a run writes and where, which changes no result."""
MAX_NAMED_KEYS = 2
"""Configs that differ in more keys than that have numbers for names."""

Config = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """One strategy in runs that differ only in the seed."""

    label: str
    """The strategy, its config if there are several, and the folder of an unfinished run."""
    strategy: str
    runs: tuple[LoadedRun, ...]

    @property
    def seeds(self) -> list[int | None]:
        """The seeds of the runs, in order."""
        return [run.seed for run in self.runs]

    @property
    def curves(self) -> list[list[Point]]:
        """The accuracy of the core in every run."""
        return [curve(run.rounds_of(self.strategy), run.first_accuracy) for run in self.runs]


def compared(config: Config) -> Config:
    """Return the entries of a config in which it differs from others."""
    return {key: value for key, value in config.items() if key not in NOT_COMPARED}


def distinct_configs(runs: Sequence[LoadedRun]) -> list[Config]:
    """Return the different configs of runs, in order; runs whose config is not known have none."""
    configs = {_text(run.config): compared(run.config) for run in runs if run.config}
    return list(configs.values())


def differing_keys(configs: Sequence[Config]) -> list[str]:
    """Return the keys whose values are not the same in all configs."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({value_text(config, key) for config in configs}) > 1]


def config_names(configs: Sequence[Config]) -> list[str]:
    """Name configs by what they differ in, such as "preset=paper"; one alone has no name.

    If they differ in many keys, their names are "config 1", "config 2" and so on.
    """
    keys = differing_keys(configs)
    if len(keys) > MAX_NAMED_KEYS:
        return [f"config {number}" for number in range(1, len(configs) + 1)]
    return [", ".join(f"{key}={value_text(config, key)}" for key in keys) for config in configs]


def group_runs(runs: Sequence[LoadedRun]) -> list[Group]:
    """Make a group of the finished runs of one strategy and one config, whatever their seeds.

    A run that has not ended, or whose config is not known, is a group of its own: its numbers are
    not those of a whole run, or they are not known to be comparable.
    """
    configs = distinct_configs(runs)
    names = {_text(config): name for config, name in zip(configs, config_names(configs))}
    members: dict[tuple[str, str, Path | None], list[LoadedRun]] = {}
    for run in runs:
        for strategy in run.strategies:
            parts = [strategy, names.get(_text(run.config), "")]
            if not run.finished:
                parts.append("unfinished")
            is_alone = not run.finished or not run.config
            if is_alone:
                parts.append(run.name)
            label = ", ".join(filter(None, parts))
            key = (label, strategy, run.folder if is_alone else None)
            members.setdefault(key, []).append(run)
    return [
        Group(label, strategy, tuple(own_runs))
        for (label, strategy, _), own_runs in members.items()
    ]


def remarks(runs: Sequence[LoadedRun], groups: Sequence[Group]) -> list[str]:
    """Return sentences about what a reader of the comparison should know."""
    texts = [f"{run.name}: no round has ended yet" for run in runs if not run.rounds]
    for group in groups:
        seeds = group.seeds
        twice = sorted({seed for seed in seeds if seed is not None and seeds.count(seed) > 1})
        texts += [
            f"{group.label}: seed {seed} has {seeds.count(seed)} runs, and all of them count"
            for seed in twice
        ]
    return texts


def value_text(config: Config, key: str) -> str:
    """Write a value of a config; "-" where the config has no such key."""
    if key not in config:
        return "-"
    value = config[key]
    return value if isinstance(value, str) and value else json.dumps(value)


def _text(config: Config) -> str:
    """Write a config so that equal ones have equal texts, for use as a key."""
    return json.dumps(compared(config), sort_keys=True)
