"""Which nodes are present, and what they call themselves."""

from collections.abc import Callable, Iterable, Iterator, KeysView, Set
from dataclasses import dataclass, field
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..io.messages import name_of
from .clock import Stepped
from .session import Session

Result = TypeVar("Result")

QUERY_SECONDS = 300.0
"""A simulation on a busy machine may take minutes to start its first client."""
PATIENCE_SECONDS = 10.0
"""Seconds to wait for the rest of a batch of new nodes after its first reply."""


class GridFailure(Exception):
    """A call of the grid failed; the cause of this exception is what the grid raised."""


def on_grid(call: Callable[[], Result]) -> Result:
    """Call a grid and mark what it raises, since a failure of the network may pass.

    Raises:
        GridFailure: from whatever the call raised.
    """
    try:
        return call()
    except Exception as error:
        raise GridFailure from error


def pull_each(grid: Grid, message_ids: Iterable[str]) -> Iterator[Message]:
    """Pull replies with one call for each message id, or all at once from a `Stepped` grid.

    Flower deletes all replies that a call asks for before it decodes any of them. If replies were
    pulled together, one that cannot be decoded would cost all the others. For a reply that was
    deleted in this way the next call returns an error reply. A `Stepped` grid decodes nothing.

    Raises:
        GridFailure: at the first reply that cannot be fetched or decoded.
    """
    if isinstance(grid, Stepped):
        yield from on_grid(lambda: grid.pull_messages(message_ids))
        return
    for message_id in message_ids:
        yield from on_grid(lambda asked=message_id: list(grid.pull_messages([asked])))  # type: ignore[misc]


@dataclass
class _Batch:
    """New nodes that were asked for their names together; they join in order of arrival."""

    asked_at: float
    questions: dict[int, str]
    """Node id -> message id, "" if the node could not be asked; in order of arrival."""
    names: dict[int, str] = field(default_factory=dict)
    """Node id -> name, for the nodes that have replied."""
    patient_until: float = float("inf")
    """Time at which the nodes that have replied join without the silent ones, in seconds."""

    @property
    def gives_up_at(self) -> float:
        """Time at which silent nodes join without a name, in seconds."""
        return self.asked_at + QUERY_SECONDS


class Arrivals:
    """Asks new nodes for their names and introduces them to a session.

    A node that takes long to reply does not hold up the others for long.

    Args:
        on_arrival: called with the edge that each new node stands for.
    """

    def __init__(
        self,
        grid: Grid,
        session: Session,
        now: Callable[[], float],
        on_arrival: Callable[[str], None],
    ) -> None:
        self._grid = grid
        self._session = session
        self._now = now
        self._on_arrival = on_arrival
        self.num_replies = 0
        """Number of new nodes that replied to the identity query."""
        self._batches: list[_Batch] = []
        self._known: set[int] = set()
        self._last: Set[int] | None = None

    def online(self) -> Set[int]:
        """Return the ids of the nodes present; a keys view is in order of arrival.

        Raises:
            GridFailure: if the grid cannot be asked.
        """
        nodes = on_grid(self._grid.get_node_ids)
        return nodes if isinstance(nodes, Set) else set(on_grid(lambda: list(nodes)))

    def welcome(self, online: Set[int]) -> None:
        """Ask new nodes for their names; introduce those that have replied or never will.

        Raises:
            GridFailure: if the grid cannot be asked. The next call continues the work.
        """
        # A grid that returns the same object has unchanged membership: skip the scan, which
        # would look at thousands of nodes in every pass.
        if online is not self._last:
            new = [node for node in online if node not in self._known]
            self._ask(new if isinstance(online, KeysView) else self._in_order(new))
            self._last = online
        for batch in self._batches:
            self._collect(batch, online)
            self._introduce(batch, online)
        self._batches = [batch for batch in self._batches if batch.questions]

    def present(self) -> Set[int]:
        """Welcome new nodes and return the ids of the nodes present.

        What the grid raises is raised as it is: Flower's own loop calls this method.
        """
        try:
            online = self.online()
            self.welcome(online)
        except GridFailure as failure:
            raise failure.__cause__ or failure from None
        return online

    @property
    def pending(self) -> bool:
        """Whether new nodes have yet to reply to the identity query."""
        return bool(self._batches)

    def next_due(self, now: float) -> float:
        """Return when the next silent node is given up, in seconds, or infinity."""
        times = (
            time
            for batch in self._batches
            for time in (batch.patient_until, batch.gives_up_at)
            if time > now
        )
        return min(times, default=float("inf"))

    def _ask(self, new: list[int]) -> None:
        if not new:
            return
        questions = [_query(node) for node in new]
        message_ids = on_grid(lambda: list(self._grid.push_messages(questions)))
        if len(message_ids) != len(new):
            # The simulation leaves out the ids of nodes that have just left: ask one by one.
            message_ids = [self._ask_one(node) for node in new]
        self._known.update(new)
        self._batches.append(_Batch(self._now(), dict(zip(new, message_ids))))

    def _in_order(self, new: list[int]) -> list[int]:
        """Sort new nodes by the time at which they registered."""
        if len(new) < 2:
            return new
        nodes = on_grid(lambda: sorted(self._grid.get_nodes(), key=lambda n: n.registered_at))
        order = {node.node_id: place for place, node in enumerate(nodes)}
        return sorted(new, key=lambda node: order.get(node, len(order)))

    def _ask_one(self, node: int) -> str:
        return on_grid(lambda: next(iter(self._grid.push_messages([_query(node)])), ""))

    def _collect(self, batch: _Batch, online: Set[int]) -> None:
        waiting = {
            message_id: node
            for node, message_id in batch.questions.items()
            if message_id and node not in batch.names and node in online
        }
        for reply in pull_each(self._grid, waiting):
            if (node := waiting.get(reply.metadata.reply_to_message_id)) is not None:
                self.num_replies += 1
                batch.names[node] = name_of(reply)
                batch.patient_until = min(batch.patient_until, self._now() + PATIENCE_SECONDS)

    def _introduce(self, batch: _Batch, online: Set[int]) -> None:
        """Introduce nodes: all at once if all reply in time, so that the order of arrival holds."""
        now = self._now()
        silent = [
            node
            for node, message_id in batch.questions.items()
            if message_id and node not in batch.names
        ]
        if silent and now < min(batch.patient_until, batch.gives_up_at):
            return
        for node in list(batch.questions):
            has_replied = node in batch.names or not batch.questions[node]
            if has_replied or now >= batch.gives_up_at:
                edge = self._session.introduce(node, batch.names.get(node, ""), online, now)
                del batch.questions[node]
                self._on_arrival(edge)


def _query(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="query", ttl=QUERY_SECONDS)
