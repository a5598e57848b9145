"""One picture for the README, drawn from `skew` on two datasets."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .figures import DOTS_PER_INCH, Data, band, look_of, page, rounds_axis
from .skew import BETWEEN

OVER_ROUNDS = (
    "ours",
    "ours without teachers",
    "unselective",
    "CEM, paper",
    "keep the clone",
    "FedAsync",
)
"""Methods that ask one edge a round, so that their rounds can share an axis."""

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
"""Family -> its methods in `skew`; those that a dataset has not are left out."""

EVEN, SKEWED, VERY_SKEWED = "IID", "Dirichlet 0.3", "Dirichlet 0.1"
BOTH = (EVEN, SKEWED)
"""The splits that share a panel: filled markers for the first, open ones for the second."""


def draw_overview(found: dict[str, Data], path: Path) -> None:
    """Draw what a reader of the README wants to know, from `skew` on digits and on CIFAR-100.

    Raises:
        KeyError: for a row that is missing.
    """
    digits, images = found["digits"], found["cifar100"]
    figure = page(8.4, 11.0)
    (even, skewed), (price, cifar) = figure.subplots(2, 2)
    _curves(even, digits["result"], EVEN)
    even.set_title("(a) digits, even edges (IID)", fontsize=10)
    _curves(skewed, digits["result"], VERY_SKEWED)
    skewed.set_title("(b) digits, skewed edges (Dirichlet 0.1)", fontsize=10)
    first = _room_for_the_later_rounds(even, digits["result"], EVEN)
    even.legend(fontsize=8, loc="lower right", title=f"round 0: {first:.3f}", title_fontsize=8)
    _price(price, digits["result"])
    price.set_title(f"(c) digits, at what cost; filled: {EVEN}, open: {SKEWED}", fontsize=10)
    _last(cifar, images["result"])
    model = images["settings"]["model"]
    cifar.set_title(f"(d) CIFAR-100, {model}, {_seeds(images['result'])}", fontsize=10)
    figure.suptitle(
        f"{digits['settings']['num_edges']} edges, held-out accuracy, mean and standard deviation; "
        f"digits: {_seeds(digits['result'])}",
        fontsize=11,
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _seeds(result: Data) -> str:
    """Say how many seeds the rows have that are drawn."""
    drawn = {method for methods in COMPARED.values() for method in methods}
    counts = {row["final"]["n"] for row in result.values() if row["method"] in drawn}
    plural = "s" if max(counts, default=0) > 1 else ""
    return f"{' to '.join(map(str, sorted({min(counts), max(counts)})))} seed{plural}"


def _curves(axes: Axes, result: Data, split: str) -> None:
    for method in OVER_ROUNDS:
        width, above = (2.4, 4) if method == "ours" else (1.5, 3)
        curve = result[f"{method}{BETWEEN}{split}"]["core"]
        band(axes, curve, **look_of(method), label=method, linewidth=width, zorder=above)
    rounds_axis(axes, "core accuracy", curve["rounds"][-1])


def _room_for_the_later_rounds(axes: Axes, result: Data, split: str) -> float:
    """Cut off the first core, which would take most of the panel; returns its accuracy."""
    curves = [result[f"{method}{BETWEEN}{split}"]["core"]["mean"] for method in OVER_ROUNDS]
    later = [accuracy for curve in curves for accuracy in curve[1:]]
    axes.set_ylim(bottom=min(later) - 0.8 * (max(later) - min(later)))  # and room for the legend
    return float(curves[0][0])


def _price(axes: Axes, result: Data) -> None:
    """Draw accuracy against bytes; families stand side by side where their bytes are equal."""
    prices, handles = set[float](), []
    for place, (family, methods) in enumerate(COMPARED.items()):
        aside = 1.05 ** (place - (len(COMPARED) - 1) / 2)
        look = look_of(methods[-1])
        handles.append(Line2D([], [], **look, linestyle="none", label=family))
        for method in methods:
            rows = [result.get(f"{method}{BETWEEN}{split}") for split in BOTH]
            for row, face in zip(rows, (look["color"], "white")):
                if row is not None:
                    megabytes = row["bytes"] / 1e6
                    prices.add(megabytes)
                    axes.plot(aside * megabytes, row["final"]["mean"], **look, markerfacecolor=face)
            means = [row["final"]["mean"] for row in rows if row is not None]
            if means:
                axes.vlines(
                    aside * megabytes,
                    min(means),
                    max(means),
                    color=look["color"],
                    linewidth=0.8,
                    alpha=0.6,
                    zorder=1,
                )
    axes.set_xscale("log")
    axes.set_xticks(sorted(prices), [f"{price:.3g}" for price in sorted(prices)])
    axes.minorticks_off()
    axes.set_xlabel("megabytes exchanged, down and up")
    axes.set_ylabel("last core accuracy")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(handles=handles, fontsize=8, loc="lower right")


def _last(axes: Axes, result: Data) -> None:
    """Draw the last core of every method as a row, both splits in it."""
    wanted = [method for methods in COMPARED.values() for method in methods]
    methods = [
        method for method in wanted if method == "ours" or f"{method}{BETWEEN}{EVEN}" in result
    ]
    for row, method in enumerate(methods):
        look = look_of(method)
        for split, face in zip(BOTH, (look["color"], "white")):
            name = f"{method}{BETWEEN}{split}"
            if name not in result and method != "ours":
                continue  # a method that was played on one of the two splits only
            last = result[name]["final"]
            error = last["sd"] if last["n"] > 1 else None
            axes.errorbar(
                last["mean"],
                row,
                xerr=error,
                **look,
                markerfacecolor=face,
                elinewidth=1,
                capsize=2.5,
            )
    axes.set_yticks(range(len(methods)), methods, fontsize=9)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_xlabel(f"last core accuracy; filled: {EVEN}, open: {SKEWED}")
    axes.grid(alpha=0.3)
