"""Who was asked, who is asked now, and whom to ask next."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Sent = TypeVar("Sent")


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
    """Monotonic seconds, as is `deadline`."""
    deadline: float


@dataclass
class Session(Generic[Sent]):
    """Bookkeeping of one run.

    Args:
        revisit: ask an edge again once all the others present were asked as often.
    """

    revisit: bool = False
    names: dict[int, str] = field(default_factory=dict)
    """Node id -> edge, for every node ever seen."""
    visits: dict[str, int] = field(default_factory=dict)
    """Edge -> how often it was asked."""
    in_flight: dict[str, Dispatch[Sent]] = field(default_factory=dict)
    """Message id -> the request."""

    def introduce(self, node_id: int, name: str, online: Iterable[int]) -> str:
        """Record who a node says it is.

        A name that somebody present bears, or might come to bear for want of one, is not believed.
        """
        taken = {self.names[other] for other in online if other in self.names}
        believed = name and name not in taken and not name.startswith("node ")
        self.names[node_id] = name if believed else f"node {node_id}"
        return self.names[node_id]

    def choose(self, online: Iterable[int]) -> int | None:
        """Pick the next node: of those not busy the least visited, the earliest to arrive first.

        Args:
            online: node ids in order of arrival.

        Returns:
            A node id, or None if nobody is left to ask.
        """
        busy = {dispatch.edge for dispatch in self.in_flight.values()}
        free = [node for node in online if node in self.names and self.names[node] not in busy]
        if not self.revisit:
            free = [node for node in free if not self.visits.get(self.names[node])]
        return min(free, key=lambda node: self.visits.get(self.names[node], 0), default=None)

    def depart(self, message_id: str, dispatch: Dispatch[Sent]) -> None:
        """Record that a request is under way; from now on its edge counts as visited."""
        self.in_flight[message_id] = dispatch
        self.visits[dispatch.edge] = self.visits.get(dispatch.edge, 0) + 1

    def expired(self, now: float) -> list[str]:
        """Return the message ids whose deadline has passed."""
        return [key for key, dispatch in self.in_flight.items() if dispatch.deadline <= now]
