"""One picture for the README, drawn from the JSON files of four figures."""

from pathlib import Path

from matplotlib.axes import Axes

from .figures import (
    BLACK,
    BLUE,
    DOTS_PER_INCH,
    GREEN,
    NOISE_LINES,
    ORANGE,
    PAPER_LAG,
    PURPLE,
    SKY,
    VERMILION,
    Data,
    band,
    page,
    rounds_axis,
    style_of,
)
from .seeds import OURS

AT_WHAT_COST = {
    "CEM, practical (ours)": ("ours", BLUE, "*", -3),
    "CPM, practical: 1 clone": ("ours, 1 clone", BLUE, "*", -3),
    "CEM, paper": ("CEM", SKY, "D", -3),
    "CPP, paper": ("CPP", VERMILION, "o", -10),
    "keep the clone": ("keep the clone", PURPLE, "^", 4),
    "FedAsync, alpha 0.6": ("FedAsync", ORANGE, "X", -3),
    "FedBuff, K 3, lr 0.5": ("FedBuff", ORANGE, "P", -3),
    "FedAvg, 1 round": ("FedAvg, 1 round", BLACK, "s", -13),
    "FedAvg, 2 rounds": ("FedAvg, 2 rounds", BLACK, "s", -12),
    "FedAvg, R rounds": ("FedAvg, 9 rounds", BLACK, "s", -3),
    "average, then distil (FedDF), 1 round": ("FedDF, 1 round", GREEN, "v", -3),
    "average, then distil (FedDF), 2 rounds": ("FedDF, 2 rounds", GREEN, "v", -3),
}
"""Row of the controls -> its label, colour, marker, and how far up the label stands, in points."""


def draw_overview(found: dict[str, Data], path: Path) -> None:
    """Draw what a reader of the README wants to know, from the JSON files of four figures."""
    figure = page(7.2, 10.5)
    (learning, price), (noise, lag) = figure.subplots(2, 2)
    variants, controls = found["fig5"]["result"], found["controls"]["result"]
    for name in ("IsPP", "IPP", "CPP", "CEM", OURS):
        band(learning, variants[name]["core"], **style_of(name))
    rounds_axis(learning, "core accuracy", variants["CPP"]["core"]["rounds"][-1])
    learning.set_title("(a) one edge a round, each asked once", fontsize=10)
    learning.legend(fontsize=8, loc="lower right")
    _price(price, controls)
    lines = {"clean": NOISE_LINES["clean"], "accepted/1.0": NOISE_LINES["accepted/1.0"],
             "drop/1.0": ("noisy, guard refuses", GREEN, "^", "--")}  # fmt: skip
    for case, (label, colour, marker, line) in lines.items():
        curve = found["fig8"]["result"][f"{OURS}/{case}"]["core"]
        band(noise, curve, color=colour, marker=marker, linestyle=line, label=label)
    rounds_axis(noise, "core accuracy", curve["rounds"][-1])
    noise.set_title("(c) edges with shuffled labels, ours", fontsize=10)
    noise.legend(fontsize=8, loc="lower right")
    _gains(lag, found["fig7"]["result"])
    drawn = [n for name in found for n in found[name]["seeds"].values()]
    settings = found["fig5"]["settings"]
    figure.suptitle(
        f"{found['fig5']['dataset']}, {settings['num_edges']} edges: held-out accuracy, mean and "
        f"standard deviation of {min(drawn)} to {max(drawn)} seeds",
        fontsize=11,
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _price(axes: Axes, controls: Data) -> None:
    prices = set[float]()
    for name, (label, colour, marker, up) in AT_WHAT_COST.items():
        row = controls.get(name)
        if row is None or not row["bytes"]:
            continue
        core, megabytes = row["core"], row["bytes"] / 1e6
        size = 10 if marker == "*" else 6
        axes.errorbar(megabytes, core["mean"], yerr=core["sd"], color=colour, marker=marker,
                      capsize=3, markersize=size)  # fmt: skip
        axes.annotate(label, (megabytes, core["mean"]), (8, up), textcoords="offset points",
                      fontsize=8, color=colour)  # fmt: skip
        prices.add(megabytes)
    axes.set_xscale("log")
    axes.set_xlim(right=2.2 * max(prices, default=1.0))  # room for the labels
    axes.set_xticks(sorted(prices), [f"{price:.3g}" for price in sorted(prices)])
    axes.minorticks_off()
    axes.set_xlabel("megabytes exchanged, down and up")
    axes.set_ylabel("last core accuracy")
    axes.grid(alpha=0.3)
    axes.set_title("(b) at what cost", fontsize=10)


def _gains(axes: Axes, lag: Data) -> None:
    """Draw what a late and a timely answer add to one omitted, in points."""
    paper = {case: PAPER_LAG[case] - PAPER_LAG["omitted"] for case in ("late", "normal")}
    for row, case in enumerate(paper):
        for method, shift in (("CPP", 0.0), (OURS, -0.18)):
            gain, style = lag[f"{method} {case}"]["gain"], style_of(method)
            axes.errorbar(100 * gain["mean"], row + shift, xerr=100 * gain["sd"], capsize=3,
                          color=style["color"], marker=style["marker"], markersize=8,
                          linestyle="none", label=style["label"] if row == 0 else None)  # fmt: skip
        label = "paper, CIFAR-100" if row == 0 else None
        axes.plot(100 * paper[case], row + 0.18, "o", color=BLACK, markerfacecolor="white",
                  label=label)  # fmt: skip
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_yticks((0, 1), ("used late", "in time"))
    axes.set_ylim(-1.1, 1.5)
    axes.set_xlabel("points of accuracy over omitting the answer")
    axes.grid(alpha=0.3)
    axes.set_title("(d) the second of two edges answers late", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
