"""One round: what is told of it, and what it cost."""

from collections.abc import Callable
from logging import INFO, WARNING
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp.strategy import Result

from ._session import Dispatch


class Answer(NamedTuple):
    """What came of one request."""

    dispatch: Dispatch[Any]
    reply: Message | None
    """None: nothing before the deadline."""
    arrived_at: float
    """Seconds of the run's clock."""

    @property
    def failed(self) -> bool:
        """Whether the edge crashed or stayed silent, rather than answer."""
        return self.reply is None or self.reply.has_error()


class Progress(NamedTuple):
    """What a run has asked for, and what came of it."""

    next_number: int = 1
    """Of the next new request."""
    unsettled: dict[str, list[int]] = {}  # noqa: RUF012  # never changed
    """Edge -> numbers of its requests that were neither absorbed nor refused."""
    visits: dict[str, int] = {}  # noqa: RUF012
    """Edge -> how many of its requests were."""


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
