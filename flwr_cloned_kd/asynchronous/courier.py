"""The network side of a run: asks edges, fetches their answers, survives a failing grid."""

import threading
from collections import deque
from collections.abc import Callable, Set
from logging import WARNING
from types import TracebackType
from typing import Any, Self

from flwr.app import Message
from flwr.common import log
from flwr.serverapp import Grid

from .arrivals import GridFailure, Register, on_grid, pull_each
from .clock import Stepped, clock_of
from .session import Answer, Dispatch, Health, Progress, Session

SHORTEST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 2.0
FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 30.0
MOST_FAILED_CALLS = 30


class Courier:
    """Keeps edges busy and collects their answers, in order of arrival.

    `tick` is one pass over the network: pull what has arrived, give up what is overdue, refill free
    slots. On an ordinary grid a thread of its own calls it, so that edges are asked while the core
    distils; on a `Stepped` one the caller's thread does, whenever it waits for an answer.

    Flower deletes a stored reply if its node is offline when somebody asks for it. So replies are
    pulled while the core is busy too, and only those of nodes that are online.

    Args:
        compose: (number of the request, node, now) -> message, and what to remember of it.
        num_rounds: how many requests to make at most.
        max_in_flight: requests under way. With 1, Algorithm 1, the next one also waits until the
            answer has been absorbed; with more, a slot is free once its answer has arrived. So
            that answers do not pile up, as many of them may wait for a slow core, and no more.
        timeout: seconds without anything to do after which the run has ended.
        max_failures: edges that failed one after the other before no more are asked.
        before: where a run before this one stopped; what it did not settle is asked again.
        record: (time, kind, edge, number) -> keeps the event.
    """

    def __init__(
        self,
        grid: Grid,
        session: Session[Any],
        compose: Callable[[int, int, float], tuple[Message, Dispatch[Any]]],
        *,
        num_rounds: int,
        max_in_flight: int,
        timeout: float,
        max_failures: int,
        before: Progress = Progress(),
        record: Callable[[float, str, str, int], None] = lambda *event: None,
    ) -> None:
        self._grid, self._session, self._compose = grid, session, compose
        self._num_rounds, self._max_in_flight = num_rounds, max_in_flight
        self._timeout, self._health = timeout, Health(max_failures)
        self._num_settled, self._next_number = sum(before.visits.values()), before.next_number
        self._again = {edge: list(numbers) for edge, numbers in before.unsettled.items()}
        self._visits, self._record = dict(before.visits), record
        session.visits |= before.visits
        self.now = clock_of(grid)
        self._stepped = grid if isinstance(grid, Stepped) else None
        self._register = Register(grid, session, self.now, self._seen)
        self._answers: deque[Answer] = deque()
        self._unsettled: dict[int, str] = {}
        self._failed_calls, self._num_arrived, self._idle_since = 0, 0, self.now()
        self._ended = self._closed = False
        self._error: BaseException | None = None
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

    def next_answer(self) -> Answer | None:
        """Wait for the next answer; None once nobody is left to ask and nothing is under way.

        Raises:
            ConnectionError: if the grid failed many times in a row.
        """
        if self._stepped is not None:
            while not self._waiting_or_ended():
                self._let_pass(self._stepped, float("inf"))
        else:
            with self._changed:
                self._changed.wait_for(lambda: self._answers or self._ended or self._error)
        with self._changed:
            if self._answers:
                return self._answers.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _waiting_or_ended(self) -> bool:
        if not self._answers:
            self._attempt()
        return bool(self._answers) or self._ended

    def core_works(self, edge: str, number: int) -> None:
        """Let the clock of a `Stepped` grid run while the core learns; edges go on meanwhile."""
        if self._stepped is not None:
            until = self.now() + self._stepped.core_seconds(edge, number)
            while self._let_pass(self._stepped, until):
                self._attempt()

    def settled(self, answer: Answer) -> None:
        """Hear that an answer was absorbed or refused."""
        edge = answer.dispatch.edge
        with self._changed:
            del self._unsettled[answer.dispatch.number]
            self._num_settled += 1
            self._visits[edge] = self._visits.get(edge, 0) + 1
        self._wake.set()

    def progress(self) -> Progress:
        """Return what a run after this one needs to know."""
        with self._changed:
            found = {edge: list(numbers) for edge, numbers in self._again.items()}
            for number, edge in self._unsettled.items():
                found.setdefault(edge, []).append(number)
            return Progress(self._next_number, found, dict(self._visits))

    def why_it_ended(self) -> str:
        """Say in a few words why there is no next answer."""
        if self._health.gave_up:
            return f"{self._health.failures} edges in a row failed"
        return f"No edge left to ask for {self._timeout:g} s"

    def tick(self) -> bool:
        """Pass once over the network; return whether anything happened.

        Raises:
            GridFailure: if a call of the grid failed. What had arrived before is kept.
        """
        online = self._register.online()
        moved = self._pull(online) + self._expire() + self._refill(online)
        self._rest()
        return moved > 0

    def _run(self) -> None:
        pause = SHORTEST_PAUSE_SECONDS
        try:
            while not self._closed and not self._ended:
                retry = self._attempt()
                # Short for edges that answer at once, long for those that take hours.
                pause = SHORTEST_PAUSE_SECONDS if retry < 0 else 1.5 * pause
                pause = min(pause, LONGEST_PAUSE_SECONDS)
                if self._wake.wait(max(retry, pause)):
                    self._wake.clear()
                    pause = SHORTEST_PAUSE_SECONDS
        except BaseException as error:  # the caller's thread raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _let_pass(self, grid: Stepped, until: float) -> bool:
        """Let time run to what comes next, or to `until`; return whether more may come before."""
        due = min(self._next_due(), until)
        if grid.advance(due):
            return True
        self._ended = self._ended or due == float("inf")
        return due < until

    def _attempt(self) -> float:
        """Tick on a grid that may fail; return how long to wait before the next try.

        Returns:
            Seconds; 0 if nothing is wrong, below 0 if something has just happened.

        Raises:
            ConnectionError: if too many tries in a row failed.
        """
        heard = self._num_heard
        try:
            moved = self.tick()
        except GridFailure as failure:
            # A grid that has fetched something is not broken: edges that send junk end no run.
            before = self._failed_calls if self._num_heard == heard else 0
            cause, self._failed_calls = failure.__cause__, before + 1
            if self._stepped is not None and cause is not None:
                raise cause from None  # nothing is lost on the way there: it is a mistake
            found = f"{type(cause).__name__}: {str(cause)[:200]}"
            if self._failed_calls >= MOST_FAILED_CALLS:
                message = f"grid: {self._failed_calls} calls in a row failed, at last with {found}"
                raise ConnectionError(message) from cause
            if self._failed_calls == 1:
                log(WARNING, "The grid failed, trying again: %s", found)
            return min(FIRST_RETRY_SECONDS * 2.0**self._failed_calls / 2, LONGEST_RETRY_SECONDS)
        self._failed_calls = 0
        return -1.0 if moved else 0.0

    @property
    def _num_heard(self) -> int:
        return self._num_arrived + self._register.num_answers

    def _pull(self, online: Set[int]) -> int:
        in_flight = self._session.in_flight
        asked = [key for key, dispatch in in_flight.items() if dispatch.node_id in online]
        replies = pull_each(self._grid, asked)
        return sum(self._arrive(reply.metadata.reply_to_message_id, reply) for reply in replies)

    def _expire(self) -> int:
        return sum(self._arrive(key, None) for key in self._session.expired(self.now()))

    def _arrive(self, message_id: str, reply: Message | None) -> bool:
        """Free the slot and hand the answer over, unless the edge was given up before."""
        with self._changed:
            dispatch = self._session.in_flight.pop(message_id, None)
            if dispatch is None:
                return False
            answer = Answer(dispatch, reply, self.now())
            self._session.free_since[dispatch.edge] = answer.arrived_at
            self._judge(answer)
            kind = "expire" if reply is None else "error" if reply.has_error() else "answer"
            self._record(answer.arrived_at, kind, dispatch.edge, dispatch.number)
            self._answers.append(answer)
            self._num_arrived += 1
            self._changed.notify_all()
        return True

    def _judge(self, answer: Answer) -> None:
        """Back off from an edge that failed, and from all if several in a row did."""
        if not answer.failed:
            self._health.succeed()
            self._session.succeed(answer.dispatch.edge)
            return
        self._session.fail(answer.dispatch.edge, answer.arrived_at)
        if pause := self._health.fail(answer.arrived_at):
            text = "%d edges in a row failed: asking nobody for %g s"
            log(WARNING, text, self._health.failures, pause)

    def _refill(self, online: Set[int]) -> int:
        """Ask edges while slots are free; meet newcomers even if none is."""
        count = 0
        if self._wants_more():
            self._register.welcome(online)
        while self._may_ask():
            node = self._session.choose(online, self.now())
            if node is None or not self._ask(node):
                break
            count += 1
        return count

    def _wants_more(self) -> bool:
        asked = self._num_settled + len(self._unsettled)
        return asked < self._num_rounds and not self._health.gave_up

    def _may_ask(self) -> bool:
        if not self._wants_more() or self.now() < self._health.paused_until:
            return False
        if self._max_in_flight == 1:
            return not self._unsettled
        waiting, most = len(self._answers), self._max_in_flight
        return len(self._session.in_flight) < most and waiting < most

    def _ask(self, node: int) -> bool:
        edge, now = self._session.names[node], self.now()
        number = self._again.get(edge, [self._next_number])[0]
        message, dispatch = self._compose(number, node, now)
        # The id is empty, or absent, if the node has just left: the edge was not asked.
        message_id = on_grid(lambda: next(iter(self._grid.push_messages([message])), ""))
        if not message_id:
            return False
        with self._changed:
            if numbers := self._again.pop(edge, []):
                self._again |= {edge: numbers[1:]} if numbers[1:] else {}
            else:
                self._next_number += 1
            self._unsettled[number] = edge
            self._session.depart(message_id, dispatch)
        self._record(now, "ask", edge, number)
        return True

    def _seen(self, edge: str) -> None:
        self._record(self.now(), "arrive", edge, 0)

    def _rest(self) -> None:
        """End the run once there has been nothing to do for long, or too much has failed."""
        now = self.now()
        pauses = self._health.paused_until > now or self._session.next_rested < float("inf")
        paused = pauses and not self._health.gave_up
        if self._unsettled or self._register.expecting or paused:
            self._idle_since = now
        elif self._health.gave_up or now >= self._idle_since + self._timeout:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _next_due(self) -> float:
        """When something is to be done though nothing happens."""
        now = self.now()
        idle = float("inf") if self._unsettled else self._idle_since + self._timeout
        dues = (self._session.next_due, self._register.next_due, self._health.paused_until, idle)
        return min((due for due in dues if due > now), default=float("inf"))
