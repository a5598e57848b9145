"""Sums over the rounds of a run: bytes, seconds and staleness."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

SECONDS = (
    "edge-seconds",
    "wait-seconds",
    "core-seconds",
    "core-idle-seconds",
    "edge-idle-seconds",
)


def accounts(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sum up rounds.

    Args:
        rows: one dict per round, such as `AsyncStrategy.history` or the arguments of `on_round`.

    Returns:
        "bytes-down" and "bytes-up", of all edges; "bytes-per-edge", edge -> [down, up];
        "edge-seconds", from request to answer, transfers included; "wait-seconds", of answers that
        wait for the core; "core-seconds", in which the core is busy; "core-idle-seconds";
        "edge-idle-seconds", in which an edge is present before it is asked, without those of edges
        that are never asked; "staleness", staleness -> number of rounds.

    Examples:
        >>> from flwr_cloned_kd import accounts
        >>> rows = [{"edge": "3", "bytes-down": 10, "bytes-up": 30, "core-seconds": 2.0}]
        >>> totals = accounts(rows)  # in a run: accounts(strategy.history)
        >>> totals["bytes-up"], totals["core-seconds"]
        (30, 2.0)
    """
    rows = list(rows)
    bytes_per_edge: dict[str, list[int]] = {}
    for row in rows:
        down_and_up = bytes_per_edge.setdefault(str(row["edge"]), [0, 0])
        down_and_up[0] += row.get("bytes-down", 0)
        down_and_up[1] += row.get("bytes-up", 0)
    num_rounds = Counter(row["staleness"] for row in rows if "staleness" in row)
    return {
        "bytes-down": sum(down for down, _ in bytes_per_edge.values()),
        "bytes-up": sum(up for _, up in bytes_per_edge.values()),
        "bytes-per-edge": bytes_per_edge,
        **{name: sum(row.get(name, 0.0) for row in rows) for name in SECONDS},
        "staleness": {str(staleness): num_rounds[staleness] for staleness in sorted(num_rounds)},
    }
