"""Every figure is a set of runs and a reduction of their records; figures.py draws what is left."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import product
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ..settings import Settings
from ..variants import VARIANTS
from .controls import CONTROLS, control_runs
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

NOISY_ROUNDS = (4, 7)
NOISE = (0.3, 0.6, 1.0)
GUARD_SCORES = ("jump", "drop")
ANSWERS: dict[str, dict[str, Any]] = {
    "accepted": {},
    "omitted": {"oracle": True},
    **{guard: {"guard": guard} for guard in GUARD_SCORES},
}
"""What becomes of noisy edges."""


class Figure(NamedTuple):
    """One figure: which runs it needs, and what it makes of their records."""

    title: str
    plan: Callable[[Settings, int, int], Plan]
    """(base settings, seeds, seeds of lesser rows) -> runs."""
    reduce: Callable[[Results], Summary]
    apart: bool = True
    """Whether each row can be read without the others."""


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


def _methods(*names: str) -> Callable[[Settings, int, int], Plan]:
    chosen = names or tuple(METHODS)
    return lambda base, seeds, lesser: {
        name: over_seeds(base, seeds, **METHODS[name]) for name in chosen
    }


def reduce_variants(results: Results) -> Summary:
    """Fig. 5: the core over the rounds, and the first edge alone and as an ensemble."""
    return {
        name: {
            "core": curve(runs, core_accuracy),
            "final": final(runs),
            "single clone": spread([records[1]["edge-accuracy"] for records in runs]),
            "ensemble": spread([records[1]["ensemble-accuracy"] for records in runs]),
            **cost(runs[0]),
        }
        for name, runs in results.items()
    }


def reduce_venn(results: Results) -> Summary:
    """Fig. 4: who is right before and after the first round's Phase 2, with a fixed teacher."""
    found: Summary = {}
    for name, runs in results.items():
        rounds = [records[1] for records in runs]
        venns = {
            when: {part: fmean(r[when][part] for r in rounds) for part in rounds[0][when]}
            for when in ("before", "after")
        }
        change = {part: venns["after"][part] - venns["before"][part] for part in venns["after"]}
        found[name] = venns | {
            "mutual": change["both"],
            "exclusive": change["student_only"],
            "consensus": {
                when: spread([_consensus(r[when]) for r in rounds]) for when in ("before", "after")
            },
        }
    return found


def reduce_consensus(results: Results) -> Summary:
    """Fig. 6: core and present edge, core and first edge, over the rounds."""
    return {
        name: {
            "intersection": curve(runs, lambda r: float(r["after"]["both"]), 1),
            "consensus": curve(runs, lambda r: _consensus(r["after"]), 1),
            "edge-1 intersection": curve(runs, lambda r: float(r["first"]["both"]), 1),
            "edge-1 consensus": curve(runs, lambda r: _consensus(r["first"]), 1),
        }
        for name, runs in results.items()
    }


LAG = {
    "omitted": ((0, 0),),
    "late": ((0, 0), (1, 1)),
    "normal": ((1, 0), (0, 0)),
}
"""Sec. 5.2, one core and two edges, as (edge, rounds late): the second edge is sent the first core,
and its answer is left out; or comes after the first edge was distilled; or comes in time."""


def plan_lag(base: Settings, seeds: int, lesser: int) -> Plan:
    """Fig. 7: three parts of the data, the core's and two edges'."""
    return {
        f"{method} {case}": over_seeds(base, seeds, num_edges=2, order=order, **METHODS[method])
        for method in ("CPP", OURS)
        for case, order in LAG.items()
    }


def reduce_lag(results: Results) -> Summary:
    """Fig. 7: the last core, and what using the late answer gained, seed by seed."""
    found: Summary = {name: {"final": final(runs)} for name, runs in results.items()}
    for name, row in found.items():
        method, case = name.split()
        if case != "omitted":
            without = found[f"{method} omitted"]["final"]["values"]
            row["gain"] = spread([a - b for a, b in zip(row["final"]["values"], without)])
    return found


def plan_noise(base: Settings, seeds: int, lesser: int) -> Plan:
    """Fig. 8: noisy edges at rounds 4 and 7, accepted, omitted, or judged by a guard."""
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


def reduce_own(results: Results) -> Summary:
    """Fig. 9: the core on each edge's own data, before and after its round."""
    return {
        name: {
            "before": curve(runs, lambda r: float(r["own-before"]), 1),
            "after": curve(runs, lambda r: float(r["own-after"]), 1),
            "gain": spread([fmean(r["own-after"] - r["own-before"] for r in records[1:])
                            for records in runs]),
        }
        for name, runs in results.items()
    }  # fmt: skip


def plan_controls(base: Settings, seeds: int, lesser: int) -> Plan:
    """Every baseline and every knob, on the same splits and seeds; the main ones first."""
    rows = sorted(control_runs(base), key=lambda row: not row[0].main)
    return {
        control.name: over_seeds(base, seeds if control.main else lesser, **changes)
        for control, changes in rows
    }


def reduce_controls(results: Results) -> Summary:
    """One row each: accuracy after the last round or an earlier one, and what it cost by then."""
    found: Summary = {}
    for control in CONTROLS:
        if control.name not in results:
            continue
        runs = results[control.name]
        stop = len(runs[0]) if control.after is None else min(1 + control.after, len(runs[0]))
        found[control.name] = {
            "group": control.group,
            "rounds": stop - 1,
            "core": spread([core_accuracy(records[stop - 1]) for records in runs]),
            **cost(runs[0][:stop]),
        }
    return found


def choose(name: str, plan: Plan, rows: Sequence[str]) -> Plan:
    """Keep the named rows of a figure's plan; none named keeps all.

    Raises:
        ValueError: for a row that is not there, or a figure whose rows are read together.
    """
    if rows and not FIGURES[name].apart:
        raise ValueError(f"--rows: {name} needs all its rows")
    if unknown := [row for row in rows if row not in plan]:
        raise ValueError(f"--rows: expected some of {'; '.join(plan)}; got {unknown[0]!r}")
    return {row: plan[row] for row in plan if row in rows or not rows}


def _consensus(venn: dict[str, float]) -> float:
    union = sum(venn.values())
    return venn["both"] / union if union else 0.0


FIGURES = {
    "fig4": Figure("Correct before and after Phase 2", _methods("IPP", "CPP"), reduce_venn),
    "fig5": Figure("All variants", _methods(), reduce_variants),
    "fig6": Figure("Consensus", _methods("IPP", "IPM", "CPP", "CPM"), reduce_consensus),
    "fig7": Figure("A late edge", plan_lag, reduce_lag, apart=False),
    "fig8": Figure("Noisy edges and guards", plan_noise, reduce_noise, apart=False),
    "fig9": Figure("On the edges' own data", _methods("CPP", "CEM", OURS), reduce_own),
    "controls": Figure("Baselines and controls", plan_controls, reduce_controls),
}
