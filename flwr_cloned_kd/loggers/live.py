"""A view of a run in the terminal, which changes while the run goes on."""

import logging
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import reduce
from logging import INFO
from typing import Any

from flwr.common import log
from rich.console import Console, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..asynchronous.callbacks import Callback, RunStart
from ..asynchronous.timeline import Event
from .rows import cause_of

REFRESHES_PER_SECOND = 4
MIN_LINE_SECONDS = 60.0
"""Without a terminal, the least seconds between two lines."""
MAX_REQUESTS = 6
"""Requests that the view lists; it counts the others."""
BAR_WIDTH = 30
MAX_TIMES = 21
"""Rounds whose ends give the time that a round takes, the newest ones."""
MAX_BARS = 40
"""Accuracies in the small chart, the newest ones."""
BARS = "▁▂▃▄▅▆▇█"
ACCURACIES = {"core-accuracy": "core accuracy", "train-accuracy": "train accuracy"}
"""Metric -> its name in the view, which shows the first of these that the rounds have."""
STATES = {
    "ask": "trains",
    "answer": "has answered and waits for the core",
    "error": "has crashed",
    "expire": "was silent",
    "learn": "teaches the core",
}
"""Kind of a request's latest event -> what the view says of its edge."""


@dataclass(frozen=True)
class Totals:
    """What the view shows of all rounds up to now; a new round costs the same after any number."""

    num_rounds: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    num_refused: int = 0
    last_refusal: str = ""
    """Round, edge and cause of the newest refusal."""
    newest: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Metric -> its newest finite values after accepted rounds, at most `MAX_BARS`."""
    best: Mapping[str, float] = field(default_factory=dict)
    """Metric -> the largest of all its finite values after accepted rounds."""

    def plus(self, row: Mapping[str, Any]) -> "Totals":
        """Return the totals with one more round."""
        newest, best = dict(self.newest), dict(self.best)
        for key in ACCURACIES:
            value = row.get(key, math.nan)
            if row["accepted"] and math.isfinite(value):
                newest[key] = (*newest.get(key, ()), value)[-MAX_BARS:]
                best[key] = max(best.get(key, value), value)
        is_refused = not row["accepted"]
        return Totals(
            num_rounds=self.num_rounds + 1,
            bytes_down=self.bytes_down + row.get("bytes-down", 0),
            bytes_up=self.bytes_up + row.get("bytes-up", 0),
            num_refused=self.num_refused + is_refused,
            last_refusal=f"round {row['round']} {cause_of(row)}"
            if is_refused
            else self.last_refusal,
            newest=newest,
            best=best,
        )

    def accuracy(self) -> str:
        """Return the metric that the view shows; "" if no round has any."""
        return next((key for key in ACCURACIES if key in self.best), "")


class LiveView(Callback):
    """Shows the progress of a run in the terminal; without a terminal, adds lines to the log.

    The view stays below the lines of the log: while it is shown, everything that Python, or the
    loggers of Python and Flower, write to the terminal goes through it. A thread of its own draws
    the view four times a second, so that it also changes while the core learns. The last picture
    stays in the terminal after the run.

    Where the output is no terminal, the log gets one more line at most once a minute, with the
    progress that the line of a round does not state. The same holds in Flower's own loop, which
    does not say when a run ends.

    Args:
        console: where to draw; None is the standard error stream, to which Flower's log goes.

    Examples:
        >>> from flwr_cloned_kd import FedAsync, LiveView
        >>> strategy = FedAsync(callbacks=[LiveView()])
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self._run: RunStart | None = None
        # The thread of the run replaces the value, and the thread that draws reads it once.
        self._totals = Totals()
        self._is_live = False
        self._has_bars = True
        self._end = ""
        self._began = 0.0
        self._ended_at: list[float] = []
        self._line_at = 0.0
        self._screen = ExitStack()
        # The events are read by the thread that draws, and by the thread of the run.
        self._reading = threading.Lock()
        self._num_read = 0
        self._requests: dict[int, Event] = {}

    def started(self, run: RunStart) -> None:
        """Show the view, if the output is a terminal."""
        self._run = run
        self._totals = reduce(Totals.plus, run.history, Totals())
        self._end = ""
        self._num_read = 0
        self._requests = {}
        self._ended_at = []
        self._began = self._line_at = time.monotonic()
        console = self.console
        if console is None:
            # rich takes a file for a terminal if the variable FORCE_COLOR is set.
            console = Console(stderr=True, force_terminal=sys.stderr.isatty())
        is_screen = console.is_terminal and not console.is_dumb_terminal
        self._is_live = is_screen and run.num_rounds is not None
        self._has_bars = not console.options.ascii_only
        if self._is_live:
            live = Live(
                console=console,
                get_renderable=self.picture,
                refresh_per_second=REFRESHES_PER_SECOND,
                # What the user sends to a file must get there.
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._screen.enter_context(live)
            self._screen.enter_context(_redirected_handlers())

    def absorbed(self, row: dict[str, Any]) -> None:
        """Add a round to the view."""
        now = time.monotonic()
        self._ended_at.append(now)
        self._totals = self._totals.plus(row)
        if not self._is_live and now - self._line_at >= MIN_LINE_SECONDS:
            self._line_at = now
            log(INFO, "%s", self._line())

    refused = absorbed

    def finished(self, error: BaseException | None) -> None:
        """Draw the last picture and give the terminal back."""
        seconds = clock(time.monotonic() - self._began)
        reason = "finished" if error is None else f"ended by {type(error).__name__}"
        self._end = f"{reason} in {seconds}"
        self._screen.close()

    def picture(self) -> RenderableType:
        """Return the present state of the run, for rich to draw."""
        totals = self._totals
        lines = Table.grid(padding=(0, 2))
        lines.add_column(style="bold", no_wrap=True)
        lines.add_column(no_wrap=True, overflow="ellipsis")
        lines.add_row(*self._progress(totals.num_rounds))
        if key := totals.accuracy():
            values = totals.newest[key]
            chart = f"{bars(values)} " if self._has_bars else ""
            text = f"{chart}{values[-1]:.3f}, best {totals.best[key]:.3f}"
            lines.add_row(ACCURACIES[key], Text(text))
        for number, line in enumerate([] if self._end else self._edges()):
            lines.add_row("" if number else "now", Text(line))
        down, up = totals.bytes_down / 1e6, totals.bytes_up / 1e6
        lines.add_row("megabytes", Text(f"{down:,.1f} sent, {up:,.1f} received"))
        if totals.num_refused:
            text = f"{totals.num_refused}; in {totals.last_refusal}"
            lines.add_row("refused", Text(text, style="yellow"))
        return lines

    def _progress(self, num_rounds: int) -> tuple[Text, RenderableType]:
        """Return the name of the strategy and the bar of its rounds."""
        if self._run is None:
            return Text(""), Text("")
        total = self._run.num_rounds or 0
        bar = Table.grid(padding=(0, 2))
        times = self._end or self._times(num_rounds)
        text = Text(f"{num_rounds} of {total} rounds, {times}")
        bar.add_row(ProgressBar(total=total, completed=num_rounds, width=BAR_WIDTH), text)
        return Text(self._run.strategy), bar

    def _times(self, num_rounds: int) -> str:
        """Return the time that has passed and, after the first round, the time that is left."""
        passed = time.monotonic() - self._began
        ended_at = self._ended_at[-MAX_TIMES:]
        if self._run is None or self._run.num_rounds is None or not ended_at:
            return clock(passed)
        if len(ended_at) == 1:
            seconds = ended_at[0] - self._began
        else:  # the first round has the start of the clients in it
            seconds = (ended_at[-1] - ended_at[0]) / (len(ended_at) - 1)
        left = seconds * (self._run.num_rounds - num_rounds)
        return f"{clock(passed)}, about {clock(left)} left"

    def _under_way(self) -> list[Event]:
        """Return the latest event of each request whose round is not over, oldest request first."""
        if self._run is None:
            return []
        with self._reading:
            events = self._run.events[self._num_read :]
            self._num_read += len(events)
            for event in events:
                if event.kind in ("absorb", "refuse"):
                    self._requests.pop(event.number, None)
                elif event.kind in STATES:
                    self._requests[event.number] = event
            return list(self._requests.values())

    def _edges(self) -> list[str]:
        """Return one line for each request under way, up to a limit."""
        requests = self._under_way()
        now = self._run.now() if self._run is not None else 0.0
        lines = [
            f"edge {event.edge} {STATES[event.kind]}, {clock(now - event.time)}"
            for event in requests[:MAX_REQUESTS]
        ]
        if len(requests) > MAX_REQUESTS:
            lines.append(f"and {len(requests) - MAX_REQUESTS} more")
        return lines

    def _line(self) -> str:
        """Return the progress of the run in one line."""
        totals = self._totals
        num_rounds = totals.num_rounds
        total = self._run.num_rounds if self._run is not None else None
        words = [f"{num_rounds} of {total} rounds" if total else f"{num_rounds} rounds"]
        if key := totals.accuracy():
            words.append(f"best {ACCURACIES[key]} {totals.best[key]:.3f}")
        num_busy = sum(event.kind == "ask" for event in self._under_way())
        words += [f"edges in flight: {num_busy}", self._times(num_rounds)]
        return ", ".join(words)


def bars(values: Sequence[float]) -> str:
    """Draw the newest values as bars of eight heights, from the least of them to the largest."""
    newest = values[-MAX_BARS:]
    least, largest = min(newest), max(newest)
    steps = len(BARS) - 1
    scale = steps / (largest - least) if largest > least else 0.0
    return "".join(BARS[round((value - least) * scale)] for value in newest)


def clock(seconds: float) -> str:
    """Write a time as hours, minutes and seconds."""
    return str(timedelta(seconds=round(max(seconds, 0.0))))


@contextmanager
def _redirected_handlers() -> Iterator[None]:
    """Let the handlers of Python's and Flower's loggers write where Python writes now.

    A handler keeps the stream that it was made with; rich redirects only `sys.stdout` and
    `sys.stderr`.
    """
    proxies = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, FileProxy)]
    with ExitStack() as stack:
        for handler in [*logging.getLogger().handlers, *logging.getLogger("flwr").handlers]:
            for proxy in proxies:
                if (
                    isinstance(handler, logging.StreamHandler)
                    and handler.stream is proxy.rich_proxied_file
                ):
                    stack.callback(handler.setStream, handler.stream)
                    handler.setStream(proxy)
        yield
