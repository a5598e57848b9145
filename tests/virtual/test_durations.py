import json
import math

import pytest

from flwr_cloned_kd import Constant, Exponential, LogNormal, Trace, VirtualGrid
from flwr_cloned_kd.virtual.durations import MAX_SIGMA
from tests.helpers.scripted import nodes, run


def test_constant_is_the_same_number_for_every_edge_visit_and_seed():
    assert {Constant(3.0)(edge, visit, visit) for edge in (0, "1") for visit in (1, 2)} == {3.0}


def test_log_normal_has_its_median_and_spread():
    draw = LogNormal(median=60.0, sigma=0.5)
    logs = sorted(math.log(draw(0, 1, seed)) for seed in range(4000))
    # Standard error of a median of n normals: 1.2533 sigma / sqrt(n) = 0.0099; four of them.
    assert logs[2000] == pytest.approx(math.log(60.0), abs=0.04)
    mean = sum(logs) / 4000
    deviation = math.sqrt(sum((x - mean) ** 2 for x in logs) / 4000)
    assert deviation == pytest.approx(0.5, abs=0.03)  # sigma / sqrt(2 n) = 0.0056; five of them


def test_the_widest_log_normal_number_is_still_finite(monkeypatch):
    draw = LogNormal(median=1e100, sigma=MAX_SIGMA)
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
def test_a_file_that_is_no_trace_is_named(tmp_path, name, text):
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
    ],
)
def test_a_parameter_out_of_range_is_an_error(make):
    with pytest.raises(ValueError, match="expected"):
        make()
