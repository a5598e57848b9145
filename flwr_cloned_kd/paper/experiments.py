"""Every figure is a set of runs and a reduction of their records; figures.py draws what is left."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from ..apps.settings import Settings
from ..method.consensus import Venn
from .controls import CONTROLS, control_runs
from .noise import plan_noise, reduce_noise
from .seeds import (
    METHODS,
    OURS,
    Plan,
    Results,
    Summary,
    core_accuracy,
    cost,
    curve,
    final,
    over_seeds,
    spread,
)
from .skew import BETWEEN, plan_skew, reduce_skew


class Figure(NamedTuple):
    """One figure: which runs it needs, and what it makes of their records."""

    title: str
    plan: Callable[[Settings, int, int], Plan]
    """(base settings, seeds, seeds of lesser rows) -> runs."""
    reduce: Callable[[Results], Summary]
    apart: bool = True
    """Whether each row can be read without the others."""


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
                when: spread([Venn(**r[when]).consensus for r in rounds])
                for when in ("before", "after")
            },
        }
    return found


def reduce_consensus(results: Results) -> Summary:
    """Fig. 6: core and present edge, core and first edge, over the rounds."""
    return {
        name: {
            "intersection": curve(runs, lambda r: float(r["after"]["both"]), 1),
            "consensus": curve(runs, lambda r: Venn(**r["after"]).consensus, 1),
            "edge-1 intersection": curve(runs, lambda r: float(r["first"]["both"]), 1),
            "edge-1 consensus": curve(runs, lambda r: Venn(**r["first"]).consensus, 1),
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
    """Every baseline and every knob, on the same splits and seeds; the main ones first.

    Rows that need more rounds than there are edges for are left out.
    """
    rows = sorted(control_runs(base), key=lambda row: not row[0].main)
    found: Plan = {}
    for control, changes in rows:
        runs = over_seeds(base, seeds if control.main else lesser, **changes)
        if runs[0].num_rounds >= (control.after or 0):
            found[control.name] = runs
    return found


def reduce_controls(results: Results) -> Summary:
    """One row each: accuracy after the last round or an earlier one, and what it cost by then."""
    found: Summary = {}
    for control in CONTROLS:
        if control.name not in results:
            continue
        runs = results[control.name]
        stop = len(runs[0]) if control.after is None else 1 + control.after
        found[control.name] = {
            "group": control.group,
            "rounds": stop - 1,
            "core": spread([core_accuracy(records[stop - 1]) for records in runs]),
            **cost(runs[0][:stop]),
        }
    return found


def choose(name: str, plan: Plan, rows: Sequence[str], splits: Sequence[str] = ()) -> Plan:
    """Keep the named rows of a figure's plan; none named keeps all.

    Rows of "skew" are named by their method; `splits` keeps those of some splits.

    Raises:
        ValueError: for a row that is not there, or a figure whose rows are read together.
    """
    if rows and not FIGURES[name].apart:
        raise ValueError(f"--rows: {name} needs all its rows")
    names = {row: row.partition(BETWEEN)[0] for row in plan}
    if unknown := [row for row in rows if row not in names.values()]:
        known = "; ".join(dict.fromkeys(names.values()))
        raise ValueError(f"--rows: expected some of {known}; got {unknown[0]!r}")
    return {
        row: runs
        for row, runs in plan.items()
        if (not rows or names[row] in rows)
        and (name != "skew" or not splits or row.partition(BETWEEN)[2] in splits)
    }


FIGURES = {
    "fig4": Figure("Correct before and after Phase 2", _methods("IPP", "CPP"), reduce_venn),
    "fig5": Figure("All variants", _methods(), reduce_variants),
    "fig6": Figure("Consensus", _methods("IPP", "IPM", "CPP", "CPM"), reduce_consensus),
    "fig7": Figure("A late edge", plan_lag, reduce_lag, apart=False),
    "fig8": Figure("Noisy edges and guards", plan_noise, reduce_noise, apart=False),
    "fig9": Figure("On the edges' own data", _methods("CPP", "CEM", OURS), reduce_own),
    "controls": Figure("Baselines and controls", plan_controls, reduce_controls),
    "skew": Figure("Even and skewed edges", plan_skew, reduce_skew),
}
