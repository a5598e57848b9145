"""A background thread that fetches replies the moment they can be had."""

import threading
from queue import Empty, Queue
from types import TracebackType
from typing import Self

from flwr.app import Message
from flwr.serverapp import Grid

SHORTEST_POLL_SECONDS = 0.02
LONGEST_POLL_SECONDS = 2.0
MOST_FAILED_POLLS = 30


class Mailbox:
    """Replies to the watched messages, in order of arrival.

    Flower deletes a stored reply if its node is offline when somebody asks for it. So replies are
    pulled while the core is busy too, and only those of nodes that are online.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._watched: dict[str, int] = {}
        self._arrived: Queue[tuple[str, Message] | Exception] = Queue()
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(
            target=self._run, name="flwr-cloned-kd-mailbox", daemon=True
        )

    def __enter__(self) -> Self:
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
        self._thread.join()

    def watch(self, message_id: str, node_id: int) -> None:
        """Fetch the reply to this message from now on."""
        with self._lock:
            self._watched[message_id] = node_id
        self._wake.set()

    def forget(self, message_id: str) -> None:
        """Stop asking for this reply."""
        with self._lock:
            self._watched.pop(message_id, None)

    def get(self, timeout: float) -> tuple[str, Message] | None:
        """Return the next (message id, reply), or None after `timeout` seconds without any.

        Raises:
            ConnectionError: if the grid failed many times in a row.
        """
        try:
            item = self._arrived.get(timeout=max(timeout, 0.0))
        except Empty:
            return None
        if isinstance(item, Exception):
            raise ConnectionError(f"grid: {MOST_FAILED_POLLS} polls in a row failed") from item
        return item

    def _run(self) -> None:
        pause, failures = SHORTEST_POLL_SECONDS, 0
        while not self._closed:
            if self._wake.wait(pause):
                self._wake.clear()
                pause = SHORTEST_POLL_SECONDS
            try:
                self._poll()
                failures = 0
            except Exception as error:  # whatever the transport raises; it may recover
                failures += 1
                if failures == MOST_FAILED_POLLS:
                    self._arrived.put(error)
                    return
            # Short for edges that answer at once, long for those that take hours.
            pause = min(1.5 * pause, LONGEST_POLL_SECONDS)

    def _poll(self) -> None:
        with self._lock:
            watched = dict(self._watched)
        if not watched:
            return
        online = set(self._grid.get_node_ids())
        asked = [message_id for message_id, node_id in watched.items() if node_id in online]
        for reply in self._grid.pull_messages(asked) if asked else ():
            message_id = reply.metadata.reply_to_message_id
            with self._lock:
                wanted = self._watched.pop(message_id, None) is not None
            if wanted:
                self._arrived.put((message_id, reply))
