"""The network side of a run: sends requests, fetches answers and survives a failing grid."""

import threading
from collections import deque
from collections.abc import Callable, Sequence, Set
from logging import WARNING
from types import TracebackType
from typing import Self

from flwr.app import Message
from flwr.common import log
from flwr.serverapp import Grid

from .arrivals import Arrivals, GridFailure, on_grid, pull_each
from .clock import Stepped, clock_of
from .session import Answer, Dispatch, Progress, Session

MIN_POLL_SECONDS = 0.02
MAX_POLL_SECONDS = 2.0
POLL_GROWTH = 1.1
"""Factor of the pause between two polls: an answer waits at most a tenth of its edge's seconds."""
INITIAL_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 30.0
MAX_FAILED_CALLS = 30
IDLE_LOG_SECONDS = 10.0
"""Seconds without an edge to ask, after which one log line says that the run waits."""

Compose = Callable[[int, int, float], tuple[Message, Dispatch]]
"""(number of the request, node id, time in seconds) -> message to send, and its record."""
Record = Callable[[float, str, str, int], None]
"""(time in seconds, kind, edge, number of the request) -> keeps the event."""


class Courier:
    """Keeps edges busy and collects their answers, in order of arrival.

    `tick` is one pass over the network: it pulls replies that have arrived, gives up overdue
    requests and fills free slots. On an ordinary grid a separate thread calls it, so that edges
    are asked while the core distils. On a `Stepped` grid the caller of `next_answers` does.

    Flower deletes a stored reply if its node is offline when the reply is asked for. Therefore the
    courier pulls replies while the core is busy too, and only those of nodes that are online.

    Args:
        num_rounds: the most requests to send, those of earlier runs included.
        max_in_flight: the most requests under way. With 1 (Algorithm 1) the next request also
            waits until the answer has been absorbed. With more, a slot is free once its answer has
            arrived; as many answers may then wait for a slow core, and no more.
        timeout: seconds without a present edge that could be asked, after which the run ends.
    """

    def __init__(
        self,
        grid: Grid,
        session: Session,
        compose: Compose,
        record: Record,
        *,
        num_rounds: int,
        max_in_flight: int,
        timeout: float,
    ) -> None:
        self._grid = grid
        self._stepped = grid if isinstance(grid, Stepped) else None
        self._session = session
        self._compose = compose
        self._record = record
        self._num_rounds = num_rounds
        self._max_in_flight = max_in_flight
        self._timeout = timeout
        self.now = clock_of(grid)
        self._arrivals = Arrivals(grid, session, self.now, self._on_arrival)
        self._answers: deque[Answer] = deque()
        self._num_arrived = 0
        self._has_asked = False
        self._failed_calls = 0
        self._idle_since = self.now()
        self._idle_logged = False
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        # Guards the session's books, the answers and the end of the run; two threads use them.
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._stepped is None:
            self._thread = threading.Thread(
                target=self._run, name="flwr-cloned-kd-courier", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def next_answers(
        self, max_answers: int, meanwhile: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        """Wait for the next answer; return it with those that have arrived since, oldest first.

        Args:
            max_answers: the most answers to return, at least 1.
            meanwhile: called each time that edges were asked, and before the answers are returned.

        Returns:
            An empty list if no edge is left to ask and no request is under way.

        Raises:
            ConnectionError: if the grid failed many times in a row.
        """
        if self._stepped is None:
            self._wait_for_answer(meanwhile)
        else:
            self._step_to_answer(self._stepped, meanwhile)
        with self._changed:
            if self._answers:
                num_answers = min(max_answers, len(self._answers))
                return [self._answers.popleft() for _ in range(num_answers)]
        if self._error is not None:
            raise self._error
        return []

    def core_works(self, dispatches: Sequence[Dispatch]) -> None:
        """Move the clock of a `Stepped` grid while the core learns; edges work at the same time."""
        if self._stepped is not None:
            answers = [(dispatch.edge, dispatch.number) for dispatch in dispatches]
            seconds = self._stepped.core_seconds(answers)
            until = self.now() + seconds
            while self._advance(self._stepped, until):
                self._attempt()

    def settle(self, answer: Answer) -> None:
        """Mark an answer as absorbed or refused and wake the network thread."""
        with self._changed:
            self._session.settle(answer.dispatch)
        self._wake.set()

    def progress(self) -> Progress:
        """Return what a resumed run needs."""
        with self._changed:
            return self._session.progress()

    def why_it_ended(self) -> str:
        """Return in a few words why there is no next answer."""
        if self._session.gave_up:
            return f"{self._session.failures_in_a_row} edges in a row failed"
        return f"No edge left to ask for {self._timeout:g} s"

    def tick(self) -> bool:
        """Pass once over the network; return whether anything happened.

        Raises:
            GridFailure: if a call of the grid failed. What arrived before the failure is kept.
        """
        online = self._arrivals.online()
        num_arrived = self._pull(online) + self._expire()
        num_asked = self._refill(online)
        self._end_if_idle()
        return num_arrived + num_asked > 0

    # Time

    def _run(self) -> None:
        """Tick until the run ends: often for edges that answer at once, rarely for slow ones."""
        pause = MIN_POLL_SECONDS
        try:
            while not self._closed and not self._ended:
                retry_in = self._attempt()
                pause = MIN_POLL_SECONDS if retry_in is None else POLL_GROWTH * pause
                pause = min(pause, MAX_POLL_SECONDS)
                if self._wake.wait(max(retry_in or 0.0, pause)):
                    self._wake.clear()
                    pause = MIN_POLL_SECONDS
        except BaseException as error:  # `next_answers` raises it in the caller's thread
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_answer(self, meanwhile: Callable[[], None]) -> None:
        """Wait for an answer, the end of the run or an error of the network thread."""
        waiting = True
        while waiting:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._answers or self._ended or self._error or self._has_asked
                )
                self._has_asked = False
                waiting = not (self._answers or self._ended or self._error)
            meanwhile()  # without the lock: it may take long

    def _step_to_answer(self, grid: Stepped, meanwhile: Callable[[], None]) -> None:
        meanwhile()
        while not self._answers and not self._ended:
            self._attempt()
            meanwhile()
            if not self._answers and not self._ended:
                self._advance(grid, float("inf"))

    def _advance(self, grid: Stepped, until: float) -> bool:
        """Move to the next event, the next due time or `until`, whichever is first.

        Returns:
            Whether the clock may move further before it reaches `until`.
        """
        due = min(self._next_due(), until)
        if grid.advance(due):
            return True
        self._ended = self._ended or due == float("inf")
        return due < until

    def _next_due(self) -> float:
        """Return when the courier must act although no event happens, in seconds."""
        now = self.now()
        idle_end = self._idle_since + self._timeout
        no_request = not self._session.unsettled and idle_end > now
        return min(
            self._session.next_due(now),
            self._arrivals.next_due(now),
            idle_end if no_request else float("inf"),
        )

    # Calls of a grid that may fail

    def _attempt(self) -> float | None:
        """Tick; return None if anything happened, else the seconds before the next try.

        Raises:
            ConnectionError: if too many tries in a row failed.
        """
        num_received = self._num_received
        try:
            moved = self.tick()
        except GridFailure as failure:
            # The failures in a row count from 0 if the grid has delivered a reply since: edges
            # that send junk must not end a run.
            if self._num_received > num_received:
                self._failed_calls = 0
            self._failed_calls += 1
            return self._retry_after(failure.__cause__)
        self._failed_calls = 0
        return None if moved else 0.0

    def _retry_after(self, cause: BaseException | None) -> float:
        if self._stepped is not None and cause is not None:
            raise cause from None  # an in-process grid has no transport that could fail: a bug
        reason = f"{type(cause).__name__}: {str(cause)[:200]}"
        if self._failed_calls >= MAX_FAILED_CALLS:
            raise ConnectionError(
                f"grid: {self._failed_calls} calls in a row failed, at last with {reason}"
            ) from cause
        if self._failed_calls == 1:
            log(WARNING, "The grid failed, trying again: %s", reason)
        return min(INITIAL_RETRY_SECONDS * 2.0 ** (self._failed_calls - 1), MAX_RETRY_SECONDS)

    @property
    def _num_received(self) -> int:
        return self._num_arrived + self._arrivals.num_replies

    # Replies

    def _pull(self, online: Set[int]) -> int:
        in_flight = self._session.in_flight
        asked = [key for key, dispatch in in_flight.items() if dispatch.node_id in online]
        replies = pull_each(self._grid, asked)
        return sum(self._arrive(reply.metadata.reply_to_message_id, reply) for reply in replies)

    def _expire(self) -> int:
        return sum(self._arrive(key, None) for key in self._session.expired(self.now()))

    def _arrive(self, message_id: str, reply: Message | None) -> bool:
        """Free the slot of a request and queue its answer; return False if it was given up."""
        with self._changed:
            arrived_at = self.now()
            dispatch = self._session.arrive(message_id, arrived_at)
            if dispatch is None:
                return False
            answer = Answer(dispatch, reply, arrived_at)
            self._count_failure(answer)
            self._record(arrived_at, answer.kind, dispatch.edge, dispatch.number)
            self._answers.append(answer)
            self._num_arrived += 1
            self._changed.notify_all()
        return True

    def _count_failure(self, answer: Answer) -> None:
        edge = answer.dispatch.edge
        if not answer.failed:
            self._session.succeed(edge)
        elif pause := self._session.fail(edge, answer.arrived_at):
            log(
                WARNING,
                "%d edges in a row failed: no edge is asked for %g s",
                self._session.failures_in_a_row,
                pause,
            )

    # Requests

    def _refill(self, online: Set[int]) -> int:
        """Welcome new nodes and ask edges while slots are free; return how many were asked."""
        count = 0
        if self._wants_more():
            self._arrivals.welcome(online)
        while self._may_ask():
            node = self._session.choose(online, self.now())
            if node is None or not self._ask(node):
                break
            count += 1
        return count

    def _wants_more(self) -> bool:
        return self._session.num_visits < self._num_rounds and not self._session.gave_up

    def _may_ask(self) -> bool:
        if not self._wants_more() or self.now() < self._session.paused_until:
            return False
        if self._max_in_flight == 1:
            return not self._session.unsettled
        num_busy, num_waiting = len(self._session.in_flight), len(self._answers)
        return max(num_busy, num_waiting) < self._max_in_flight

    def _ask(self, node: int) -> bool:
        edge, now = self._session.names[node], self.now()
        number = self._session.number_for(edge)
        message, dispatch = self._compose(number, node, now)
        # The id is empty, or absent, if the node has just left: the edge was not asked.
        message_id = on_grid(lambda: next(iter(self._grid.push_messages([message])), ""))
        if not message_id:
            return False
        with self._changed:
            self._session.depart(message_id, dispatch)
            self._record(now, "ask", edge, number)
            self._has_asked = True
            self._changed.notify_all()
        return True

    def _on_arrival(self, edge: str) -> None:
        self._record(self.now(), "arrive", edge, 0)

    def _end_if_idle(self) -> None:
        """End the run if no edge could be asked for long, or if too many failed in a row."""
        now = self.now()
        gave_up = self._session.gave_up
        # A run that gave up welcomes no new nodes, so it must not wait for their names.
        expects_edges = not gave_up and (
            self._arrivals.pending or self._session.paused_until > now or self._session.has_resting
        )
        if self._session.unsettled or expects_edges:
            self._idle_since = now
            self._idle_logged = False
        elif gave_up or now >= self._idle_since + self._timeout:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
        elif now >= self._idle_since + IDLE_LOG_SECONDS and self._wants_more():
            self._log_idle(now)

    def _log_idle(self, now: float) -> None:
        """Log, once per wait, that no edge is left to ask; no time passes on a `Stepped` grid."""
        if self._idle_logged or self._stepped is not None:
            return
        self._idle_logged = True
        log(
            WARNING,
            "No edge is left to ask after %d of %d requests: the run ends in %.0f s unless a new "
            "edge appears",
            self._session.num_visits,
            self._num_rounds,
            self._idle_since + self._timeout - now,
        )
