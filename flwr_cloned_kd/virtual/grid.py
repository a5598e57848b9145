"""A federation in virtual time: one process, no threads, no waiting, the same bits every time."""

import heapq
import math
from collections.abc import Callable, Iterable, KeysView, Sequence
from functools import partial
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from ..asynchronous.timeline import Event
from ..engine.recipe import fold_in
from ..io.messages import num_bytes
from .draws import Draw, as_draw

App = Callable[[Message, Context], Message | None]
"""A `ClientApp`, or any function like it; None is an edge that never answers."""

FIRST_NODE = 100
NODE_OFFLINE, PROCESS_KILLED, APP_RAISED = 5, 8, 2


class VirtualGrid(Grid):
    """Nodes with scripted or drawn speeds, arrivals, departures and crashes, and a clock.

    It runs the client apps one by one, in the caller's thread. A request takes bytes / `down`
    seconds to the edge, `compute` seconds there, and bytes / `up` back. What it is asked who it is
    ("query") or to evaluate costs no computing, and a query no transfer either. The clock stands
    still but for `advance`, `send_and_receive` and what a strategy does with it.

    An edge that departs loses the request it works on, and is silent about it; a stored reply is
    lost if it is asked for while the edge is away, as with Flower.

    Args:
        apps: one per edge; edge i's node config is {"partition-id": i, "num-partitions": n}.
        compute: seconds of one training; infinity never ends.
        down, up: bytes per second, above 0; infinity takes no time.
        arrival: seconds until an edge is there.
        stay: seconds until it departs; infinity never does.
        away: seconds until it is back; infinity never is. Then it stays and departs again.
        crash: probability, in [0, 1], that a training ends half way with an error.
        core: seconds that the core takes to learn from an answer; for it, the edge is the one that
            answered, and the visit the number of its request.
        seed: determines every draw.

        Each but the seed is a number, or a `Draw` such as `LogNormal` or `Trace`.

    Raises:
        ValueError: if there is no app; when it is drawn, for a number out of range.
    """

    def __init__(
        self,
        apps: Sequence[App],
        *,
        compute: Draw | float = 1.0,
        down: Draw | float = math.inf,
        up: Draw | float = math.inf,
        arrival: Draw | float = 0.0,
        stay: Draw | float = math.inf,
        away: Draw | float = math.inf,
        crash: Draw | float = 0.0,
        core: Draw | float = 0.0,
        seed: int = 0,
    ) -> None:
        if not apps:
            raise ValueError("apps: expected at least one, got none")
        _identify()
        given = {"compute": compute, "down": down, "up": up, "arrival": arrival, "stay": stay,
                 "away": away, "crash": crash, "core": core}  # fmt: skip
        self.apps, self.seed = list(apps), seed
        self.events: list[Event] = []
        self._draws = {name: as_draw(draw) for name, draw in given.items()}
        self._time, self._count = 0.0, 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._online: dict[int, float] = {}
        self._view: KeysView[int] = self._online.keys()
        self._stale = False
        self._contexts: dict[int, Context] = {}
        self._visits: dict[int, int] = {}
        self._stays: dict[int, int] = {}
        self._replies: dict[str, Message] = {}
        self._pending: dict[str, int] = {}
        for edge in range(len(apps)):
            self._at(self._draw("arrival", edge, 0), partial(self._arrive, edge))
        while self._heap and self._heap[0][0] <= 0:
            self.advance(0.0)

    # The clock

    def now(self) -> float:
        """Seconds since the grid was made."""
        return self._time

    def advance(self, until: float) -> bool:
        """Let time pass to the next event, or to `until` if none comes before; return which.

        Raises:
            ValueError: if `until` has passed.
        """
        if until < self._time:
            raise ValueError(f"until: expected at least {self._time}, got {until}")
        if not self._heap or self._heap[0][0] > until:
            self._time = until if until < math.inf else self._time
            return False
        self._time, _, happen = heapq.heappop(self._heap)
        happen()
        return True

    def core_seconds(self, edge: str, number: int) -> float:
        """Draw how long the core takes to learn from one answer."""
        return self._draw("core", edge, number)

    # Flower's Grid

    def set_run(self, run: Any) -> None:
        """Ignore the run: there is one only."""

    @property
    def run(self) -> Any:
        """Refuse: a virtual federation is no run of a SuperLink."""
        raise RuntimeError("VirtualGrid: expected no use of its run")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> KeysView[int]:
        """Return the nodes present, in order of arrival; the same object until that changes."""
        if self._stale:
            self._view, self._stale = dict(self._online).keys(), False
        return self._view

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send requests; the id is "" for a node that is not there."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived; for a node that is away an error instead."""
        found = []
        for message_id in message_ids:
            reply = self._replies.get(message_id)
            if reply is not None and reply.metadata.src_node_id in self._online:
                found.append(self._replies.pop(message_id))
            elif reply is not None:
                del self._replies[message_id]
                error = Error(NODE_OFFLINE, "node offline")
                reply.__dict__.update(_content=None, _error=error)
                found.append(reply)
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send requests and let time pass until all are answered, lost, or out of time."""
        missing = [message_id for message_id in self.push_messages(messages) if message_id]
        until, found = self._time + (math.inf if timeout is None else timeout), []
        while missing:
            replies = self.pull_messages(missing)
            found += replies
            answered = {reply.metadata.reply_to_message_id for reply in replies}
            missing = [key for key in missing if key not in answered and key in self._pending]
            if missing and not self.advance(until):
                break
        return found

    # What happens

    def _push(self, message: Message) -> str:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if node not in self._online:
            return ""
        edge, self._count = node - FIRST_NODE, self._count + 1
        message_id = message.metadata.__dict__["_message_id"] = f"message-{self._count}"
        if kind == "query":
            self._reply(message, self._answer(message))
            return message_id
        visit = self._visits[edge] = self._visits.get(edge, 0) + 1
        self._record("ask", edge, visit)
        self._pending[message_id] = edge
        seconds = self._seconds("down", edge, visit, message)
        seconds += self._draw("compute", edge, visit) if kind == "train" else 0.0
        crashes = kind == "train" and self._lot(edge, visit) < self._draw("crash", edge, visit)
        trained = partial(self._trained, message, visit, self._stays[edge], crashes)
        self._after(seconds / 2 if crashes else seconds, trained)
        return message_id

    def _trained(self, message: Message, visit: int, stays: int, crashes: bool) -> None:
        """Run the app now that its time is over, and send what it returns on its way."""
        edge = message.metadata.dst_node_id - FIRST_NODE
        if self._stays[edge] != stays:
            return
        if crashes:
            error = Error(PROCESS_KILLED, "client process killed")
            self._reply(message, Message(error, reply_to=message), visit)
        elif (reply := self._answer(message)) is not None:
            seconds = self._seconds("up", edge, visit, reply)
            self._after(seconds, partial(self._arrived, message, reply, visit, stays))

    def _arrived(self, message: Message, reply: Message, visit: int, stays: int) -> None:
        if self._stays[message.metadata.dst_node_id - FIRST_NODE] == stays:
            self._reply(message, reply, visit)

    def _answer(self, message: Message) -> Message | None:
        edge = message.metadata.dst_node_id - FIRST_NODE
        try:
            return self.apps[edge](message, self._context(edge))
        except Exception as error:  # whatever an app raises is an error reply, as with Flower
            return Message(Error(APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)

    def _reply(self, message: Message, reply: Message | None, visit: int = 0) -> None:
        if reply is None:
            return
        message_id = message.metadata.message_id
        self._replies[message_id] = reply
        self._pending.pop(message_id, None)
        if visit:
            kind = "error" if reply.has_error() else "answer"
            self._record(kind, message.metadata.dst_node_id - FIRST_NODE, visit)

    def _arrive(self, edge: int) -> None:
        count = self._stays[edge] = self._stays.get(edge, 0) + 1
        self._online[FIRST_NODE + edge] = self._time
        self._stale = True
        self._record("arrive", edge)
        self._after(self._draw("stay", edge, count), lambda: self._depart(edge))

    def _depart(self, edge: int) -> None:
        count = self._stays[edge] = self._stays[edge] + 1
        del self._online[FIRST_NODE + edge]
        self._stale = True
        self._record("depart", edge)
        for message_id in [key for key, busy in self._pending.items() if busy == edge]:
            del self._pending[message_id]
        self._after(self._draw("away", edge, count), lambda: self._arrive(edge))

    def _context(self, edge: int) -> Context:
        if edge not in self._contexts:
            self._contexts[edge] = Context(
                1,
                FIRST_NODE + edge,
                {"partition-id": edge, "num-partitions": len(self.apps)},
                RecordDict(),
                {},
            )
        return self._contexts[edge]

    def _record(self, kind: str, edge: int, visit: int = 0) -> None:
        self.events.append(Event(self._time, kind, str(edge), visit, 0))

    def _at(self, time: float, happen: Callable[[], Any]) -> None:
        if time < math.inf:
            self._count += 1
            heapq.heappush(self._heap, (time, self._count, happen))

    def _after(self, seconds: float, happen: Callable[[], Any]) -> None:
        self._at(self._time + seconds, happen)

    def _seconds(self, way: str, edge: int, visit: int, message: Message) -> float:
        if not message.has_content():
            return 0.0
        return num_bytes(message.content) / self._draw(way, edge, visit)

    def _lot(self, edge: int, visit: int) -> float:
        return fold_in(self.seed, "crash-lot", edge, visit) / 2.0**63

    def _draw(self, name: str, edge: int | str, visit: int) -> float:
        draw = self._draws[name]
        once = getattr(draw, "per_edge", False)
        found = draw(edge, visit, fold_in(self.seed, name, edge, 0 if once else visit))
        if name in ("down", "up"):
            fits, expected = found > 0, "above 0"
        elif name == "crash":
            fits, expected = 0 <= found <= 1, "0 to 1"
        else:
            fits, expected = found >= 0, "at least 0"
        if not fits:
            raise ValueError(f"{name} of edge {edge}: expected {expected}, got {found}")
        return found


def _identify() -> None:
    """Let this process make messages, which Flower allows only to its own."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("run_id", "task_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, 1)
