"""The books of a run: which edges are present, what was asked of them, and which edge is next."""

import heapq
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from flwr.app import Message, RecordDict

INITIAL_REST_SECONDS = 10.0
MAX_REST_SECONDS = 600.0
FAILURES_BEFORE_A_PAUSE = 3
MAX_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Dispatch:
    """A request that was sent to an edge."""

    node_id: int
    edge: str
    version: int
    """Version of the model that was sent."""
    sent: Any
    """What the strategy keeps of the request. A late answer is compared with it."""
    num_bytes: int
    """Size of the arrays that were sent, in bytes."""
    sent_at: float
    """Time of sending, in seconds of the run's clock."""
    deadline: float
    """Time at which the request is given up, in seconds of the run's clock."""
    number: int = 0
    """Number of the request, counted from 1. The edge receives it as "server-round"."""
    idle_seconds: float = 0.0
    """How long the edge was present without a request before this one."""


class Answer(NamedTuple):
    """The end of a request: a reply, an error reply or silence."""

    dispatch: Dispatch
    reply: Message | None
    """None if no reply came before the deadline."""
    arrived_at: float
    """Seconds of the run's clock."""

    @property
    def failed(self) -> bool:
        """Whether the edge crashed or stayed silent."""
        return self.reply is None or self.reply.has_error()

    @property
    def kind(self) -> str:
        """The kind of the event that ends the request: "answer", "error" or "expire"."""
        if self.reply is None:
            return "expire"
        return "error" if self.reply.has_error() else "answer"


class Received(NamedTuple):
    """A reply that a strategy may learn from."""

    dispatch: Dispatch
    content: RecordDict
    staleness: int
    """Versions that were made while the edge was away, 0 for a fresh answer."""


class Progress(NamedTuple):
    """What a resumed run needs from the books of the run before it."""

    next_number: int = 1
    """Number of the next new request."""
    unsettled: Mapping[str, list[int]] = {}
    """Edge -> numbers of its requests whose answers were neither absorbed nor refused."""
    visits: Mapping[str, int] = {}
    """Edge -> number of its answers that were absorbed or refused."""
    quarantined: Sequence[str] = ()
    """Edges that are never asked again."""


@dataclass
class Session:
    """The books of a run, which change only by the methods below.

    The next edge is found in O(log nodes). Where two threads use a session, the caller locks it.

    Args:
        revisit: ask an edge again once every other present edge was asked as often.
        max_failures: number of failures in a row after which no edge is asked any more.
        quarantined: edges that are never asked again.
    """

    revisit: bool = False
    max_failures: int = 30
    quarantined: frozenset[str] = frozenset()
    names: dict[int, str] = field(default_factory=dict)
    """Node id -> edge, for every node that was ever introduced."""
    visits: dict[str, int] = field(default_factory=dict)
    """Edge -> number of its requests; of earlier runs only those that were settled count."""
    num_visits: int = 0
    """Sum of `visits`."""
    in_flight: dict[str, Dispatch] = field(default_factory=dict)
    """Message id -> request under way, oldest first."""
    unsettled: dict[int, str] = field(default_factory=dict)
    """Number of a request -> its edge, until its answer is absorbed or refused."""
    free_since: dict[str, float] = field(default_factory=dict)
    """Edge -> time at which it was first seen or its latest request ended, in seconds."""
    next_number: int = 1
    """Number of the next new request."""
    failures_in_a_row: int = 0
    """Failures since the last edge that answered, over all edges."""
    paused_until: float = float("-inf")
    """Time before which no edge should be asked, in seconds."""
    # A node waits for a request in one of four places: `_queue` orders candidates by
    # (visits, arrival); `_away` holds absent nodes; `_busy` those whose edge has a request
    # under way; `_resting` those whose edge has failed, by the time at which they may return.
    _queue: list[tuple[int, int, int]] = field(default_factory=list)
    _away: set[int] = field(default_factory=set)
    _busy: dict[str, list[int]] = field(default_factory=dict)
    _resting: list[tuple[float, int]] = field(default_factory=list)
    _rest_until: dict[str, float] = field(default_factory=dict)
    _failures: dict[str, int] = field(default_factory=dict)
    _nodes_of: dict[str, set[int]] = field(default_factory=dict)
    _arrival: dict[int, int] = field(default_factory=dict)
    _ask_again: dict[str, list[int]] = field(default_factory=dict)

    def resume(self, before: Progress) -> None:
        """Continue the books of an earlier run; its unsettled requests will be sent again."""
        self.next_number = before.next_number
        self.visits = dict(before.visits)
        self.num_visits = sum(self.visits.values())
        self._ask_again = {edge: list(numbers) for edge, numbers in before.unsettled.items()}
        self.quarantined |= frozenset(before.quarantined)

    def quarantine(self, edge: str) -> None:
        """Record that an edge is never asked again."""
        self.quarantined |= {edge}

    def introduce(self, node_id: int, name: str, online: Iterable[int], now: float = 0.0) -> str:
        """Record the name of a node and return the edge that the node stands for.

        A name in use by another online node, or one that looks like a default name, is rejected:
        the edge is then called "node ID".

        Args:
            name: what the node calls itself, "" if it has not said.
            online: ids of the nodes that are present.
            now: seconds.
        """
        present = online if isinstance(online, Set) else set(online)
        taken = any(other in present for other in self._nodes_of.get(name, ()))
        usable = name and not taken and not name.startswith("node ")
        edge = name if usable else f"node {node_id}"
        self.names[node_id] = edge
        self._nodes_of.setdefault(edge, set()).add(node_id)
        self._arrival.setdefault(node_id, len(self._arrival))
        self.free_since.setdefault(edge, now)
        self._enqueue(node_id)
        return edge

    def choose(self, online: Iterable[int], now: float = 0.0) -> int | None:
        """Choose the next node: the least visited free one, and of these the first to arrive.

        Args:
            online: ids of the nodes that are present.
            now: seconds; an edge that has failed is not chosen before the end of its rest.

        Returns:
            A node id, or None if no node can be asked now.
        """
        present = online if isinstance(online, Set) else set(online)
        busy = {dispatch.edge for dispatch in self.in_flight.values()}
        self._readmit(present, busy, now)
        while self._queue:
            visits, _, node = heapq.heappop(self._queue)
            edge = self.names[node]
            if edge in self.quarantined:
                continue
            if visits != self.visits.get(edge, 0):
                self._enqueue(node)
            elif edge in busy:
                self._busy.setdefault(edge, []).append(node)
            elif self._rest_until.get(edge, now) > now:
                heapq.heappush(self._resting, (self._rest_until[edge], node))
            elif node not in present:
                self._away.add(node)
            else:
                # The node stays a candidate until `depart` records a request to it.
                self._enqueue(node)
                return node
        return None

    def number_for(self, edge: str) -> int:
        """Return the number of the next request to an edge: an unsettled one first, else new."""
        unsettled = self._ask_again.get(edge)
        return unsettled[0] if unsettled else self.next_number

    def depart(self, message_id: str, dispatch: Dispatch) -> None:
        """Record that a request was sent; from now on its edge counts as visited."""
        edge = dispatch.edge
        if unsettled := self._ask_again.pop(edge, []):
            if unsettled[1:]:
                self._ask_again[edge] = unsettled[1:]
        else:
            self.next_number += 1
        self.in_flight[message_id] = dispatch
        self.unsettled[dispatch.number] = edge
        self.visits[edge] = self.visits.get(edge, 0) + 1
        self.num_visits += 1

    def arrive(self, message_id: str, now: float) -> Dispatch | None:
        """Record that a request has ended, in whatever way; its edge is free again.

        Returns:
            The request, or None if it had ended before.
        """
        dispatch = self.in_flight.pop(message_id, None)
        if dispatch is not None:
            self.free_since[dispatch.edge] = now
        return dispatch

    def succeed(self, edge: str) -> None:
        """Record that an edge answered: no edge is paused, and this one need not rest."""
        self.failures_in_a_row = 0
        self.paused_until = float("-inf")
        self._failures.pop(edge, None)
        self._rest_until.pop(edge, None)

    def fail(self, edge: str, now: float) -> float:
        """Record that an edge crashed or stayed silent.

        The edge rests, twice as long after each further failure in a row. After several failures
        of any edges in a row all edges are paused: one killed process can make the process pool of
        a simulation fail every request at once, and would otherwise use up all edges.

        Returns:
            The length of the pause in seconds, often 0.
        """
        count = self._failures.get(edge, 0) + 1
        self._failures[edge] = count
        rest = min(INITIAL_REST_SECONDS * 2.0 ** min(count - 1, 30), MAX_REST_SECONDS)
        self._rest_until[edge] = now + rest
        self.failures_in_a_row += 1
        beyond = self.failures_in_a_row - FAILURES_BEFORE_A_PAUSE
        pause = min(2.0 ** min(beyond, 30), MAX_PAUSE_SECONDS) if beyond >= 0 else 0.0
        self.paused_until = now + pause
        return pause

    def settle(self, dispatch: Dispatch) -> None:
        """Record that the answer to a request was absorbed or refused."""
        del self.unsettled[dispatch.number]

    def progress(self) -> Progress:
        """Return what a resumed run needs."""
        unsettled = {edge: list(numbers) for edge, numbers in self._ask_again.items()}
        settled = dict(self.visits)
        for number, edge in self.unsettled.items():
            unsettled.setdefault(edge, []).append(number)
            settled[edge] -= 1
        visits = {edge: count for edge, count in settled.items() if count}
        return Progress(self.next_number, unsettled, visits, tuple(sorted(self.quarantined)))

    def expired(self, now: float) -> list[str]:
        """Return the message ids of the requests whose deadline has passed."""
        return [key for key, dispatch in self.in_flight.items() if dispatch.deadline <= now]

    def next_due(self, now: float) -> float:
        """Return when the next deadline, rest or pause after `now` ends, or infinity.

        Times up to `now` are left out one by one: a rest that is over does not hide a deadline.
        """
        deadlines = (dispatch.deadline for dispatch in self.in_flight.values())
        rests = (until for until, _ in self._resting)
        times = chain(deadlines, rests, [self.paused_until])
        return min((time for time in times if time > now), default=float("inf"))

    @property
    def gave_up(self) -> bool:
        """Whether so many edges in a row failed that no more are asked."""
        return self.failures_in_a_row >= self.max_failures

    @property
    def has_resting(self) -> bool:
        """Whether an edge that can be asked again rests after a failure."""
        return bool(self._resting)

    def _enqueue(self, node: int) -> None:
        visits = self.visits.get(self.names[node], 0)
        if self.revisit or not visits:
            heapq.heappush(self._queue, (visits, self._arrival[node], node))

    def _readmit(self, present: Set[int], busy: set[str], now: float) -> None:
        """Put nodes back into the queue that have returned, finished or rested."""
        returned = [node for node in self._away if node in present]
        self._away.difference_update(returned)
        for edge in [edge for edge in self._busy if edge not in busy]:
            returned += self._busy.pop(edge)
        while self._resting and self._resting[0][0] <= now:
            returned.append(heapq.heappop(self._resting)[1])
        for node in returned:
            self._enqueue(node)
