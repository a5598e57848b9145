"""Mean and spread over seeds of the numbers in the records of runs."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from .rounds import Record

Results = dict[str, list[list[Record]]]
"""Name of a row -> the records of its runs, one list per seed."""

Summary = dict[str, Any]
"""What a figure's JSON file holds of one row, or of all rows by their names."""


def spread(values: Sequence[float]) -> Summary:
    """Sum up one number over seeds: mean, sample standard deviation (0 for one), all values."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return {"mean": fmean(values), "sd": deviation, "n": len(values), "values": list(values)}


def curve(runs: list[list[Record]], read: Callable[[Record], float], first: int = 0) -> Summary:
    """Sum up one number of every round over seeds.

    Args:
        runs: the records of one row.
        read: returns the number of one record.
        first: the round in which the curve begins.
    """
    rounds = [*range(first, len(runs[0]))]
    spreads = [spread([read(records[i]) for records in runs]) for i in rounds]
    return {
        "rounds": rounds,
        "mean": [one["mean"] for one in spreads],
        "sd": [one["sd"] for one in spreads],
    }


def core_accuracy(record: Record) -> float:
    """Return the core's accuracy on held-out data after a round."""
    return float(record["core-accuracy"])


def final(runs: list[list[Record]]) -> Summary:
    """Sum up the core's accuracy after the last round over seeds."""
    return spread([core_accuracy(records[-1]) for records in runs])


def mean_of_rounds(runs: list[list[Record]]) -> Summary:
    """Sum up over seeds the mean of the core's accuracy over the rounds after Phase 0.

    A run without such rounds counts with its accuracy after Phase 0.
    """
    return spread([fmean(map(core_accuracy, records[1:] or records)) for records in runs])


def worst_drop(runs: list[list[Record]]) -> float:
    """Return the largest fall of the core's accuracy in one round of all seeds.

    It is 0 without rounds after Phase 0, and negative if every round raises the accuracy.
    """
    pairs = [pair for records in runs for pair in pairwise(map(core_accuracy, records))]
    return max([before - after for before, after in pairs], default=0.0)


def cost(records: list[Record]) -> dict[str, int]:
    """Add up the bytes exchanged and the images trained on in one run."""
    return {
        "bytes": sum(record["bytes-down"] + record["bytes-up"] for record in records),
        "images": sum(record["images"] for record in records),
    }
