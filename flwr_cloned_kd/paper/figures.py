"""Draw what experiments.py found: one function per figure, a JSON-like dict to a PNG."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib_venn import venn2
from matplotlib_venn.layout.venn2 import DefaultLayoutAlgorithm

from ..asynchronous.palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from .experiments import LAG
from .noise import NOISE, NOISY_ROUNDS
from .seeds import OURS
from .skew import BETWEEN

Data = dict[str, Any]

DOTS_PER_INCH = 110
WIDTH_INCHES = 10.0

STYLES: dict[str, dict[str, Any]] = {
    "IsPP": {"color": BLACK, "marker": "x", "linestyle": ":"},
    "IPP": {"color": VERMILION, "marker": "o", "linestyle": "--"},
    "IEP": {"color": ORANGE, "marker": "s", "linestyle": "--"},
    "IPM": {"color": PURPLE, "marker": "^", "linestyle": "--"},
    "IEM": {"color": SKY, "marker": "D", "linestyle": "--"},
    "CPP": {"color": VERMILION, "marker": "o", "linestyle": "-"},
    "CEP": {"color": ORANGE, "marker": "s", "linestyle": "-"},
    "CPM": {"color": PURPLE, "marker": "^", "linestyle": "-"},
    "CEM": {"color": SKY, "marker": "D", "linestyle": "-"},
    OURS: {"color": BLUE, "marker": "*", "linestyle": "-", "linewidth": 2.4, "markersize": 9},
}
"""Colour and marker: plain, ensemble, memory, both. Dashed and open: independent. Solid: cloned."""

LABELS = {OURS: "CEM, practical (ours)"}
PAPER_LAG = {"omitted": 0.6265, "late": 0.6337, "normal": 0.6425}
PAPER_FIRST_EDGE = "paper, CIFAR-100: about 0.40, ensemble 0.438"


def draw(data: Data, path: Path) -> None:
    """Draw one figure's result, as its JSON file holds it."""
    figure = DRAWINGS[data["figure"]](data["result"])
    least, most = min(data["seeds"].values()), max(data["seeds"].values())
    seeds = f"{most} seed{'s' * (most > 1)}" if least == most else f"{least} to {most} seeds"
    settings = data["settings"]
    figure.suptitle(
        f"{data['title']}: {data['dataset']}, {settings['model']}, mean and standard "
        f"deviation of {seeds}",
        fontsize=11,
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)


def style_of(name: str) -> dict[str, Any]:
    style = {"linewidth": 1.5, "markersize": 5, "label": LABELS.get(name, name)} | STYLES[name]
    if name.startswith("I"):
        style["markerfacecolor"] = "white"
    return style


def page(height: float, width: float = WIDTH_INCHES) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def band(axes: Axes, curve: Data, **style: Any) -> None:
    """Draw a mean over the rounds, and a band of one standard deviation over seeds."""
    rounds, mean, sd = curve["rounds"], curve["mean"], curve["sd"]
    axes.plot(rounds, mean, **style)
    low, high = ([m + sign * s for m, s in zip(mean, sd)] for sign in (-1, 1))
    axes.fill_between(rounds, low, high, color=style["color"], alpha=0.1, linewidth=0)


def rounds_axis(axes: Axes, y: str, last: int) -> None:
    axes.set_xlabel("round (one edge each)")
    axes.set_ylabel(y)
    axes.set_xticks(range(last + 1))
    axes.grid(alpha=0.3)


def _dots(axes: Axes, y: float, spread: Data, **style: Any) -> None:
    """Draw every seed as a small dot on a row, the mean as a marker with its deviation."""
    colour = style.get("color", BLACK)
    values = spread["values"]
    axes.plot(values, [y - 0.25] * len(values), ".", color=colour, alpha=0.5, markersize=4)
    axes.errorbar(spread["mean"], y, xerr=spread["sd"], capsize=2.5, elinewidth=1, **style)


def draw_venn(result: Data) -> Figure:
    """Draw Fig. 4: circles to scale, before and after Phase 2 of the first round."""
    figure = page(6.6, 8.6)
    panels = figure.subplots(2, len(result), squeeze=False)
    names = {"IPP": "independent (IPP)", "CPP": "cloned (CPP)"}
    for column, (name, found) in zip(panels.T, result.items()):
        for axes, when in zip(column, ("before", "after")):
            _venn(axes, found[when])
            consensus = found["consensus"][when]
            axes.set_title(f"{names[name]}, {when} Phase 2\nconsensus {consensus['mean']:.3f} "
                           f"± {consensus['sd']:.3f}", fontsize=10)  # fmt: skip
        column[1].set_xlabel(f"change: mutual {found['mutual']:+.3f}, "
                             f"exclusive {found['exclusive']:+.3f}")  # fmt: skip
    return figure


def _venn(axes: Axes, venn: Data) -> None:
    shares = venn["student_only"], venn["both"], venn["teacher_only"]
    # One scale for all panels, here and in the limits: by default each union would fill its own.
    layout = DefaultLayoutAlgorithm(normalize_to=sum(shares))
    circles = venn2((shares[0], shares[2], shares[1]), ax=axes, set_labels=None,
                    set_colors=(BLUE, ORANGE), layout_algorithm=layout,
                    subset_label_formatter=lambda share: "")  # fmt: skip
    (left, right), radii = (centre.x for centre in circles.centers), circles.radii
    starts, ends = (left - radii[0], right - radii[1]), (left + radii[0], right + radii[1])
    text = {"ha": "center", "va": "center", "fontsize": 10}
    axes.text((max(starts) + min(ends)) / 2, 0, f"both\n{shares[1]:.3f}", **text)  # type: ignore[arg-type]
    # Slivers are too thin for text: the numbers stand outside.
    axes.text(min(starts) - 0.17, 0, f"core\nonly\n{shares[0]:.3f}", color=BLUE, **text)  # type: ignore[arg-type]
    axes.text(max(ends) + 0.17, 0, f"edge\nonly\n{shares[2]:.3f}", color="#9a6a00", **text)  # type: ignore[arg-type]
    middle = (min(starts) + max(ends)) / 2
    axes.set_xlim(middle - 1.0, middle + 1.0)
    axes.set_ylim(-0.6, 0.6)  # a circle of everything has radius 0.564
    axes.set_aspect("equal")
    axes.set_axis_on()  # for the words below
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_variants(result: Data) -> Figure:
    """Draw Fig. 5: the core over the rounds, its last accuracy, and the first edge."""
    figure = page(4.6, 12.5)
    curves, finals, first = figure.subplots(1, 3, width_ratios=(1.25, 1, 0.85))
    names = [*result]
    for name in names:  # ten bands would hide each other: the spread is in the next panel
        core = result[name]["core"]
        curves.plot(core["rounds"], core["mean"], **style_of(name))
    met = [value for name in names for value in result[name]["core"]["mean"][1:]]
    curves.set_ylim(bottom=min(met) - 0.5 * (max(met) - min(met)))  # room for the legend
    start = result[names[0]]["core"]
    curves.set_title(f"first core (round 0): {start['mean'][0]:.3f} ± {start['sd'][0]:.3f}",
                     fontsize=9)  # fmt: skip
    rounds_axis(curves, "core accuracy, held-out data", result[names[0]]["core"]["rounds"][-1])
    curves.legend(fontsize=8, ncols=2, loc="lower right")
    for row, name in enumerate(reversed(names)):
        found, style = result[name], style_of(name) | {"linestyle": "none"}
        _dots(finals, row, found["final"], **style)
        _dots(first, row, found["single clone"], **style)
        if abs(found["ensemble"]["mean"] - found["single clone"]["mean"]) > 1e-6:
            _dots(first, row, found["ensemble"], **style | {"marker": "P", "markersize": 8})
    for axes in (finals, first):
        axes.set_yticks(range(len(names)), [n.replace(OURS, "ours") for n in reversed(names)])
        axes.grid(alpha=0.3)
    finals.set_xlabel("core after the last edge; dots: seeds")
    first.set_yticklabels([])
    first.set_xlabel("first edge: one clone; plus: ensemble")
    first.set_title(PAPER_FIRST_EDGE, fontsize=9)
    return figure


def draw_consensus(result: Data) -> Figure:
    """Draw Fig. 6: three scores over the rounds."""
    figure = page(3.9, 12.0)
    panels = {
        "intersection": "both right: core and present edge",
        "consensus": "consensus: core and present edge",
        "edge-1 intersection": "both right: core and edge 1",
    }
    for axes, (score, label) in zip(figure.subplots(1, 3), panels.items()):
        for name, found in result.items():
            band(axes, found[score], **style_of(name))
        rounds_axis(axes, label, found[score]["rounds"][-1])
    axes.legend(fontsize=8, loc="lower right")
    return figure


def draw_lag(result: Data) -> Figure:
    """Draw Fig. 7: three cases; the paper's numbers on their own scale."""
    figure = page(3.6)
    methods = list(dict.fromkeys(name.split()[0] for name in result))
    panels = figure.subplots(1, 1 + len(methods))
    for row, value in enumerate(PAPER_LAG.values()):
        panels[0].plot(value, row, "o", color=BLACK)
        panels[0].annotate(f"{value:.4f}", (value, row), (0, 7), textcoords="offset points",
                           ha="center", fontsize=9)  # fmt: skip
    panels[0].set_title("paper: CIFAR-100, ResNet-32", fontsize=10)
    panels[0].set_xlim(0.624, 0.6451)
    for axes, method in zip(panels[1:], methods):
        style = style_of(method) | {"linestyle": "none"}
        for row, case in enumerate(LAG):
            found = result[f"{method} {case}"]["final"]
            _dots(axes, row, found, **style)
            axes.annotate(f"{found['mean']:.4f}", (found["mean"], row), (0, 7), fontsize=9,
                          textcoords="offset points", ha="center")  # fmt: skip
        axes.set_title(LABELS.get(method, f"{method}, paper's preset"), fontsize=10)
    for axes in panels:
        axes.set_yticks(range(len(LAG)), [*LAG] if axes is panels[0] else [""] * len(LAG))
        axes.set_ylim(-0.6, len(LAG) - 0.5)
        axes.grid(alpha=0.3)
        axes.set_xlabel("last core accuracy")
    panels[0].set_ylabel("the second edge's answer")
    return figure


NOISE_LINES = {
    "clean": ("no noisy edge", BLUE, "o", "-"),
    "accepted/1.0": ("noisy, accepted", VERMILION, "s", "-"),
    "omitted/1.0": ("noisy, omitted", GREEN, "^", "--"),
}


def draw_noise(result: Data) -> Figure:
    """Draw Fig. 8: accuracies with noisy edges, and how well two guards tell them."""
    figure = page(6.6, 12.5)
    methods = list(dict.fromkeys(name.split("/")[0] for name in result))
    for row, method in zip(figure.subplots(len(methods), 4), methods):
        scores = {"core": "core, held-out", "core train": "core, its own data",
                  "edge": "edge, held-out"}  # fmt: skip
        for axes, (score, label) in zip(row, scores.items()):
            for case, (name, colour, marker, line) in NOISE_LINES.items():
                band(axes, result[f"{method}/{case}"][score], color=colour, marker=marker,
                       linestyle=line, label=name, markersize=4.5)  # fmt: skip
            last = result[f"{method}/clean"][score]["rounds"][-1]
            rounds_axis(axes, f"accuracy: {label}", last)
            for noisy in NOISY_ROUNDS:
                if noisy <= last:
                    axes.axvspan(noisy - 0.4, noisy + 0.4, color="0.85", zorder=0)
        row[0].set_title(LABELS.get(method, f"{method}, paper's preset"), fontsize=10)
        _roc(row[3], result, method)
    figure.legend(
        handles=figure.axes[0].get_lines(),
        fontsize=9,
        loc="outside lower center",
        ncols=3,
        title="all labels of noisy edges permuted (p = 1), in the rounds shaded grey",
        title_fontsize=9,
    )
    return figure


def _roc(axes: Axes, result: Data, method: str) -> None:
    lines = zip(NOISE, (":", "--", "-"))
    guards = {"jump": (VERMILION, "s", "jump (Sec. 5.3)"), "drop": (BLUE, "o", "drop (ours)")}
    for p, line in lines:
        for guard, (colour, marker, label) in guards.items():
            found = result[f"{method}/roc/{guard}"][str(p)]
            axes.plot(found["false alarms"], found["detected"], color=colour, linestyle=line,
                      marker=marker, markersize=3,
                      label=f"{label}, p = {p}: {found['area']:.2f}")  # fmt: skip
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)
    axes.set_xlabel("honest rounds refused")
    axes.set_ylabel("noisy rounds refused")
    axes.legend(fontsize=7, loc="lower right", title="area under the curve", title_fontsize=7)


def draw_own(result: Data) -> Figure:
    """Draw Fig. 9: the core on the data of the edge it meets, before and after."""
    figure = page(3.8, 11.0)
    panels = figure.subplots(1, len(result), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, result.items()):
        band(axes, found["before"], color=VERMILION, marker="s", label="before", linestyle="--")
        band(axes, found["after"], color=BLUE, marker="o", label="after")
        rounds_axis(axes, "", found["after"]["rounds"][-1])
        gain = found["gain"]
        axes.set_title(f"{LABELS.get(name, name)}: {gain['mean']:+.3f} ± {gain['sd']:.3f}",
                       fontsize=10)  # fmt: skip
    figure.axes[0].set_ylabel("core accuracy on the edge's own data")
    axes.legend(loc="lower right", title="its round")
    return figure


def draw_controls(result: Data) -> Figure:
    """Draw every control as a row: accuracy over seeds, megabytes, training images."""
    figure = page(0.5 + 0.21 * (len(result) + 12), 9.5)
    axes = figure.subplots()
    colours = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, BLACK)
    y, ticks, names = 0.0, list[float](), list[str]()
    groups = groupby(result.items(), key=lambda row: row[1]["group"])
    for (group, rows), colour in zip(groups, 3 * colours):
        axes.text(0.01, y, group, transform=axes.get_yaxis_transform(), fontsize=8.5,
                  fontweight="bold", color=colour, va="center")  # fmt: skip
        for name, found in rows:
            y -= 1
            _dots(axes, y, found["core"], color=colour, marker="o", markersize=4)
            text = (f"{found['core']['mean']:.3f}   {found['bytes'] / 1e6:5.2f} MB   "
                    f"{found['images'] / 1e3:4.0f}k   n = {found['core']['n']}")  # fmt: skip
            axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), fontsize=7.5,
                      va="center", family="monospace")  # fmt: skip
            ticks.append(y)
            names.append(name)
        y -= 1.3
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set_ylim(y + 0.5, 1)
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel("core accuracy, held-out data (right: mean, bytes exchanged, thousands of "
                    "training images, seeds)", fontsize=9)  # fmt: skip
    return figure


LOOKS: dict[str, dict[str, Any]] = {
    "ours without teachers": {"color": SKY, "marker": "*", "markersize": 8},
    "ours": {"color": BLUE, "marker": "*", "markersize": 8},
    "unselective": {"color": ORANGE, "marker": "s", "markersize": 5},
    "CEM": {"color": VERMILION, "marker": "o", "markersize": 5},
    "CPP": {"color": VERMILION, "marker": "o", "markersize": 5},
    "keep": {"color": PURPLE, "marker": "^", "markersize": 6},
    "FedAsync": {"color": GREEN, "marker": "X", "markersize": 6},
    "FedAvg": {"color": BLACK, "marker": "D", "markersize": 5},
    "FedProx": {"color": "0.45", "marker": "d", "markersize": 6},
    "FedDF": {"color": "0.45", "marker": "v", "markersize": 6},
}
"""How the name of a method in `skew` begins -> colour and marker of its family."""


def look_of(method: str) -> dict[str, Any]:
    """Return the colour and the marker of a method in `skew`; the method `ours` stands out."""
    other = {"color": BLACK, "marker": "o", "markersize": 5}
    look = next((look for start, look in LOOKS.items() if method.startswith(start)), other)
    return look | ({"markersize": 13} if method == "ours" else {})


FIRST_CORE = "first core"
"""The row that no edge has reached: far below all others, it is a number above the panel."""


def draw_skew(result: Data) -> Figure:
    """Draw a panel for each split: every method as a row, with its bytes at the right."""
    splits = list(dict.fromkeys(found["split"] for found in result.values()))
    methods = [*dict.fromkeys(found["method"] for found in result.values())]
    methods = [method for method in methods if method != FIRST_CORE]
    figure = page(1.3 + 0.25 * len(methods), 3.5 + 2.3 * len(splits))
    panels = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for axes, split in zip(panels, splits):
        for row, method in enumerate(methods):
            found = result.get(f"{method}{BETWEEN}{split}")
            if found is not None:
                _dots(axes, row, found["final"], **look_of(method), zorder=3)
        _rows_apart(axes, methods)
        ours = result.get(f"ours{BETWEEN}{split}")
        if ours is not None:
            mean = ours["final"]["mean"]
            axes.axvline(mean, color=BLUE, alpha=0.5, linewidth=0.9, linestyle="--", zorder=1)
        first = result.get(f"{FIRST_CORE}{BETWEEN}{split}")
        start = f"\nfirst core: {first['final']['mean']:.3f}" if first else ""
        axes.set_title(f"{split}{start}", fontsize=10)
        axes.set_xlabel("last core accuracy; dots: seeds", fontsize=9)
        axes.grid(alpha=0.3, axis="x")
        axes.tick_params(axis="x", labelsize=8)
    panels[0].set_yticks(range(len(methods)), methods, fontsize=9)
    panels[0].set_ylim(len(methods) - 0.4, -0.6)  # the first row is the top one
    for label in panels[0].get_yticklabels():
        if label.get_text() == "ours":
            label.set(color=BLUE, fontweight="bold")
    for row, method in enumerate(methods):
        paid = next(found["bytes"] for found in result.values() if found["method"] == method)
        _beside(panels[-1], row, f"{paid / 1e6:5.2f} MB")
    return figure


def _rows_apart(axes: Axes, methods: list[str]) -> None:
    """Shade the row of `ours`, and draw a line between two families of methods."""
    for row, method in enumerate(methods):
        if method == "ours":
            axes.axhspan(row - 0.5, row + 0.5, color=BLUE, alpha=0.1, linewidth=0)
        look, above = look_of(method), look_of(methods[row - 1])
        if row and (look["color"], look["marker"]) != (above["color"], above["marker"]):
            axes.axhline(row - 0.5, color="0.85", linewidth=0.8, zorder=0)


def _beside(axes: Axes, row: float, text: str) -> None:
    """Write a number at the right of a panel, next to one of its rows."""
    place = axes.get_yaxis_transform()
    axes.text(1.03, row, text, transform=place, fontsize=8, va="center", family="monospace")


DRAWINGS: dict[str, Callable[[Data], Figure]] = {
    "fig4": draw_venn,
    "fig5": draw_variants,
    "fig6": draw_consensus,
    "fig7": draw_lag,
    "fig8": draw_noise,
    "fig9": draw_own,
    "controls": draw_controls,
    "skew": draw_skew,
}
