"""Virtual time: the same strategies, an order of events that can be derived by hand."""

import gc
import json
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

from flwr_cloned_kd import (
    ClonedKD,
    Constant,
    Event,
    Exponential,
    LogNormal,
    Trace,
    VirtualGrid,
    accounts,
    draw_timeline,
)
from flwr_cloned_kd.asynchronous.timeline import CORE, Span, spans
from flwr_cloned_kd.virtual.draws import LARGEST_SIGMA
from tests.helpers import victim
from tests.helpers.federation import NOTHING, Tally, adds, app, small_core

W_BYTES = 136  # a float64 scalar: 8 bytes and NumPy's header of 128


def by_edge(*numbers):
    return lambda edge, visit, seed: numbers[int(edge)]


def run(grid, *, rounds, timeout=1000.0, **options):
    strategy = Tally(**options)
    strategy.start(grid, NOTHING, num_rounds=rounds, timeout=timeout)
    return strategy


def told(strategy):
    return [(e.time, e.kind, int(e.edge) - 1) for e in strategy.events if e.kind != "arrive"]


def nodes(count):
    return [adds(1 + i) for i in range(count)]


def crash(message, context):
    if message.metadata.message_type == "query":
        return Message(Error(1, "no query function"), reply_to=message)
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("revisit", [False, True])
def test_edges_that_rested_do_not_end_a_run_with_a_request_under_way(revisit):
    """Four edges fail, one stays silent for 100 s, three answer.

    When the rest of the first edge ends at 11 s, the silent edge's request is under way.
    """

    def silent(message, context):
        return adds(0)(message, context) if message.metadata.message_type == "query" else None

    grid = VirtualGrid([crash] * 4 + [silent] + nodes(3))
    strategy = run(grid, rounds=8, timeout=100.0, revisit=revisit)
    assert [row["accepted"] for row in strategy.history] == [0] * 5 + [1] * 3
    assert strategy.w == 6
    assert strategy.history[-1]["time"] > 100


def test_a_timeline_derived_by_hand():
    """Four edges that train 1, 5, 1 and 1 s, two in flight, a core that learns for 2 s.

    While it learns from edge 0, from 1 to 3, edge 2 gets its slot, and edge 3 that of edge 2.
    """
    strategy = run(
        VirtualGrid(nodes(4), compute=by_edge(1, 5, 1, 1), core=2.0), rounds=4, max_in_flight=2
    )
    assert told(strategy) == [
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


def test_a_request_takes_its_way_there_its_training_and_its_way_back():
    grid = VirtualGrid(nodes(1), compute=10.0, down=W_BYTES / 2, up=W_BYTES / 3)
    assert run(grid, rounds=1).history[0]["edge-seconds"] == pytest.approx(2 + 10 + 3)


def test_no_thread_and_no_waiting():
    before, started = threading.active_count(), time.monotonic()
    seen = []
    grid = VirtualGrid(nodes(3), compute=86_400.0)
    strategy = Tally(on_round=lambda row: seen.append(threading.active_count()))
    strategy.start(grid, NOTHING, num_rounds=3, timeout=1e6)
    assert seen == [before] * 3
    assert grid.now() == 3 * 86_400
    assert time.monotonic() - started < 10


def test_an_edge_that_departs_loses_its_work_and_is_given_up():
    grid = VirtualGrid(nodes(2), compute=10.0, stay=by_edge(4, math.inf))
    strategy = run(grid, rounds=2, timeout=30)
    assert told(strategy) == [
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


def test_an_edge_that_departs_and_returns_is_asked_again_only_if_it_was_not_asked():
    grid = VirtualGrid(nodes(2), compute=2.0, stay=by_edge(math.inf, 1), away=5.0)
    strategy = run(grid, rounds=2, timeout=30)
    # Edge 1 is away from 1 to 6; then it stays for 1 s, too short for 2 s of training.
    assert told(strategy)[4:] == [
        (6, "ask", 1),
        (36, "expire", 1),
        (36, "learn", 1),
        (36, "refuse", 1),
    ]


def test_an_edge_that_answered_while_the_core_learned_and_left_is_not_lost():
    grid = VirtualGrid(
        nodes(2), compute=by_edge(1, 3), stay=by_edge(math.inf, 4), core=Constant(10)
    )
    strategy = run(grid, rounds=2, max_in_flight=2)
    assert [row["accepted"] for row in strategy.history] == [1, 1]
    assert [row["time"] for row in strategy.history] == [11, 21]


def test_a_crash_comes_half_way_and_the_edge_counts_as_visited():
    grid = VirtualGrid(nodes(2), compute=10.0, crash=by_edge(1, 0))
    strategy = run(grid, rounds=3, timeout=20)
    assert told(strategy)[:2] == [(0, "ask", 0), (5, "error", 0)]
    assert strategy.history[0]["cause"].startswith("expected a reply, got error 8")
    assert [row["accepted"] for row in strategy.history] == [0, 1]
    assert grid.now() == 15 + 20  # nobody is left to ask


def test_failures_in_a_row_pause_the_run_in_its_own_time():
    grid = VirtualGrid(nodes(5), compute=2.0, crash=by_edge(1, 1, 1, 1, 0))
    asked = [time for time, kind, _ in told(run(grid, rounds=5)) if kind == "ask"]
    # Each crash takes 1 s; after the third the pause is 1 s, after the fourth 2 s.
    assert asked == [0, 1, 2, 4, 7]


def test_an_edge_that_crashed_rests_before_it_is_asked_again():
    strategy = run(VirtualGrid(nodes(1), compute=2.0, crash=1.0), rounds=3, revisit=True)
    # 10 s of rest after the first crash, at 1, and 20 s after the second, at 12.
    assert [time for time, kind, _ in told(strategy) if kind == "ask"] == [0, 11, 32]


def test_late_arrivals_are_waited_for():
    grid = VirtualGrid(nodes(3), compute=1.0, arrival=by_edge(20, 0, 7))
    assert [(t, e) for t, kind, e in told(run(grid, rounds=3)) if kind == "ask"] == [
        (0, 1),
        (7, 2),
        (20, 0),
    ]


def test_sec_5_2_a_late_answer_is_distilled_omitted_or_waited_for():
    """Edge 0 lags: 10 s against 1 s. Cases 3, 1 and 2 of the paper."""
    grid = lambda: VirtualGrid(nodes(3), compute=by_edge(10, 1, 1))  # noqa: E731
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
    # With two in flight an edge asked on another one's arrival is one version behind anyway.
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
    first, ends = ArrayRecord(core.model.state_dict()), []
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
    ask = lambda: [Message(NOTHING_ASKED, 100 + edge, "train") for edge in range(3)]  # noqa: E731
    replies = grid.send_and_receive(ask(), timeout=10)
    assert [reply.metadata.src_node_id for reply in replies] == [100]
    assert grid.now() == 10
    assert [m.metadata.src_node_id for m in grid.send_and_receive(ask())] == [100, 101]
    assert grid.now() == 60


NOTHING_ASKED = RecordDict({"arrays": NOTHING})


def test_a_reply_pulled_while_its_node_is_away_is_gone():
    grid = VirtualGrid(nodes(1), stay=2.0, away=1.0)
    (message_id,) = grid.push_messages([Message(NOTHING_ASKED, 100, "train")])
    while grid.now() < 2.5:
        grid.advance(2.5)
    (reply,) = grid.pull_messages([message_id])
    assert reply.has_error()
    assert reply.error.code == 5
    assert grid.pull_messages([message_id]) == []
    assert grid.push_messages([Message(NOTHING_ASKED, 100, "train")]) == [""]


def test_time_does_not_run_back():
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
def test_whatever_happens_the_books_balance(
    num_edges, cap, seed, compute, stay, core, crash, arrival, timeout, revisit
):
    def once():
        grid = VirtualGrid(
            nodes(num_edges),
            compute=LogNormal(median=compute, sigma=1.0),
            down=LogNormal(median=W_BYTES, sigma=0.5, per_edge=True),
            up=LogNormal(median=W_BYTES, sigma=0.5, per_edge=True),
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
    for seen in (events, grid.events):  # time never runs back
        assert [event.time for event in seen] == sorted(event.time for event in seen)
    under_way, waiting = set(), 0
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
    # Every request that was made has come to an end, or is under way still.
    number_of = Counter(event.kind for event in events)
    assert number_of["ask"] == number_of["absorb"] + number_of["refuse"] + len(under_way) + waiting
    asked = [event.number for event in events if event.kind == "ask"]
    assert asked == list(range(1, len(asked) + 1))
    edges = Counter(event.edge for event in events if event.kind == "ask")
    assert revisit or not edges or max(edges.values()) == 1
    # Time of an answer: when it was asked, and its three parts.
    for event in grid.events:
        if event.kind == "answer":
            edge, visit = int(event.edge), event.number
            (sent,) = (
                e.time
                for e in grid.events
                if (e.kind, e.edge, e.number) == ("ask", event.edge, visit)
            )
            parts = grid._draw("compute", edge, visit)
            parts += W_BYTES / grid._draw("down", edge, visit)
            parts += W_BYTES / grid._draw("up", edge, visit)
            assert event.time == pytest.approx(sent + parts)
    # The same seed, the same events and the same sum.
    again, other = once()
    assert again.events == events
    assert other.events == grid.events
    assert again.w == strategy.w


def test_ten_thousand_edges_in_a_minute_and_no_message_is_kept():
    num_edges, started = 10_000, time.process_time()
    grid = VirtualGrid(nodes(num_edges), compute=LogNormal(median=60, sigma=1.0), core=0.1)
    strategy = run(grid, rounds=num_edges, timeout=1e5, max_in_flight=100)
    assert strategy.w == num_edges * (num_edges + 1) / 2
    assert time.process_time() - started < 60
    gc.collect()
    assert sum(type(found) is Message for found in gc.get_objects()) < 200


@pytest.mark.parametrize("core", [0.0, 0.1, 1.0, 3.0])
def test_edges_of_equal_speed_are_at_most_two_slots_of_versions_late(core):
    """What docs/asynchronous.md advises: m answers may wait while m more are under way."""
    for slots in (2, 3, 5):
        grid = VirtualGrid(nodes(20), core=core)
        strategy = run(grid, rounds=60, max_in_flight=slots, revisit=True)
        assert max(row["staleness"] for row in strategy.history) == 2 * slots - 1


def test_a_run_waits_for_its_only_edge_to_recover():
    """It rests 10 s after its first failure and 20 s after its second, longer than the timeout."""
    answer, failures = adds(5), [1, 2]

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
def test_a_speed_out_of_range_is_named(options, message):
    grid = VirtualGrid(nodes(1), **options)
    with pytest.raises(ValueError, match=message):
        run(grid, rounds=1)


# Timelines


def test_spans_pair_what_began_with_what_ended_it():
    grid = VirtualGrid(
        nodes(4), compute=by_edge(1, 4.5, 4, 100), core=2.0, crash=by_edge(0, 0, 1, 0)
    )
    strategy = run(grid, rounds=3, timeout=50, max_in_flight=4)
    # Edge 2 crashes half way through its 4 s; three rounds ask three edges.
    assert sorted(spans(strategy.events)) == [
        (CORE, 1, 3, "learn"),
        (CORE, 3, 3, "refused"),
        (CORE, 4.5, 6.5, "learn"),
        ("1", 0, 1, "train"),
        ("2", 0, 4.5, "train"),
        ("3", 0, 2, "error"),
    ]


def test_what_is_under_way_at_the_end_lasts_until_then():
    grid = VirtualGrid(nodes(2), compute=by_edge(1, 9))
    strategy = run(grid, rounds=2, timeout=5, max_in_flight=2)
    assert Span("2", 0, 5, "expire") in spans(strategy.events)
    begun = [Event(0.0, "ask", "1", 1, 0), Event(3.0, "arrive", "2", 0, 0)]
    assert spans(begun) == [Span("1", 0, 3, "open")]
    cut_off = [Event(1, "learn", "core", 1, 0), Event(3, "arrive", "2", 0, 0)]
    assert spans(cut_off) == [Span(CORE, 1, 3, "open")]
    namesake = [Event(0, "ask", "core", 1, 0), Event(1, "answer", "core", 1, 0)]
    assert [span.lane for span in spans(namesake)] == ["core"] != [CORE]


@pytest.mark.parametrize("whose", ["strategy", "grid"])
def test_a_timeline_is_drawn_for_many_edges_too(tmp_path, whose):
    grid = VirtualGrid(nodes(70), compute=LogNormal(median=5, sigma=1), crash=0.1, stay=30.0)
    strategy = run(grid, rounds=70, timeout=20, max_in_flight=8)
    events = {"strategy": strategy.events, "grid": grid.events}[whose]
    draw_timeline(events, tmp_path / "timeline.png", title="seventy edges")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_accounts_of_a_run_add_up():
    grid = VirtualGrid(nodes(4), compute=by_edge(1, 5, 1, 1), core=2.0)
    strategy = run(grid, rounds=4, max_in_flight=2)
    found = accounts(strategy.history)
    assert found["bytes-down"] == found["bytes-up"] == 4 * W_BYTES
    assert found["bytes-per-edge"] == {str(1 + edge): [W_BYTES, W_BYTES] for edge in range(4)}
    assert found["edge-seconds"] == 1 + 5 + 1 + 1
    # The core is busy from 1 to 9, 2 s for each; the rows of the timeline above.
    assert (found["core-idle-seconds"], found["core-seconds"]) == (1, 8)
    assert (found["wait-seconds"], found["edge-idle-seconds"]) == (5, 3)
    assert found["staleness"] == {"0": 1, "1": 1, "2": 1, "3": 1}


# Draws


def test_log_normal_has_its_median_and_spread():
    draw = LogNormal(median=60.0, sigma=0.5)
    logs = sorted(math.log(draw(0, 1, seed)) for seed in range(4000))
    # Standard error of a median of n normals: 1.2533 sigma / sqrt(n) = 0.0099; four of them.
    assert logs[2000] == pytest.approx(math.log(60.0), abs=0.04)
    mean = sum(logs) / 4000
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / 4000)
    assert deviation == pytest.approx(0.5, abs=0.03)  # sigma / sqrt(2 n) = 0.0056; five of them


def test_the_widest_log_normal_number_is_still_finite(monkeypatch):
    draw = LogNormal(median=1e100, sigma=LARGEST_SIGMA)
    # Python's normal numbers are sqrt(-2 ln u) cos v for u of at least 2^-53: at most 8.6.
    extreme = math.sqrt(2 * 53 * math.log(2))
    for gauss in (extreme, -extreme):
        monkeypatch.setattr("random.Random.gauss", lambda self, mu, sigma, x=gauss: x)
        assert 0 < draw(0, 1, 0) < math.inf


def test_exponential_has_its_mean():
    draw = Exponential(mean=30.0)
    # Standard error of the mean: 30 / sqrt(4000) = 0.47; four of them.
    assert sum(draw(0, 1, seed) for seed in range(4000)) / 4000 == pytest.approx(30.0, abs=1.9)


def test_a_slow_edge_stays_slow_if_drawn_per_edge():
    def seconds(per_edge):
        compute = LogNormal(median=10, sigma=1.0, per_edge=per_edge)
        strategy = run(VirtualGrid(nodes(2), compute=compute), rounds=6, revisit=True)
        return {(row["edge"], round(row["edge-seconds"], 6)) for row in strategy.history}

    assert len(seconds(per_edge=True)) == 2
    assert len(seconds(per_edge=False)) == 6


def test_a_trace_is_used_in_turn(tmp_path):
    as_json, as_csv = tmp_path / "trace.json", tmp_path / "trace.csv"
    as_json.write_text(json.dumps({"0": [3, 5], "1": [2.5]}))
    as_csv.write_text("edge,value\n0,3\n1,2.5\n0,5\n")
    for path in (as_json, as_csv):
        trace = Trace.read(path)
        assert [trace(0, visit, 0) for visit in (1, 2, 3)] == [3, 5, 3]
        assert trace("1", 4, 0) == 2.5
    strategy = run(VirtualGrid(nodes(2), compute=trace), rounds=4, revisit=True)
    assert [row["edge-seconds"] for row in strategy.history] == [3, 2.5, 5, 2.5]
    with pytest.raises(ValueError, match="trace: expected numbers for edge 2, got none"):
        trace(2, 1, 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", "[1, 2]"),
        ("t.json", '{"0": []}'),
        ("t.json", '{"0": [-1]}'),
        ("t.json", '{"0": ["fast"]}'),
        ("t.json", "{"),
        ("t.csv", "node,seconds\n0,1\n"),
        ("t.csv", "edge,value\n0,fast\n"),
        ("t.csv", "edge,value\n0,nan\n"),
    ],
)
def test_a_trace_that_is_none_is_named(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: expected edge -> numbers"):
        Trace.read(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogNormal(median=0, sigma=1),
        lambda: LogNormal(median=1, sigma=-1),
        lambda: LogNormal(median=math.inf, sigma=1),
        lambda: LogNormal(median=math.nan, sigma=1),
        lambda: LogNormal(median=1, sigma=1e4),
        lambda: LogNormal(median=1, sigma=math.nan),
        lambda: Exponential(mean=0),
        lambda: Exponential(mean=math.inf),
        lambda: Exponential(mean=math.nan),
        lambda: VirtualGrid([]),
        lambda: run(VirtualGrid(nodes(1), compute=-1.0), rounds=1),
    ],
)
def test_what_is_out_of_range_is_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()
