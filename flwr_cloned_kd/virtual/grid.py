"""A federation in virtual time: one process, no threads, no waiting, and reproducible bits."""

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
from .durations import Draw, as_draw
from .superlink import assign_id, identify_process, replace_by_error

App = Callable[[Message, Context], Message | None]
"""A `ClientApp`, or a function with the same arguments. If it returns None, the edge never answers.

An exception, or a result that is no `Message`, becomes an error reply.
"""

FIRST_NODE = 100
"""Node id of edge 0."""

# Error codes of Flower.
APP_RAISED = 2
NODE_OFFLINE = 5
PROCESS_KILLED = 8


class VirtualGrid(Grid):
    """Nodes with scripted or drawn speeds, arrivals, departures and crashes, and a clock.

    The grid runs the client apps one by one, in the caller's thread. A request takes bytes / `down`
    seconds to the edge, `compute` seconds there, and bytes / `up` seconds back. Queries and
    evaluations take no computing time; queries take no transfer time either. Time passes only in
    `advance` and in `send_and_receive`; a strategy calls them.

    An edge that departs loses the request that it works on and sends no error. A stored reply is
    lost if it is pulled while the edge is away, as with Flower.

    All options but the seed are numbers, or a `Draw` such as `LogNormal` or `Trace`. The visit of a
    draw counts the requests to an edge, from 1; it is 0 for `arrival`, 1, 3, 5, ... for `stay` and
    2, 4, 6, ... for `away`.

    Args:
        apps: one per edge; the node config of edge i is {"partition-id": i, "num-partitions": n}.
        compute: seconds of one training; with infinity a training never ends.
        down: bytes per second to an edge, above 0; with infinity a transfer takes no time.
        up: bytes per second from an edge, likewise.
        arrival: seconds until an edge arrives.
        stay: seconds until an edge that is present departs; with infinity it never departs.
        away: seconds until an edge that departed returns; with infinity it never returns.
        crash: probability, in [0, 1], that a training ends half way with an error.
        core: seconds that the core takes to learn from an answer. The edge of this draw is the one
            that answered, and the visit is the number of its request.
        further: seconds that each further answer adds if the core learns from several together.
        seed: determines every draw.

    Raises:
        ValueError: if there is no app; at the time of a draw, if its number is out of range.

    Examples:
        >>> import torch
        >>> from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
        >>> from flwr_cloned_kd import FedAsync, VirtualGrid
        >>> def edge(message, context):
        ...     metrics = MetricRecord({"num-examples": 1})
        ...     content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
        ...     return Message(content, reply_to=message)
        >>> grid = VirtualGrid([edge] * 3, compute=60.0)
        >>> start = ArrayRecord({"w": torch.zeros(2)})
        >>> result = FedAsync(max_in_flight=3).start(grid, start, num_rounds=6)
        >>> grid.now()
        120.0
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
        further: Draw | float = 0.0,
        seed: int = 0,
    ) -> None:
        if not apps:
            raise ValueError("apps: expected at least one, got none")
        identify_process()
        self.apps = list(apps)
        self.seed = seed
        self.events: list[Event] = []
        self._draws = {
            "compute": as_draw(compute),
            "down": as_draw(down),
            "up": as_draw(up),
            "arrival": as_draw(arrival),
            "stay": as_draw(stay),
            "away": as_draw(away),
            "crash": as_draw(crash),
            "core": as_draw(core),
            "further": as_draw(further),
        }
        self._time = 0.0
        # Numbers the messages, and the events of the heap: the earlier of two at one time is first.
        self._count = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._online: dict[int, float] = {}
        self._view: KeysView[int] = self._online.keys()
        self._view_is_stale = False
        self._contexts: dict[int, Context] = {}
        self._visits: dict[int, int] = {}
        # Edge -> its arrivals and departures so far: odd while it is present.
        self._moves: dict[int, int] = {}
        self._replies: dict[str, Message] = {}
        # Message id -> edge, of requests without a reply so far.
        self._pending: dict[str, int] = {}
        for edge in range(len(apps)):
            self._at(self._draw("arrival", edge, 0), partial(self._arrive, edge))
        while self._heap and self._heap[0][0] <= 0:
            self.advance(0.0)

    # The clock

    def now(self) -> float:
        """Return the seconds since the grid was made."""
        return self._time

    def advance(self, until: float) -> bool:
        """Let time pass to the next event, or to `until` if no event comes before.

        Returns:
            Whether an event happened.

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

    def core_seconds(self, answers: Sequence[tuple[str, int]]) -> float:
        """Draw the seconds that the core takes to learn from answers together."""
        first, *others = answers
        further = sum(self._draw("further", *answer) for answer in others)
        return self._draw("core", *first) + further

    # Flower's Grid

    def set_run(self, run: Any) -> None:
        """Ignore the run: this grid has only one."""

    @property
    def run(self) -> Any:
        """Raise a RuntimeError: a virtual federation is not a run of a SuperLink."""
        raise RuntimeError("VirtualGrid: expected no use of its run")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> KeysView[int]:
        """Return the nodes present, in order of arrival; the same object until they change."""
        if self._view_is_stale:
            self._view = dict(self._online).keys()
            self._view_is_stale = False
        return self._view

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send requests; return their ids, "" for a request to a node that is away."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived; an error replaces that of a node that is away."""
        replies: list[Message] = []
        if not self._replies:  # most calls: a strategy asks after every event
            return replies
        for message_id in message_ids:
            reply = self._replies.pop(message_id, None)
            if reply is None:
                continue
            if reply.metadata.src_node_id not in self._online:
                replace_by_error(reply, Error(NODE_OFFLINE, "node offline"))
            replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send requests; let time pass until each has a reply or is lost, or until the timeout."""
        missing = [message_id for message_id in self.push_messages(messages) if message_id]
        until = self._time + (math.inf if timeout is None else timeout)
        replies: list[Message] = []
        while missing:
            arrived = self.pull_messages(missing)
            replies += arrived
            answered = {reply.metadata.reply_to_message_id for reply in arrived}
            missing = [key for key in missing if key not in answered and key in self._pending]
            if missing and not self.advance(until):
                break
        return replies

    # What happens to a request

    def _push(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        if node not in self._online:
            return ""
        edge = node - FIRST_NODE
        kind = message.metadata.message_type
        self._count += 1
        message_id = assign_id(message, f"message-{self._count}")
        if kind == "query":
            self._store(message, self._answer(message))
            return message_id
        visit = self._visits[edge] = self._visits.get(edge, 0) + 1
        self._record("ask", edge, visit)
        self._pending[message_id] = edge
        seconds = self._transfer_seconds("down", edge, visit, message)
        seconds += self._draw("compute", edge, visit) if kind == "train" else 0.0
        crashes = kind == "train" and self._lot(edge, visit) < self._draw("crash", edge, visit)
        work = partial(self._work, message, visit, self._moves[edge], crashes)
        self._after(seconds / 2 if crashes else seconds, work)
        return message_id

    def _work(self, message: Message, visit: int, moves: int, crashes: bool) -> None:
        """Run the app once its computing time is over, and send its reply.

        Args:
            moves: the edge's `_moves` when it was asked. Another number now means that the edge
                departed in between, and lost the request.
        """
        edge = message.metadata.dst_node_id - FIRST_NODE
        if self._moves[edge] != moves:
            return
        if crashes:
            error = Error(PROCESS_KILLED, "client process killed")
            self._store(message, Message(error, reply_to=message), visit)
        elif (reply := self._answer(message)) is not None:
            seconds = self._transfer_seconds("up", edge, visit, reply)
            self._after(seconds, partial(self._deliver, message, reply, visit, moves))

    def _deliver(self, message: Message, reply: Message, visit: int, moves: int) -> None:
        if self._moves[message.metadata.dst_node_id - FIRST_NODE] == moves:
            self._store(message, reply, visit)

    def _answer(self, message: Message) -> Message | None:
        """Run the app of the edge; every failure of an app is an error reply, as with Flower."""
        edge = message.metadata.dst_node_id - FIRST_NODE
        try:
            reply: object = self.apps[edge](message, self._context(edge))
            if reply is None or isinstance(reply, Message):
                return reply
            raise TypeError(f"app: expected a Message or None, got {type(reply).__name__}")
        except Exception as error:
            return Message(Error(APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)

    def _store(self, message: Message, reply: Message | None, visit: int = 0) -> None:
        """Keep a reply until it is pulled; visit 0 is a query, which is not an event."""
        if reply is None:
            return
        message_id = message.metadata.message_id
        self._replies[message_id] = reply
        self._pending.pop(message_id, None)
        if visit:
            kind = "error" if reply.has_error() else "answer"
            self._record(kind, message.metadata.dst_node_id - FIRST_NODE, visit)

    # Arrivals and departures

    def _arrive(self, edge: int) -> None:
        moves = self._moves[edge] = self._moves.get(edge, 0) + 1
        self._online[FIRST_NODE + edge] = self._time
        self._view_is_stale = True
        self._record("arrive", edge)
        self._after(self._draw("stay", edge, moves), lambda: self._depart(edge))

    def _depart(self, edge: int) -> None:
        moves = self._moves[edge] = self._moves[edge] + 1
        del self._online[FIRST_NODE + edge]
        self._view_is_stale = True
        self._record("depart", edge)
        for message_id in [key for key, busy in self._pending.items() if busy == edge]:
            del self._pending[message_id]
        self._after(self._draw("away", edge, moves), lambda: self._arrive(edge))

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

    # Events and draws

    def _record(self, kind: str, edge: int, visit: int = 0) -> None:
        self.events.append(Event(self._time, kind, str(edge), visit, 0))

    def _at(self, time: float, happen: Callable[[], Any]) -> None:
        if time < math.inf:
            self._count += 1
            heapq.heappush(self._heap, (time, self._count, happen))

    def _after(self, seconds: float, happen: Callable[[], Any]) -> None:
        self._at(self._time + seconds, happen)

    def _transfer_seconds(self, way: str, edge: int, visit: int, message: Message) -> float:
        if not message.has_content():
            return 0.0
        return num_bytes(message.content) / self._draw(way, edge, visit)

    def _lot(self, edge: int, visit: int) -> float:
        """Draw a uniform number in [0, 1); a training crashes if it is below `crash`."""
        return fold_in(self.seed, "crash-lot", edge, visit) / 2.0**63

    def _draw(self, name: str, edge: int | str, visit: int) -> float:
        """Draw the number of one option, and check its range."""
        draw = self._draws[name]
        per_edge = getattr(draw, "per_edge", False)
        number = draw(edge, visit, fold_in(self.seed, name, edge, 0 if per_edge else visit))
        if name in ("down", "up"):
            fits = number > 0
            expected = "above 0"
        elif name == "crash":
            fits = 0 <= number <= 1
            expected = "0 to 1"
        else:
            fits = number >= 0
            expected = "at least 0"
        if not fits:
            raise ValueError(f"{name} of edge {edge}: expected {expected}, got {number}")
        return number
