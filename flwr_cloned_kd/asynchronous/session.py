"""Who was asked, who is asked now, and whom to ask next."""

import heapq
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from flwr.app import Message

Sent = TypeVar("Sent")

FIRST_REST_SECONDS = 10.0
LONGEST_REST_SECONDS = 600.0


@dataclass(frozen=True)
class Dispatch(Generic[Sent]):
    """One request under way."""

    node_id: int
    edge: str
    version: int
    """Of the core when it was sent."""
    sent: Sent
    """What it was sent: late answers are measured against it."""
    num_bytes: int
    """Of the arrays sent."""
    sent_at: float
    """Seconds of the run's clock, as is `deadline`."""
    deadline: float
    number: int = 0
    """Of the request, counted from 1; the "server-round" that the edge was told."""
    idle_seconds: float = 0.0
    """How long the edge had been there without anything to do."""


@dataclass
class Session(Generic[Sent]):
    """Bookkeeping of one run; the next edge is found in O(log nodes).

    Args:
        revisit: ask an edge again once all the others present were asked as often.
    """

    revisit: bool = False
    names: dict[int, str] = field(default_factory=dict)
    """Node id -> edge, for every node ever seen."""
    visits: dict[str, int] = field(default_factory=dict)
    """Edge -> how often it was asked."""
    in_flight: dict[str, Dispatch[Sent]] = field(default_factory=dict)
    """Message id -> the request, oldest first."""
    free_since: dict[str, float] = field(default_factory=dict)
    """Edge -> when it was first seen, or its latest request was over; seconds."""
    _bearers: dict[str, set[int]] = field(default_factory=dict)
    _arrival: dict[int, int] = field(default_factory=dict)
    # Candidates by (visits, arrival); the others wait to return, for their edge, or to recover.
    _queue: list[tuple[int, int, int]] = field(default_factory=list)
    _away: set[int] = field(default_factory=set)
    _busy: dict[str, list[int]] = field(default_factory=dict)
    _resting: list[tuple[float, int]] = field(default_factory=list)
    _rest_until: dict[str, float] = field(default_factory=dict)
    _failures: dict[str, int] = field(default_factory=dict)

    def introduce(self, node_id: int, name: str, online: Iterable[int], now: float = 0.0) -> str:
        """Record who a node says it is.

        A name that somebody present bears, or might come to bear for want of one, is not believed.
        """
        present = online if isinstance(online, Set) else set(online)
        taken = any(bearer in present for bearer in self._bearers.get(name, ()))
        believed = name and not taken and not name.startswith("node ")
        edge = self.names[node_id] = name if believed else f"node {node_id}"
        self._bearers.setdefault(edge, set()).add(node_id)
        self._arrival.setdefault(node_id, len(self._arrival))
        self.free_since.setdefault(edge, now)
        self._enqueue(node_id)
        return edge

    def choose(self, online: Iterable[int], now: float = 0.0) -> int | None:
        """Pick the next node: of those not busy the least visited, the earliest to arrive first.

        An edge that failed is left alone for a while (`fail`).

        Args:
            online: node ids.
            now: seconds, against which rests are measured.

        Returns:
            A node id, or None if nobody is left to ask.
        """
        present = online if isinstance(online, Set) else set(online)
        busy = {dispatch.edge for dispatch in self.in_flight.values()}
        self._readmit(present, busy, now)
        while self._queue:
            visits, _, node = heapq.heappop(self._queue)
            edge = self.names[node]
            if edge in busy:
                self._busy.setdefault(edge, []).append(node)
            elif self._rest_until.get(edge, now) > now:
                heapq.heappush(self._resting, (self._rest_until[edge], node))
            elif node not in present:
                self._away.add(node)
            elif visits != self.visits.get(edge, 0):
                self._enqueue(node)
            else:
                # Back at once: until it departs it may be chosen again.
                self._enqueue(node)
                return node
        return None

    def depart(self, message_id: str, dispatch: Dispatch[Sent]) -> None:
        """Record that a request is under way; from now on its edge counts as visited."""
        self.in_flight[message_id] = dispatch
        self.visits[dispatch.edge] = self.visits.get(dispatch.edge, 0) + 1

    def succeed(self, edge: str) -> None:
        """Forget earlier failures of an edge that answered."""
        self._failures.pop(edge, None)
        self._rest_until.pop(edge, None)

    def fail(self, edge: str, now: float) -> None:
        """Leave an edge that failed alone, twice as long after every further failure in a row."""
        count = self._failures[edge] = self._failures.get(edge, 0) + 1
        rest = min(FIRST_REST_SECONDS * 2.0 ** min(count - 1, 30), LONGEST_REST_SECONDS)
        self._rest_until[edge] = now + rest

    def expired(self, now: float) -> list[str]:
        """Return the message ids whose deadline has passed."""
        return [key for key, dispatch in self.in_flight.items() if dispatch.deadline <= now]

    @property
    def next_due(self) -> float:
        """When the next request expires or the next edge has rested; infinity if none does."""
        deadlines = (dispatch.deadline for dispatch in self.in_flight.values())
        return min(self.next_rested, min(deadlines, default=float("inf")))

    @property
    def next_rested(self) -> float:
        """When the next edge that failed may be asked again; infinity if none rests."""
        return self._resting[0][0] if self._resting else float("inf")

    def _enqueue(self, node: int) -> None:
        visits = self.visits.get(self.names[node], 0)
        if self.revisit or not visits:
            heapq.heappush(self._queue, (visits, self._arrival[node], node))

    def _readmit(self, present: Set[int], busy: set[str], now: float) -> None:
        """Put those back into the queue who have returned, finished or rested."""
        returned = [node for node in self._away if node in present]
        self._away.difference_update(returned)
        for edge in [edge for edge in self._busy if edge not in busy]:
            returned += self._busy.pop(edge)
        while self._resting and self._resting[0][0] <= now:
            returned.append(heapq.heappop(self._resting)[1])
        for node in returned:
            self._enqueue(node)


class Health:
    """Counts edges that failed one after the other, and says when to stop asking.

    One killed process can make a simulation's pool fail at once whatever it is given: then asking
    on would only use up the edges.

    Args:
        max_failures: how many in a row end the run.
    """

    FAILURES_BEFORE_A_PAUSE = 3
    LONGEST_PAUSE_SECONDS = 60.0

    def __init__(self, max_failures: int) -> None:
        self.failures, self.paused_until = 0, float("-inf")
        self._max_failures = max_failures

    @property
    def gave_up(self) -> bool:
        """Whether so many failed that no more are asked."""
        return self.failures >= self._max_failures

    def succeed(self) -> None:
        """Hear of an edge that answered."""
        self.failures, self.paused_until = 0, float("-inf")

    def fail(self, now: float) -> float:
        """Hear of an edge that failed; return for how many seconds to ask nobody, maybe 0."""
        self.failures += 1
        beyond = self.failures - self.FAILURES_BEFORE_A_PAUSE
        pause = min(2.0 ** min(beyond, 30), self.LONGEST_PAUSE_SECONDS) if beyond >= 0 else 0.0
        self.paused_until = now + pause
        return pause


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
