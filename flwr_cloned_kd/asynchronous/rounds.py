"""One round: what is told of it, and what it cost."""

from collections.abc import Callable
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.common import log
from flwr.serverapp.strategy import Result

from .session import Answer


def account(answer: Answer, began: float, ended: float) -> dict[str, Any]:
    """Count bytes sent and seconds per phase.

    Args:
        began, ended: when the core turned to the answer and was done with it; seconds.
    """
    dispatch = answer.dispatch
    return {
        "number": dispatch.number,
        "bytes-down": dispatch.num_bytes,
        "edge-seconds": answer.arrived_at - dispatch.sent_at,
        "wait-seconds": began - answer.arrived_at,
        "core-seconds": ended - began,
        "edge-idle-seconds": dispatch.idle_seconds,
    }


def tell(server_round: int, edge: str, metrics: dict[str, float], cause: str) -> str:
    """Log a round in one line; return the cause of a refusal, "" if it was none."""
    if metrics["accepted"]:
        log(INFO, "[ROUND %d] edge %s: %s", server_round, edge, _brief(metrics))
        return ""
    cause = cause or f"the guard, by {_brief(metrics)}"
    log(WARNING, "[ROUND %d] edge %s refused: %s", server_round, edge, cause)
    return cause


def evaluate(
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    server_round: int,
    arrays: ArrayRecord,
    result: Result,
) -> None:
    """Call the user's evaluation, if there is one, and keep what it returns."""
    if evaluate_fn and (metrics := evaluate_fn(server_round, arrays)) is not None:
        log(INFO, "Global evaluation: %s", metrics)
        result.evaluate_metrics_serverapp[server_round] = metrics


def _brief(metrics: dict[str, float]) -> str:
    """Write the accuracies and the consensus of a round in a few words."""
    kinds = ("edge", "ensemble", "core", "train")
    known = {kind: metrics.get(f"{kind}-accuracy") for kind in kinds}
    known["consensus"] = metrics.get("consensus")
    known["knows"] = metrics.get("known")
    known["student starts at"] = metrics.get("student-start")
    words = [f"{name} {value:.3f}" for name, value in known.items() if value is not None]
    return ", ".join(words) or "absorbed"
