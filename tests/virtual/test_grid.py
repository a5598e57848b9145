"""Strategies in virtual time: the order of their events is derived by hand."""

import gc
import math
import threading
import time
from collections import Counter

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_cloned_kd import ClonedKD, Constant, Exponential, LogNormal, VirtualGrid, fold_in
from flwr_cloned_kd.asynchronous.session import Session
from tests.helpers import victim
from tests.helpers.federation import NOTHING, Tally, adds, app, small_core
from tests.helpers.scripted import W_BYTES, by_edge, nodes, run

TRAIN_CONTENT = RecordDict({"arrays": NOTHING})


def train(edge):
    """A request to train."""
    return Message(TRAIN_CONTENT, 100 + edge, "train")


def steps(strategy):
    """(time, kind, edge) of all events but arrivals."""
    return [(e.time, e.kind, int(e.edge) - 1) for e in strategy.events if e.kind != "arrive"]


def test_a_timeline_derived_by_hand():
    """Four edges train for 1, 5, 1 and 1 s, two in flight; the core learns for 2 s.

    From 1 to 3 the core learns from edge 0. Meanwhile edge 2 gets the slot of edge 0, and edge 3
    gets the slot of edge 2.
    """
    grid = VirtualGrid(nodes(4), compute=by_edge(1, 5, 1, 1), core=2.0)
    strategy = run(grid, rounds=4, max_in_flight=2)
    assert steps(strategy) == [
        (0, "ask", 0),
        (0, "ask", 1),
        (1, "answer", 0),
        (1, "ask", 2),
        (1, "learn", 0),
        (2, "answer", 2),
        (2, "ask", 3),
        (3, "answer", 3),
        (3, "absorb", 0),
        (3, "learn", 2),
        (5, "answer", 1),
        (5, "absorb", 2),
        (5, "learn", 3),
        (7, "absorb", 3),
        (7, "learn", 1),
        (9, "absorb", 1),
    ]
    assert [row["staleness"] for row in strategy.history] == [0, 1, 2, 3]
    assert [row["wait-seconds"] for row in strategy.history] == [0, 1, 2, 2]
    assert [row["core-idle-seconds"] for row in strategy.history] == [1, 0, 0, 0]
    assert [row["edge-idle-seconds"] for row in strategy.history] == [0, 1, 2, 0]
    assert [row["time"] for row in strategy.history] == [3, 5, 7, 9]


def test_with_one_in_flight_core_and_edges_take_turns():
    strategy = run(VirtualGrid(nodes(3), compute=by_edge(1, 5, 1), core=2.0), rounds=3)
    # 1 + 2, 5 + 2, 1 + 2
    assert [row["time"] for row in strategy.history] == [3, 10, 13]
    assert [row["staleness"] for row in strategy.history] == [0, 0, 0]


def test_a_request_takes_two_transfers_and_the_training():
    grid = VirtualGrid(nodes(1), compute=10.0, down=W_BYTES / 2, up=W_BYTES / 3)
    assert run(grid, rounds=1).history[0]["edge-seconds"] == pytest.approx(2 + 10 + 3)


def test_no_thread_and_no_waiting():
    num_threads = threading.active_count()
    started = time.monotonic()
    counts = []
    grid = VirtualGrid(nodes(3), compute=86_400.0)
    strategy = Tally(on_round=lambda row: counts.append(threading.active_count()))
    strategy.start(grid, NOTHING, num_rounds=3, timeout=1e6)
    assert counts == [num_threads] * 3
    assert grid.now() == 3 * 86_400
    assert time.monotonic() - started < 10


def test_the_request_of_an_edge_that_departs_expires():
    grid = VirtualGrid(nodes(2), compute=10.0, stay=by_edge(4, math.inf))
    strategy = run(grid, rounds=2, timeout=30)
    assert steps(strategy) == [
        (0, "ask", 0),
        (30, "expire", 0),
        (30, "learn", 0),
        (30, "refuse", 0),
        (30, "ask", 1),
        (40, "answer", 1),
        (40, "learn", 1),
        (40, "absorb", 1),
    ]
    assert [(e.time, e.kind) for e in grid.events if e.edge == "0"] == [
        (0, "arrive"),
        (0, "ask"),
        (4, "depart"),
    ]


def test_an_edge_that_returns_is_asked_if_it_was_not_asked():
    grid = VirtualGrid(nodes(2), compute=2.0, stay=by_edge(math.inf, 1), away=5.0)
    strategy = run(grid, rounds=2, timeout=30)
    # Edge 1 is away from 1 to 6; then it stays for 1 s, too short for 2 s of training.
    assert steps(strategy)[4:] == [
        (6, "ask", 1),
        (36, "expire", 1),
        (36, "learn", 1),
        (36, "refuse", 1),
    ]


def test_an_edge_that_departs_while_the_core_learns_is_not_lost():
    grid = VirtualGrid(
        nodes(2), compute=by_edge(1, 3), stay=by_edge(math.inf, 4), core=Constant(10)
    )
    strategy = run(grid, rounds=2, max_in_flight=2)
    assert [row["accepted"] for row in strategy.history] == [1, 1]
    assert [row["time"] for row in strategy.history] == [11, 21]


def test_a_crash_comes_half_way_and_the_edge_counts_as_visited():
    grid = VirtualGrid(nodes(2), compute=10.0, crash=by_edge(1, 0))
    strategy = run(grid, rounds=3, timeout=20)
    assert steps(strategy)[:2] == [(0, "ask", 0), (5, "error", 0)]
    assert strategy.history[0]["cause"].startswith("expected a reply, got error 8")
    assert [row["accepted"] for row in strategy.history] == [0, 1]
    assert grid.now() == 15 + 20  # the timeout: no edge is left to ask


def test_failures_in_a_row_pause_the_run_in_virtual_time():
    grid = VirtualGrid(nodes(5), compute=2.0, crash=by_edge(1, 1, 1, 1, 0))
    asked = [time for time, kind, _ in steps(run(grid, rounds=5)) if kind == "ask"]
    # Each crash takes 1 s; after the third the pause is 1 s, after the fourth 2 s.
    assert asked == [0, 1, 2, 4, 7]


def test_an_edge_that_crashed_rests_before_it_is_asked_again():
    strategy = run(VirtualGrid(nodes(1), compute=2.0, crash=1.0), rounds=3, revisit=True)
    # 10 s of rest after the first crash, at 1, and 20 s after the second, at 12.
    assert [time for time, kind, _ in steps(strategy) if kind == "ask"] == [0, 11, 32]


@pytest.mark.parametrize("revisit", [False, True])
def test_edges_that_rested_do_not_end_a_run_with_a_request_under_way(revisit):
    """Four edges fail, one stays silent for 100 s, three answer.

    When the rest of the first edge ends at 11 s, the silent edge's request is under way.
    """

    def crash(message, context):
        if message.metadata.message_type == "query":
            return Message(Error(1, "no query function"), reply_to=message)
        raise RuntimeError("out of memory")

    def silent(message, context):
        return adds(0)(message, context) if message.metadata.message_type == "query" else None

    grid = VirtualGrid([crash] * 4 + [silent] + nodes(3))
    strategy = run(grid, rounds=8, timeout=100.0, revisit=revisit)
    assert [row["accepted"] for row in strategy.history] == [0] * 5 + [1] * 3
    assert strategy.w == 6
    assert strategy.history[-1]["time"] > 100


def test_a_run_waits_for_edges_that_arrive_late():
    grid = VirtualGrid(nodes(3), compute=1.0, arrival=by_edge(20, 0, 7))
    assert [(t, e) for t, kind, e in steps(run(grid, rounds=3)) if kind == "ask"] == [
        (0, 1),
        (7, 2),
        (20, 0),
    ]


def test_sec_5_2_a_late_answer_is_distilled_omitted_or_waited_for():
    """Edge 0 lags: 10 s against 1 s. Cases 3, 2 and 1 of the paper, in this order."""

    def grid():
        return VirtualGrid(nodes(3), compute=by_edge(10, 1, 1))

    late = run(grid(), rounds=3, max_in_flight=2)
    assert [(row["edge"], row["staleness"]) for row in late.history] == [
        ("2", 0),
        ("3", 1),
        ("1", 2),
    ]
    assert late.w == 6
    waiting = run(grid(), rounds=3, max_in_flight=1)
    assert [row["time"] for row in waiting.history] == [10, 11, 12]
    core = victim.make().core
    # With two in flight, an edge that is asked when another one answers is one version stale.
    omits = ClonedKD(core, num_clones=1, max_in_flight=2, max_staleness=1)
    slow = VirtualGrid(victim.grid().apps[:3], compute=by_edge(10, 1, 1), core=0.5)
    omits.start(slow, ArrayRecord(core.model.state_dict()), num_rounds=3)
    assert [(row["edge"], row["staleness"], row["accepted"]) for row in omits.history] == [
        ("1", 0, 1),
        ("2", 1, 1),
        ("0", 2, 0),
    ]


def test_cloned_kd_on_a_virtual_grid_ends_with_the_bits_of_flowers_loop():
    core = small_core()
    first = ArrayRecord(core.model.state_dict())
    ends = []
    for loop in (Strategy.start, ClonedKD.start):
        strategy = ClonedKD(core, num_clones=2)
        loop(strategy, VirtualGrid([app()] * 3, compute=5.0), first, num_rounds=2)
        ends.append(strategy.state.params)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_flowers_fedavg_waits_for_its_slowest_edge():
    grid = VirtualGrid(nodes(3), compute=by_edge(1, 5, 2))
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    times = []

    def evaluate(server_round, arrays):
        times.append((grid.now(), float(arrays["w"].numpy())))

    strategy.start(grid, NOTHING, num_rounds=2, evaluate_fn=evaluate)
    assert times == [(0, 0), (5, 2), (10, 2)]  # the mean of 1, 2, 3


def test_send_and_receive_ends_at_the_timeout_or_when_all_is_lost():
    grid = VirtualGrid(nodes(3), compute=by_edge(1, 50, 2), stay=by_edge(100, 100, 1))
    replies = grid.send_and_receive([train(edge) for edge in range(3)], timeout=10)
    assert [reply.metadata.src_node_id for reply in replies] == [100]
    assert grid.now() == 10
    replies = grid.send_and_receive([train(edge) for edge in range(3)])
    assert [reply.metadata.src_node_id for reply in replies] == [100, 101]
    assert grid.now() == 60


def test_a_reply_that_is_pulled_while_its_node_is_away_is_lost():
    grid = VirtualGrid(nodes(1), stay=2.0, away=1.0)
    (message_id,) = grid.push_messages([train(0)])
    while grid.now() < 2.5:
        grid.advance(2.5)
    (reply,) = grid.pull_messages([message_id])
    assert reply.has_error()
    assert reply.error.code == 5
    assert grid.pull_messages([message_id]) == []
    assert grid.push_messages([train(0)]) == [""]


def test_time_does_not_go_back():
    grid = VirtualGrid(nodes(1))
    grid.advance(5.0)
    with pytest.raises(ValueError, match=r"until: expected at least 5\.0, got 4"):
        grid.advance(4.0)


NUMBERS = st.floats(0.01, 100)


@settings(max_examples=40, deadline=None)
@given(
    num_edges=st.integers(1, 12),
    cap=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    compute=NUMBERS,
    stay=st.floats(1, 300),
    core=st.floats(0, 20),
    crash=st.floats(0, 0.6),
    arrival=NUMBERS,
    timeout=st.floats(1, 200),
    revisit=st.booleans(),
)
def test_every_request_is_accounted_for_in_any_federation(
    num_edges, cap, seed, compute, stay, core, crash, arrival, timeout, revisit
):
    train_seconds = LogNormal(median=compute, sigma=1.0)
    bytes_per_second = LogNormal(median=W_BYTES, sigma=0.5, per_edge=True)

    def once():
        grid = VirtualGrid(
            nodes(num_edges),
            compute=train_seconds,
            down=bytes_per_second,
            up=bytes_per_second,
            arrival=Exponential(mean=arrival),
            stay=Exponential(mean=stay),
            away=Exponential(mean=stay),
            crash=crash,
            core=core,
            seed=seed,
        )
        strategy = run(
            grid, rounds=2 * num_edges, timeout=timeout, max_in_flight=cap, revisit=revisit
        )
        return strategy, grid

    strategy, grid = once()
    events = strategy.events
    for times in ([e.time for e in events], [e.time for e in grid.events]):
        assert times == sorted(times)
    under_way = set()
    waiting = 0
    for event in events:
        if event.kind == "ask":
            assert event.number not in under_way
            under_way.add(event.number)
        elif event.kind in ("answer", "error", "expire"):
            under_way.remove(event.number)
            waiting += 1
        elif event.kind == "learn":
            waiting -= 1
        assert len(under_way) <= cap
        assert waiting < 2 * cap
    assert all(row["staleness"] >= 0 for row in strategy.history)
    # Every request is settled, waits for the core, or is under way.
    number_of = Counter(event.kind for event in events)
    assert number_of["ask"] == number_of["absorb"] + number_of["refuse"] + len(under_way) + waiting
    asked = [event.number for event in events if event.kind == "ask"]
    assert asked == list(range(1, len(asked) + 1))
    edges = Counter(event.edge for event in events if event.kind == "ask")
    assert revisit or not edges or max(edges.values()) == 1
    # An answer arrives when its edge was asked plus the two transfers and the training.
    for event in grid.events:
        if event.kind == "answer":
            edge, visit = int(event.edge), event.number
            (sent,) = (
                e.time
                for e in grid.events
                if (e.kind, e.edge, e.number) == ("ask", event.edge, visit)
            )
            seconds = train_seconds(edge, visit, fold_in(seed, "compute", edge, visit))
            for way in ("down", "up"):
                # 0 in place of the visit: these draws are `per_edge`.
                seconds += W_BYTES / bytes_per_second(edge, visit, fold_in(seed, way, edge, 0))
            assert event.time == pytest.approx(sent + seconds)
    # The same seed gives the same events and the same sum.
    second_strategy, second_grid = once()
    assert second_strategy.events == events
    assert second_grid.events == grid.events
    assert second_strategy.w == strategy.w


@pytest.mark.parametrize("num_edges", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_an_edge_costs_two_milliseconds_and_no_message_is_kept(num_edges):
    # 0.8 ms of a processor beside three busy processes; 1.1 ms with the log that pytest keeps.
    started = time.process_time()
    grid = VirtualGrid(nodes(num_edges), compute=LogNormal(median=60, sigma=1.0), core=0.1)
    strategy = run(grid, rounds=num_edges, timeout=1e5, max_in_flight=100)
    assert strategy.w == num_edges * (num_edges + 1) / 2
    assert time.process_time() - started < 0.002 * num_edges
    gc.collect()
    assert sum(type(item) is Message for item in gc.get_objects()) < 200


def test_the_work_of_a_round_does_not_grow(monkeypatch):
    """Each event costs one pull for all requests, and no copy of the books is made."""
    calls = []
    grid = VirtualGrid(nodes(50), compute=LogNormal(median=60, sigma=1.0), core=0.1)
    pull = grid.pull_messages
    monkeypatch.setattr(grid, "pull_messages", lambda ids: calls.append(ids) or pull(ids))
    monkeypatch.setattr(Session, "progress", None)  # only a checkpoint needs it
    strategy = run(grid, rounds=50, max_in_flight=20)
    assert strategy.w == 50 * 51 / 2
    # The names of the edges; then for each round the request, the answer and the core's time.
    assert len(calls) <= 2 + 3 * 50


@pytest.mark.parametrize("core", [0.0, 0.1, 1.0, 3.0])
def test_edges_of_equal_speed_are_at_most_two_slots_of_versions_late(core):
    """With m slots, m answers may wait while m requests are under way; see docs/asynchronous.md."""
    for slots in (2, 3, 5):
        grid = VirtualGrid(nodes(20), core=core)
        strategy = run(grid, rounds=60, max_in_flight=slots, revisit=True)
        assert max(row["staleness"] for row in strategy.history) == 2 * slots - 1


def test_a_run_waits_for_its_only_edge_to_recover():
    """It rests 10 s after its first failure and 20 s after its second, longer than the timeout."""
    answer = adds(5)
    failures = [1, 2]

    def edge(message, context):
        if message.metadata.message_type == "train" and failures:
            raise MemoryError(f"out of memory, {failures.pop()} to go")
        return answer(message, context)

    strategy = run(VirtualGrid([edge]), rounds=3, timeout=5, revisit=True)
    assert [row["accepted"] for row in strategy.history] == [0, 0, 1]
    # One second of training each.
    assert [row["time"] for row in strategy.history] == [1, 12, 33]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"down": 0.0}, r"down of edge 0: expected above 0, got 0\.0"),
        ({"up": 0}, "up of edge 0: expected above 0, got 0"),
        ({"crash": 1.5}, r"crash of edge 0: expected 0 to 1, got 1\.5"),
        ({"crash": float("nan")}, "crash of edge 0: expected 0 to 1, got nan"),
        ({"compute": -1}, "compute of edge 0: expected at least 0, got -1"),
    ],
)
def test_a_number_out_of_range_is_named(options, message):
    grid = VirtualGrid(nodes(1), **options)
    with pytest.raises(ValueError, match=message):
        run(grid, rounds=1)


def test_a_grid_without_edges_is_an_error():
    with pytest.raises(ValueError, match="apps: expected at least one, got none"):
        VirtualGrid([])


@pytest.mark.parametrize("result", [{"w": 1.0}, "done", 3, False])
def test_a_result_that_is_no_message_is_a_failure_of_its_edge(result):
    """As with Flower, it costs one round and does not end the run."""
    answer = adds(1)

    def edge(message, context):
        return answer(message, context) if message.metadata.message_type == "query" else result

    grid = VirtualGrid([edge, adds(2)], compute=1.0)
    strategy = run(grid, rounds=2)
    assert steps(strategy)[:2] == [(0, "ask", 0), (1, "error", 0)]
    assert [row["accepted"] for row in strategy.history] == [0, 1]
    cause = f"TypeError: app: expected a Message or None, got {type(result).__name__}"
    assert strategy.history[0]["cause"] == f"expected a reply, got error 2: {cause!r}"
    assert [event.kind for event in grid.events if event.edge == "0"] == ["arrive", "ask", "error"]


def test_an_edge_that_answers_a_query_wrongly_has_no_name():
    def edge(message, context):
        query = message.metadata.message_type == "query"
        return "edge 7" if query else adds(2)(message, context)

    strategy = run(VirtualGrid([edge]), rounds=1)
    assert [(row["edge"], row["accepted"]) for row in strategy.history] == [("node 100", 1)]


def test_an_edge_that_returns_none_never_answers():
    grid = VirtualGrid([lambda message, context: None])
    assert grid.send_and_receive([train(0)]) == []
    assert [event.kind for event in grid.events] == ["arrive", "ask"]
