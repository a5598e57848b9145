"""What a run leaves behind."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from flwr_cloned_kd.apps.report import Report
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.apps.tables import comparison_table, final_accuracy, rounds_table
from flwr_cloned_kd.asynchronous.timeline import Event
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import NOTHING, Tally, adds, small_core


def row(server_round, accuracy, accepted=1.0, edge="0"):
    return {
        "round": server_round,
        "edge": edge,
        "accepted": accepted,
        "core-accuracy": accuracy,
        "bytes-down": 1000,
        "bytes-up": 2000,
    }


def ended(events, history=()):
    """A strategy that has ended."""
    return SimpleNamespace(events=events, history=list(history))


@pytest.fixture
def report(tmp_path):
    settings = Settings(results=str(tmp_path), strategy="cloned-kd,fedavg", seed=3)
    report = Report(settings, small_core(), 0.5)
    for server_round, accuracy in ((1, 0.6), (2, 0.7)):
        report.add("cloned-kd", row(server_round, accuracy))
    report.add("cloned-kd", row(3, 0.1, accepted=0.0))
    report.add("fedavg", row(1, 0.65, edge="all"))
    return report


def test_rows_are_on_disk_as_they_come(report):
    lines = (report.folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["strategy"] for r in rows] == ["cloned-kd"] * 3 + ["fedavg"]
    assert all(r["seconds"] >= 0 for r in rows)


def test_rounds_before_a_resumption_come_first_on_disk_too(report):
    history = [{**row(number, 0.6), "time": 3.0 * number} for number in range(1, 6)]
    report.keep("cloned-kd", ended([], history))
    lines = (report.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == report.rows
    assert [r["strategy"] for r in report.rows] == ["cloned-kd"] * 5 + ["fedavg"]
    assert [r["seconds"] for r in report.rows[:2]] == [3.0, 3.0]


def test_the_summary_says_what_ran_where_and_what_came_out(report):
    report.finish()
    summary = json.loads((report.folder / "summary.json").read_text())
    assert summary["final_core_accuracy"] == 0.7
    assert summary["final_accuracies"] == {"cloned-kd": 0.7, "fedavg": 0.65}
    assert summary["first_core_accuracy"] == 0.5
    assert summary["refused"] == 1
    assert summary["seed"] == 3
    assert summary["config"]["num-edges"] == 9
    assert {"python", "flwr", "torch"} <= set(summary["versions"])
    assert summary["hardware"]["cores"] >= 1
    assert not list(report.folder.glob("*.part"))


def test_the_picture_is_drawn(report):
    report.finish()
    assert (report.folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_strategy_of_the_users_own_needs_three_keys_of_a_round(report):
    report.add("mine", {"round": 1, "accepted": 1, "core-accuracy": 0.8})
    report.finish()
    summary = json.loads((report.folder / "summary.json").read_text())
    assert summary["final_accuracies"] == {"cloned-kd": 0.7, "fedavg": 0.65, "mine": 0.8}
    assert summary["accounts"]["mine"]["bytes-per-edge"] == {"all": [0, 0]}


def test_a_strategy_without_bytes_has_a_curve_over_the_rounds_only(report, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    report.add("mine", {"round": 1, "accepted": 1, "core-accuracy": 0.8})
    report.finish()
    left, right = figures[0].axes
    labels = [
        [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
        for axes in (left, right)
    ]
    assert labels == [["Cloned KD", "FedAvg", "mine"], ["Cloned KD", "FedAvg"]]
    assert all(tick == round(tick) for tick in left.get_xticks())


def test_without_matplotlib_the_rest_is_still_written(report, monkeypatch):
    def missing(*args):
        raise ImportError("matplotlib")

    monkeypatch.setattr("flwr_cloned_kd.apps.report.draw_accuracy", missing)
    report.finish()
    assert (report.folder / "summary.json").exists()


def test_a_refused_round_does_not_count():
    rows = [{"strategy": "x", **row(1, 0.6)}, {"strategy": "x", **row(2, 0.1, accepted=0.0)}]
    assert final_accuracy(rows, "x", 0.5) == 0.6
    assert final_accuracy(rows[1:], "x", 0.5) == 0.5


def test_tables_show_every_round_and_every_strategy(report):
    console = Console(width=118, record=True, file=io.StringIO())
    console.print(rounds_table(report.rows))
    console.print(comparison_table(report.rows, 0.5))
    text = console.export_text()
    assert "refused" in text
    assert "0.700" in text
    assert "FedAvg" in text
    assert "first core: 0.500" in text


def test_the_table_of_rounds_marks_undone_ones():
    rows = [{"strategy": "cloned-kd", **row(1, 0.6), "seconds": 1.0, "undone": 1.0}]
    assert list(rounds_table(rows).columns[7].cells) == ["undone"]


def seconds_row(server_round, seconds, idle, core, train):
    numbers = {"core-idle-seconds": idle, "core-seconds": core, "reported-train-seconds": train}
    return {"strategy": "cloned-kd", **row(server_round, 0.6), "seconds": seconds, **numbers}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # 20 s until the first answer, of which the edge trained 4 s; then 3 s, of which 2 s. The
        # core learned for 1 s each; 1.5 s are left of 25.5 s.
        (
            [seconds_row(1, 21.5, 20, 1, 4), seconds_row(2, 4.0, 3, 1, 2)],
            ["25.5", "6.0", "2.0", "16.0", "1.5"],
        ),
        # An edge that trained while the core learned, and edges that report what cannot be.
        ([seconds_row(1, 3.0, 1, 2, 9)], ["3.0", "1.0", "2.0", "0.0", "0.0"]),
        ([seconds_row(1, 3.0, 1, 2, 1e300)], ["3.0", "1.0", "2.0", "0.0", "0.0"]),
        ([seconds_row(1, 3.0, 1, 2, -5)], ["3.0", "0.0", "2.0", "1.0", "0.0"]),
        # In virtual time the parts are seconds of another clock.
        ([seconds_row(1, 3.0, 60, 20, 50)], ["3.0", "-", "-", "-", "-"]),
        # Flower's own strategies do not measure the parts.
        ([{"strategy": "fedavg", **row(1, 0.6), "seconds": 7.0}], ["7.0", "-", "-", "-", "-"]),
    ],
)
def test_the_comparison_says_where_the_seconds_went(rows, expected):
    table = comparison_table(rows, 0.5)
    titles = [column.header for column in table.columns]
    assert titles[-5:] == ["seconds", "edges train", "core learns", "start", "other"]
    assert [next(iter(column.cells)) for column in table.columns][-5:] == expected
    console = Console(width=118, record=True, file=io.StringIO())
    console.print(table)
    assert "…" not in console.export_text()


def test_the_summary_accounts_for_bytes_time_and_staleness(report):
    late = {"staleness": 2, "core-seconds": 1.5, "core-idle-seconds": 0.5, "edge-seconds": 4.0}
    report.add("cloned-kd", row(4, 0.7) | late)
    report.add("cloned-kd", row(5, 0.7, edge="1") | late)
    accounts = report.summary()["accounts"]
    assert set(accounts) == {"cloned-kd", "fedavg"}
    account = accounts["cloned-kd"]
    assert (account["bytes-down"], account["bytes-up"]) == (5000, 10000)
    assert account["bytes-per-edge"] == {"0": [4000, 8000], "1": [1000, 2000]}
    assert account["core-seconds"] == 3.0
    assert account["core-idle-seconds"] == 1.0
    assert account["staleness"] == {"2": 2}


HOSTILE = ("clinic[/x]", "[bold]b", "$\\frac$", "a$b$", "\\$x$", "core", "a\\[/x]")


@pytest.mark.parametrize("name", HOSTILE)
def test_an_edge_cannot_end_a_run_by_its_name(report, name, flower_log):
    report.add("cloned-kd", row(4, 0.8, edge=name))
    events = [Event(0, "ask", name, 1, 0), Event(1, "answer", name, 1, 0)]
    report.keep("cloned-kd", ended(events))
    report.finish()
    assert (report.folder / "timeline-cloned-kd.png").exists()
    assert not any("picture" in line for line in flower_log)
    console = Console(width=118, record=True, file=io.StringIO())
    console.print(rounds_table(report.rows))
    assert f" {name} " in console.export_text()


def test_two_runs_of_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr("flwr_cloned_kd.apps.report.time.strftime", lambda form: "20260101-000000")
    settings = Settings(results=str(tmp_path / "deep" / "er"))
    folders = [Report(settings, small_core(), 0.5).folder.name for _ in range(3)]
    first = "digits-CEM-practical-seed0-20260101-000000"
    assert folders == [first, f"{first}-2", f"{first}-3"]


def test_a_picture_that_fails_is_one_line_in_the_log(report, monkeypatch, flower_log):
    def broken(*args, **options):
        raise RuntimeError("no such font")

    monkeypatch.setattr("flwr_cloned_kd.apps.report.draw_timeline", broken)
    report.keep("cloned-kd", ended([]))
    report.finish()
    assert "No picture: RuntimeError: no such font" in flower_log
    assert any(line.startswith("Results in ") for line in flower_log)
    command = f"{sys.executable} -m flwr_cloned_kd report {report.folder}"
    assert f"To make a page of figures: {command}" in flower_log


def test_a_timeline_of_a_real_run_is_drawn(report):
    strategy = Tally(max_in_flight=2)
    strategy.start(FakeGrid([adds(1), adds(2), adds(3)]), NOTHING, num_rounds=3)
    report.keep("cloned-kd", strategy)
    report.finish()
    picture = report.folder / "timeline-cloned-kd.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
