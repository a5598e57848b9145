"""Flower's strategy loop without the barrier at the end of a round."""

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence, Set
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, TypedDict

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from ..engine.counts import check_count, plain
from ..io.messages import content_of, num_bytes
from .arrivals import Arrivals
from .callbacks import Callback, Callbacks, RunStart
from .clock import Stepped, clock_of
from .courier import Courier
from .resume import SavedRun, load, save
from .rounds import costs, log_round
from .session import Answer, Dispatch, Received, Session
from .timeline import Event
from .undo import learned_from, undo_edges

WAIT_SECONDS = 0.2

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
"""(round, arrays) -> metrics, as Flower's strategies take it."""


class LoopOptions(TypedDict, total=False):
    """The options of `AsyncStrategy`, which its subclasses hand on to it."""

    max_in_flight: int
    max_staleness: int | None
    revisit: bool
    max_failures: int
    on_round: Callable[[dict[str, Any]], None] | None
    callbacks: Iterable[Callback]
    checkpoint: str | Path | None
    quarantine: Iterable[str]


class AsyncStrategy(Strategy):
    """Flower's loop without its barrier: each answer is used when it arrives.

    A subclass defines what to send (`request`) and how to learn from one answer (`absorb`). Two
    loops can run it: `start`, which keeps up to `max_in_flight` edges busy, and the synchronous
    one that Flower's own `Strategy.start` defines.

    Threads: `start` calls `absorb` in the caller's thread and `request` in another thread, so that
    edges are asked while the model learns. Therefore `absorb` makes new values beside the old ones
    and publishes them at the end: it assigns fields while it holds `self.publishing`. `request`
    runs under that lock, reads the fields and returns quickly. What was sent is never changed.

    Args:
        max_in_flight: edges asked at the same time, at least 1. With 1 the next edge is asked when
            the answer has been absorbed; with more, as soon as an answer has arrived.
        max_staleness: answers to a model older than this many versions are refused; None refuses
            none.
        revisit: ask edges again once every edge was asked. False asks each edge at most once.
        max_failures: the run ends after this many edges in a row that crashed or stayed silent.
        on_round: called after each round with one flat dict: round, edge, accepted (1 or 0), cause,
            number (of the request), staleness, bytes-down, bytes-up, edge-seconds (from request to
            answer), wait-seconds (from answer until the core had time for it), core-seconds
            (absorbing it), core-idle-seconds (waiting for the answer), edge-idle-seconds (of this
            edge, present and without a request before this one), time (since the start, in
            seconds), and what `absorb` returned.
        callbacks: called as things happen, from the start of a run to its end; see `Callback`.
        checkpoint: a file that is written after every round; if it is there at the start, the run
            resumes from it. For strategies with `state_dict` and `load_state_dict`. Flower's own
            loop does not use it.
        quarantine: names of edges that are never asked, besides those that the checkpoint names.
            If the model of the checkpoint has learned from one of them, it is undone (`undo`)
            before the run goes on. The method `quarantine` adds an edge during a run.

    Raises:
        ValueError: for a number out of range, for callbacks that are no instances of `Callback`, or
            a checkpoint for a strategy that has no `state_dict` and `load_state_dict`.

    Examples:
        >>> from flwr.app import ArrayRecord, RecordDict
        >>> from flwr_cloned_kd import AsyncStrategy
        >>> class Replace(AsyncStrategy):  # the model becomes what the latest edge returned
        ...     def begin(self, arrays):
        ...         self.model = arrays
        ...
        ...     @property
        ...     def arrays(self):
        ...         return self.model
        ...
        ...     def request(self, server_round, config):
        ...         return RecordDict({"arrays": self.model, "config": config}), None
        ...
        ...     def absorb(self, dispatch, content, staleness):
        ...         with self.publishing:
        ...             self.model, self.version = content["arrays"], self.version + 1
        ...         return {}
        >>> strategy = Replace(max_in_flight=4, revisit=True)
    """

    version = 0
    """How often the global model has changed."""
    max_together = 1
    """How many waiting answers `absorb_all` gets at once, at most."""

    def __init__(
        self,
        *,
        max_in_flight: int = 1,
        max_staleness: int | None = None,
        revisit: bool = False,
        max_failures: int = 30,
        on_round: Callable[[dict[str, Any]], None] | None = None,
        callbacks: Iterable[Callback] = (),
        checkpoint: str | Path | None = None,
        quarantine: Iterable[str] = (),
    ) -> None:
        check_count("max_in_flight", max_in_flight)
        check_count("max_failures", max_failures)
        if max_staleness is not None:
            check_count("max_staleness", max_staleness, minimum=0)
        if isinstance(quarantine, str):
            raise ValueError(f"quarantine: expected a list of names, got {quarantine!r}")
        if checkpoint is not None:
            self._require_state_dict()
        self.max_in_flight = max_in_flight
        self.max_staleness = max_staleness
        self.revisit = revisit
        self.max_failures = max_failures
        self.on_round = on_round
        self.checkpoint = None if checkpoint is None else Path(checkpoint).absolute()
        self.publishing = threading.RLock()
        self.events: list[Event] = []
        self.history: list[dict[str, Any]] = []
        self._required = frozenset(quarantine)
        self._callbacks = Callbacks(callbacks)
        self._session = Session(revisit, max_failures, self._required)
        self._must_undo = False
        self._undone_versions: list[int] = []
        self._timeout = 3600.0
        self._now: Callable[[], float] = time.monotonic
        self._started = 0.0
        self._idle_since = 0.0
        self._arrivals: Arrivals | None = None

    @abstractmethod
    def begin(self, arrays: ArrayRecord) -> None:
        """Start a new run from these arrays; raise ValueError if they do not fit."""

    @property
    @abstractmethod
    def arrays(self) -> ArrayRecord:
        """The global model as it is now."""

    @abstractmethod
    def request(self, server_round: int, config: ConfigRecord) -> tuple[RecordDict, Any]:
        """Return what to send to the next edge, and what to keep of it as `Dispatch.sent`."""

    @abstractmethod
    def absorb(self, dispatch: Dispatch, content: RecordDict, staleness: int) -> dict[str, Any]:
        """Learn from one answer and return metrics; raise ValueError to refuse it.

        Metrics with "accepted" 0.0 refuse it too; they may say why, as the text "cause".

        Args:
            dispatch: the request.
            content: the reply.
            staleness: versions that were made while the edge was away, 0 for a fresh answer.
        """

    def absorb_all(self, answers: Sequence[Received]) -> list[dict[str, Any] | ValueError]:
        """Learn from answers that wait at the same time; by default from one after the other.

        Args:
            answers: one up to `max_together`, in order of arrival.

        Returns:
            For each answer its metrics, or the reason to refuse it.
        """
        outcomes: list[dict[str, Any] | ValueError] = []
        for answer in answers:
            try:
                outcomes.append(self.absorb(*answer))
            except ValueError as error:
                outcomes.append(error)
        return outcomes

    def quarantine(self, edge: str) -> None:
        """Never ask an edge again, refuse its answers, and undo what the model learned from it.

        Any thread may call this method. The edge is undone before the next answer is used, and the
        checkpoint of that round names it. If it cannot be undone, one warning says why, and the run
        goes on with the model as it is.
        """
        with self.publishing:
            self._session.quarantine(edge)
            self._must_undo = True

    @property
    def quarantined(self) -> frozenset[str]:
        """The edges that are never asked again."""
        return self._session.quarantined

    def undo(self, edges: Set[str]) -> Set[int]:
        """Make the model what it would be if the answers of these edges had been refused.

        Args:
            edges: names of edges that the model has learned from.

        Returns:
            The numbers of the requests whose answers the model no longer contains.

        Raises:
            ValueError: if this is not possible; then nothing has changed.
        """
        name = type(self).__name__
        raise ValueError(f"expected edges that {name} has not learned from, got {sorted(edges)}")

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the run before it, for JSON."""
        return {}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the strategy has learned: tensors by name, and a dict for JSON.

        A checkpoint holds `version` and `settings` besides.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected state_dict(), got none")

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, instead of `begin`.

        Raises:
            ValueError: if the state does not fit.
            KeyError: if an entry is missing.
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
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run until `num_rounds` edges have answered or were given up.

        Args:
            initial_arrays: the first model; a run that resumes from a checkpoint does not use it.
            timeout: seconds to wait for an edge's answer. Once no edge is left to ask, also the
                seconds to wait for a new edge; then the run ends with what it has.
            evaluate_config: not used; edges are asked only to train.
            evaluate_fn: (round, arrays) -> metrics, called for round 0 and after every round; of
                answers that were absorbed together, after the last.

        Returns:
            Flower's `Result`: final arrays and the metrics of all rounds, of those before a resume
            too.

        Raises:
            ConnectionError: if the grid failed many times in a row.
            ValueError: if the arrays or the checkpoint do not fit.
        """
        result = Result()
        self._timeout = timeout
        log(INFO, "Starting %s strategy:", type(self).__name__)
        log(INFO, "\t├── Number of rounds: %d", num_rounds)
        self.summary()
        self._reset(grid)
        if self._resume(result):
            self._undo_quarantined(result)
        else:
            self.begin(initial_arrays)
            _evaluate(evaluate_fn, 0, initial_arrays, result)
        with self._callbacks.watch(self._run_start(num_rounds)):
            if len(self.history) < num_rounds:
                with self._courier(grid, num_rounds, train_config or ConfigRecord()) as courier:
                    self._run(courier, num_rounds, result, evaluate_fn)
        self.events.sort(key=lambda event: event.time)  # two threads append to the list
        result.arrays = self.arrays
        seconds = self._now() - self._started
        text = "Finished in %.1f s: %d rounds, version %d"
        log(INFO, text, seconds, len(self.history), self.version)
        if self.history and not any(row["accepted"] for row in self.history):
            log(WARNING, "No answer was accepted: the arrays are those that the run began with")
        return result

    def _run(
        self, courier: Courier, num_rounds: int, result: Result, evaluate_fn: EvaluateFn | None
    ) -> None:
        while len(self.history) < num_rounds:
            answers = courier.next_answers(self.max_together, self._callbacks.catch_up)
            self._undo_quarantined(result, courier)  # of a thread that did not wait for a round
            if not answers:
                log(WARNING, "%s: ending the run with what it has", courier.why_it_ended())
                return
            first_round = len(self.history) + 1
            metrics = self._settle(first_round, answers, courier)
            result.train_metrics_clientapp.update(enumerate(metrics, first_round))
            # No checkpoint before the answers are settled: a resumed run would ask for them again.
            self._undo_quarantined(courier=courier)
            if evaluate_fn is not None:  # before the next request: both may use one model
                _evaluate(evaluate_fn, len(self.history), self.arrays, result)
            for answer in answers:
                courier.settle(answer)
            self._save(result, courier)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask one edge (Flower's synchronous loop); wait until there is one to ask."""
        if server_round == 1 or self._arrivals is None:
            self._reset(grid)
            self.begin(arrays)
            self._arrivals = Arrivals(grid, self._session, self._now, lambda edge: None)
            self._callbacks.start(self._run_start(None))
        deadline = self._now() + self._timeout
        while (node := self._session.choose(self._arrivals.present(), self._now())) is None:
            if self._now() > deadline:
                log(WARNING, "No edge left to ask")
                return []
            if isinstance(grid, Stepped):
                grid.advance(self._now() + WAIT_SECONDS)
            else:
                time.sleep(WAIT_SECONDS)
        message, dispatch = self._compose(server_round, node, self._now(), config)
        self._session.depart(str(node), dispatch)
        self._record(dispatch.sent_at, "ask", dispatch.edge, dispatch.number)
        self._callbacks.catch_up()
        return [message]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Learn from the answer of the one edge, if it came (Flower's synchronous loop)."""
        now = self._now()
        message_id = next(iter(self._session.in_flight), "")
        dispatch = self._session.arrive(message_id, now)
        if dispatch is None:
            return self.arrays, None
        answer = Answer(dispatch, next(iter(replies), None), now)
        self._record(now, answer.kind, dispatch.edge, dispatch.number)
        self._callbacks.catch_up()
        self._undo_quarantined()
        metrics = self._settle(server_round, [answer])
        self._undo_quarantined()
        self._session.settle(dispatch)
        self.saved()
        return self.arrays, metrics[0]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask no edge: an edge is used only to train. Use `evaluate_fn` or held-out data."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing, since no edge was asked to evaluate."""
        return None

    def summary(self) -> None:
        """Log the configuration."""
        log(INFO, "\t├── Edges in flight: at most %d", self.max_in_flight)
        log(INFO, "\t├── An edge is asked: %s", "again and again" if self.revisit else "once")
        if self.checkpoint is not None:
            log(INFO, "\t├── Checkpoint: %s", self.checkpoint)

    def _settle(
        self, first_round: int, answers: Sequence[Answer], courier: Courier | None = None
    ) -> list[MetricRecord]:
        """Absorb answers or refuse them; log their rounds and add their rows to the history.

        The answers share the seconds of the core evenly; the first one has the time that the core
        waited.
        """
        began = self._now()
        idle_seconds = began - self._idle_since
        staleness = [self._staleness(answer.dispatch) for answer in answers]
        for answer in answers:
            self._record(began, "learn", answer.dispatch.edge, answer.dispatch.number)
        outcomes = self._outcomes(answers, courier)
        ended = self._now()
        core_seconds = (ended - began) / len(answers)
        records = []
        for place, (answer, outcome) in enumerate(zip(answers, outcomes)):
            dispatch = answer.dispatch
            metrics: dict[str, Any] = {"accepted": 0.0}
            cause = str(outcome)
            if not isinstance(outcome, ValueError):
                metrics |= {name: plain(value) for name, value in outcome.items()}
                metrics["accepted"] = float(outcome.get("accepted", True))
                cause = metrics.pop("cause", "")
            kind = "absorb" if metrics["accepted"] else "refuse"
            self._record(ended, kind, dispatch.edge, dispatch.number)
            server_round = first_round + place
            cause = log_round(server_round, dispatch.edge, metrics, cause)
            numbers = {
                **metrics,
                **costs(answer, began, core_seconds),
                "staleness": staleness[place],
                "core-idle-seconds": 0.0 if place else idle_seconds,
                "time": ended - self._started,
            }
            row = {"round": server_round, "edge": dispatch.edge, "cause": cause, **numbers}
            self.history.append(row)
            records.append(MetricRecord(numbers))
            if self.on_round is not None:
                self.on_round(dict(row))
            self._callbacks.settle(row)
        self._idle_since = self._now()
        return records

    def _outcomes(
        self, answers: Sequence[Answer], courier: Courier | None
    ) -> list[dict[str, Any] | ValueError]:
        """Return for each answer its metrics, or the reason to refuse it."""
        checked = [self._check(answer) for answer in answers]
        received = [answer for answer in checked if isinstance(answer, Received)]
        if received and courier is not None:
            courier.core_works([answer.dispatch for answer in received])
        absorbed = iter(self.absorb_all(received) if received else [])
        return [next(absorbed) if isinstance(answer, Received) else answer for answer in checked]

    def _check(self, answer: Answer) -> Received | ValueError:
        """Return what the strategy may learn from, or the reason to refuse it."""
        dispatch = answer.dispatch
        if dispatch.edge in self.quarantined:
            return ValueError(f"quarantine: expected another edge, got {dispatch.edge!r}")
        try:
            content = content_of(answer.reply, answer.arrived_at - dispatch.sent_at)
        except ValueError as error:
            return error
        staleness = self._staleness(dispatch)
        if self.max_staleness is not None and staleness > self.max_staleness:
            return ValueError(f"staleness: expected at most {self.max_staleness}, got {staleness}")
        return Received(dispatch, content, staleness)

    def _staleness(self, dispatch: Dispatch) -> int:
        """Return how many versions were made while an edge was away, without those undone."""
        num_undone = sum(version > dispatch.version for version in self._undone_versions)
        return self.version - dispatch.version - num_undone

    def _undo_quarantined(
        self, result: Result | None = None, courier: Courier | None = None
    ) -> None:
        """Undo what the model has learned from quarantined edges.

        Args:
            result: to write a checkpoint with it; None writes none.

        Raises:
            ValueError: at the start of a run, if an edge that the caller named cannot be undone.
        """
        if not self._must_undo:
            return
        self._must_undo = False
        edges = learned_from(self.history) & self.quarantined
        if not edges:
            return
        versions, failures = undo_edges(self.undo, edges, self.history)
        self._undone_versions += versions
        for edge, cause in failures.items():
            if courier is None and edge in self._required:
                raise ValueError(f"quarantine: edge {edge!r}: {cause}")
            text = "The run goes on with what it learned from quarantined edge %s: %s"
            log(WARNING, text, edge, cause)
        if result is not None and versions:
            self._save(result, courier)

    def _compose(
        self, number: int, node: int, now: float, config: ConfigRecord
    ) -> tuple[Message, Dispatch]:
        own_config = ConfigRecord({**config, "server-round": number})
        with self.publishing:
            content, sent = self.request(number, own_config)
            version = self.version
        message = Message(
            content,
            dst_node_id=node,
            message_type=MessageType.TRAIN,
            ttl=self._timeout,
            group_id=str(version),
        )
        edge = self._session.names[node]
        dispatch = Dispatch(
            node_id=node,
            edge=edge,
            version=version,
            sent=sent,
            num_bytes=num_bytes(content),
            sent_at=now,
            deadline=now + self._timeout,
            number=number,
            idle_seconds=now - self._session.free_since.get(edge, now),
        )
        return message, dispatch

    def _courier(self, grid: Grid, num_rounds: int, config: ConfigRecord) -> Courier:
        return Courier(
            grid,
            self._session,
            lambda number, node, now: self._compose(number, node, now, config),
            self._record,
            num_rounds=num_rounds,
            max_in_flight=self.max_in_flight,
            timeout=self._timeout,
        )

    def _run_start(self, num_rounds: int | None) -> RunStart:
        options = ("max_in_flight", "max_together", "max_staleness", "revisit", "max_failures")
        return RunStart(
            strategy=type(self).__name__,
            num_rounds=num_rounds,
            settings={**{name: getattr(self, name) for name in options}, **self.settings()},
            history=[dict(row) for row in self.history],
            events=self.events,
            now=lambda: self._now() - self._started,
        )

    def _record(self, at: float, kind: str, edge: str, number: int) -> None:
        self.events.append(Event(at - self._started, kind, edge, number, self.version))

    def _reset(self, grid: Grid) -> None:
        with self.publishing:  # Another thread may call `quarantine` now; it must not be lost.
            self._session = Session(self.revisit, self.max_failures, self.quarantined)
        self._undone_versions = []
        self._now = clock_of(grid)
        self._started = self._now()
        self._idle_since = self._started
        self.version = 0
        self.events = []
        self.history = []

    def saved(self) -> None:
        """Do what must wait until a checkpoint is written; by default nothing.

        Flower's own loop writes no checkpoint and calls this method after every round.
        """

    def _save(self, result: Result, courier: Courier | None = None) -> None:
        """Write a checkpoint, if the run has one."""
        if self.checkpoint is None:
            return
        tensors, state = self.state_dict()
        evaluations = result.evaluate_metrics_serverapp
        run = SavedRun(
            strategy=type(self).__name__,
            settings=self.settings(),
            version=self.version,
            tensors=tensors,
            state=state,
            progress=(self._session if courier is None else courier).progress(),
            history=self.history,
            evaluations={number: dict(metrics) for number, metrics in evaluations.items()},
        )
        if save(self.checkpoint, run):
            self.saved()

    def _resume(self, result: Result) -> bool:
        """Resume from the checkpoint, if there is one; return whether there was.

        Requests that were under way are lost, since a new run cannot pull their answers. They had
        no effect on the model, so their edges are asked again with the same request numbers.
        """
        run = load(self.checkpoint) if self.checkpoint is not None else None
        if run is None:
            return False
        try:
            self._take_over(run)
        except (KeyError, TypeError, AttributeError) as error:
            message = f"{self.checkpoint}: expected a complete header, got {error!r}"
            raise ValueError(message) from None
        except ValueError as error:
            raise ValueError(f"{self.checkpoint}: {error}") from None
        run.copy_metrics(result)
        text = "Resuming from %s after %d rounds; the initial arrays are not used"
        log(INFO, text, self.checkpoint, len(run.history))
        return True

    def _take_over(self, run: SavedRun) -> None:
        run.require(type(self).__name__, self.settings())
        self.load_state_dict(run.tensors, run.state)
        self.version = run.version
        with self.publishing:
            self._session.resume(run.progress)
            self._must_undo = True
        self.history = run.history
        if run.history:  # elapsed time continues from the checkpoint
            self._started -= run.history[-1]["time"]

    def _require_state_dict(self) -> None:
        """Check that the strategy can write a checkpoint, before it has run for days."""
        for name in ("state_dict", "load_state_dict"):
            if getattr(type(self), name) is getattr(AsyncStrategy, name):
                message = f"checkpoint: expected {type(self).__name__} to have {name}()"
                raise ValueError(message)


def _evaluate(
    evaluate_fn: EvaluateFn | None, server_round: int, arrays: ArrayRecord, result: Result
) -> None:
    """Call the user's evaluation, if there is one, and keep what it returns."""
    if evaluate_fn and (metrics := evaluate_fn(server_round, arrays)) is not None:
        log(INFO, "Global evaluation: %s", metrics)
        result.evaluate_metrics_serverapp[server_round] = metrics
