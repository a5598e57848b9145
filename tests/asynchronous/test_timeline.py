import pytest

from flwr_cloned_kd import Event, LogNormal, VirtualGrid, draw_timeline
from flwr_cloned_kd.asynchronous.timeline import CORE, Span, spans
from tests.helpers.scripted import by_edge, nodes, run


def test_spans_pair_the_beginnings_with_their_ends():
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


def test_a_request_that_expires_is_a_span_up_to_its_deadline():
    grid = VirtualGrid(nodes(2), compute=by_edge(1, 9))
    strategy = run(grid, rounds=2, timeout=5, max_in_flight=2)
    assert Span("2", 0, 5, "expire") in spans(strategy.events)


def test_a_span_without_an_end_lasts_until_the_last_event():
    asked = [Event(0.0, "ask", "1", 1, 0), Event(3.0, "arrive", "2", 0, 0)]
    assert spans(asked) == [Span("1", 0, 3, "open")]
    learning = [Event(1, "learn", "core", 1, 0), Event(3, "arrive", "2", 0, 0)]
    assert spans(learning) == [Span(CORE, 1, 3, "open")]


def test_an_edge_called_core_has_a_lane_of_its_own():
    events = [Event(0, "ask", "core", 1, 0), Event(1, "answer", "core", 1, 0)]
    assert [span.lane for span in spans(events)] == ["core"] != [CORE]


@pytest.mark.parametrize("source", ["strategy", "grid"])
def test_a_timeline_is_drawn_for_many_edges_too(tmp_path, source):
    grid = VirtualGrid(nodes(70), compute=LogNormal(median=5, sigma=1), crash=0.1, stay=30.0)
    strategy = run(grid, rounds=70, timeout=20, max_in_flight=8)
    events = {"strategy": strategy.events, "grid": grid.events}[source]
    draw_timeline(events, tmp_path / "timeline.png", title="seventy edges")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
