"""A Grid in one process: real client apps, run in threads, replies in order of completion."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from flwr_cloned_kd.virtual.superlink import assign_id

Answer = Callable[[Message, Context], Message]


class Unreadable:
    """What a node answers whose reply Flower cannot decode."""


class FakeGrid(Grid):
    """Nodes 100, 101, ... with one answering function each.

    Args:
        apps: per node, a client app or any function of (message, context).
        names: per node, its node config; the default is its partition id.
    """

    def __init__(self, apps: list[ClientApp | Answer], node_configs: list[dict] | None = None):
        configs = node_configs or [{"partition-id": i} for i in range(len(apps))]
        self.apps = {100 + i: app for i, app in enumerate(apps)}
        self.contexts = {
            node: Context(1, node, config, RecordDict(), {})
            for node, config in zip(self.apps, configs)
        }
        self.online = list(self.apps)
        self.pushed: list[Message] = []
        self.lock = threading.Lock()
        self._pool = ThreadPoolExecutor(8)
        self._replies: dict[str, object] = {}
        self._consumed: dict[str, Message] = {}

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        with self.lock:
            return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.online:
                ids.append("")
                continue
            ids.append(assign_id(message, str(uuid4())))
            self.pushed.append(message)
            self._replies[ids[-1]] = self._pool.submit(self._answer, node, message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies, taken, unreadable = [], [], False
        for message_id in message_ids:
            if message_id in self._consumed:
                replies.append(Message(Error(3), reply_to=self._consumed.pop(message_id)))
            future = self._replies.get(message_id)
            if future is not None and future.done():
                reply = self._replies.pop(message_id).result()
                taken.append(message_id)
                if isinstance(reply, Unreadable):
                    unreadable = True
                    continue
                # As Flower does: asked for while its node is away, a stored reply is gone.
                gone = reply is None or reply.metadata.src_node_id not in self.online
                replies += [] if gone else [reply]
        if unreadable:
            # As Flower does: all replies of the call are deleted before one of them is decoded.
            pushed = {message.metadata.message_id: message for message in self.pushed}
            self._consumed |= {message_id: pushed[message_id] for message_id in taken}
            raise ValueError("Expecting value: line 1 column 1 (char 0)")
        return replies

    def send_and_receive(self, messages, *, timeout=None):
        ids = [i for i in self.push_messages(messages) if i]
        wait([self._replies[i] for i in ids], timeout=timeout)
        return self.pull_messages(ids)

    def trained(self) -> list[int]:
        """The nodes that were asked to train, in order."""
        asked = [m.metadata for m in self.pushed if m.metadata.message_type == "train"]
        return [metadata.dst_node_id for metadata in asked]

    def _answer(self, node: int, message: Message) -> Message | None:
        try:
            try:
                return self.apps[node](message, self.contexts[node])
            except SystemError:
                # CPython 3.11 rarely fails when two threads parse a literal at the same time, as
                # numpy.load does for the header of an array. The edges of this grid are threads.
                return self.apps[node](message, self.contexts[node])
        except Exception as error:
            reason = f"Traceback ...\n{type(error).__name__}: {error}"
            return Message(Error(2, reason), reply_to=message)


class Flaky:
    """A grid whose calls fail as often as told; the others pass through."""

    def __init__(self, grid: FakeGrid, failures: dict[str, int]):
        self.grid, self.failures = grid, dict(failures)

    def __getattr__(self, name):
        method = getattr(self.grid, name)

        def call(*args, **kwargs):
            if self.failures.get(name, 0) > 0:
                self.failures[name] -= 1
                raise OSError(f"{name}: connection reset")
            return method(*args, **kwargs)

        return call


def silent(message: Message, context: Context) -> Message | None:
    """A node that says who it is and then never answers."""
    if message.metadata.message_type == "query":
        raise ValueError("no query function")
    return None
