"""The live view: what it shows, what it does to a terminal, and what it does without one."""

import io
import logging
import math
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from contextlib import nullcontext
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.serverapp.strategy import Strategy
from rich.console import Console

from flwr_cloned_kd import Event, LiveView, RunStart
from flwr_cloned_kd.loggers.live import MAX_BARS, MAX_REQUESTS, Totals, bars, clock
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import NOTHING, Tally, adds
from tests.helpers.live import film, picture

ROOT = Path(__file__).parents[2]
SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"
ENOUGH_SECONDS = 60


def terminal(**options):
    return Console(file=io.StringIO(), force_terminal=True, width=100, **options)


def plain(text):
    """Leave out the control sequences of a terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def lines_of(console):
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_view_shows_what_happens_in_a_run():
    rows = lines_of(film(6))
    # Rounds 1 to 5 ended at 101, 141, 181, 263 and 303 s; four are left: 4 (303 - 101) / 4 s.
    assert re.fullmatch(r"ClonedKD +━+[╸╺]━+ +5 of 9 rounds, 0:05:43, about 0:03:22 left", rows[0])
    # Four rounds of five were accepted; the fifth refused edge 6.
    assert rows[1:] == [
        "core accuracy  ▁▅▆█ 0.846, best 0.846",
        "now            edge 4 teaches the core, 0:00:40",
        "               edge 7 trains, 0:02:00",
        "               edge 8 trains, 0:01:44",
        "               edge 9 trains, 0:01:42",
        "megabytes      4.6 sent, 13.8 received",
        "refused        1; in round 5 edge 6: conv1.weight: expected finite values, got nan",
    ]


def test_before_the_first_round_no_time_left_is_shown():
    rows = lines_of(film(1))
    assert rows[0].endswith("0 of 9 rounds, 0:01:41")
    assert rows[2] == "           edge 2 has answered and waits for the core, 0:00:06"


def test_after_the_run_the_view_says_how_it_ended():
    rows = lines_of(film(10))
    assert rows[0].endswith("9 of 9 rounds, finished in 0:08:15")
    assert not any(row.startswith("now") for row in rows)


def test_the_picture_of_the_guide_is_that_of_the_view():
    def texts(svg):
        return re.findall(r"<text[^>]*>([^<]*)</text>", svg)

    kept = (ROOT / "docs" / "figures" / "live.svg").read_text(encoding="utf-8")
    assert texts(kept) == texts(picture())
    assert "http" not in kept.replace("http://www.w3.org/2000/svg", "")


@pytest.fixture
def view():
    """A view of a run that has started, and the events of the run."""
    view = LiveView(Console(file=io.StringIO()))
    events = []
    view.started(RunStart("Any", 10, {}, [], events, lambda: 60.0))
    return view, events


def text_of(view):
    console = Console(record=True, file=io.StringIO(), width=100)
    console.print(view.picture())
    return console.export_text()


def row(server_round, **changes):
    return {"round": server_round, "edge": "1", "cause": "", "accepted": 1.0} | changes


def test_requests_beyond_the_limit_are_counted(view):
    view, events = view
    events += [Event(0.0, "ask", str(number), number, 0) for number in range(1, 10)]
    text = text_of(view)
    assert text.count("trains, 0:01:00") == MAX_REQUESTS == 6
    assert "and 3 more" in text


@pytest.mark.parametrize("name", ["clinic[/x]", "[bold]b", "[link=x]y"])
def test_the_name_of_an_edge_is_shown_verbatim(view, name):
    view, events = view
    events.append(Event(0.0, "ask", name, 1, 0))
    view.refused(row(1, edge=name, cause="[red]no", accepted=0.0))
    text = text_of(view)
    assert f"edge {name} trains" in text
    assert f"edge {name}: [red]no" in text


def test_rounds_without_a_finite_accuracy_are_shown(view):
    view, _ = view
    view.absorbed(row(1, **{"core-accuracy": float("nan")}))
    assert "accuracy" not in text_of(view)
    view.absorbed(row(2, **{"train-accuracy": 0.5}))
    assert "train accuracy  ▁ 0.500, best 0.500" in text_of(view)


def test_a_resumed_run_continues_the_bar_and_the_time_left(monkeypatch):
    now = SimpleNamespace(monotonic=lambda: now.seconds, seconds=0.0)
    monkeypatch.setattr("flwr_cloned_kd.loggers.live.time", now)
    view = LiveView(Console(file=io.StringIO()))
    history = [row(number) for number in range(1, 6)]
    view.started(RunStart("Any", 10, {}, history, [], lambda: 0.0))
    assert "5 of 10 rounds, 0:00:00\n" in text_of(view)
    now.seconds = 30.0
    view.absorbed(row(6))
    # 30 s for the one round of its own, and four are left.
    assert "6 of 10 rounds, 0:00:30, about 0:02:00 left" in text_of(view)
    now.seconds = 40.0
    view.absorbed(row(7))
    # The round after the first one took 10 s, and three are left.
    assert "7 of 10 rounds, 0:00:40, about 0:00:30 left" in text_of(view)


def test_the_totals_equal_the_sums_over_all_rows():
    accuracies = [0.2, 0.9, float("nan"), 0.5, *(0.4 + number / 1000 for number in range(60))]
    rows = [
        row(number, accepted=float(number % 3 > 0), **{"core-accuracy": accuracy, "bytes-up": 5})
        for number, accuracy in enumerate(accuracies, 1)
    ]
    totals = reduce(Totals.plus, rows, Totals())
    accepted = [row["core-accuracy"] for row in rows if row["accepted"]]
    values = [value for value in accepted if math.isfinite(value)]
    assert totals.newest["core-accuracy"] == tuple(values[-MAX_BARS:])
    assert totals.best["core-accuracy"] == max(values) == 0.9
    assert (totals.num_rounds, totals.bytes_up, totals.bytes_down) == (64, 320, 0)
    assert totals.num_refused == 21
    assert totals.last_refusal.startswith("round 63 edge 1")


def test_a_refresh_reads_no_row_again(view):
    view, _ = view

    class Unreadable(dict):
        def get(self, *args):
            assert not closed
            return super().get(*args)

        __getitem__ = get

    closed = False
    view.absorbed(Unreadable(row(1, **{"core-accuracy": 0.5})))
    closed = True
    assert "0.500" in text_of(view)


def test_bars_go_from_the_least_to_the_largest_of_the_newest_values():
    assert bars([0.0, 0.5, 1.0]) == "▁▅█"
    assert bars([0.3, 0.3]) == "▁▁"
    assert bars([*[0.0] * 50, 1.0]) == "▁" * 39 + "█"
    assert clock(3661.4) == "1:01:01"


def test_a_terminal_without_unicode_gets_no_bars():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    view = LiveView(Console(file=file, force_terminal=True, width=100))
    strategy = Reports(callbacks=[view])
    strategy.start(FakeGrid([adds(1), adds(2)]), NOTHING, num_rounds=2)
    file.flush()
    assert "core accuracy  0.300, best 0.300" in plain(file.buffer.getvalue().decode())


class Reports(Tally):
    """Reports a tenth of its sum as the accuracy."""

    def absorb(self, dispatch, content, staleness):
        metrics = super().absorb(dispatch, content, staleness)
        return metrics | {"core-accuracy": self.w / 10}


def test_the_view_changes_while_the_model_learns():
    console = terminal()
    shown = threading.Event()

    class Patient(Tally):
        def absorb(self, dispatch, content, staleness):
            deadline = threading.Event()
            for _ in range(400):
                if "teaches the core" in console.file.getvalue():
                    shown.set()
                    break
                deadline.wait(0.02)
            return super().absorb(dispatch, content, staleness)

    Patient(callbacks=[LiveView(console)]).start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    assert shown.is_set()


class Screen(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("error", [None, KeyError("x"), KeyboardInterrupt()])
def test_the_terminal_is_given_back_however_the_run_ends(error, monkeypatch):
    class Ends(Tally):
        def absorb(self, dispatch, content, staleness):
            assert handler.stream is not screen  # Flower's lines go through the view
            logging.getLogger("flwr").info("a line of the log")
            if error is not None:
                raise error
            return super().absorb(dispatch, content, staleness)

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    logger = logging.getLogger("flwr")
    logger.addHandler(handler)
    console = terminal()
    strategy = Ends(callbacks=[LiveView(console)])
    with nullcontext() if error is None else pytest.raises(type(error)):
        strategy.start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    logger.removeHandler(handler)
    assert sys.stderr is screen
    assert handler.stream is screen
    written = console.file.getvalue()
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)
    assert "a line of the log" in written
    assert "a line of the log" not in screen.getvalue()
    end = "finished in" if error is None else f"ended by {type(error).__name__} in"
    assert end in written


def test_what_is_sent_to_a_file_gets_there(monkeypatch):
    class Prints(Tally):
        def absorb(self, dispatch, content, staleness):
            print("for the file")
            return super().absorb(dispatch, content, staleness)

    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", Screen())
    strategy = Prints(callbacks=[LiveView()])
    strategy.start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    assert file.getvalue() == "for the file\n"
    assert "1 of 1 rounds" in sys.stderr.getvalue()


def test_without_a_terminal_a_line_a_minute_says_what_the_log_does_not(flower_log, monkeypatch):
    now = SimpleNamespace(monotonic=lambda: now.seconds, seconds=0.0)

    class Slow(Reports):
        def absorb(self, dispatch, content, staleness):
            now.seconds += 35.0
            return super().absorb(dispatch, content, staleness)

    monkeypatch.setattr("flwr_cloned_kd.loggers.live.time", now)
    console = Console(file=io.StringIO())
    strategy = Slow(callbacks=[LiveView(console)])
    strategy.start(FakeGrid([adds(1)] * 5), NOTHING, num_rounds=5)
    lines = [line for line in flower_log if " rounds, " in line and "Finished" not in line]
    assert lines == [
        "2 of 5 rounds, best core accuracy 0.200, edges in flight: 0, 0:01:10, about 0:01:45 left",
        "4 of 5 rounds, best core accuracy 0.400, edges in flight: 0, 0:02:20, about 0:00:35 left",
    ]
    assert console.file.getvalue() == ""


def test_a_file_is_no_terminal_although_colour_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    Tally(callbacks=[LiveView()]).start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    assert HIDE_CURSOR not in screen.getvalue()


def test_in_the_loop_of_flower_the_view_is_not_shown(flower_log):
    console = terminal()
    strategy = Tally(callbacks=[LiveView(console)])
    Strategy.start(strategy, FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    assert console.file.getvalue() == ""
    assert not any("callback" in line for line in flower_log)


SCRIPT = """
import fcntl
import signal
import termios
import time
from flwr.supercore.task_identity import TaskIdentity
from flwr_cloned_kd import LiveView
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import NOTHING, Tally, adds

class Waits(Tally):
    def absorb(self, dispatch, content, staleness):
        if dispatch.edge == "2":
            print("waiting")
            time.sleep(60)
        return super().absorb(dispatch, content, staleness)

# A process in the background of a shell ignores Ctrl-C, and so do the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Standard input becomes the terminal that controls this process: its Ctrl-C is a signal.
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
try:
    strategy = Waits(callbacks=[LiveView()])
    strategy.start(FakeGrid([adds(1), adds(2)]), NOTHING, num_rounds=2)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_in_a_terminal_leaves_readable_lines_and_a_cursor():
    keyboard, screen = pty.openpty()
    # The terminal does not echo "^C" into the lines of the run.
    attributes = termios.tcgetattr(screen)
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(screen, termios.TCSANOW, attributes)
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=screen,
        stdout=screen,
        stderr=screen,
        env=environment | {"COLUMNS": "100", "LINES": "40"},
        start_new_session=True,
    )
    os.close(screen)
    written = b""
    pressed = False
    try:
        while chunk := _read(keyboard):
            written += chunk
            if b"waiting" in written and not pressed:
                os.write(keyboard, b"\x03")
                pressed = True
        assert child.wait(ENOUGH_SECONDS) == 0
    finally:
        child.kill()
        os.close(keyboard)
    text = written.decode()
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    lines = [line.strip() for line in plain(text).splitlines()]
    assert "INFO :      [ROUND 1] edge 1: absorbed" in lines
    assert "waiting" in lines
    assert "interrupted" in lines, text
    assert any("1 of 2 rounds, ended by KeyboardInterrupt" in line for line in lines), text


def _read(descriptor):
    """Return what a terminal has to read; b"" once its last process has ended."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""
