"""Fig. 8: edges with permuted labels, and how well guards tell them."""

from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import Any

from ..apps.settings import Settings
from .runs import Record
from .seeds import (
    METHODS,
    OURS,
    Plan,
    Results,
    Summary,
    core_accuracy,
    curve,
    final,
    over_seeds,
)

NOISY_ROUNDS = (4, 7)
NOISE = (0.3, 0.6, 1.0)
GUARD_SCORES = ("jump", "drop")
ANSWERS: dict[str, dict[str, Any]] = {
    "accepted": {},
    "omitted": {"oracle": True},
    **{guard: {"guard": guard} for guard in GUARD_SCORES},
}
"""What becomes of noisy edges."""


def plan_noise(base: Settings, seeds: int, lesser: int) -> Plan:
    """Fig. 8: noisy edges at rounds 4 and 7, accepted, omitted, or judged by a guard."""
    if base.num_edges < 2:
        raise ValueError("--num-edges: expected at least 2, an honest and a noisy one, got 1")
    noisy = [r - 1 for r in NOISY_ROUNDS if r <= base.num_edges] or [base.num_edges - 1]
    bad = {"noisy_edges": ",".join(map(str, noisy))}
    found: Plan = {}
    for method in ("CPP", OURS):
        row = METHODS[method]
        found[f"{method}/clean"] = over_seeds(base, seeds, **row)
        for p, (case, how) in product(NOISE, ANSWERS.items()):
            changes: dict[str, Any] = row | bad | how | {"noise_probability": p}
            found[f"{method}/{case}/{p}"] = over_seeds(base, seeds if p == 1 else lesser, **changes)
    return found


def reduce_noise(results: Results) -> Summary:
    """Fig. 8: curves with and without noise, what the guards did, and their ROC."""
    found: Summary = {}
    for name, runs in results.items():
        method, case, *_ = name.split("/")
        row = {"final": final(runs), "core": curve(runs, core_accuracy)}
        row["core train"] = curve(runs, lambda r: float(r["train-accuracy"]))
        row["edge"] = curve(runs, lambda r: float(r["edge-accuracy"]), 1)
        row["edge train"] = curve(runs, lambda r: float(r["own-edge"]), 1)
        rounds = [r for records in runs for r in records[1:]]
        if case in GUARD_SCORES:
            row["refused"] = {
                who: fmean(1 - r["accepted"] for r in rounds if _is_noisy(r, results, name) is bad)
                for who, bad in (("noisy", True), ("honest", False))
            }
        found[name] = row
    for method in dict.fromkeys(name.split("/")[0] for name in results):
        for guard in GUARD_SCORES:
            found[f"{method}/roc/{guard}"] = {
                str(p): _roc(results[f"{method}/omitted/{p}"], guard) for p in NOISE
            }
    return found


def _is_noisy(record: Record, results: Results, name: str) -> bool:
    """Tell a noisy round by the run in which an oracle refused just those."""
    omitted = results[f"{name.split('/')[0]}/omitted/1.0"][0]
    return not omitted[record["round"]]["accepted"]


def guard_scores(records: list[Record], guard: str) -> list[tuple[float, bool]]:
    """Score every round as a guard would, on a history of honest rounds only.

    Returns:
        (what the guard compares with its threshold, is the edge noisy) for each round.
    """
    history, found = [records[0]["train-accuracy"]], []
    for record in records[1:]:
        trained = record["train-accuracy"]
        rise, fall = trained - fmean(history), history[-1] - trained
        found.append((rise if guard == "jump" else fall, not record["accepted"]))
        if record["accepted"]:
            history.append(trained)
    return found


def _roc(runs: list[list[Record]], guard: str) -> Summary:
    scores = [pair for records in runs for pair in guard_scores(records, guard)]
    noisy, honest = ([s for s, bad in scores if bad is kind] for kind in (True, False))
    return roc(noisy, honest) | {"n": len(runs)}


def roc(noisy: Sequence[float], honest: Sequence[float]) -> Summary:
    """Sweep a threshold: share of noisy and of honest rounds above it, and the area under it.

    The area is the chance that a noisy round scores above an honest one, ties half.
    """
    points = [(0.0, 0.0)] + [
        (fmean(s >= t for s in honest), fmean(s >= t for s in noisy))
        for t in sorted({*noisy, *honest}, reverse=True)
    ]
    wins = fmean((a > b) + 0.5 * (a == b) for a in noisy for b in honest)
    return {"false alarms": [x for x, _ in points], "detected": [y for _, y in points],
            "area": wins}  # fmt: skip
