"""`python -m flwr_cloned_kd report` compares runs, and its errors say what it expected."""

import builtins
import json
import sys

import pytest

from flwr_cloned_kd.__main__ import main
from tests.helpers.results import round_row, write_run


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        write_run(tmp_path / "results" / f"{seed}", seed=seed)
    return tmp_path / "results"


def test_it_prints_a_table_and_writes_a_page(results, capsys):
    assert main(["report", str(results)]) == 0
    output = capsys.readouterr().out
    assert "0.700" in output
    assert f"Page: {results.parent / 'report.html'}" in output
    assert (results.parent / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_the_page_has_the_name_that_was_asked_for(results, capsys):
    assert main(["report", str(results / "0"), "--out", "own.html", "--target", "0.6"]) == 0
    assert (results.parent / "own.html").exists()
    assert "until 0.6" in capsys.readouterr().out


def test_without_html_no_page_is_written(results, capsys):
    assert main(["report", str(results), "--no-html"]) == 0
    assert "0.700" in capsys.readouterr().out
    assert not list(results.parent.glob("*.html"))


def test_it_opens_the_page_if_asked_to(results, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["report", str(results), "--open"]) == 0
    assert opened == [(results.parent / "report.html").as_uri()]


def test_many_differences_have_a_table_and_few_are_in_the_names(results, capsys):
    write_run(results / "paper", preset="paper")
    main(["report", str(results), "--no-html"])
    output = capsys.readouterr().out
    assert "preset=paper" in output
    assert "The configs differ in" not in output
    write_run(results / "far", preset="paper", lr=0.2, momentum=0.5)
    main(["report", str(results), "--no-html"])
    output = capsys.readouterr().out
    assert "The configs differ in" in output
    assert "momentum" in output


def test_remarks_are_printed(results, capsys):
    write_run(results / "begun", [], finished=False)
    main(["report", str(results), "--no-html"])
    assert "begun: no round has ended yet" in capsys.readouterr().out


def test_a_remark_cannot_control_the_terminal(results, capsys):
    for name in ("one", "two"):
        write_run(results / name, preset="\x1b[2J")
    main(["report", str(results), "--no-html"])
    output = capsys.readouterr().out
    assert "seed 0 has 2 runs" in output
    assert "\x1b" not in output


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent", "absent: expected a results folder (with metrics.jsonl) or a folder of such"),
        (".", "got no such folder in it"),
    ],
)
def test_a_path_without_runs_is_an_error(results, capsys, path, message):
    assert main(["report", path]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_damaged_run_is_an_error_with_its_line(results, capsys):
    with (results / "0" / "metrics.jsonl").open("a") as file:
        file.write("oops\n")
    assert main(["report", str(results)]) == 2
    assert "metrics.jsonl, line 3: expected JSON, got b'oops'" in capsys.readouterr().err


def test_damaged_events_cost_the_page_and_not_the_table(results, capsys):
    (results / "0" / "events-cloned-kd.jsonl").write_text("oops\n")
    assert main(["report", str(results)]) == 2
    captured = capsys.readouterr()
    assert "0.700" in captured.out
    assert "No page: " in captured.err
    assert "events-cloned-kd.jsonl, line 1: expected JSON" in captured.err


def test_a_page_that_cannot_be_written_is_an_error(results, capsys):
    assert main(["report", str(results), "--out", "absent/report.html"]) == 2
    assert "No page: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "required: RUN"),
        (["reprot", "results"], "invalid choice: 'reprot' (choose from"),
        (["report", "results", "--ouut", "x"], "unrecognized arguments: --ouut x"),
        (["report", "results", "--target", "95"], "expected a fraction, 0 to 1, got '95'"),
        (["report", "results", "--target", "nan"], "expected a fraction, 0 to 1, got 'nan'"),
        (["report", "results", "--target", "best"], "expected a fraction, 0 to 1, got 'best'"),
    ],
    ids=["nothing", "command", "option", "percent", "nan", "word"],
)
def test_a_misspelt_command_is_an_error(results, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("RUN", "--out", "--no-html", "--open", "--target"))


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_without_the_extra_the_table_is_printed_and_the_install_command(
    results, capsys, monkeypatch, package
):
    original = builtins.__import__

    def blocked(name, *args, **options):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{package}'")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    monkeypatch.delitem(sys.modules, "flwr_cloned_kd.reading.figures", raising=False)
    assert main(["report", str(results)]) == 2
    captured = capsys.readouterr()
    assert "0.700" in captured.out
    assert f"No page: No module named '{package}'" in captured.err
    assert 'pip install "flwr-cloned-kd[report]"' in captured.err
    assert main(["report", str(results), "--no-html"]) == 0


def test_the_largest_numbers_and_half_a_character_do_not_stop_it(results, capsys):
    largest = {"bytes-down": 10**100, "bytes-up": 1e100, "seconds": 1e100, "time": -1e100}
    largest |= {"number": 1e100, "core-seconds": 1e100, "together": 1e100, "round": 10**100}
    names = {"cause": "\ud800", "edge": ["\ud800"], "strategy": "\ud800"}
    venn = {"student-only": 1e400, "both": float("nan"), "teacher-only": 10**400, "consensus": "a"}
    for seed in (0, 1):
        rows = [round_row(1, 1e100 * (-1) ** seed), round_row(2, 0.5, **largest, accepted=0)]
        rows[0] |= largest | venn
        write_run(results / f"large-{seed}", [row | names for row in rows], seed=seed, lr=1e400)
    assert main(["report", str(results), "--target", "0.5"]) == 0
    text = (results.parent / "report.html").read_text()
    data = text.split('id="figures">')[1].split("</script>")[0]
    constants = []  # NaN and Infinity, which are no JSON for a browser
    json.loads(data, parse_constant=constants.append)
    assert constants == []


def test_ten_thousand_rounds_take_seconds(results, capsys):
    rows = [round_row(number, 0.5) for number in range(1, 10_001)]
    write_run(results / "long", rows, preset="paper")
    assert main(["report", str(results)]) == 0
    assert "10000" in capsys.readouterr().out
