"""Callbacks: objects whose methods a strategy calls during a run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import WARNING
from typing import Any

from flwr.common import log

from .timeline import Event

MAX_CHARACTERS = 200
"""Characters of an exception's message in the log."""


@dataclass(frozen=True)
class RunStart:
    """What is known of a run when it starts.

    Examples:
        >>> from flwr_cloned_kd import Callback, RunStart
        >>> class Header(Callback):
        ...     def started(self, run: RunStart) -> None:
        ...         print(run.strategy, run.num_rounds)
    """

    strategy: str
    """Name of the strategy's class."""
    num_rounds: int | None
    """Rounds that the run should have; None in Flower's own loop, which does not say it."""
    settings: Mapping[str, Any]
    """Options of the strategy: texts, numbers, booleans and None."""
    history: Sequence[Mapping[str, Any]]
    """Rows of the rounds before a resume; empty for a new run."""
    events: Sequence[Event]
    """The events of the run. The sequence grows in two threads until `Callback.finished`."""
    now: Callable[[], float]
    """Returns the seconds since the start of the run, on the clock of `Event.time`."""


class Callback:
    """Methods that a run calls while it goes on; a subclass defines those that it needs.

    Threads: a run calls all methods in the thread that called `AsyncStrategy.start`, one after the
    other, so that a callback needs no lock. While the model learns, that thread is busy: the calls
    of `asked` and `arrived` follow when the model has learned, before `absorbed` or `refused`. A
    callback that needs every event at once, such as a live view, reads `RunStart.events` in a
    thread of its own.

    Order: `started` first, `finished` last; `asked` comes before the `arrived` of the same request,
    and `arrived` before its `absorbed` or `refused`.

    Errors: an exception costs one WARNING line in the log, and the run goes on. If `started` raised
    it, the callback gets no further calls in this run. KeyboardInterrupt and other exceptions that
    are no `Exception` end the run.

    Flower's own loop (`Strategy.start`) calls all methods but `finished`, since it does not say
    which round is the last.

    Examples:
        >>> from flwr_cloned_kd import Callback, FedAsync
        >>> class Refusals(Callback):
        ...     def refused(self, row):
        ...         print(row["round"], row["edge"], row["cause"])
        >>> strategy = FedAsync(callbacks=[Refusals()])
    """

    def started(self, run: RunStart) -> None:
        """The run begins: its model is there, and no edge has been asked yet."""

    def asked(self, event: Event) -> None:
        """A request was sent; the kind of the event is "ask"."""

    def arrived(self, event: Event) -> None:
        """A request has ended.

        Args:
            event: of the kind "answer", "error" (the edge crashed) or "expire" (no answer before
                the deadline). The kind "arrive", a new edge, is no end of a request.
        """

    def absorbed(self, row: dict[str, Any]) -> None:
        """A round is over, and the model has learned from the edge.

        Args:
            row: a copy of what `on_round` gets.
        """

    def refused(self, row: dict[str, Any]) -> None:
        """A round is over, and the edge has changed nothing; `row["cause"]` says why.

        Args:
            row: a copy of what `on_round` gets. Edges that crashed or stayed silent are refused.
        """

    def finished(self, error: BaseException | None) -> None:
        """The run is over; close files here.

        Args:
            error: the exception that ended the run, such as KeyboardInterrupt; None if the run
                ended by itself. If no edge is left to ask, a run ends by itself with fewer rounds.
        """


class Callbacks:
    """The callbacks of one run.

    Args:
        callbacks: called in this order.

    Raises:
        ValueError: for anything but instances of `Callback`.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._all = tuple(callbacks)
        for callback in self._all:
            if not isinstance(callback, Callback):
                raise ValueError(f"callbacks: expected instances of Callback, got {callback!r}")
        self._active: list[Callback] = []
        self._events: Sequence[Event] = ()
        self._num_seen = 0

    def start(self, run: RunStart) -> None:
        """Call `started` of all callbacks; leave out those that fail from now on."""
        self._events = run.events
        self._num_seen = 0
        self._active = []
        for callback in self._all:
            if _call(callback.started, run):
                self._active.append(callback)

    def catch_up(self) -> None:
        """Call `asked` and `arrived` for the events since the last call."""
        if not self._active:
            return
        events = self._events[self._num_seen :]
        self._num_seen += len(events)
        for event in events:
            for callback in self._active:
                if event.kind == "ask":
                    _call(callback.asked, event)
                elif event.kind in ("answer", "error", "expire"):
                    _call(callback.arrived, event)

    def settle(self, row: Mapping[str, Any]) -> None:
        """Call `absorbed` or `refused` for a round."""
        self.catch_up()
        for callback in self._active:
            _call(callback.absorbed if row["accepted"] else callback.refused, dict(row))

    @contextmanager
    def watch(self, run: RunStart) -> Iterator[None]:
        """Call `started` on entry, and `finished` on exit, however the run ends."""
        try:
            self.start(run)
            yield
        except BaseException as error:
            self._finish(error)
            raise
        self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        self.catch_up()
        for callback in self._active:
            _call(callback.finished, error)


def _call(method: Callable[[Any], None], value: object) -> bool:
    """Call a method of a callback; return whether it succeeded, and log a failure."""
    try:
        method(value)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:MAX_CHARACTERS]}"
        name = getattr(method, "__qualname__", repr(method))
        log(WARNING, "The callback %s failed: %s", name, reason)
        return False
    return True
