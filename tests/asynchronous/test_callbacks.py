"""What a callback sees of a run, in which thread and order, and what its errors cost."""

import threading

import pytest
from flwr.app import Error, Message
from flwr.serverapp.strategy import Strategy

from flwr_cloned_kd import Callback, FedAsync, VirtualGrid
from tests.helpers.diary import METHODS, Diary
from tests.helpers.fake_grid import FakeGrid, silent
from tests.helpers.federation import NOTHING, Tally, adds
from tests.helpers.scripted import by_edge, nodes, run

ENOUGH_SECONDS = 30


def crash(message, context):
    if message.metadata.message_type == "query":
        return adds(9)(message, context)
    return Message(Error(8, "client process killed"), reply_to=message)


class Choosy(Tally):
    """Refuses what edge 2 sends."""

    def absorb(self, dispatch, content, staleness):
        if dispatch.edge == "2":
            raise ValueError("expected anything but 2")
        return super().absorb(dispatch, content, staleness)


def test_one_edge_after_the_other_is_asked_arrives_and_is_absorbed():
    diary = Diary()
    strategy = Tally(callbacks=[diary])
    strategy.start(FakeGrid([adds(1), adds(2)]), NOTHING, num_rounds=2)
    assert diary.names() == [
        "started",
        *["asked", "arrived", "absorbed"] * 2,
        "finished",
    ]
    assert diary.of("absorbed") == strategy.history
    assert diary.of("finished") == [None]
    events = [event for event in strategy.events if event.kind in ("ask", "answer")]
    assert diary.of("asked", "arrived") == events


def test_refused_crashed_and_silent_edges_are_refused_with_their_causes():
    diary = Diary()
    grid = FakeGrid([adds(1), adds(2), crash, silent])
    Choosy(callbacks=[diary]).start(grid, NOTHING, num_rounds=4, timeout=0.5)
    assert diary.names()[1:-1] == [
        *["asked", "arrived", "absorbed"],
        *["asked", "arrived", "refused"] * 3,
    ]
    assert [event.kind for event in diary.of("arrived")] == ["answer", "answer", "error", "expire"]
    causes = [row["cause"] for row in diary.of("refused")]
    assert causes[0] == "expected anything but 2"
    assert "client process killed" in causes[1]
    assert causes[2].startswith("expected an answer, got none")


def test_all_calls_come_in_the_thread_of_start():
    diary = Diary()
    grid = FakeGrid([adds(number) for number in range(1, 13)])
    Tally(max_in_flight=4, callbacks=[diary]).start(grid, NOTHING, num_rounds=12)
    assert diary.threads == {threading.current_thread()}
    assert sorted(set(diary.names())) == sorted(set(METHODS) - {"refused"})
    for number in range(1, 13):
        of_request = [
            name
            for name, value in diary.calls
            if name not in ("started", "finished") and number in _numbers(value)
        ]
        assert of_request == ["asked", "arrived", "absorbed"]


def _numbers(value):
    return [value["number"]] if isinstance(value, dict) else [value.number]


def test_edges_are_reported_as_asked_before_the_first_answer():
    seen = threading.Event()

    class Both(Callback):
        def __init__(self):
            self.count = 0

        def asked(self, event):
            self.count += 1
            if self.count == 2:
                seen.set()

    def waits(message, context):
        if message.metadata.message_type == "train":
            assert seen.wait(ENOUGH_SECONDS)
        return adds(1)(message, context)

    strategy = Tally(max_in_flight=2, callbacks=[Both()])
    strategy.start(FakeGrid([waits, waits]), NOTHING, num_rounds=2, timeout=ENOUGH_SECONDS)
    assert [row["accepted"] for row in strategy.history] == [1, 1]


def test_an_answer_is_reported_before_the_model_learns_from_it():
    diary = Diary()

    class Looks(Tally):
        def absorb(self, dispatch, content, staleness):
            assert diary.names()[-1] == "arrived"
            return super().absorb(dispatch, content, staleness)

    strategy = Looks(callbacks=[diary])
    strategy.start(FakeGrid([adds(1), adds(2)]), NOTHING, num_rounds=2)
    assert strategy.w == 3
    strategy = run(VirtualGrid(nodes(2)), rounds=2, callbacks=[diary])
    assert strategy.w == 3


def test_a_run_in_virtual_time_calls_in_the_order_of_the_clock():
    diary = Diary()
    grid = VirtualGrid(nodes(3), compute=by_edge(1, 5, 2), core=1.0, crash=by_edge(0, 0, 1))
    strategy = run(grid, rounds=3, max_in_flight=2, callbacks=[diary])
    times = [
        (name, value["time"] if isinstance(value, dict) else value.time)
        for name, value in diary.calls[1:-1]
    ]
    # Edge 1 answers at 1 s; edge 3 is asked then, and crashes half way through its 2 s; the core
    # has learned from edge 1 by then. Edge 2 answers at 5 s.
    assert times == [
        ("asked", 0),
        ("asked", 0),
        ("arrived", 1),
        ("asked", 1),
        ("arrived", 2),
        ("absorbed", 2),
        ("refused", 2),
        ("arrived", 5),
        ("absorbed", 6),
    ]
    assert [row["round"] for row in diary.of("absorbed", "refused")] == [1, 2, 3]
    assert strategy.w == 3


def test_the_start_states_the_run():
    diary = Diary()
    grid = VirtualGrid(nodes(2), compute=3.0)
    strategy = FedAsync(alpha=0.5, max_in_flight=1, revisit=False, callbacks=[diary])
    strategy.start(grid, NOTHING, num_rounds=2)
    (start,) = diary.of("started")
    assert (start.strategy, start.num_rounds, start.history) == ("FedAsync", 2, [])
    assert start.settings["alpha"] == 0.5
    assert start.settings["max_in_flight"] == 1
    assert start.events is strategy.events
    assert start.now() == 6.0


def test_the_rows_and_events_cannot_be_changed_by_a_callback():
    class Eraser(Callback):
        def absorbed(self, row):
            row.clear()

    diary = Diary()
    strategy = Tally(callbacks=[Eraser(), diary])
    strategy.start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    assert diary.of("absorbed") == strategy.history
    assert strategy.history[0]["w"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_an_error_in_a_callback_costs_one_line_and_not_the_run(method, flower_log):
    def fails(self, value):
        raise OSError("disk full\nsecond line")

    faulty = type("Faulty", (Callback,), {method: fails})()
    diary = Diary()
    strategy = Choosy(callbacks=[faulty, diary])
    strategy.start(FakeGrid([adds(1), adds(2)]), NOTHING, num_rounds=2)
    assert strategy.w == 1
    assert diary.names()[-1] == "finished"
    lines = [line for line in flower_log if "failed" in line]
    times = 2 if method in ("asked", "arrived") else 1
    assert len(lines) == times
    assert lines[0].startswith("The callback ")
    assert lines[0].endswith("failed: OSError: disk full")


def test_a_callback_whose_start_failed_is_not_called_again():
    class Late(Diary):
        def started(self, run):
            raise ImportError("no such package")

    late = Late()
    Tally(callbacks=[late]).start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    assert late.calls == []


@pytest.mark.parametrize("method", METHODS[:-1])
def test_an_interrupt_in_a_callback_ends_the_run_and_the_callbacks_finish(method):
    def stops(self, value):
        raise KeyboardInterrupt

    interrupted = type("Interrupted", (Callback,), {method: stops})()
    diary = Diary()
    strategy = Choosy(callbacks=[diary, interrupted])
    with pytest.raises(KeyboardInterrupt):
        strategy.start(FakeGrid([adds(1), adds(2)]), NOTHING, num_rounds=2)
    (error,) = diary.of("finished")
    assert isinstance(error, KeyboardInterrupt)


def test_finished_gets_the_error_that_ended_the_run():
    class Wrong(Tally):
        def absorb(self, dispatch, content, staleness):
            raise KeyError("no such field")

    diary = Diary()
    with pytest.raises(KeyError):
        Wrong(callbacks=[diary]).start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    assert diary.names() == ["started", "asked", "arrived", "finished"]
    assert isinstance(diary.of("finished")[0], KeyError)


def test_a_run_that_ends_early_finishes_without_an_error():
    diary = Diary()
    Tally(callbacks=[diary]).start(FakeGrid([adds(1)]), NOTHING, num_rounds=5, timeout=0.2)
    assert diary.names() == ["started", "asked", "arrived", "absorbed", "finished"]
    assert diary.of("finished") == [None]


def test_the_loop_of_flower_calls_all_methods_but_finished():
    diary = Diary()
    strategy = Choosy(callbacks=[diary])
    grid = FakeGrid([adds(1), adds(2), crash])
    Strategy.start(strategy, grid, NOTHING, num_rounds=3)
    assert diary.names() == [
        "started",
        *["asked", "arrived", "absorbed"],
        *["asked", "arrived", "refused"] * 2,
    ]
    assert diary.of("started")[0].num_rounds is None
    assert [event.kind for event in diary.of("arrived")] == ["answer", "answer", "error"]


@pytest.mark.parametrize("wrong", [Callback, print, None])
def test_what_is_no_callback_is_refused_before_the_run(wrong):
    with pytest.raises(ValueError, match="callbacks: expected instances of Callback, got"):
        Tally(callbacks=[wrong])
