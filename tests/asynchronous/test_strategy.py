"""The loop without a barrier: who is asked while the core learns, and what it survives."""

import threading
import time
from itertools import accumulate

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, RecordDict

from flwr_cloned_kd import AsyncStrategy, ClonedKD, VirtualGrid
from flwr_cloned_kd.asynchronous.courier import Courier
from flwr_cloned_kd.asynchronous.session import Dispatch, Progress, Session
from tests.helpers.fake_grid import FakeGrid, Flaky, Unreadable, silent
from tests.helpers.federation import NOTHING, Tally, adds, apps, small_core

ENOUGH_SECONDS = 30


def kinds(strategy, *wanted):
    return [(event.kind, event.edge) for event in strategy.events if event.kind in wanted]


class Deliberate(Tally):
    """Absorbs the first answer only once `go` is set, and says when it has begun."""

    def __init__(self, **options):
        super().__init__(**options)
        self.began, self.go = threading.Event(), threading.Event()

    def absorb(self, dispatch, content, staleness):
        if not self.began.is_set():
            self.began.set()
            assert self.go.wait(ENOUGH_SECONDS)
        return super().absorb(dispatch, content, staleness)


def signals(answer, event):
    """Set an event when the node is asked to train."""

    def call(message, context):
        if message.metadata.message_type == "train":
            event.set()
        return answer(message, context)

    return call


def test_a_freed_slot_is_refilled_while_the_core_learns():
    third = threading.Event()
    held = threading.Event()

    def slow(message, context):
        if message.metadata.message_type == "train":
            held.wait(ENOUGH_SECONDS)
        return adds(2)(message, context)

    grid = FakeGrid([adds(1), slow, signals(adds(3), third)])
    strategy = Deliberate(max_in_flight=2)

    def watch():
        strategy.began.wait(ENOUGH_SECONDS)
        # The core is busy with edge 1, edge 2 holds the other slot: edge 3 gets edge 1's.
        asked.append(third.wait(ENOUGH_SECONDS))
        held.set()
        strategy.go.set()

    asked = []
    watcher = threading.Thread(target=watch)
    watcher.start()
    strategy.start(grid, NOTHING, num_rounds=3, timeout=ENOUGH_SECONDS)
    watcher.join()
    assert asked == [True]
    happened = kinds(strategy, "ask", "learn", "absorb")
    assert happened.index(("ask", "3")) < happened.index(("absorb", "1"))
    # It was sent the core as it was then: before edge 1.
    assert {row["edge"]: row["sent"] for row in strategy.history}["3"] == 0
    assert strategy.w == 6


def test_absorb_may_return_numbers_of_numpy_and_pytorch():
    class Measured(Tally):
        def absorb(self, dispatch, content, staleness):
            metrics = super().absorb(dispatch, content, staleness)
            return metrics | {
                "accepted": np.bool_(True),
                "a": np.float32(0.5),
                "b": torch.tensor(2),
            }

    strategy = Measured()
    result = strategy.start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    (row,) = strategy.history
    assert (row["accepted"], row["a"], row["b"]) == (1.0, 0.5, 2)
    assert [type(row[name]) for name in ("accepted", "a", "b")] == [float, float, int]
    assert result.train_metrics_clientapp[1]["a"] == 0.5


def test_a_run_that_accepted_no_answer_ends_with_a_warning(flower_log):
    class Refuses(Tally):
        def absorb(self, dispatch, content, staleness):
            raise ValueError("expected another answer")

    Refuses().start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    assert "No answer was accepted" in flower_log[-1]
    Tally().start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    assert "No answer was accepted" not in flower_log[-1]


def test_with_one_in_flight_the_next_edge_gets_the_newest_core():
    strategy = Tally()
    strategy.start(FakeGrid([adds(i) for i in (1, 2, 3)]), NOTHING, num_rounds=3)
    assert [row["sent"] for row in strategy.history] == [0, 1, 3]
    assert kinds(strategy, "ask", "absorb") == [
        (kind, edge) for edge in "123" for kind in ("ask", "absorb")
    ]


def test_every_request_ends_once_and_in_order():
    strategy = Tally(max_in_flight=3)
    strategy.start(FakeGrid([adds(i) for i in range(1, 9)]), NOTHING, num_rounds=8)
    for number in range(1, 9):
        own_events = [event for event in strategy.events if event.number == number]
        assert [event.kind for event in own_events] == ["ask", "answer", "learn", "absorb"]
        assert [event.time for event in own_events] == sorted(event.time for event in own_events)
    assert strategy.w == 36
    assert [event.time for event in strategy.events] == sorted(e.time for e in strategy.events)
    # A row tells the same times as the events do.
    for row in strategy.history:
        ask, answer, learn, absorb = (e for e in strategy.events if e.number == row["number"])
        assert row["edge-seconds"] == pytest.approx(answer.time - ask.time)
        assert row["wait-seconds"] == pytest.approx(learn.time - answer.time)
        assert row["core-seconds"] == pytest.approx(absorb.time - learn.time)


def test_a_request_is_labelled_with_the_version_of_what_it_carries():
    """Every edge adds 1, so the model is its own version, whichever thread looks at it."""

    def adds_one(name):
        def answer(message, context):
            if message.metadata.message_type == "query":
                return adds(name)(message, context)
            return adds(1)(message, context)

        return answer

    strategy = Tally(max_in_flight=4)
    strategy.start(FakeGrid([adds_one(i) for i in range(40)]), NOTHING, num_rounds=40)
    assert [row["w"] for row in strategy.history] == list(range(1, 41))
    for row in strategy.history:
        assert row["sent"] == row["w"] - 1 - row["staleness"]


def test_what_to_send_is_made_where_the_core_learns():
    """Drawing fresh weights copies the model, which must not be in use by another thread."""
    threads = []

    def send(state):
        threads.append(threading.current_thread())
        return state.params

    core = small_core()
    strategy = ClonedKD(core, num_clones=1, max_in_flight=2, send=send)
    first = ArrayRecord(core.model.state_dict())
    strategy.start(FakeGrid(apps(3)), first, num_rounds=3, timeout=ENOUGH_SECONDS)
    assert strategy.version == 3
    assert threads == [threading.current_thread()] * 4  # for the first core, and each new one


def test_answers_do_not_pile_up_before_a_slow_core():
    """At most as many wait as may be in flight; then no more are asked."""
    grid = FakeGrid([adds(i) for i in range(1, 21)])
    strategy = Deliberate(max_in_flight=2)
    most = []

    def watch():
        strategy.began.wait(ENOUGH_SECONDS)
        deadline = time.monotonic() + 0.4
        while time.monotonic() < deadline:
            most.append(len(grid.trained()))
        strategy.go.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    strategy.start(grid, NOTHING, num_rounds=20, timeout=ENOUGH_SECONDS)
    watcher.join()
    # One is being absorbed, two wait, and the last to be asked made one more at most.
    assert 3 <= max(most) <= 4
    assert strategy.w == 210


def test_an_edge_that_leaves_while_the_core_learns_is_not_lost():
    grid = FakeGrid([adds(1), adds(2)])
    strategy = Deliberate(max_in_flight=2)

    def watch():
        strategy.began.wait(ENOUGH_SECONDS)
        deadline = time.monotonic() + ENOUGH_SECONDS
        while len(kinds(strategy, "answer")) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        grid.online = []  # from now on Flower would delete what is asked for
        strategy.go.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    strategy.start(grid, NOTHING, num_rounds=2, timeout=ENOUGH_SECONDS)
    watcher.join()
    assert strategy.w == 3


@pytest.mark.parametrize("call", ["get_node_ids", "get_nodes", "push_messages", "pull_messages"])
def test_a_grid_that_fails_for_a_while_is_asked_again(call, flower_log):
    strategy = Tally()
    grid = Flaky(FakeGrid([adds(1), adds(2)]), {call: 3})
    strategy.start(grid, NOTHING, num_rounds=2, timeout=ENOUGH_SECONDS)
    assert strategy.w == 3
    lines = [line for line in flower_log if "The grid failed" in line]
    assert len(lines) in (1, 2, 3)
    assert "connection reset" in lines[0]


@pytest.mark.parametrize("call", ["get_node_ids", "get_nodes", "push_messages", "pull_messages"])
def test_a_grid_that_stays_broken_ends_the_run_with_the_cause(call, monkeypatch):
    monkeypatch.setattr("flwr_cloned_kd.asynchronous.courier.MAX_FAILED_CALLS", 3)
    grid = Flaky(FakeGrid([adds(1), adds(2)]), {call: 10**9})
    with pytest.raises(ConnectionError, match="3 calls in a row failed, at last with OS") as caught:
        Tally().start(grid, NOTHING, num_rounds=2)
    assert isinstance(caught.value.__cause__, OSError)


def unreadable(kind, answer):
    """Answer requests of this kind with bytes that Flower cannot decode, others as `answer`."""

    def call(message, context):
        junk = message.metadata.message_type == kind
        return Unreadable() if junk else answer(message, context)

    return call


class Together(FakeGrid):
    """Replies of one kind are there all at once, or not yet."""

    def __init__(self, apps, kind):
        super().__init__(apps)
        self.kind = kind

    def pull_messages(self, message_ids):
        asked = {m.metadata.message_id for m in self.pushed if m.metadata.message_type == self.kind}
        waiting = [self._replies[i] for i in asked if i in self._replies]
        ready = len(asked) == len(self.apps) and all(future.done() for future in waiting)
        return super().pull_messages([i for i in message_ids if ready or i not in asked])


def test_an_answer_that_cannot_be_decoded_costs_its_edge_alone():
    grid = Together([adds(1), unreadable("train", adds(2)), adds(4)], "train")
    strategy = Tally(max_in_flight=3)
    strategy.start(grid, NOTHING, num_rounds=3, timeout=ENOUGH_SECONDS)
    assert strategy.w == 5
    causes = {row["edge"]: row["cause"] for row in strategy.history}
    assert causes["1"] == causes["4"] == ""
    assert causes["2"].startswith("expected a reply, got error 3")


def test_a_name_that_cannot_be_decoded_costs_no_other_its_name():
    grid = Together([adds(1), unreadable("query", adds(2)), adds(4)], "query")
    strategy = Tally()
    strategy.start(grid, NOTHING, num_rounds=3, timeout=ENOUGH_SECONDS)
    assert [row["edge"] for row in strategy.history] == ["1", "node 101", "4"]
    assert strategy.w == 7


def test_many_answers_that_cannot_be_decoded_are_no_broken_grid(monkeypatch):
    monkeypatch.setattr("flwr_cloned_kd.asynchronous.courier.MAX_FAILED_CALLS", 3)
    hostile = unreadable("query", unreadable("train", adds(0)))
    strategy = Tally(max_in_flight=5, max_failures=100)
    monkeypatch.setattr("flwr_cloned_kd.asynchronous.session.FAILURES_BEFORE_A_PAUSE", 100)
    grid = FakeGrid([hostile, hostile, hostile, hostile, adds(1)])
    strategy.start(grid, NOTHING, num_rounds=5, timeout=ENOUGH_SECONDS)
    assert strategy.w == 1


def test_a_mistake_in_a_strategy_is_raised_at_once():
    class Wrong(Tally):
        def request(self, server_round, config):
            raise KeyError("no such field")

    with pytest.raises(KeyError, match="no such field"):
        Wrong().start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)


def crash(message, context):
    if message.metadata.message_type == "query":
        return Message(Error(1), reply_to=message)
    return Message(Error(8, "client process killed"), reply_to=message)


def test_failures_in_a_row_end_the_run_with_what_it_has(flower_log):
    strategy = Tally(max_failures=2)
    grid = FakeGrid([adds(5), crash, crash, adds(7)])
    result = strategy.start(grid, NOTHING, num_rounds=4, timeout=ENOUGH_SECONDS)
    assert [row["accepted"] for row in strategy.history] == [1, 0, 0]
    assert float(result.arrays["w"].numpy()) == 5
    assert "2 edges in a row failed: ending the run with what it has" in "\n".join(flower_log)
    assert grid.trained() == [100, 101, 102]


def test_a_run_that_gave_up_does_not_wait_for_the_name_of_a_new_node(monkeypatch):
    monkeypatch.setattr("flwr_cloned_kd.asynchronous.arrivals.PATIENCE_SECONDS", 0.1)
    strategy = Tally(max_failures=1)
    # The second node never says its name.
    grid = FakeGrid([crash, lambda message, context: None])
    run = threading.Thread(
        target=strategy.start, args=(grid, NOTHING, 2, ENOUGH_SECONDS), daemon=True
    )
    run.start()
    run.join(5)
    assert not run.is_alive()
    assert len(strategy.history) == 1


def test_an_edge_that_crashed_counts_as_visited():
    strategy = Tally()
    grid = FakeGrid([crash, adds(1)])
    strategy.start(grid, NOTHING, num_rounds=3, timeout=1)
    assert grid.trained() == [100, 101]
    assert strategy.history[0]["cause"].startswith("expected a reply, got error 8")


def test_a_silent_newcomer_does_not_hold_up_the_others(monkeypatch):
    monkeypatch.setattr("flwr_cloned_kd.asynchronous.arrivals.PATIENCE_SECONDS", 0.3)

    def hangs(message, context):
        return None

    strategy = Tally()
    grid = FakeGrid([hangs, adds(1)])
    strategy.start(grid, NOTHING, num_rounds=1, timeout=ENOUGH_SECONDS)
    assert strategy.w == 1


def test_silence_counts_as_a_failure():
    strategy = Tally(max_failures=1)
    strategy.start(FakeGrid([silent, adds(1)]), NOTHING, num_rounds=2, timeout=0.3)
    assert len(strategy.history) == 1
    assert kinds(strategy, "expire") == [("expire", "node 100")]


def test_the_pause_after_failures_in_a_row_doubles_up_to_a_minute():
    session = Session(max_failures=20)
    pauses = [session.fail(f"edge {i}", 100.0) for i in range(10)]
    assert pauses == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert session.paused_until == 160
    session.succeed("edge 3")
    assert session.paused_until < 0
    assert session.fail("edge 3", 200.0) == 0


def dispatch(edge, node, deadline=100.0):
    return Dispatch(node, edge, 0, None, 0, 0.0, deadline)


def test_an_edge_that_failed_rests_before_it_is_asked_again():
    session = Session(revisit=True)
    for node, name in ((1, "a"), (2, "b")):
        session.introduce(node, name, {1, 2})
    assert session.choose({1, 2}, now=0.0) == 1
    session.depart("m", dispatch("a", 1))
    session.arrive("m", 0.0)
    session.fail("a", now=0.0)
    session.visits["b"] = 5  # else b would be first anyway
    # 10 s after a first failure, 20 s more after a second.
    assert [session.choose({1, 2}, now=t) for t in (0.0, 9.9, 10.0)] == [2, 2, 1]
    session.fail("a", now=10.0)
    assert [session.choose({1, 2}, now=t) for t in (29.9, 30.0)] == [2, 1]


def test_the_least_visited_edge_present_is_next_the_earliest_first():
    session = Session(revisit=True)
    for node, name in ((7, "c"), (5, "a"), (6, "b")):
        session.introduce(node, name, {5, 6, 7})
    assert session.choose([5, 6]) == 5  # 7 is away
    session.depart("m", dispatch("a", 5))
    assert session.choose([5, 6, 7]) == 7  # 7 is back, and came first
    session.visits["c"] = 2
    assert session.choose([5, 6, 7]) == 6
    session.arrive("m", 0.0)
    assert session.choose([5, 7]) == 5


def test_a_rest_that_is_over_does_not_hide_a_deadline():
    session = Session(revisit=True)
    for node in (1, 2):
        session.introduce(node, str(node), {1, 2})
    session.depart("m", dispatch("1", 1))
    session.arrive("m", 1.0)
    session.fail("1", now=1.0)
    session.visits["2"] = 5
    assert session.choose({1, 2}, now=1.0) == 2  # and from now on edge 1 rests
    session.depart("n", dispatch("2", 2, deadline=100.0))
    assert [session.next_due(now) for now in (1.0, 11.0)] == [11.0, 100.0]
    assert session.next_due(100.0) == float("inf")


def test_an_edge_that_is_not_asked_again_does_not_rest():
    session = Session()
    session.introduce(1, "a", {1})
    assert session.choose({1}) == 1
    session.depart("m", dispatch("a", 1))
    session.arrive("m", 1.0)
    session.fail("a", now=1.0)
    assert session.choose({1}, now=1.0) is None
    assert not session.has_resting


def test_the_books_survive_a_resume():
    """Edge a was settled once; edges b and c have a request under way each."""
    session = Session(revisit=True)
    for number, edge in enumerate("abc", start=1):
        session.introduce(number, edge, {1, 2, 3})
        session.depart(edge, Dispatch(number, edge, 0, None, 0, 0.0, 1.0, number=number))
    session.settle(session.arrive("a", 0.0))
    progress = session.progress()
    assert progress == Progress(4, {"b": [2], "c": [3]}, {"a": 1})
    resumed = Session(revisit=True)
    resumed.resume(progress)
    assert resumed.progress() == progress
    assert resumed.num_visits == 1
    assert [resumed.number_for(edge) for edge in "abc"] == [4, 2, 3]
    resumed.depart("m", Dispatch(2, "b", 0, None, 0, 0.0, 1.0, number=2))
    assert [resumed.number_for(edge) for edge in "abc"] == [4, 4, 3]
    assert resumed.progress() == progress


@pytest.mark.parametrize(("max_staleness", "accepted"), [(None, 1), (2, 1), (1, 0)])
def test_too_stale_an_answer_is_refused_by_the_loop(max_staleness, accepted):
    """Edge 1 trains for 10 s; meanwhile the edges 2 and 3 make two versions."""
    strategy = Tally(max_in_flight=2, max_staleness=max_staleness)
    seconds = {"0": 10.0, "1": 1.0, "2": 1.0}
    grid = VirtualGrid(
        [adds(1), adds(2), adds(3)], compute=lambda edge, visit, seed: seconds[str(edge)]
    )
    strategy.start(grid, NOTHING, num_rounds=3)
    last = strategy.history[-1]
    assert (last["edge"], last["staleness"], last["accepted"]) == ("1", 2, accepted)
    refusal = "" if accepted else "staleness: expected at most 1, got 2"
    assert last["cause"] == refusal


def test_an_answer_to_a_request_that_was_given_up_is_dropped():
    grid, session = FakeGrid([adds(1)]), Session()
    courier = Courier(
        grid,
        session,
        lambda number, node, now: (
            Message(RecordDict(), dst_node_id=node, message_type="query"),
            Dispatch(node, "1", 0, None, 0, now, now + 1e9, number=number),
        ),
        lambda *event: None,
        num_rounds=1,
        max_in_flight=1,
        timeout=1e9,
    )
    deadline = time.monotonic() + ENOUGH_SECONDS
    while not session.in_flight and time.monotonic() < deadline:
        courier.tick()
    pull = grid.pull_messages

    def slow(message_ids):
        replies = pull(message_ids)
        session.in_flight.clear()  # the deadline passes while the pull is under way
        return replies

    grid.pull_messages = slow
    assert not courier.tick()
    assert courier.progress().unsettled == {"1": [1]}


def test_an_answer_waits_for_a_poll_at_most_a_tenth_of_its_seconds(monkeypatch):
    # Nothing ever happens, and the courier polls until an imitated clock shows an hour.
    courier = Courier(
        FakeGrid([silent]),
        Session(),
        lambda number, node, now: None,
        lambda *event: None,
        num_rounds=1,
        max_in_flight=1,
        timeout=1e9,
    )
    monkeypatch.setattr(courier, "tick", lambda: False)
    pauses = []

    def wait(seconds):
        pauses.append(seconds)
        courier._closed = sum(pauses) > 3600

    monkeypatch.setattr(courier._wake, "wait", wait)
    courier._run()
    polled_at = [0.0, *accumulate(pauses)]
    assert all(pause <= 0.1 * at + 0.03 for at, pause in zip(polled_at, pauses))
    # In the long run the grid is asked every two seconds, as before.
    assert max(pauses) == 2.0
    assert len(pauses) < 3600 / 2 + 50


def test_a_subclass_needs_four_methods():
    assert AsyncStrategy.__abstractmethods__ == {"begin", "arrays", "request", "absorb"}


def test_a_run_waits_for_newcomers_that_are_slow_to_say_who_they_are():
    begun, answer = threading.Event(), adds(1)

    def slow(message, context):
        if message.metadata.message_type == "query":
            begun.wait(0.4)  # longer than the run waits for anybody to come
        return answer(message, context)

    strategy = Tally()
    strategy.start(FakeGrid([slow]), NOTHING, num_rounds=1, timeout=0.2)
    assert [row["edge"] for row in strategy.history] == ["1"]
