"""The accuracy of the core over rounds, bytes and seconds."""

from flwr_cloned_kd.reading.curves import Point, curve
from tests.helpers.results import round_row


def test_bytes_and_seconds_add_up_and_a_refused_round_keeps_the_core():
    rows = [round_row(1, 0.6), round_row(2, 0.1, accepted=0.0), round_row(3, 0.7)]
    assert curve(rows, 0.5) == [
        Point(0, 0.0, 0.0, 0.5),
        Point(1, 3.0, 1.5, 0.6),
        Point(2, 6.0, 3.0, 0.6),
        Point(3, 9.0, 4.5, 0.7),
    ]


def test_without_a_first_accuracy_it_begins_with_the_first_known_one():
    rows = [round_row(1, 0.1, accepted=0.0), round_row(2, 0.6)]
    assert curve(rows, None) == [Point(2, 6.0, 3.0, 0.6)]


def test_a_round_may_measure_nothing():
    bare = {"strategy": "own", "round": 1, "accepted": 1.0}
    assert curve([bare], 0.5) == [Point(0, 0.0, 0.0, 0.5), Point(1, 0.0, 0.0, 0.5)]
    assert curve([bare], None) == []


def test_without_rounds_it_is_the_first_core():
    assert curve([], 0.5) == [Point(0, 0.0, 0.0, 0.5)]
