"""Who was busy when, and what it cost."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .palette import BLUE, GREY, ORANGE, SKY, VERMILION, YELLOW

LOOKS = {
    "learn": ("core learns", BLUE, ""),
    "refused": ("core refuses", VERMILION, "////"),
    "train": ("edge busy", SKY, ""),
    "error": ("edge crashed", ORANGE, "xxxx"),
    "expire": ("edge silent", GREY, "...."),
    "open": ("still under way", YELLOW, ""),
}
MOST_LANES = 60
CORE = ""
"""The core's lane: no edge has an empty name, but one may call itself "core"."""


class Event(NamedTuple):
    """Something that happened in a run.

    Kinds: "arrive" (an edge is known from now on), "ask", then one of "answer", "error" (the edge
    crashed) and "expire" (it stayed silent); "learn" (the core turns to the answer), then one of
    "absorb" and "refuse". A `VirtualGrid` also tells of "depart".
    """

    time: float
    """Seconds since the start of the run."""
    kind: str
    edge: str
    number: int
    """Of the request, from 1; 0 for "arrive"."""
    version: int
    """Of the core at that time."""


class Span(NamedTuple):
    """A time for which somebody was busy."""

    lane: str
    """The edge, or `CORE`."""
    begin: float
    end: float
    look: str
    """A key of `LOOKS`."""


def spans(events: Sequence[Event]) -> list[Span]:
    """Pair what began with what ended it; what did not end lasts until the last event."""
    found: list[Span] = []
    asked: dict[tuple[str, int], float] = {}
    learning: dict[tuple[str, int], float] = {}
    for event in events:
        key = (event.edge, event.number)
        if event.kind == "ask":
            asked[key] = event.time
        elif event.kind in ("answer", "error", "expire") and key in asked:
            look = "train" if event.kind == "answer" else event.kind
            found.append(Span(event.edge, asked.pop(key), event.time, look))
        elif event.kind == "learn":
            learning[key] = event.time
        elif event.kind in ("absorb", "refuse") and key in learning:
            look = "learn" if event.kind == "absorb" else "refused"
            found.append(Span(CORE, learning.pop(key), event.time, look))
    end = max((event.time for event in events), default=0.0)
    found += [Span(edge, begin, end, "open") for (edge, _), begin in asked.items()]
    return found + [Span(CORE, begin, end, "open") for begin in learning.values()]


def accounts(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sum up rounds, as `on_round` is told them: bytes, seconds per phase, idle time, staleness.

    Returns:
        "bytes-down" and "bytes-up"; "bytes-per-edge", edge -> [down, up]; "edge-seconds" (edges
        busy, travel included), "wait-seconds" (answers waiting), "core-seconds" (core busy),
        "core-idle-seconds", "edge-idle-seconds" (present and not asked; of edges that were asked at
        last); "staleness", staleness -> rounds.
    """
    rows = list(rows)
    per_edge: dict[str, list[int]] = {}
    for row in rows:
        edge = per_edge.setdefault(str(row["edge"]), [0, 0])
        edge[0] += row.get("bytes-down", 0)
        edge[1] += row.get("bytes-up", 0)
    sums = ("edge-seconds", "wait-seconds", "core-seconds", "core-idle-seconds",
            "edge-idle-seconds")  # fmt: skip
    staleness = Counter(row["staleness"] for row in rows if "staleness" in row)
    return {
        "bytes-down": sum(down for down, _ in per_edge.values()),
        "bytes-up": sum(up for _, up in per_edge.values()),
        "bytes-per-edge": per_edge,
        **{name: sum(row.get(name, 0.0) for row in rows) for name in sums},
        "staleness": {str(late): staleness[late] for late in sorted(staleness)},
    }


def draw_timeline(events: Sequence[Event], path: str | Path, *, title: str = "") -> None:
    """Draw who was busy when: a lane for the core, if it learned, and one per edge.

    Beyond 60 edges only the first to be asked are drawn.

    Args:
        events: `AsyncStrategy.events` of any run, or `VirtualGrid.events`.
        path: of the picture; its suffix says which kind.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    found = sorted(spans(events), key=lambda span: span.begin)
    names = [name for name in dict.fromkeys(s.lane for s in found) if name != CORE][:MOST_LANES]
    lanes = {name: place for place, name in enumerate([CORE, *names])}
    figure = Figure(figsize=(10, 1.2 + 0.24 * len(lanes)), layout="constrained")
    axes = figure.subplots()
    for look, (_, colour, hatch) in LOOKS.items():
        for name, place in lanes.items():
            mine = [(s.begin, s.end - s.begin) for s in found if (s.lane, s.look) == (name, look)]
            style: dict[str, Any] = {
                "facecolor": colour,
                "hatch": hatch,
                "edgecolor": "white",
                "linewidth": 0.5,
            }
            axes.broken_barh(mine, (place - 0.4, 0.8), **style)
    known = {name: place for name, place in lanes.items() if name != CORE}
    for event in events:
        if event.kind in ("arrive", "depart") and event.edge in known:
            mark = ">" if event.kind == "arrive" else "<"
            axes.plot(event.time, known[event.edge], mark, color="black", markersize=4)
    labels = ["core", *names]
    # An edge may have a name that is no TeX: "$" in it stands for itself.
    axes.set_yticks(list(lanes.values()), labels, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the start of the run")
    axes.set_title(title)
    used = [LOOKS[look] for look in LOOKS if any(s.look == look for s in found)]
    patches = [Patch(facecolor=c, hatch=h, edgecolor="white", label=text) for text, c, h in used]
    if patches:
        axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=120)
