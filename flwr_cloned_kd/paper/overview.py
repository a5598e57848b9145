"""One picture for the README, drawn from `skew` on two datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .skew import look_of, row_name
from .statistics import Summary
from .style import DOTS_PER_INCH, band, blank_figure, rounds_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OVER_ROUNDS = (
    "ours",
    "ours without teachers",
    "unselective",
    "CEM, paper",
    "keep the clone",
    "FedAsync",
)
"""Methods that send the core to one edge a round, so that their rounds can share an axis."""

COMPARED = {
    "ours": ("ours", "ours, 1 clone"),
    "ours without teachers": ("ours without teachers", "ours without teachers, 1 clone"),
    "unselective": ("unselective", "unselective, 1 clone"),
    "paper: CEM, CPP": ("CEM, paper", "CPP, paper"),
    "keep the clone": ("keep the clone",),
    "FedAsync": ("FedAsync",),
    "FedAvg": ("FedAvg, 1 round", "FedAvg, 2 rounds", "FedAvg, R rounds"),
    "FedDF": ("FedDF, 1 round", "FedDF, 2 rounds"),
}
"""Family -> its methods in `skew`; methods that a dataset lacks are left out."""

EVEN = "IID"
SKEWED = "Dirichlet 0.3"
VERY_SKEWED = "Dirichlet 0.1"
BOTH = (EVEN, SKEWED)
"""The splits that share a panel: filled markers for the first, open markers for the second."""


def draw_overview(data: dict[str, Summary], path: Path) -> None:
    """Draw the answers to a reader's first questions: accuracy over the rounds, and its cost.

    Args:
        data: "digits" and "cifar100" -> what the JSON file of `skew` on that dataset holds.
        path: of the picture.

    Raises:
        KeyError: for a row that is missing.
        ImportError: if Matplotlib is not installed.
    """
    digits = data["digits"]["result"]
    images = data["cifar100"]["result"]
    figure = blank_figure(8.4, 11.0)
    (even, skewed), (price, cifar) = figure.subplots(2, 2)
    _draw_curves(even, digits, EVEN)
    even.set_title("(a) digits, even edges (IID)", fontsize=10)
    _draw_curves(skewed, digits, VERY_SKEWED)
    skewed.set_title("(b) digits, skewed edges (Dirichlet 0.1)", fontsize=10)
    first = _cut_off_the_first_core(even, digits, EVEN)
    even.legend(fontsize=8, loc="lower right", title=f"round 0: {first:.3f}", title_fontsize=8)
    _draw_price(price, digits)
    price.set_title(f"(c) digits, at what cost; filled: {EVEN}, open: {SKEWED}", fontsize=10)
    _draw_last_cores(cifar, images)
    model = data["cifar100"]["settings"]["model"]
    cifar.set_title(f"(d) CIFAR-100, {model}, {_seeds(images)}", fontsize=10)
    num_edges = data["digits"]["settings"]["num_edges"]
    figure.suptitle(
        f"{num_edges} edges, held-out accuracy, mean and standard deviation; "
        f"digits: {_seeds(digits)}",
        fontsize=11,
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _seeds(result: Summary) -> str:
    """Write the number of seeds of the rows that are drawn, or the range of their numbers."""
    drawn = {method for methods in COMPARED.values() for method in methods}
    counts = {row["final"]["n"] for row in result.values() if row["method"] in drawn}
    plural = "s" if max(counts, default=0) > 1 else ""
    return f"{' to '.join(map(str, sorted({min(counts), max(counts)})))} seed{plural}"


def _draw_curves(axes: Axes, result: Summary, split: str) -> None:
    for method in OVER_ROUNDS:
        is_ours = method == "ours"
        curve = result[row_name(method, split)]["core"]
        band(
            axes,
            curve,
            **look_of(method),
            label=method,
            linewidth=2.4 if is_ours else 1.5,
            zorder=4 if is_ours else 3,
        )
    rounds_axis(axes, "core accuracy", curve["rounds"][-1])


def _cut_off_the_first_core(axes: Axes, result: Summary, split: str) -> float:
    """Start the y axis above the first core, which would need most of the panel.

    Returns:
        The accuracy of the first core.
    """
    curves = [result[row_name(method, split)]["core"]["mean"] for method in OVER_ROUNDS]
    later = [accuracy for curve in curves for accuracy in curve[1:]]
    axes.set_ylim(bottom=min(later) - 0.8 * (max(later) - min(later)))  # and room for the legend
    return float(curves[0][0])


def _draw_price(axes: Axes, result: Summary) -> None:
    """Draw accuracy against bytes; families stand side by side where their bytes are equal."""
    from matplotlib.lines import Line2D

    prices: set[float] = set()
    handles = []
    for place, (family, methods) in enumerate(COMPARED.items()):
        aside = 1.05 ** (place - (len(COMPARED) - 1) / 2)
        look = look_of(methods[-1])
        handles.append(Line2D([], [], **look, linestyle="none", label=family))
        for method in methods:
            prices |= _draw_method_price(axes, result, method, look, aside)
    axes.set_xscale("log")
    axes.set_xticks(sorted(prices), [f"{price:.3g}" for price in sorted(prices)])
    axes.minorticks_off()
    axes.set_xlabel("megabytes exchanged, down and up")
    axes.set_ylabel("last core accuracy")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(handles=handles, fontsize=8, loc="lower right")


def _draw_method_price(
    axes: Axes, result: Summary, method: str, look: dict[str, Any], aside: float
) -> set[float]:
    """Draw one method on both splits, and a line between its two markers.

    Returns:
        The megabytes of the method, or nothing if the dataset lacks the method.
    """
    prices: set[float] = set()
    means = []
    for split, face in zip(BOTH, (look["color"], "white")):
        row = result.get(row_name(method, split))
        if row is not None:
            price = row["bytes"] / 1e6
            prices.add(price)
            means.append(row["final"]["mean"])
            axes.plot(aside * price, means[-1], **look, markerfacecolor=face)
    if means:
        axes.vlines(
            aside * price,
            min(means),
            max(means),
            color=look["color"],
            linewidth=0.8,
            alpha=0.6,
            zorder=1,
        )
    return prices


def _draw_last_cores(axes: Axes, result: Summary) -> None:
    """Draw the last core of every method as a row, with both splits in it."""
    methods = [
        method
        for methods in COMPARED.values()
        for method in methods
        if method == "ours" or row_name(method, EVEN) in result
    ]
    for y, method in enumerate(methods):
        look = look_of(method)
        for split, face in zip(BOTH, (look["color"], "white")):
            name = row_name(method, split)
            if name not in result and method != "ours":
                continue  # The method was played on one of the two splits only.
            last = result[name]["final"]
            axes.errorbar(
                last["mean"],
                y,
                xerr=last["sd"] if last["n"] > 1 else None,
                **look,
                markerfacecolor=face,
                elinewidth=1,
                capsize=2.5,
            )
    axes.set_yticks(range(len(methods)), methods, fontsize=9)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_xlabel(f"last core accuracy; filled: {EVEN}, open: {SKEWED}")
    axes.grid(alpha=0.3)
