"""Runs that differ only in the seed are one group, and configs are named by their differences."""

import pytest

from flwr_cloned_kd import load_run, load_runs
from flwr_cloned_kd.reading.groups import differing_keys, distinct_configs, group_runs, remarks
from tests.helpers.results import round_row, write_run


def groups_of(folder):
    return group_runs(load_runs([folder]))


def test_seeds_and_the_places_of_files_do_not_tell_runs_apart(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"{seed}", seed=seed, results=f"/tmp/{seed}", checkpoint=f"{seed}")
    (group,) = groups_of(tmp_path)
    assert (group.label, group.seeds) == ("cloned-kd", [0, 1, 2])


def test_what_a_run_writes_beside_its_results_does_not_tell_runs_apart(tmp_path):
    for seed, watch in enumerate(["", "live", "mlflow,tensorboard"]):
        write_run(tmp_path / f"{seed}", seed=seed, watch=watch, keep_rounds=seed)
    (group,) = groups_of(tmp_path)
    assert group.seeds == [0, 1, 2]


def test_every_strategy_is_a_group_whatever_else_its_run_ran(tmp_path):
    both = [round_row(1, 0.6), round_row(1, 0.7, strategy="fedavg")]
    write_run(tmp_path / "a", both, strategy="cloned-kd,fedavg")
    write_run(tmp_path / "b", both[1:], strategy="fedavg", seed=1)
    groups = groups_of(tmp_path)
    assert [(group.label, group.seeds) for group in groups] == [
        ("cloned-kd", [0]),
        ("fedavg", [0, 1]),
    ]
    assert [[points[-1].accuracy for points in group.curves] for group in groups] == [
        [0.6],
        [0.7, 0.7],
    ]


def test_configs_that_differ_in_few_keys_are_named_by_them(tmp_path):
    write_run(tmp_path / "a", lr=0.1)
    write_run(tmp_path / "b", lr=0.2, preset="paper")
    labels = [group.label for group in groups_of(tmp_path)]
    assert labels == ["cloned-kd, preset=practical, lr=0.1", "cloned-kd, preset=paper, lr=0.2"]


def test_configs_that_differ_in_many_keys_have_numbers(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", lr=0.2, preset="paper", momentum=0.5)
    runs = load_runs([tmp_path])
    assert [group.label for group in group_runs(runs)] == [
        "cloned-kd, config 1",
        "cloned-kd, config 2",
    ]
    assert differing_keys(distinct_configs(runs)) == ["preset", "lr", "momentum"]


def test_an_unfinished_run_is_a_group_of_its_own(tmp_path):
    write_run(tmp_path / "done")
    write_run(tmp_path / "killed", finished=False, seed=1)
    labels = [group.label for group in groups_of(tmp_path)]
    assert labels == ["cloned-kd", "cloned-kd, unfinished, killed"]


def test_a_run_without_a_config_is_a_group_of_its_own(tmp_path):
    write_run(tmp_path / "a")
    bare = write_run(tmp_path / "b")
    (bare / "config.json").unlink()
    (bare / "summary.json").write_text('{"seconds": 1}')
    assert [group.label for group in groups_of(tmp_path)] == ["cloned-kd", "cloned-kd, b"]


def test_two_folders_of_one_name_remain_two_groups(tmp_path):
    """Killed twice under one name, in two places."""
    folders = [write_run(tmp_path / place / "run", finished=False) for place in ("a", "b")]
    assert [len(group.runs) for group in group_runs(load_runs(folders))] == [1, 1]


def test_a_seed_that_ran_twice_is_remarked(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, seed=4)
    runs = [*load_runs([tmp_path]), load_run(write_run(tmp_path / "c", [], seed=1))]
    assert remarks(runs, group_runs(runs)) == [
        "c: no round has ended yet",
        "cloned-kd: seed 4 has 2 runs, and all of them count",
    ]


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, None, "", 1e308, "<b>"])
def test_any_value_of_a_config_is_compared(tmp_path, value):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", lr=value)
    assert len(groups_of(tmp_path)) == 2
