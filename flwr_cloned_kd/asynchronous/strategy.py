"""Flower's strategy loop without its barrier."""

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from ..io.messages import content_of, num_bytes
from .arrivals import Register
from .clock import Stepped, clock_of
from .courier import Courier
from .resume import require, resume, save
from .rounds import account, evaluate, tell
from .session import Answer, Dispatch, Progress, Session
from .timeline import Event

WAIT_SECONDS = 0.2


class AsyncStrategy(Strategy):
    """Flower's loop without its barrier: every answer counts the moment it arrives.

    A subclass says what to send (`request`) and how to learn from one answer (`absorb`). Both
    loops run it: `start`, which keeps up to `max_in_flight` edges busy, and the one that
    Flower's own `Strategy.start` defines.

    Threads: `start` calls `absorb` in the caller's thread and `request` in another, so that edges
    are asked while the model learns. `absorb` therefore makes new values beside the old ones and
    publishes them at the end, by assigning fields while it holds `self.publishing`; `request` runs
    under that lock, reads the fields and takes no long time. What was sent is never changed.

    Args:
        max_in_flight: edges asked at the same time, at least 1. With 1 the next one is asked once
            the answer has been absorbed; with more, as soon as an answer has arrived.
        revisit: ask edges again once every edge was asked; False asks each at most once.
        max_failures: end the run after so many edges in a row that crashed or stayed silent.
        on_round: called with one flat dict after each round: round, edge, accepted (1 or 0), cause,
            number (of the request), staleness, bytes-down, bytes-up, edge-seconds (from request to
            answer), wait-seconds (from answer until the core had time for it), core-seconds
            (absorbing it), core-idle-seconds (before that, waiting for an answer),
            edge-idle-seconds (present without anything to do before the request), time (since
            the start), and what `absorb` returned.
        checkpoint: a file to write after every round and to go on from, if it is there; for
            strategies with `state_dict` and `load_state_dict`. Flower's own loop does not use it.

    Raises:
        ValueError: for a number below 1, or a strategy that cannot be written down.
    """

    version = 0
    """How often the global model has changed."""

    def __init__(
        self,
        *,
        max_in_flight: int = 1,
        revisit: bool = False,
        max_failures: int = 30,
        on_round: Callable[[dict[str, Any]], None] | None = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        for name, value in (("max_in_flight", max_in_flight), ("max_failures", max_failures)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.max_in_flight, self.revisit, self.on_round = max_in_flight, revisit, on_round
        self.max_failures = max_failures
        self.checkpoint = require(checkpoint, self, AsyncStrategy)
        self.publishing = threading.RLock()
        self.events: list[Event] = []
        self.history: list[dict[str, Any]] = []
        self._session = Session[Any](revisit)
        self._timeout = 3600.0
        self._now: Callable[[], float] = time.monotonic
        self._started = self._idle_since = 0.0
        self._register: Register | None = None

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

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what has been learned: tensors by name, and what JSON can hold.

        `version` is kept anyway. Settings that a resumed run must share belong in here too.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected state_dict(), got none")

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, instead of `begin`; ValueError if it does not fit.

        A missing key is refused too.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected load_state_dict(), got none")

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
            initial_arrays: the first model; not used by a run that goes on from a checkpoint.
            timeout: seconds to wait for an edge's answer, and, once no edge is left to ask, for
                a new one to arrive; then the run ends with what it has.
            evaluate_config: not used; edges are asked once, to train.
            evaluate_fn: (round, arrays) -> metrics, called for round 0 and after every round.

        Returns:
            Flower's `Result`: final arrays, metrics per round, those before a resume included.

        Raises:
            ConnectionError: if the grid failed many times in a row.
            ValueError: if the arrays or the checkpoint do not fit.
        """
        result, self._timeout = Result(), timeout
        log(INFO, "Starting %s strategy:", type(self).__name__)
        log(INFO, "\t├── Number of rounds: %d", num_rounds)
        self.summary()
        self._reset(grid)
        before = self._resume(result)
        if before is None:
            self.begin(initial_arrays)
            evaluate(evaluate_fn, 0, initial_arrays, result)
        config = train_config or ConfigRecord()
        if len(self.history) < num_rounds:
            with self._courier(grid, num_rounds, config, before or Progress()) as courier:
                self._run(courier, num_rounds, result, evaluate_fn)
        self.events.sort(key=lambda event: event.time)  # two threads have told of them
        result.arrays, took, done = self.arrays, self._now() - self._started, len(self.history)
        log(INFO, "Finished in %.1f s: %d rounds, version %d", took, done, self.version)
        return result

    def _run(
        self,
        courier: Courier,
        num_rounds: int,
        result: Result,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> None:
        while len(self.history) < num_rounds:
            if (answer := courier.next_answer()) is None:
                log(WARNING, "%s: ending the run with what it has", courier.why_it_ended())
                return
            server_round = len(self.history) + 1
            metrics = self._settle(server_round, answer, courier.core_works)
            result.train_metrics_clientapp[server_round] = metrics
            if evaluate_fn is not None:  # before the next request: both may use one model
                evaluate(evaluate_fn, server_round, self.arrays, result)
            courier.settled(answer)
            if self.checkpoint is not None:
                save(self.checkpoint, self, courier.progress(), result)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask one edge (Flower's synchronous loop); waits until there is one to ask."""
        if server_round == 1 or self._register is None:
            self._reset(grid)
            self.begin(arrays)
            self._register = Register(grid, self._session, self._now)
        deadline = self._now() + self._timeout
        while (node := self._next_node(self._register)) is None:
            if self._now() > deadline:
                log(WARNING, "No edge left to ask")
                return []
            if isinstance(grid, Stepped):
                grid.advance(self._now() + WAIT_SECONDS)
            else:
                time.sleep(WAIT_SECONDS)
        message, dispatch = self._compose(server_round, node, self._now(), config)
        self._session.depart(str(node), dispatch)
        return [message]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Learn from the one edge's answer, if it came (Flower's synchronous loop)."""
        if not self._session.in_flight:
            return self.arrays, None
        dispatch = self._session.in_flight.popitem()[1]
        self._session.free_since[dispatch.edge] = self._now()
        answer = Answer(dispatch, next(iter(replies), None), self._now())
        metrics = self._settle(server_round, answer)
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

    def _reset(self, grid: Grid) -> None:
        self._session, self.version = Session[Any](self.revisit), 0
        self.events, self.history, self._now = [], [], clock_of(grid)
        self._started = self._idle_since = self._now()

    def _resume(self, result: Result) -> Progress | None:
        """Go on from the checkpoint, if there is one; its time, too, goes on."""
        progress = resume(self.checkpoint, self, result) if self.checkpoint is not None else None
        if self.history:
            self._started -= self.history[-1]["time"]
        return progress

    def _courier(
        self, grid: Grid, num_rounds: int, config: ConfigRecord, before: Progress
    ) -> Courier:
        return Courier(
            grid,
            self._session,
            lambda number, node, now: self._compose(number, node, now, config),
            num_rounds=num_rounds,
            max_in_flight=self.max_in_flight,
            timeout=self._timeout,
            max_failures=self.max_failures,
            before=before,
            record=self._record,
        )

    def _next_node(self, register: Register) -> int | None:
        return self._session.choose(register.present(), self._now())

    def _compose(
        self, number: int, node: int, now: float, config: ConfigRecord
    ) -> tuple[Message, Dispatch[Any]]:
        own = ConfigRecord({**config, "server-round": number})
        with self.publishing:
            (content, sent), version = self.request(number, own), self.version
        message = Message(
            content,
            dst_node_id=node,
            message_type=MessageType.TRAIN,
            ttl=self._timeout,
            group_id=str(version),
        )
        edge = self._session.names[node]
        return message, Dispatch(
            node,
            edge,
            version,
            sent,
            num_bytes(content),
            sent_at=now,
            deadline=now + self._timeout,
            number=number,
            idle_seconds=now - self._session.free_since.get(edge, now),
        )

    def _settle(
        self,
        server_round: int,
        answer: Answer,
        core_works: Callable[[str, int], None] = lambda edge, number: None,
    ) -> MetricRecord:
        """Absorb one answer, or the lack of one, and say so in one line."""
        dispatch, began, cause, up = answer.dispatch, self._now(), "", 0
        metrics: dict[str, float] = {"accepted": 0.0}
        staleness, idle = self.version - dispatch.version, began - self._idle_since
        self._record(began, "learn", dispatch.edge, dispatch.number)
        try:
            content = content_of(answer.reply, answer.arrived_at - dispatch.sent_at)
            up = num_bytes(content)
        except ValueError as error:
            cause = str(error)
        else:
            core_works(dispatch.edge, dispatch.number)
            try:
                metrics |= {"accepted": 1.0} | self.absorb(dispatch, content)
            except ValueError as error:
                cause = str(error)
        ended = self._now()
        kind = "absorb" if metrics["accepted"] else "refuse"
        self._record(ended, kind, dispatch.edge, dispatch.number)
        cause = tell(server_round, dispatch.edge, metrics, cause)
        numbers = {
            **metrics,
            **account(answer, began, ended),
            "staleness": staleness,
            "bytes-up": up,
            "core-idle-seconds": idle,
            "time": ended - self._started,
        }
        row = {"round": server_round, "edge": dispatch.edge, "cause": cause, **numbers}
        self.history.append(row)
        if self.on_round is not None:
            self.on_round(dict(row))
        self._idle_since = self._now()
        return MetricRecord(numbers)

    def _record(self, at: float, kind: str, edge: str, number: int) -> None:
        self.events.append(Event(at - self._started, kind, edge, number, self.version))
