"""Results folders are read as far as they go, and what is damaged is refused by its line."""

import json
import time

import pandas
import pytest

from flwr_cloned_kd import LogNormal, VirtualGrid, load_run, load_runs
from flwr_cloned_kd.apps.report import Report
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.asynchronous.timeline import CORE, Event, Span, spans
from flwr_cloned_kd.reading import events
from flwr_cloned_kd.reading.events import events_file, read_events, write_events
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import NOTHING, Tally, adds, small_core
from tests.helpers.results import round_row, write_run


def test_a_run_is_read_with_its_config_its_rounds_and_its_summary(tmp_path):
    run = load_run(write_run(tmp_path / "run", seed=3))
    assert run.name == "run"
    assert (run.seed, run.finished, run.first_accuracy) == (3, True, 0.5)
    assert run.strategies == ["cloned-kd"]
    assert run.rounds_of("cloned-kd") == run.rounds == [round_row(1, 0.6), round_row(2, 0.7)]
    assert run.summary["seconds"] == 3.0
    assert run.config["preset"] == "practical"


def test_the_rounds_are_a_table_of_pandas(tmp_path):
    table = pandas.DataFrame(load_run(write_run(tmp_path / "run")).rounds)
    assert list(table["core-accuracy"]) == [0.6, 0.7]


def test_what_a_report_writes_is_read_back_with_its_events(tmp_path):
    settings = Settings(results=str(tmp_path), seed=7)
    report = Report(settings, small_core(), 0.4)
    assert load_run(report.folder).rounds == []  # a run that has just begun
    strategy = Tally(max_in_flight=2, on_round=lambda row: report.add("cloned-kd", row))
    strategy.start(FakeGrid([adds(1), adds(2), adds(3)]), NOTHING, num_rounds=3)
    report.keep("cloned-kd", strategy)
    going_on = load_run(report.folder)
    assert (going_on.finished, going_on.seed, going_on.first_accuracy) == (False, 7, 0.4)
    assert going_on.rounds == report.rows
    report.finish()
    run = load_run(report.folder)
    assert run.finished
    assert run.config == going_on.config == run.summary["config"]
    read = run.events_of("cloned-kd")
    assert [event[1:] for event in read] == [event[1:] for event in strategy.events]
    assert [event.time for event in read] == [round(event.time, 4) for event in strategy.events]
    assert run.events_of("fedavg") == []


def test_events_that_were_not_written_follow_from_the_rounds(tmp_path):
    """A run that is killed has the same spans as one that writes its events at its end."""
    report = Report(Settings(results=str(tmp_path)), small_core(), 0.4)
    strategy = Tally(max_in_flight=2, on_round=lambda row: report.add("cloned-kd", row))
    durations = LogNormal(median=60.0, sigma=1.0)
    edges = [adds(number) for number in range(20)]
    grid = VirtualGrid(edges, compute=durations, core=20.0, crash=0.3, seed=1)
    strategy.start(grid, NOTHING, num_rounds=20)
    rebuilt = load_run(report.folder).events_of("cloned-kd")
    assert [event.time for event in rebuilt] == sorted(event.time for event in rebuilt)
    report.keep("cloned-kd", strategy)
    written = load_run(report.folder).events_of("cloned-kd")
    assert len(written) == len(strategy.events)  # none is added to those that were written
    assert {span.look for span in spans(written)} == {"train", "error", "learn", "refused"}
    for span, other in zip(sorted(spans(rebuilt)), sorted(spans(written)), strict=True):
        assert (span.lane, span.look) == (other.lane, other.look)
        assert span.begin == pytest.approx(other.begin, abs=1e-3)
        assert span.end == pytest.approx(other.end, abs=1e-3)


def test_answers_of_one_group_have_the_same_span(tmp_path):
    costs = {"time": 10.0, "core-seconds": 2.0, "together": 2, "wait-seconds": 1.0}
    rows = [
        round_row(number, 0.6, number=number, **costs, **{"edge-seconds": float(number)})
        for number in (1, 2)
    ]
    run = load_run(write_run(tmp_path / "run", rows, finished=False))
    assert sorted(spans(run.events_of("cloned-kd"))) == [
        Span(CORE, 6.0, 10.0, "learn"),
        Span(CORE, 6.0, 10.0, "learn"),
        Span("1", 4.0, 5.0, "train"),
        Span("2", 3.0, 5.0, "train"),
    ]


def test_a_refused_answer_of_a_group_shares_its_span(tmp_path):
    # Three answers took 6 s of the core; it distilled two of them together and refused the third.
    costs = {"time": 10.0, "core-seconds": 2.0, "wait-seconds": 1.0, "edge-seconds": 1.0}
    rows = [
        round_row(1, 0.6, number=1, together=2, **costs),
        round_row(2, 0.6, number=2, **costs) | {"accepted": 0.0, "cause": "w: not finite"},
        round_row(3, 0.6, number=3, together=2, **costs),
    ]
    run = load_run(write_run(tmp_path / "run", rows, finished=False))
    events = run.events_of("cloned-kd")
    assert {event.time for event in events if event.kind == "learn"} == {4.0}
    assert {event.time for event in events if event.kind == "ask"} == {2.0}
    assert [event.number for event in events if event.kind == "refuse"] == [2]


def test_a_run_that_resumed_is_read_with_the_rounds_before(tmp_path):
    report = Report(Settings(results=str(tmp_path)), small_core(), 0.4)
    strategy = Tally()
    strategy.history = [
        {"round": number, "edge": "0", "accepted": 1.0, "core-accuracy": 0.5, "time": 2.0 * number}
        for number in (1, 2, 3)
    ]
    report.add("cloned-kd", strategy.history[2])
    report.keep("cloned-kd", strategy)
    assert [row["round"] for row in load_run(report.folder).rounds] == [1, 2, 3]


@pytest.mark.parametrize("cut", ['{"strategy": "cloned-kd", "rou', '{"edge": "\\ud8', "{"])
def test_the_cut_last_line_of_a_killed_run_is_left_out(tmp_path, cut):
    run = load_run(write_run(tmp_path / "run", finished=False, cut=cut))
    assert len(run.rounds) == 2
    assert not run.finished
    assert run.summary == {}
    assert run.config["lr"] == 0.1


def test_a_last_line_without_its_end_counts_if_it_is_whole(tmp_path):
    run = load_run(write_run(tmp_path / "run", cut=json.dumps(round_row(3, 0.8))))
    assert len(run.rounds) == 3


def test_a_folder_of_an_older_version_has_its_config_in_the_summary(tmp_path):
    folder = write_run(tmp_path / "run", seed=5)
    (folder / "config.json").unlink()
    assert load_run(folder).seed == 5
    (folder / "summary.json").unlink()
    run = load_run(folder)
    assert (run.config, run.seed, run.first_accuracy) == ({}, None, None)


HUGE = "1" + "0" * 400
DAMAGED = {
    "no JSON": ("metrics.jsonl", b"{oops\n", "line 1: expected JSON, got b'{oops'"),
    "no text": ("metrics.jsonl", b"\xff\xfe\n", "line 1: expected JSON"),
    "deep": ("metrics.jsonl", b"[" * 100_000 + b"\n", "line 1: expected JSON"),
    "a list": ("metrics.jsonl", b"[1]\n", "line 1: expected a JSON object, got [1]"),
    "no strategy": ("metrics.jsonl", b"{}\n", "line 1: strategy: expected a text, got None"),
    "no round": (
        "metrics.jsonl",
        b'{"strategy": "a", "round": 1.5}\n',
        "line 1: round: expected a whole number, got 1.5",
    ),
    "a truth value": (
        "metrics.jsonl",
        b'{"strategy": "a", "round": 1, "accepted": true}\n',
        "line 1: accepted: expected a number of at most 1e+100, got True",
    ),
    "not finite": (
        "metrics.jsonl",
        b'{"strategy": "a", "round": 1, "accepted": 1, "core-accuracy": NaN}\n',
        "line 1: core-accuracy: expected a number of at most 1e+100, got nan",
    ),
    "a huge number": (
        "metrics.jsonl",
        b'{"strategy": "a", "round": 1, "accepted": 1, "seconds": ' + HUGE.encode() + b"}\n",
        "line 1: seconds: expected a number of at most 1e+100, got 1000",
    ),
    "a list as summary": ("summary.json", b"[]", "summary.json: expected a JSON object, got []"),
    "half a summary": ("summary.json", b'{"config', "summary.json: expected JSON"),
    "a config of another kind": (
        "summary.json",
        b'{"config": "x"}',
        "summary.json: config: expected a JSON object, got 'x'",
    ),
    "a seed of another kind": (
        "summary.json",
        b'{"config": {"seed": "<script>"}}',
        "summary.json: seed: expected a number of at most 1e+100, got '<script>'",
    ),
    "a first accuracy of another kind": (
        "summary.json",
        b'{"first_core_accuracy": "high"}',
        "summary.json: first_core_accuracy: expected a number of at most 1e+100, got 'high'",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_foreign_file_is_refused_by_path_and_line(tmp_path, case):
    name, content, message = DAMAGED[case]
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="expected") as error:
        load_run(folder)
    assert str(error.value).startswith(str(folder / name))
    assert message in str(error.value)
    assert len(str(error.value)) < len(str(folder)) + 200


def test_a_line_in_the_middle_is_not_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(f"{lines[0]}\n{lines[1][:20]}\n{lines[1]}\n")
    with pytest.raises(ValueError, match="line 2: expected JSON"):
        load_run(folder)


def test_what_is_no_results_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a results folder, got no such folder"):
        load_run(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a results folder, got a file"):
        load_run(tmp_path / "file")
    with pytest.raises(ValueError, match=r"with metrics\.jsonl, got none in it"):
        load_run(tmp_path)


def test_a_folder_of_results_folders_stands_for_all_of_them(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / "many" / name)
    (tmp_path / "many" / "notes").mkdir()
    alone = write_run(tmp_path / "alone")
    names = [run.name for run in load_runs([alone, tmp_path / "many", tmp_path / "many" / "a"])]
    assert names == ["alone", "a", "b"]


@pytest.mark.parametrize(
    ("name", "got"), [("absent", "no such folder"), ("empty", "no such folder in it")]
)
def test_a_path_without_runs_is_refused(tmp_path, name, got):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"a folder of such folders, got {got}$"):
        load_runs([tmp_path / name])


def test_ten_thousand_rounds_are_read_in_seconds(tmp_path):
    rows = [round_row(number, 0.5) for number in range(1, 10_001)]
    folder = write_run(tmp_path / "run", rows)
    began = time.monotonic()
    assert len(load_run(folder).rounds) == 10_000
    assert time.monotonic() - began < 10  # it takes 0.1 s on an idle core


def test_events_of_ten_thousand_edges_are_a_few_megabytes(tmp_path):
    kinds = ("arrive", "ask", "answer", "learn", "absorb")
    many = [
        Event(number + 0.123456789, kind, f"edge-{number}", number, number)
        for number in range(10_000)
        for kind in kinds
    ]
    write_events(tmp_path, "cloned-kd", many)
    assert events_file(tmp_path, "cloned-kd").stat().st_size < 3e6
    assert len(read_events(tmp_path, "cloned-kd")) == len(many)


def test_of_too_many_events_the_first_are_kept(tmp_path, monkeypatch, flower_log):
    monkeypatch.setattr(events, "MAX_EVENTS", 2)
    write_events(tmp_path, "x", [Event(number, "ask", "a", number, 0) for number in range(5)])
    assert [event.number for event in read_events(tmp_path, "x")] == [0, 1]
    assert any("kept the first 2 of 5" in line for line in flower_log)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["time"]', "line 1: expected the columns time, kind, edge, number, version, got"),
        ("HEADER\n[1, 2]", r"line 2: expected 5 values, got \[1, 2\]"),
        (
            'HEADER\n["now", "ask", "a", 1, 0]',
            r"line 2: time: expected a number of at most 1e\+100, got 'now'",
        ),
        ('HEADER\n[1, 7, "a", 1, 0]', "line 2: kind: expected a text, got 7"),
        ('HEADER\n[1, "ask", null, 1, 0]', "line 2: edge: expected a text, got None"),
        ('HEADER\n[1, "ask", "a", -1, 0]', "line 2: number: expected a whole number, got -1"),
    ],
    ids=["columns", "length", "time", "kind", "edge", "number"],
)
def test_damaged_events_are_refused(tmp_path, line, message):
    header = json.dumps(Event._fields)
    events_file(tmp_path, "x").write_text(line.replace("HEADER", header) + "\n")
    with pytest.raises(ValueError, match=message):
        read_events(tmp_path, "x")
