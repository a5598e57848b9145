"""The interactive figures of a comparison, as Plotly's JavaScript library takes them.

A figure is a dict with "data" and "layout". The page sets the colours of text and lines, which
depend on whether it is light or dark.
"""

from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean, stdev
from typing import Any

import plotly.graph_objects as go

from ..asynchronous.palette import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from ..asynchronous.timeline import CORE, LOOKS, MAX_LANES, Span, spans
from .curves import Point
from .groups import Group
from .lines import is_number
from .runs import LoadedRun

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)
"""Black and yellow are left out: each is hard to see on one of the two backgrounds."""
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "triangle-up", "triangle-down", "diamond", "x", "star")
HATCHES = {"": "", "////": "/", "xxxx": "x", "....": "."}
"""Matplotlib's name of a hatch -> Plotly's."""
MAX_LEGEND_WIDTH = 40
"""Longer names of groups have several lines in a legend, so that a phone shows them whole."""
MAX_TICKS = 10
MAX_MARKED_ROUNDS = 100
"""Curves with more rounds are lines without markers."""
MAX_SPANS = 3000
"""How many bars a timeline has: a browser draws no more of them in a moment."""

X_AXES: dict[str, tuple[str, Callable[[Point], float]]] = {
    "rounds": ("round", lambda point: point.round),
    "bytes": ("megabytes exchanged, down and up", lambda point: point.megabytes),
    "seconds": ("seconds", lambda point: point.seconds),
}
"""Choice -> title of the x axis, and where a point lies on it."""

SHARES = {
    "student-only": ("only the core", SKY),
    "both": ("both", GREEN),
    "teacher-only": ("only the edge", ORANGE),
}
"""Share of the held-out data that is classified correctly -> by which model, colour."""

Figure = dict[str, Any]
Choices = list[tuple[str, Figure]]
"""What a reader of the page may choose, and the figure of each choice."""


def accuracy_figures(groups: Sequence[Group]) -> Choices:
    """Draw the core's accuracy over the rounds, over the bytes and over the seconds.

    A group is drawn as the mean over its runs, with a band of one standard deviation, as far as
    all of its runs go.
    """
    figures: Choices = []
    most_rounds = max((len(points) for group in groups for points in group.curves), default=0)
    for choice, (title, x_of) in X_AXES.items():
        data = []
        for place, group in enumerate(groups):
            rounds = _common_rounds(group)
            x = [fmean(x_of(point) for point in points) for points in rounds]
            means = [fmean(point.accuracy for point in points) for points in rounds]
            colour = COLOURS[place % len(COLOURS)]
            if len(group.runs) > 1:
                deviations = [stdev(point.accuracy for point in points) for points in rounds]
                data.append(_band(x, means, deviations, colour, group.label))
            data.append(
                go.Scatter(
                    x=x,
                    y=means,
                    name=_legend_text(group.label),
                    legendgroup=str(place),
                    mode="lines" if len(x) > MAX_MARKED_ROUNDS else "lines+markers",
                    line={"color": colour, "dash": DASHES[place // len(COLOURS) % len(DASHES)]},
                    marker={"symbol": MARKERS[place % len(MARKERS)], "size": 8},
                    hovertemplate=f"%{{y:.3f}} at {choice} %{{x:.4g}}",
                )
            )
        layout = go.Layout(xaxis={"title": title}, yaxis={"title": "accuracy of the core"})
        if choice == "rounds":
            layout.xaxis.nticks = min(MAX_TICKS, most_rounds + 1)
        figures.append((choice, _figure(data, layout)))
    return figures


def consensus_figures(groups: Sequence[Group]) -> Choices:
    """Draw for each group what the core and the edge of a round classify correctly.

    Groups whose rounds do not measure this have no figure. The numbers of a round are means over
    those runs of a group that measured it: an answer that is refused at once is not measured.
    """
    figures: Choices = []
    for group in groups:
        rounds: dict[int, list[dict[str, Any]]] = {}
        for run in group.runs:
            for row in run.rounds_of(group.strategy):
                if all(is_number(row.get(name)) for name in (*SHARES, "consensus")):
                    rounds.setdefault(row["round"], []).append(row)
        if not rounds:
            continue
        x = sorted(rounds)
        means = {
            name: [fmean(row[name] for row in rounds[number]) for number in x]
            for name in (*SHARES, "consensus")
        }
        is_long = len(x) > MAX_MARKED_ROUNDS
        data = [
            _share(x, means[name], label, colour, as_area=is_long)
            for name, (label, colour) in SHARES.items()
        ]
        data.append(
            go.Scatter(
                x=x,
                y=means["consensus"],
                name="consensus",
                mode="lines" if is_long else "lines+markers",
                line={"color": VERMILION},
                hovertemplate="%{y:.3f}",
            )
        )
        layout = go.Layout(
            barmode="stack",
            bargap=0.15,
            hovermode="x unified",
            xaxis={"title": "round", "nticks": min(MAX_TICKS, len(x) + 1)},
            yaxis={"title": "share of held-out data", "range": [0, 1]},
        )
        figures.append((group.label, _figure(data, layout)))
    return figures


def timeline_figures(runs: Sequence[LoadedRun]) -> Choices:
    """Draw for each strategy of each run when the core and the edges were busy.

    Strategies without events have no figure. Of more than `MAX_LANES` edges those are drawn that
    were asked first, and of more than `MAX_SPANS` bars the first.
    """
    figures: Choices = []
    for run in runs:
        for strategy in run.strategies:
            bars = sorted(spans(run.events_of(strategy)), key=lambda span: span.begin)
            if bars:
                figures.append((f"{run.name}: {strategy}", _timeline(bars)))
    return figures


def _share(
    x: list[int], y: list[float], label: str, colour: str, *, as_area: bool
) -> go.Bar | go.Scatter:
    """Draw one of the stacked shares; of many rounds as an area, which is one shape."""
    options = {"x": x, "y": y, "name": label, "hovertemplate": "%{y:.3f}"}
    if not as_area:
        return go.Bar(marker={"color": colour}, **options)
    return go.Scatter(
        stackgroup="shares",
        mode="lines",
        line={"width": 0, "color": colour},
        fillcolor=colour,
        **options,
    )


def _timeline(bars: Sequence[Span]) -> Figure:
    edges = [lane for lane in dict.fromkeys(span.lane for span in bars) if lane != CORE]
    lanes = [CORE, *edges[:MAX_LANES]]
    places = {lane: place for place, lane in enumerate(lanes)}
    drawn = [span for span in bars if span.lane in places]
    kept = drawn[:MAX_SPANS]
    data = []
    for look, (label, colour, hatch) in LOOKS.items():
        own_spans = [span for span in kept if span.look == look]
        if own_spans:
            data.append(
                go.Bar(
                    orientation="h",
                    base=[round(span.begin, 3) for span in own_spans],
                    x=[round(span.end - span.begin, 3) for span in own_spans],
                    y=[places[span.lane] for span in own_spans],
                    name=label,
                    marker={
                        "color": colour,
                        # With a line around it, a bar of no length is seen too.
                        "line": {"color": colour, "width": 1},
                        "pattern": {
                            "shape": HATCHES[hatch],
                            "fgcolor": "white",
                            "fillmode": "overlay",
                            "size": 6,
                        },
                    },
                    hovertemplate="from %{base:.1f} s, for %{x:.1f} s",
                )
            )
    names = ["core", *(escape(edge, quote=False) for edge in lanes[1:])]
    notes = []
    if len(edges) > MAX_LANES:
        notes.append(f"the first {MAX_LANES} of {len(edges)} edges")
    if len(drawn) > MAX_SPANS:
        notes.append(f"the first {MAX_SPANS} of {len(drawn)} bars")
    layout = go.Layout(
        barmode="overlay",
        bargap=0.2,
        height=170 + 22 * len(lanes),
        xaxis={
            "rangemode": "tozero",
            "title": "; ".join(["seconds since the start of the run", *notes]),
        },
        yaxis={
            "tickvals": list(places.values()),
            "ticktext": names,
            "range": [len(lanes) - 0.5, -0.5],
        },
    )
    return _figure(data, layout)


def _common_rounds(group: Group) -> list[list[Point]]:
    """Return the points of the runs of a group, round by round, where every run has one."""
    by_round: dict[int, list[Point]] = {}
    for points in group.curves:
        for point in points:
            by_round.setdefault(point.round, []).append(point)
    return [points for points in by_round.values() if len(points) == len(group.runs)]


def _band(
    x: list[float], means: list[float], deviations: list[float], colour: str, legend_group: str
) -> go.Scatter:
    """Draw a band of one standard deviation around a mean."""
    high = [mean + deviation for mean, deviation in zip(means, deviations)]
    low = [mean - deviation for mean, deviation in zip(means, deviations)]
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=legend_group,
    )


def _figure(data: Sequence[Any], layout: go.Layout) -> Figure:
    """Check data and layout with Plotly and return them as plain values for JSON."""
    layout.update(
        {
            "template": "none",
            "margin": {"l": 60, "r": 15, "t": 35, "b": 45},
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
            | {"traceorder": "normal"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
        }
    )
    plain: Figure = go.Figure(data=list(data), layout=layout).to_plotly_json()
    return plain


def _legend_text(label: str) -> str:
    """Write the name of a group for a legend, in which Plotly reads markup."""
    text = escape(label, quote=False)
    return text.replace(", ", ",<br>") if len(label) > MAX_LEGEND_WIDTH else text
