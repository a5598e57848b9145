"""What the drawings of all figures share: colours, styles of methods, and parts of a panel.

Matplotlib is optional and imported by `blank_figure` only, so this module is importable without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..asynchronous.palette import BLACK, BLUE, ORANGE, PURPLE, SKY, VERMILION
from .methods import OURS
from .statistics import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
"""Colour and marker show plain, ensemble, memory or both; independent variants are dashed and
have open markers, cloned variants are solid."""

LABELS = {OURS: "CEM, practical (ours)"}


def style_of(method: str) -> dict[str, Any]:
    """Return the options of Matplotlib's `plot` for one of `methods.METHODS`."""
    style = {"linewidth": 1.5, "markersize": 5, "label": LABELS.get(method, method)}
    style |= STYLES[method]
    if method.startswith("I"):
        style["markerfacecolor"] = "white"
    return style


def panel_title(method: str) -> str:
    """Return the title of a panel that shows one method."""
    return LABELS.get(method, f"{method}, paper's preset")


def blank_figure(height: float, width: float = WIDTH_INCHES) -> Figure:
    """Make an empty figure; height and width are in inches.

    Raises:
        ImportError: if Matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def band(axes: Axes, curve: Summary, **style: Any) -> None:
    """Draw a mean over the rounds, and a band of one standard deviation over seeds."""
    axes.plot(curve["rounds"], curve["mean"], **style)
    low = [mean - sd for mean, sd in zip(curve["mean"], curve["sd"])]
    high = [mean + sd for mean, sd in zip(curve["mean"], curve["sd"])]
    axes.fill_between(curve["rounds"], low, high, color=style["color"], alpha=0.1, linewidth=0)


def rounds_axis(axes: Axes, y_label: str, last: int) -> None:
    """Label the axes of a panel whose x axis has the rounds 0 to `last`."""
    axes.set_xlabel("round (one edge each)")
    axes.set_ylabel(y_label)
    axes.set_xticks(range(last + 1))
    axes.grid(alpha=0.3)


def dots(axes: Axes, y: float, spread: Summary, **style: Any) -> None:
    """Draw every seed as a small dot on a row, and the mean as a marker with its deviation."""
    colour = style.get("color", BLACK)
    values = spread["values"]
    axes.plot(values, [y - 0.25] * len(values), ".", color=colour, alpha=0.5, markersize=4)
    axes.errorbar(spread["mean"], y, xerr=spread["sd"], capsize=2.5, elinewidth=1, **style)
