"""The numbers of a comparison."""

import io
import json
import re

import pytest
from rich.console import Console

from flwr_cloned_kd import load_runs
from flwr_cloned_kd.reading.groups import group_runs
from flwr_cloned_kd.reading.tables import (
    difference_cells,
    print_table,
    refusal_cells,
    run_cells,
    shared_cells,
    spread_cell,
    summary_cells,
    target_cell,
)
from tests.helpers.results import round_row, write_run


def text_of(cells, width=118):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_table(console, cells)
    return console.file.getvalue()


@pytest.fixture
def runs(tmp_path):
    """Two seeds: the final accuracies are 0.6 and 0.8, the best ones 0.7 and 0.8."""
    refused = round_row(3, 0.1, accepted=0.0, cause="staleness: expected at most 2, got 3")
    rows = [round_row(1, 0.7), round_row(2, 0.6), refused]
    write_run(tmp_path / "a", rows, seed=0)
    write_run(tmp_path / "b", [round_row(1, 0.75), round_row(2, 0.8), refused], seed=1)
    return load_runs([tmp_path])


def test_the_summary_has_mean_and_deviation_over_the_seeds(runs):
    """The deviation of 0.6 and 0.8 is 0.2 / sqrt(2) = 0.141; equal numbers have none."""
    cells = summary_cells(group_runs(runs))
    (row,) = [dict(zip(cells.headings, row)) for row in cells.rows]
    assert row == {
        "strategy": "cloned-kd",
        "seeds": "0, 1",
        "rounds": "3",
        "refused": "1",
        "first": "0.500",
        "final": "0.700 ± 0.141",
        "best": "0.750 ± 0.071",
        "MB down": "3.00",
        "MB up": "6.00",
        "seconds": "4.5",
    }


def test_a_target_says_what_it_took_to_reach_it(runs):
    cells = summary_cells(group_runs(runs), target=0.7)
    assert cells.headings[-2:] == ["MB until 0.7", "s until 0.7"]
    assert cells.rows[0][-2:] == ["3.00", "1.5"]
    assert summary_cells(group_runs(runs), target=0.8).rows[0][-2:] == ["1 of 2 runs"] * 2
    assert summary_cells(group_runs(runs), target=0.9).rows[0][-2:] == ["never", "never"]
    assert summary_cells(group_runs(runs), target=0.0).rows[0][-2:] == ["0.00", "0.0"]


def test_many_seeds_are_counted(tmp_path):
    for seed in range(5):
        write_run(tmp_path / f"{seed}", seed=seed)
    assert summary_cells(group_runs(load_runs([tmp_path]))).rows[0][1] == "5 seeds"


@pytest.mark.parametrize(
    ("values", "digits", "cell"),
    [([0.5], 3, "0.500"), ([1, 2], 0, "1.5 ± 0.7"), ([2, 2], 0, "2"), ([None, 1], 1, "-")],
)
def test_a_cell_has_a_mean_and_a_deviation(values, digits, cell):
    assert spread_cell(values, digits) == cell


def test_a_mean_over_runs_that_reached_a_target_needs_all_of_them():
    assert target_cell([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert target_cell([0.0, 0.0], 1) == "0.0"
    assert target_cell([1.0, None], 1) == "1 of 2 runs"


def test_refused_rounds_are_listed_with_their_causes(runs):
    cells = refusal_cells(runs)
    assert cells.headings == ["edge", "cause", "round", "strategy", "run"]
    assert cells.rows[0] == ["3", "staleness: expected at most 2, got 3", "3", "cloned-kd", "a"]
    assert [row[-1] for row in cells.rows] == ["a", "b"]


def test_configs_are_compared_key_by_key(tmp_path, runs):
    assert difference_cells(runs) is None
    other = load_runs([*[run.folder for run in runs], write_run(tmp_path / "c", preset="paper")])
    assert difference_cells(other) == (
        ["key", "preset=practical", "preset=paper"],
        [["preset", "practical", "paper"]],
    )
    assert shared_cells(other) == (["key", "value"], [["lr", "0.1"]])


def test_a_run_says_its_machine_if_it_knows_it(tmp_path):
    folder = write_run(tmp_path / "a")
    machine = {"hardware": {"cpu": "a CPU", "gpu": None}, "versions": {"flwr": "1.41.0"}}
    (folder / "summary.json").write_text(json.dumps({"config": {"seed": 2}} | machine))
    write_run(tmp_path / "b", finished=False)
    assert run_cells(load_runs([tmp_path])).rows == [
        ["a", "2", "yes", "a CPU", "flwr 1.41.0"],
        ["b", "0", "no", "-", "-"],
    ]


def test_the_printed_table_shows_every_cell(tmp_path, runs):
    name = "digits-CEM-practical-seed0-20261126-211138"
    killed = write_run(tmp_path / name, finished=False, preset="paper", lr=0.2)
    groups = group_runs([*runs, *load_runs([killed])])
    cells = summary_cells(groups, target=0.6)
    texts = [text_of(cells, width) for width in (40, 118, 300)]
    words = [word for cell in sum(cells.rows, cells.headings) for word in re.split("[, ±]+", cell)]
    assert name in words
    assert all(word in text for text in texts for word in words)


def test_a_name_cannot_control_the_terminal(tmp_path):
    rows = [round_row(1, 0.6, strategy="[bold]x[/y]\x1b[2J\a")]
    write_run(tmp_path / "a", rows)
    text = text_of(summary_cells(group_runs(load_runs([tmp_path]))))
    assert "[bold]x[/y]\ufffd[2J\ufffd" in text
