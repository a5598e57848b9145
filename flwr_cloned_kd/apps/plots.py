"""The picture of a run: the core's accuracy per round, and per megabyte."""

from pathlib import Path
from typing import Any, NamedTuple

from ..asynchronous.palette import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION
from ..reading.curves import curve


class Style(NamedTuple):
    """How a strategy is written and drawn; the marker serves where there is no colour."""

    label: str
    colour: str
    marker: str


STYLES = {
    "cloned-kd": Style("Cloned KD", BLUE, "o"),
    "fedavg": Style("FedAvg", VERMILION, "s"),
    "fedprox": Style("FedProx", GREEN, "^"),
    "fedasync": Style("FedAsync", PURPLE, "v"),
    "fedbuff": Style("FedBuff", ORANGE, "D"),
}


def style_of(strategy: str) -> Style:
    """Return the style of a strategy; unknown ones are black."""
    return STYLES.get(strategy, Style(strategy, BLACK, "x"))


def draw_accuracy(rows: list[dict[str, Any]], first: float, path: Path) -> None:
    """Draw the core's accuracy per round, and per megabyte exchanged.

    Args:
        first: accuracy of the core before any edge, a fraction in [0, 1].

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name in dict.fromkeys(row["strategy"] for row in rows):
        points = curve((row for row in rows if row["strategy"] == name), first)
        accuracies = [point.accuracy for point in points]
        rounds = [point.round for point in points]
        megabytes = [point.megabytes for point in points]
        label, colour, marker = style_of(name)
        for axes, x in ((left, rounds), (right, megabytes)):
            if any(x):  # A strategy that has not counted its bytes has no curve over them.
                axes.plot(x, accuracies, color=colour, marker=marker, label=label, markersize=5)
    left.set_xlabel("round (of FedAvg and FedProx: all edges)")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("megabytes exchanged, down and up")
    left.set_ylabel("core accuracy on held-out data")
    for axes in (left, right):
        axes.axhline(first, color="0.6", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
    left.legend(loc="lower right", title=f"first core: {first:.3f}")
    figure.savefig(path, dpi=120)
