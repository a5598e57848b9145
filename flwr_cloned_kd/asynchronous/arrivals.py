"""Which nodes are present, and who they say they are."""

from collections.abc import Callable, Iterable, Iterator, KeysView, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..io.messages import name_of
from .session import Session

Found = TypeVar("Found")

QUERY_SECONDS = 300.0
"""Long, since a simulation on a busy machine may take minutes to start its first client."""
PATIENCE_SECONDS = 10.0
"""So long after the first of them a silent newcomer no longer holds up those it arrived with."""


class GridFailure(Exception):
    """A call of the grid failed; its cause says how."""


def on_grid(call: Callable[[], Found]) -> Found:
    """Tell what the transport raises, which may recover, from what anything else raises."""
    try:
        return call()
    except Exception as error:
        raise GridFailure from error


def pull_each(grid: Grid, message_ids: Iterable[str]) -> Iterator[Message]:
    """Pull replies by one call each, as far as it goes.

    Flower deletes all that a call asks for before it decodes any of it: pulled together, one
    reply of junk would cost all the others. Of the deleted one the next call says, by an error
    reply, that it is not to be had.

    Raises:
        GridFailure: at the first reply that could not be fetched or decoded.
    """
    for message_id in message_ids:
        yield from on_grid(lambda asked=message_id: list(grid.pull_messages([asked])))  # type: ignore[misc]


@dataclass
class _Batch:
    """Newcomers that were asked together; they join in order of arrival."""

    asked_at: float
    questions: dict[int, str]
    """Node id -> message id, "" if it could not be asked; in order of arrival."""
    names: dict[int, str] = field(default_factory=dict)
    until: float = float("inf")
    """When those that have answered no longer wait for the silent ones."""


class Register:
    """Introduces newcomers to the session, without waiting for slow ones.

    Args:
        seen: called with the name of every newcomer.
    """

    def __init__(
        self,
        grid: Grid,
        session: Session[Any],
        now: Callable[[], float],
        seen: Callable[[str], None] = lambda edge: None,
    ) -> None:
        self._grid, self._session, self._now, self._seen = grid, session, now, seen
        self.num_answers = 0
        """Newcomers that have said who they are, or that they cannot say."""
        self._batches: list[_Batch] = []
        self._known: set[int] = set()
        self._last: Set[int] | None = None

    def online(self) -> Set[int]:
        """Return the node ids present; the keys of a dict if they are in order of arrival.

        Raises:
            GridFailure: if the grid does not say.
        """
        found = on_grid(self._grid.get_node_ids)
        return found if isinstance(found, Set) else set(on_grid(lambda: list(found)))

    def welcome(self, online: Set[int]) -> None:
        """Ask newcomers who they are, and introduce those that have answered or never will.

        Raises:
            GridFailure: if the grid cannot be asked; nothing is lost, call again.
        """
        # Whoever hands out the same set again has seen nobody come or go: thousands of nodes
        # are not looked through for nothing.
        if online is not self._last:
            new = [node for node in online if node not in self._known]
            # The keys of a dict are in order of arrival already.
            self._ask(new if isinstance(online, KeysView) else self._in_order(new))
            self._last = online
        for batch in self._batches:
            self._collect(batch, online)
            self._introduce(batch, online)
        self._batches = [batch for batch in self._batches if batch.questions]

    def present(self) -> Set[int]:
        """Welcome newcomers and return the node ids present; raise what the grid raises."""
        try:
            self.welcome(online := self.online())
        except GridFailure as failure:  # Flower's own loop knows its grid, and not this
            raise failure.__cause__ or failure from None
        return online

    @property
    def expecting(self) -> bool:
        """Whether newcomers have yet to say who they are."""
        return bool(self._batches)

    @property
    def next_due(self) -> float:
        """When to give up on the next silent newcomer; infinity if nobody was asked."""
        now = self._now()
        limits = [at for b in self._batches for at in (b.until, b.asked_at + QUERY_SECONDS)]
        return min((limit for limit in limits if limit > now), default=float("inf"))

    def _ask(self, new: list[int]) -> None:
        if not new:
            return
        questions = [
            Message(RecordDict(), dst_node_id=node, message_type="query", ttl=QUERY_SECONDS)
            for node in new
        ]
        ids = on_grid(lambda: list(self._grid.push_messages(questions)))
        if len(ids) != len(new):
            # The simulation drops who has just left from the list: ask one by one.
            ids = [self._ask_one(node) for node in new]
        self._known.update(new)
        self._batches.append(_Batch(self._now(), dict(zip(new, ids))))

    def _in_order(self, new: list[int]) -> list[int]:
        if len(new) < 2:
            return new
        nodes = on_grid(lambda: sorted(self._grid.get_nodes(), key=lambda n: n.registered_at))
        order = {node.node_id: place for place, node in enumerate(nodes)}
        return sorted(new, key=lambda node: order.get(node, len(order)))

    def _ask_one(self, node: int) -> str:
        question = Message(RecordDict(), dst_node_id=node, message_type="query", ttl=QUERY_SECONDS)
        return on_grid(lambda: next(iter(self._grid.push_messages([question])), ""))

    def _collect(self, batch: _Batch, online: Set[int]) -> None:
        waiting = {
            message_id: node
            for node, message_id in batch.questions.items()
            if message_id and node not in batch.names and node in online
        }
        for reply in pull_each(self._grid, waiting):
            if (node := waiting.get(reply.metadata.reply_to_message_id)) is not None:
                self.num_answers += 1
                batch.names[node] = name_of(reply)
                batch.until = min(batch.until, self._now() + PATIENCE_SECONDS)

    def _introduce(self, batch: _Batch, online: Set[int]) -> None:
        """Let newcomers join: all at once, so that the order of arrival counts, if they answer."""
        now = self._now()
        silent = [node for node, asked in batch.questions.items()
                  if asked and node not in batch.names]  # fmt: skip
        if silent and now < min(batch.until, batch.asked_at + QUERY_SECONDS):
            return
        for node in list(batch.questions):
            answered = node in batch.names or not batch.questions[node]
            if answered or now >= batch.asked_at + QUERY_SECONDS:
                edge = self._session.introduce(node, batch.names.get(node, ""), online, now)
                del batch.questions[node]
                self._seen(edge)
