"""What is compared, over seeds: runs, and the mean and spread of what they found."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from statistics import fmean, stdev
from typing import Any

from ..apps.settings import Settings
from ..method.variants import VARIANTS
from .runs import Record, Run

Plan = dict[str, list[Run]]
"""What is compared -> its runs, one per seed."""

Results = dict[str, list[list[Record]]]
"""What is compared -> the records of its runs."""

Summary = dict[str, Any]

OURS = "practical"
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"variant": name, "preset": "paper"} for name in VARIANTS},
    OURS: {"variant": "CEM", "preset": "practical"},
}
"""The rows of Fig. 5's table, and ours."""


def over_seeds(base: Settings, seeds: int, **changes: Any) -> list[Run]:
    """Make one run per seed, from 0 on; `changes` are fields of `Run` or of `Settings`."""
    own = {field.name for field in fields(Run)} & changes.keys()
    settings = {name: value for name, value in changes.items() if name not in own}
    return [
        Run(settings=replace(base, seed=seed, **settings), **{name: changes[name] for name in own})
        for seed in range(seeds)
    ]


def spread(values: Sequence[float]) -> Summary:
    """Sum up one number over seeds: mean, sample standard deviation (0 for one), all values."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": fmean(values), "sd": deviation, "n": len(values), "values": list(values)}


def curve(runs: list[list[Record]], read: Callable[[Record], float], first: int = 0) -> Summary:
    """Sum up one number of each round, from round `first` on, over seeds."""
    rounds = [*range(first, len(runs[0]))]
    found = [spread([read(records[i]) for records in runs]) for i in rounds]
    return {"rounds": rounds, "mean": [s["mean"] for s in found], "sd": [s["sd"] for s in found]}


def core_accuracy(record: Record) -> float:
    """Return the core's accuracy on held-out data after a round."""
    return float(record["core-accuracy"])


def final(runs: list[list[Record]]) -> Summary:
    """Sum up the core's last accuracy."""
    return spread([core_accuracy(records[-1]) for records in runs])


def cost(records: list[Record]) -> dict[str, int]:
    """Add up bytes exchanged and images trained on."""
    return {
        "bytes": sum(r["bytes-down"] + r["bytes-up"] for r in records),
        "images": sum(r["images"] for r in records),
    }
