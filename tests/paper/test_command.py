"""The command line: bad options, a choice of rows, stored runs, interruption."""

import itertools
import json

import pytest

from flwr_cloned_kd.io.checkpoint import write
from flwr_cloned_kd.paper import store
from flwr_cloned_kd.paper.__main__ import base_settings, main, parser


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fig3"], "invalid choice: 'fig3'"),
        (["fig5", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["fig5", "--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["fig5", "--core-epochs", "-1"], "--core-epochs: expected at least 1, got -1"),
        (["fig8", "--num-edges", "1"], "--num-edges: expected at least 2, an honest and a noisy"),
        (["attacks", "--num-edges", "1"], "--num-edges: expected at least 2, an honest and a bad"),
        (["fig5", "--dataset", "npz"], "--data-path: expected the place of the npz data, got ''"),
        (["fig5", "--model", "resnet-9"], "--model: expected digits-cnn or resnet-DEPTH"),
        (["fig5", "--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["fig5", "--dataset", "npz", "--data-path", "no.npz"], "no.npz"),
        (["fig5", "--schedule", "short"], "--schedule short: expected another dataset than digits"),
        (["fig5", "--rows", "CPQ"], "--rows: expected some of IsPP; IPP; "),
        (["fig8", "--rows", "CPP/clean"], "--rows: fig8 needs all its rows"),
        (["all", "--rows", "CPP"], "--rows: fig7 needs all its rows"),
    ],
)
def test_a_bad_option_is_named(arguments, expected, capsys, tmp_path):
    try:
        status = main([*arguments, "--out", str(tmp_path)])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_a_short_schedule_is_a_name_for_settings_that_can_be_overruled():
    def schedule(arguments):
        settings = base_settings(parser().parse_args(arguments))
        return settings.model, settings.core_epochs, settings.edge_epochs, settings.distill_epochs

    full = ["fig5", "--dataset", "npz", "--data-path", "x"]
    short = [*full, "--schedule", "short"]
    assert schedule(short) == ("resnet-8", 12, 4, 4)
    assert schedule([*short, "--epochs", "6", "--model", "resnet-14"]) == ("resnet-14", 12, 6, 6)
    assert schedule(full) == ("resnet-32", 164, 164, 164)


def result_of(folder, figure):
    return json.loads((folder / f"{figure}.json").read_text())["result"]


def test_some_rows_are_the_same_rows(command, tmp_path):
    arguments = command("fig9", tmp_path)
    assert main([*arguments, "--rows", "CPP"]) == 0
    some = result_of(tmp_path, "fig9")
    assert main(arguments) == 0
    every = result_of(tmp_path, "fig9")
    assert [*some] == ["CPP"]
    assert len(every) == 3
    assert some["CPP"] == every["CPP"]


def test_stored_runs_are_summed_up_and_none_is_played(command, tmp_path, capsys, monkeypatch):
    arguments = command("fig9", tmp_path)
    assert main([*arguments, "--seeds", "2", "--stored"]) == 2
    assert "--stored: expected finished runs of fig9 in " in capsys.readouterr().err
    assert main([*arguments, "--seeds", "1", "--rows", "CPP"]) == 0
    monkeypatch.setattr(store, "play", None)
    assert main([*arguments, "--seeds", "2", "--stored"]) == 0
    data = json.loads((tmp_path / "fig9.json").read_text())
    assert data["seeds"] == {"CPP": 1}


def test_help_says_that_the_same_command_resumes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "resumes where it was interrupted" in " ".join(capsys.readouterr().out.split())


def test_a_figure_killed_on_the_way_is_the_same_in_the_end(command, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert main(command("fig4", whole)) == 0
    writes = itertools.count()

    def killed_after_the_second(path, tensors, header):
        write(path, tensors, header)
        if next(writes) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "write", killed_after_the_second)
    with pytest.raises(KeyboardInterrupt):
        main(command("fig4", killed))
    assert main(command("fig4", killed)) == 0
    assert (killed / "fig4.json").read_bytes() == (whole / "fig4.json").read_bytes()
    assert json.loads((whole / "fig4.json").read_text())["seeds"] == {"IPP": 1, "CPP": 1}
