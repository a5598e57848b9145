"""The numbers of the study of bad edges: cores, refused edges, and the area under the ROC."""

from collections.abc import Sequence
from contextlib import suppress
from statistics import fmean

from .attacks import HONEST, HONEST_SPLITS, OMITTED, ROWS, UNGUARDED, Row
from .rounds import SCORES, Record
from .statistics import (
    Results,
    Summary,
    core_accuracy,
    cost,
    final,
    mean_of_rounds,
    spread,
    worst_drop,
)

SKEWED = tuple(split for split in HONEST_SPLITS if split != "IID")


def reduce(results: Results) -> Summary:
    """Sum up the last core, the core right after a bad edge, and what the defence refused."""
    return {name: _reduce_row(ROWS[name], results) for name in results}


def _reduce_row(row: Row, results: Results) -> Summary:
    runs = results[row.name]
    summary: Summary = {
        "attack": row.attack,
        "edges": row.edges,
        "defence": row.defence,
        "split": row.split,
        "visits": row.num_visits,
        "final": final(runs),
        "mean of rounds": mean_of_rounds(runs),
        "worst drop": worst_drop(runs),
        **cost(runs[0]),
    }
    if row.reference in results and row.attack not in (HONEST, OMITTED):
        pairs = zip(runs, results[row.reference])
        summary["minus omitted"] = spread(
            [core_accuracy(one[-1]) - core_accuracy(other[-1]) for one, other in pairs]
        )
    if row.attack != HONEST:
        summary["backdoor"] = spread([records[-1]["backdoor"] for records in runs])
    if row.one_edge_a_round:
        summary |= _refusals(row, runs)
    if row.defence == UNGUARDED and row.attack not in (HONEST, OMITTED):
        summary |= _roc(row, results)
    return summary


def _refusals(row: Row, runs: list[list[Record]]) -> Summary:
    refusals: Summary = {
        "honest refused": spread([_share_refused(records, bad=False) for records in runs])
    }
    if row.attack != HONEST:
        refusals["right after"] = spread([min(_after_bad(records)) for records in runs])
        refusals["bad refused"] = spread([_share_refused(records, bad=True) for records in runs])
        refusals["precision"] = _precision(runs)
    return refusals


def is_bad(record: Record) -> bool:
    """Return whether a bad edge attacked in the round of a record."""
    return bool(record.get("bad", 0.0))


def _after_bad(records: list[Record]) -> list[float]:
    return [core_accuracy(record) for record in records if is_bad(record)]


def _share_refused(records: list[Record], *, bad: bool) -> float:
    return fmean(1 - record["accepted"] for record in records[1:] if is_bad(record) == bad)


def _precision(runs: list[list[Record]]) -> float | None:
    """Return the share of bad edges among those refused in all runs; None if none was refused."""
    refused = [record for records in runs for record in records[1:] if not record["accepted"]]
    return fmean(is_bad(record) for record in refused) if refused else None


def _roc(row: Row, results: Results) -> Summary:
    """Return how well each score separates the bad rounds of a row from honest ones.

    The honest rounds are those of the same runs ("roc"), or those of runs without a bad edge whose
    edges are skewed ("roc skewed").
    """
    rounds = [record for records in results[row.name] for record in records[1:]]
    bad = [record for record in rounds if is_bad(record)]
    honest = [record for record in rounds if not is_bad(record)]
    skewed = [
        record
        for split in SKEWED
        for records in results.get(Row(HONEST, split=split).name, [])
        for record in records[1:]
    ]
    return {"roc": areas(bad, honest), "roc skewed": areas(bad, skewed)}


def areas(bad: Sequence[Record], honest: Sequence[Record]) -> dict[str, float]:
    """Return the area under the ROC of each score, in [0, 1].

    The area is the probability that a bad round has a higher score than an honest one, where a tie
    counts one half: 1 separates them, 0.5 is chance.

    Args:
        bad, honest: records; a record without a score does not count. A score that only records of
            one kind have is left out, and without scikit-learn all are.
    """
    values = {
        name: [
            [record["scores"][name] for record in records if name in record.get("scores", {})]
            for records in (honest, bad)
        ]
        for name in SCORES
    }
    with suppress(ImportError):
        from sklearn.metrics import roc_auc_score

        return {
            name: float(
                roc_auc_score([0] * len(of_honest) + [1] * len(of_bad), [*of_honest, *of_bad])
            )
            for name, (of_honest, of_bad) in values.items()
            if of_honest and of_bad
        }
    return {}
