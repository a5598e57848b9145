"""The events of a run, and a picture of when the core and the edges were busy."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .palette import BLUE, GREY, ORANGE, SKY, VERMILION, YELLOW

# The hatches are for print in grey.
LOOKS = {
    "learn": ("core learns", BLUE, ""),
    "refused": ("core refuses", VERMILION, "////"),
    "train": ("edge busy", SKY, ""),
    "error": ("edge crashed", ORANGE, "xxxx"),
    "expire": ("edge silent", GREY, "...."),
    "open": ("still under way", YELLOW, ""),
}
"""Look -> text in the legend, colour, hatch."""

MAX_LANES = 60
CORE = ""
"""The core's lane. No edge has an empty name, but the name of an edge may be "core"."""


class Event(NamedTuple):
    """Something that happened in a run.

    Kinds: "arrive" (the edge is known from now on); "ask", then one of "answer", "error" (the edge
    crashed) and "expire" (no answer before the deadline); "learn" (the core takes the answer from
    the queue), then one of "absorb" and "refuse". The events of a `VirtualGrid` also include
    "depart".

    Examples:
        >>> from flwr_cloned_kd import Event
        >>> Event(time=60.0, kind="answer", edge="3", number=1, version=0).kind
        'answer'
    """

    time: float
    """Seconds since the start of the run."""
    kind: str
    edge: str
    number: int
    """Number of the request, from 1; 0 for "arrive" and "depart".

    In the events of a `VirtualGrid` the number counts the requests to this edge.
    """
    version: int
    """Version of the core at that time; always 0 in the events of a `VirtualGrid`."""


class Span(NamedTuple):
    """A time for which the core or an edge was busy."""

    lane: str
    """The edge, or `CORE`."""
    begin: float
    end: float
    look: str
    """A key of `LOOKS`."""


def spans(events: Sequence[Event]) -> list[Span]:
    """Pair each event that begins something with the event that ends it.

    A span whose end is missing lasts until the last event.
    """
    closed: list[Span] = []
    asked: dict[tuple[str, int], float] = {}
    learning: dict[tuple[str, int], float] = {}
    for event in events:
        key = (event.edge, event.number)
        if event.kind == "ask":
            asked[key] = event.time
        elif event.kind in ("answer", "error", "expire") and key in asked:
            look = "train" if event.kind == "answer" else event.kind
            closed.append(Span(event.edge, asked.pop(key), event.time, look))
        elif event.kind == "learn":
            learning[key] = event.time
        elif event.kind in ("absorb", "refuse") and key in learning:
            look = "learn" if event.kind == "absorb" else "refused"
            closed.append(Span(CORE, learning.pop(key), event.time, look))
    end = max((event.time for event in events), default=0.0)
    open_edges = [Span(edge, begin, end, "open") for (edge, _), begin in asked.items()]
    open_core = [Span(CORE, begin, end, "open") for begin in learning.values()]
    return closed + open_edges + open_core


def draw_timeline(events: Sequence[Event], path: str | Path, *, title: str = "") -> None:
    """Draw when the core and the edges were busy: one lane for the core, and one per edge.

    Of more than 60 edges, the 60 that were asked first are drawn.

    Args:
        events: `AsyncStrategy.events` of any run, or `VirtualGrid.events`, which do not include
            what the core does.
        path: where to write the picture; the suffix determines its format.
        title: above the picture.

    Raises:
        ImportError: without matplotlib.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from flwr_cloned_kd import Event, draw_timeline
        >>> events = [Event(0.0, "ask", "3", 1, 0), Event(60.0, "answer", "3", 1, 0)]
        >>> with tempfile.TemporaryDirectory() as folder:  # after a run: strategy.events
        ...     draw_timeline(events, Path(folder, "timeline.svg"))
    """
    try:
        from matplotlib.artist import Artist
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            'draw_timeline needs matplotlib: pip install "flwr-cloned-kd[plots]"'
        ) from error

    by_begin = sorted(spans(events), key=lambda span: span.begin)
    edges = [lane for lane in dict.fromkeys(span.lane for span in by_begin) if lane != CORE]
    edges = edges[:MAX_LANES]
    places = {lane: place for place, lane in enumerate([CORE, *edges])}
    figure = Figure(figsize=(10, 1.2 + 0.24 * len(places)), layout="constrained")
    axes = figure.subplots()
    for look, (_, colour, hatch) in LOOKS.items():
        for lane, place in places.items():
            bars = [
                (span.begin, span.end - span.begin)
                for span in by_begin
                if (span.lane, span.look) == (lane, look)
            ]
            axes.broken_barh(
                bars,
                (place - 0.4, 0.8),
                facecolor=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.5,
            )
    handles: list[Artist] = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=text)
        for look, (text, colour, hatch) in LOOKS.items()
        if any(span.look == look for span in by_begin)
    ]
    for kind, marker, text in (("arrive", ">", "edge arrives"), ("depart", "<", "edge leaves")):
        shown = [event for event in events if event.kind == kind and event.edge in edges]
        if shown:
            times = [event.time for event in shown]
            lanes = [places[event.edge] for event in shown]
            handles += axes.plot(times, lanes, marker, color="black", markersize=4, label=text)
    # Show the names of edges verbatim: "$" must not start math mode.
    axes.set_yticks(list(places.values()), ["core", *edges], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the start of the run")
    axes.set_title(title)
    if handles:
        axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=120)
