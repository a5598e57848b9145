"""Fig. 8: edges with permuted labels (Sec. 5.3), and how well guards detect their rounds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from ..apps.settings import Settings
from ..asynchronous.palette import BLUE, GREEN, VERMILION
from .methods import METHODS, OURS, Changes, Plan, over_seeds
from .rounds import Record
from .statistics import Results, Summary, core_accuracy, curve, final
from .style import band, blank_figure, panel_title, rounds_axis
from .tables import NONE, spread_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOISY_ROUNDS = (4, 7)
PROBABILITIES = (0.3, 0.6, 1.0)
GUARDS = ("jump", "drop")
CASES: dict[str, Changes] = {
    "accepted": {},
    "omitted": {"oracle": True},
    **{guard: {"guard": guard} for guard in GUARDS},
}
"""What happens to the rounds of noisy edges -> what differs from the base settings."""


class Row(NamedTuple):
    """One row of the figure.

    Args:
        method: one of `methods.METHODS`.
        case: one of `CASES`, or "clean" without a noisy edge.
        probability: of a noisy edge, to permute the labels of a batch; None without a noisy edge.
    """

    method: str
    case: str
    probability: float | None = None

    @property
    def name(self) -> str:
        """The name of the row in the JSON file."""
        parts = (self.method, self.case, self.probability)
        return "/".join(str(part) for part in parts if part is not None)


ROWS = {
    row.name: row
    for method in ("CPP", OURS)
    for row in (
        Row(method, "clean"),
        *(Row(method, case, p) for p, case in product(PROBABILITIES, CASES)),
    )
}


def roc_name(method: str, guard: str) -> str:
    """Return the name in the JSON file of the ROC of one guard."""
    return f"{method}/roc/{guard}"


def noisy_edges(base: Settings) -> list[int]:
    """Return the edges, from 0, of `NOISY_ROUNDS`; with few edges, the last one."""
    return [r - 1 for r in NOISY_ROUNDS if r <= base.num_edges] or [base.num_edges - 1]


def plan(base: Settings, seeds: int, lesser: int) -> Plan:
    """Plan noisy edges in rounds 4 and 7: accepted, omitted, or left to a guard.

    Raises:
        ValueError: if there is only one edge.
    """
    if base.num_edges < 2:
        raise ValueError("--num-edges: expected at least 2, an honest and a noisy one, got 1")
    noisy = noisy_edges(base)
    runs: Plan = {}
    for name, row in ROWS.items():
        changes = METHODS[row.method]
        if row.probability is not None:
            changes = {
                **changes,
                **CASES[row.case],
                "noisy_edges": ",".join(map(str, noisy)),
                "noise_probability": row.probability,
            }
        full = row.probability in (None, 1.0)
        runs[name] = over_seeds(base, seeds if full else lesser, changes)
    return runs


def reduce(results: Results) -> Summary:
    """Sum up the accuracies over the rounds, what the guards refused, and the guards' ROC."""
    summary: Summary = {name: _reduce_row(ROWS[name], results) for name in results}
    for method, guard in product(dict.fromkeys(ROWS[name].method for name in results), GUARDS):
        summary[roc_name(method, guard)] = {
            str(p): _roc_of(results[Row(method, "omitted", p).name], guard) for p in PROBABILITIES
        }
    return summary


def _reduce_row(row: Row, results: Results) -> Summary:
    runs = results[row.name]
    summary = {
        "final": final(runs),
        "core": curve(runs, core_accuracy),
        "core train": curve(runs, lambda record: float(record["train-accuracy"])),
        "edge": curve(runs, lambda record: float(record["edge-accuracy"]), 1),
    }
    if row.case in GUARDS:
        # The oracle refuses exactly the rounds of noisy edges, so its run shows which these are.
        omitted = results[Row(row.method, "omitted", 1.0).name][0]
        noisy = {record["round"] for record in omitted if not record["accepted"]}
        records = [record for records in runs for record in records[1:]]
        summary["refused"] = {
            "noisy": fmean(1 - r["accepted"] for r in records if r["round"] in noisy),
            "honest": fmean(1 - r["accepted"] for r in records if r["round"] not in noisy),
        }
    return summary


def guard_scores(records: list[Record], guard: str) -> list[tuple[float, bool]]:
    """Score every round as a guard would with a history of honest rounds only.

    Args:
        records: of a run in which an oracle refused the rounds of noisy edges.
        guard: one of `GUARDS`.

    Returns:
        For each round, the number that the guard compares with its threshold, and whether the edge
        is noisy.
    """
    history = [records[0]["train-accuracy"]]
    scores = []
    for record in records[1:]:
        trained = record["train-accuracy"]
        score = trained - fmean(history) if guard == "jump" else history[-1] - trained
        scores.append((score, not record["accepted"]))
        if record["accepted"]:
            history.append(trained)
    return scores


def _roc_of(runs: list[list[Record]], guard: str) -> Summary:
    scores = [pair for records in runs for pair in guard_scores(records, guard)]
    noisy = [score for score, is_noisy in scores if is_noisy]
    honest = [score for score, is_noisy in scores if not is_noisy]
    return roc(noisy, honest) | {"n": len(runs)}


def roc(noisy: Sequence[float], honest: Sequence[float]) -> Summary:
    """Compute the receiver operating characteristic of scores.

    Args:
        noisy: scores of noisy rounds, which should be the higher ones.
        honest: scores of honest rounds.

    Returns:
        For a falling threshold, the share of honest rounds ("false alarms") and of noisy rounds
        ("detected") at or above it; and the "area" under this curve, which is the probability that
        a noisy round scores above an honest one, where a tie counts one half.
    """
    thresholds = sorted({*noisy, *honest}, reverse=True)
    return {
        "false alarms": [0.0, *(fmean(s >= t for s in honest) for t in thresholds)],
        "detected": [0.0, *(fmean(s >= t for s in noisy) for t in thresholds)],
        "area": fmean((a > b) + 0.5 * (a == b) for a in noisy for b in honest),
    }


def table(result: Summary) -> tuple[list[str], list[list[str]]]:
    """Show the last core of every row, what a guard refused, and the area under the ROC."""
    headings = [
        "",
        "noisy edges",
        "p",
        "last core",
        "noisy refused",
        "honest refused",
        *(f"area under the ROC, {guard}" for guard in GUARDS),
    ]
    return headings, [_line(ROWS[name], result) for name in result if name in ROWS]


def _line(row: Row, result: Summary) -> list[str]:
    summary = result[row.name]
    case = {"clean": "none"} | {guard: f"guard: {guard}" for guard in GUARDS}
    refused = [NONE, NONE]
    if "refused" in summary:
        refused = [f"{summary['refused'][edges]:.2f}" for edges in ("noisy", "honest")]
    areas = [NONE] * len(GUARDS)
    if row.case == "omitted":
        p = str(row.probability)
        areas = [f"{result[roc_name(row.method, guard)][p]['area']:.2f}" for guard in GUARDS]
    return [
        row.method,
        case.get(row.case, row.case),
        NONE if row.probability is None else str(row.probability),
        spread_cell(summary["final"]),
        *refused,
        *areas,
    ]


PANELS = {"core": "core, held-out", "core train": "core, its own data", "edge": "edge, held-out"}
"""Score -> the label of its panel."""

LINES = {
    ("clean", None): ("no noisy edge", BLUE, "o", "-"),
    ("accepted", 1.0): ("noisy, accepted", VERMILION, "s", "-"),
    ("omitted", 1.0): ("noisy, omitted", GREEN, "^", "--"),
}
"""Case and probability -> the label, colour, marker and line style of its curve."""

GUARD_LINES = {
    "jump": ("jump (Sec. 5.3)", VERMILION, "s"),
    "drop": ("drop (ours)", BLUE, "o"),
}
"""Guard -> the label, colour and marker of its ROC."""


def draw(result: Summary) -> Figure:
    """Draw the accuracies with noisy edges, and the ROC of the guards, a row for each method."""
    figure = blank_figure(6.6, 12.5)
    methods = list(dict.fromkeys(ROWS[name].method for name in result if name in ROWS))
    for (*panels, roc_panel), method in zip(figure.subplots(len(methods), 4), methods):
        for axes, score in zip(panels, PANELS):
            _draw_score(axes, result, method, score)
        panels[0].set_title(panel_title(method), fontsize=10)
        _draw_roc(roc_panel, result, method)
    figure.legend(
        handles=figure.axes[0].get_lines(),
        fontsize=9,
        loc="outside lower center",
        ncols=3,
        title="all labels of noisy edges permuted (p = 1), in the rounds shaded grey",
        title_fontsize=9,
    )
    return figure


def _draw_score(axes: Axes, result: Summary, method: str, score: str) -> None:
    for (case, probability), (label, colour, marker, line) in LINES.items():
        band(
            axes,
            result[Row(method, case, probability).name][score],
            color=colour,
            marker=marker,
            linestyle=line,
            label=label,
            markersize=4.5,
        )
    last = result[Row(method, "clean").name][score]["rounds"][-1]
    rounds_axis(axes, f"accuracy: {PANELS[score]}", last)
    for noisy in NOISY_ROUNDS:
        if noisy <= last:
            axes.axvspan(noisy - 0.4, noisy + 0.4, color="0.85", zorder=0)


def _draw_roc(axes: Axes, result: Summary, method: str) -> None:
    for p, line in zip(PROBABILITIES, (":", "--", "-")):
        for guard, (label, colour, marker) in GUARD_LINES.items():
            curve = result[roc_name(method, guard)][str(p)]
            axes.plot(
                curve["false alarms"],
                curve["detected"],
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=3,
                label=f"{label}, p = {p}: {curve['area']:.2f}",
            )
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)
    axes.set_xlabel("honest rounds refused")
    axes.set_ylabel("noisy rounds refused")
    axes.legend(fontsize=7, loc="lower right", title="area under the curve", title_fontsize=7)
