"""Flower's strategy loop without its barrier."""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable
from logging import INFO, WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from ._mailbox import Mailbox
from ._session import Dispatch, Session
from ._wire import content_of, name_of, num_bytes

QUERY_SECONDS = 60.0
WAIT_SECONDS = 0.2


class AsyncStrategy(Strategy):
    """Flower's loop without its barrier: every answer counts the moment it arrives.

    A subclass says what to send (`request`) and how to learn from one answer (`absorb`). Both
    loops run it: `start`, which keeps up to `max_in_flight` edges busy, and the one that
    Flower's own `Strategy.start` defines.

    Args:
        max_in_flight: edges asked at the same time, at least 1.
        revisit: ask edges again once every edge was asked; False asks each at most once.
        on_round: called with one flat dict after each round: round, edge, accepted (1 or 0), cause,
            staleness, bytes-down, bytes-up, edge-seconds (from request to answer), core-seconds
            (absorbing it), and what `absorb` returned.

    Raises:
        ValueError: if `max_in_flight` is below 1.
    """

    version = 0
    """How often the global model has changed."""

    def __init__(
        self,
        *,
        max_in_flight: int = 1,
        revisit: bool = False,
        on_round: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight: expected at least 1, got {max_in_flight}")
        self.max_in_flight, self.revisit, self.on_round = max_in_flight, revisit, on_round
        self._session = Session[Any](revisit)
        self._timeout = 3600.0

    @abstractmethod
    def begin(self, arrays: ArrayRecord) -> None:
        """Start a new run from these arrays; ValueError if they do not fit."""

    @property
    @abstractmethod
    def arrays(self) -> ArrayRecord:
        """The global model as it is now."""

    @abstractmethod
    def request(self, server_round: int, config: ConfigRecord) -> tuple[RecordDict, Any]:
        """Say what to send to the next edge, and what to remember of it as `Dispatch.sent`."""

    @abstractmethod
    def absorb(self, dispatch: Dispatch[Any], content: RecordDict) -> dict[str, float]:
        """Learn from one answer and return metrics; ValueError refuses it, with the cause."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run until `num_rounds` edges have answered or were given up.

        Args:
            timeout: seconds to wait for an edge's answer, and, once no edge is left to ask, for
                a new one to arrive; then the run ends with what it has.
            evaluate_config: not used; edges are asked once, to train.
            evaluate_fn: (round, arrays) -> metrics, called for round 0 and after every round.

        Returns:
            Flower's `Result`: final arrays, metrics per round.
        """
        started, result, self._timeout = time.monotonic(), Result(), timeout
        log(INFO, "Starting %s strategy:", type(self).__name__)
        log(INFO, "\t├── Number of rounds: %d", num_rounds)
        self.summary()
        self._open(initial_arrays)
        result.arrays = initial_arrays
        _evaluate(evaluate_fn, 0, result)
        with Mailbox(grid) as mailbox:
            for server_round in range(1, num_rounds + 1):
                answer = self._next_answer(grid, mailbox, num_rounds, train_config)
                if answer is None:
                    log(WARNING, "No edge left to ask for %g s: ending the run", timeout)
                    break
                metrics = self._settle(server_round, *answer)
                result.arrays = self.arrays
                result.train_metrics_clientapp[server_round] = metrics
                _evaluate(evaluate_fn, server_round, result)
        took, num_done = time.monotonic() - started, len(result.train_metrics_clientapp)
        log(INFO, "Finished in %.1f s: %d rounds, version %d", took, num_done, self.version)
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask one edge (Flower's synchronous loop); waits until there is one to ask."""
        if server_round == 1:
            self._open(arrays)
        deadline = time.monotonic() + self._timeout
        while (node := self._session.choose(self._online(grid))) is None:
            if time.monotonic() > deadline:
                log(WARNING, "No edge left to ask")
                return []
            time.sleep(WAIT_SECONDS)
        message, dispatch = self._compose(server_round, config, node)
        self._session.depart(str(node), dispatch)
        return [message]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Learn from the one edge's answer, if it came (Flower's synchronous loop)."""
        if not self._session.in_flight:
            return self.arrays, None
        dispatch = self._session.in_flight.popitem()[1]
        metrics = self._settle(server_round, dispatch, next(iter(replies), None))
        return self.arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: an edge is used once, to train; use `evaluate_fn` or held-out data."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, since nobody was asked."""
        return None

    def summary(self) -> None:
        """Log the configuration."""
        log(INFO, "\t├── Edges in flight: at most %d", self.max_in_flight)
        log(INFO, "\t├── An edge is asked: %s", "again and again" if self.revisit else "once")

    def _open(self, arrays: ArrayRecord) -> None:
        self._session, self.version = Session[Any](self.revisit), 0
        self.begin(arrays)

    def _next_answer(
        self, grid: Grid, mailbox: Mailbox, num_rounds: int, config: ConfigRecord | None
    ) -> tuple[Dispatch[Any], Message | None] | None:
        """Keep edges busy until one answers or is overdue; None if nobody comes any more."""
        session, deadline = self._session, time.monotonic() + self._timeout
        while True:
            self._dispatch(grid, mailbox, num_rounds, config or ConfigRecord())
            if session.in_flight:
                arrived = mailbox.get(WAIT_SECONDS)
                # A reply that arrived while its edge was given up on counts as none.
                if arrived and (dispatch := session.in_flight.pop(arrived[0], None)):
                    return dispatch, arrived[1]
                for message_id in session.expired(time.monotonic()):
                    mailbox.forget(message_id)
                    return session.in_flight.pop(message_id), None
            elif time.monotonic() > deadline:
                return None
            else:
                time.sleep(WAIT_SECONDS)

    def _dispatch(
        self, grid: Grid, mailbox: Mailbox, num_rounds: int, config: ConfigRecord
    ) -> None:
        session = self._session
        while len(session.in_flight) < self.max_in_flight:
            server_round = sum(session.visits.values()) + 1
            if server_round > num_rounds or (node := session.choose(self._online(grid))) is None:
                return
            message, dispatch = self._compose(server_round, config, node)
            # The id is empty, or absent, if the node has just left: the edge was not asked.
            message_id = next(iter(grid.push_messages([message])), "")
            if not message_id:
                return
            session.depart(message_id, dispatch)
            mailbox.watch(message_id, node)

    def _compose(
        self, server_round: int, config: ConfigRecord, node: int
    ) -> tuple[Message, Dispatch[Any]]:
        own = ConfigRecord({**config, "server-round": server_round})
        content, sent = self.request(server_round, own)
        message = Message(
            content,
            dst_node_id=node,
            message_type=MessageType.TRAIN,
            ttl=self._timeout,
            group_id=str(self.version),
        )
        edge, down, now = self._session.names[node], num_bytes(content), time.monotonic()
        return message, Dispatch(node, edge, self.version, sent, down, now, now + self._timeout)

    def _settle(
        self, server_round: int, dispatch: Dispatch[Any], reply: Message | None
    ) -> MetricRecord:
        """Absorb one answer, or the lack of one, and say so in one line."""
        answered, cause, up = time.monotonic(), "", 0
        metrics = {"accepted": 0.0}
        staleness = self.version - dispatch.version
        took = answered - dispatch.sent_at
        try:
            content = content_of(reply, took)
            up = num_bytes(content)
            metrics |= self.absorb(dispatch, content)
        except ValueError as error:
            cause = str(error)
        numbers: dict[str, Any] = {
            **metrics,
            "staleness": staleness,
            "bytes-down": dispatch.num_bytes,
            "bytes-up": up,
            "edge-seconds": took,
            "core-seconds": time.monotonic() - answered,
        }
        if metrics["accepted"]:
            log(INFO, "[ROUND %d] edge %s: %s", server_round, dispatch.edge, _brief(metrics))
        else:
            cause = cause or f"the guard, by {_brief(metrics)}"
            log(WARNING, "[ROUND %d] edge %s refused: %s", server_round, dispatch.edge, cause)
        if self.on_round is not None:
            self.on_round({"round": server_round, "edge": dispatch.edge, "cause": cause, **numbers})
        return MetricRecord(numbers)

    def _online(self, grid: Grid) -> list[int]:
        """List the nodes present in order of arrival, asking newcomers who they are."""
        present = sorted(grid.get_nodes(), key=lambda node: node.registered_at)
        online = [node.node_id for node in present]
        new = [node for node in online if node not in self._session.names]
        if new:
            questions = [
                Message(RecordDict(), dst_node_id=node, message_type="query", ttl=QUERY_SECONDS)
                for node in new
            ]
            replies = grid.send_and_receive(questions, timeout=QUERY_SECONDS)
            answers = {reply.metadata.src_node_id: reply for reply in replies}
            for node in new:
                self._session.introduce(node, name_of(answers.get(node)), online)
        return online


def _evaluate(
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    server_round: int,
    result: Result,
) -> None:
    if evaluate_fn and (metrics := evaluate_fn(server_round, result.arrays)) is not None:
        log(INFO, "Global evaluation: %s", metrics)
        result.evaluate_metrics_serverapp[server_round] = metrics


def _brief(metrics: dict[str, float]) -> str:
    """Write the accuracies and the consensus of a round in a few words."""
    kinds = ("edge", "ensemble", "core", "train")
    known = {kind: metrics.get(f"{kind}-accuracy") for kind in kinds}
    known["consensus"] = metrics.get("consensus")
    words = [f"{name} {value:.3f}" for name, value in known.items() if value is not None]
    return ", ".join(words) or "absorbed"
