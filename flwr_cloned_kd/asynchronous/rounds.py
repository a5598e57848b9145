"""One round: its log line and what it cost."""

from collections.abc import Mapping
from logging import INFO, WARNING
from typing import Any

from flwr.common import log

from ..io.messages import num_bytes
from .session import Answer

NOT_METRICS = ("round", "edge", "cause")
"""Entries of a row that are no metrics of its round."""
LOGGED_METRICS = {
    "edge-accuracy": "edge",
    "ensemble-accuracy": "ensemble",
    "core-accuracy": "core",
    "train-accuracy": "train",
    "consensus": "consensus",
    "known": "knows",
    "student-start": "student starts at",
}
"""Metric -> what the log line of a round calls it."""


def costs(answer: Answer, began: float, core_seconds: float) -> dict[str, Any]:
    """Return the bytes that travelled and the seconds that each part of a round took.

    Args:
        began: when the core turned to the answer, in seconds.
        core_seconds: how long the core took to absorb or refuse it.
    """
    dispatch, reply = answer.dispatch, answer.reply
    return {
        "number": dispatch.number,
        "bytes-down": dispatch.num_bytes,
        "bytes-up": 0 if reply is None or reply.has_error() else num_bytes(reply.content),
        "edge-seconds": answer.arrived_at - dispatch.sent_at,
        "wait-seconds": began - answer.arrived_at,
        "core-seconds": core_seconds,
        "edge-idle-seconds": dispatch.idle_seconds,
    }


def log_round(server_round: int, edge: str, metrics: Mapping[str, float], cause: str) -> str:
    """Log a round in one line.

    Args:
        metrics: "accepted" (1 or 0) and what the strategy measured.
        cause: why the answer was refused; "" if the guard refused it or it was accepted.

    Returns:
        The cause of the refusal, "" for an accepted answer.
    """
    if metrics["accepted"]:
        log(INFO, "[ROUND %d] edge %s: %s", server_round, edge, _brief(metrics))
        return ""
    cause = cause or f"the guard, by {_brief(metrics)}"
    log(WARNING, "[ROUND %d] edge %s refused: %s", server_round, edge, cause)
    return cause


def _brief(metrics: Mapping[str, float]) -> str:
    """Write the accuracies of a round in a few words."""
    words = [
        f"{word} {metrics[name]:.3f}" for name, word in LOGGED_METRICS.items() if name in metrics
    ]
    return ", ".join(words) or "absorbed"
