"""What is made of the records: hand-computed numbers, and a picture of everything."""

import json
import sys

import numpy as np
import pytest

from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.paper import attacks, controls, fig4, fig7, fig8, skew
from flwr_cloned_kd.paper.__main__ import main
from flwr_cloned_kd.paper.controls import CONTROLS
from flwr_cloned_kd.paper.fig8 import guard_scores, roc
from flwr_cloned_kd.paper.figures import FIGURES
from flwr_cloned_kd.paper.statistics import spread


def test_venn_circles_have_one_scale_for_all_panels():
    venns = {
        "before": {"student_only": 0.04, "both": 0.67, "teacher_only": 0.24},
        "after": {"student_only": 0.2, "both": 0.1, "teacher_only": 0.0},
    }
    consensus = {moment: spread([0.5]) for moment in venns}
    row = {**venns, "consensus": consensus, "mutual": 0.0, "exclusive": 0.0}
    panels = fig4.draw({"CPP": row}).axes
    for axes, venn in zip(panels, venns.values(), strict=True):
        assert np.ptp(axes.get_xlim()) == 2
        # The two exclusive regions and the common one, each a patch: their areas are the shares.
        areas = [area(patch) for patch in axes.patches]
        shares = venn["student_only"], venn["teacher_only"], venn["both"]
        assert areas == pytest.approx(shares, abs=2e-3)


def area(patch):
    (polygon, *_) = patch.get_path().to_polygons(closed_only=True) or [np.zeros((1, 2))]
    x, y = polygon.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def test_a_spread_is_the_mean_and_the_sample_deviation():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": 2**0.5, "n": 2, "values": [1.0, 3.0]}
    assert spread([1.0])["sd"] == 0


def test_a_roc_by_hand():
    # Noisy 3, 1; honest 2, 0. Thresholds 3, 2, 1, 0. Of the four pairs three are in order.
    curve = roc([3, 1], [2, 0])
    assert curve["detected"] == [0, 0.5, 0.5, 1, 1]
    assert curve["false alarms"] == [0, 0, 0.5, 0.5, 1]
    assert curve["area"] == 0.75
    assert roc([1, 1], [1])["area"] == 0.5


def test_guards_are_scored_on_a_history_of_honest_rounds():
    accuracies = [0.5, 0.7, 0.1, 0.9]
    accepted = [1, 1, 0, 1]
    rounds = [{"train-accuracy": a, "accepted": k} for a, k in zip(accuracies, accepted)]
    jumps, drops = (guard_scores(rounds, guard) for guard in ("jump", "drop"))
    # Means of the accepted before: 0.5, then 0.6, and still 0.6 after the refusal.
    assert [score for score, _ in jumps] == pytest.approx([0.2, -0.5, 0.3])
    assert [score for score, _ in drops] == pytest.approx([-0.2, 0.6, -0.2])
    assert [is_noisy for _, is_noisy in jumps] == [False, True, False]


def noisy_rounds(*accepted):
    """Make the records of a run of three edges, the last of them noisy."""
    return [
        {
            "round": i,
            "core-accuracy": 0.5,
            "train-accuracy": 0.5,
            "edge-accuracy": 0.5,
            "accepted": float(one),
        }
        for i, one in enumerate((1, *accepted))
    ]


def test_refusals_are_counted_apart_for_noisy_and_honest_rounds():
    names = [name for name, row in fig8.ROWS.items() if row.method == "CPP"]
    results = {name: [noisy_rounds(1, 1, 1)] for name in names}
    results |= {name: [noisy_rounds(1, 1, 0)] for name in names if "/omitted/" in name}
    results["CPP/jump/1.0"] = [noisy_rounds(0, 1, 1), noisy_rounds(1, 1, 0)]
    summary = fig8.reduce(results)
    # Of two runs with one noisy and two honest rounds each, one of each kind was refused.
    assert summary["CPP/jump/1.0"]["refused"] == {"noisy": 0.5, "honest": 0.25}
    assert "refused" not in summary["CPP/accepted/1.0"]
    assert summary.keys() - results.keys() == {"CPP/roc/jump", "CPP/roc/drop"}
    line = next(line for line in fig8.table(summary)[1] if line[1:3] == ["guard: jump", "1.0"])
    assert line == ["CPP", "guard: jump", "1.0", "0.500 ± 0.000", "0.50", "0.25", "-", "-"]


def test_what_a_late_answer_gains_is_counted_seed_by_seed():
    results = {
        "CPP omitted": [[{"core-accuracy": 0.5}], [{"core-accuracy": 0.7}]],
        "CPP late": [[{"core-accuracy": 0.6}], [{"core-accuracy": 0.7}]],
    }
    assert fig7.reduce(results)["CPP late"]["gain"]["values"] == pytest.approx([0.1, 0.0])


def test_lag_is_sec_5_2():
    plan = fig7.plan(Settings(), 1, 1)
    assert {run.settings.num_edges for runs in plan.values() for run in runs} == {2}
    visits = {
        case: [plan[f"CPP {case}"][0].visits(r) for r in range(1, 3)] for case in ("late", "normal")
    }
    # In time: edge 2 (id 1), then edge 1. Late: edge 1, then edge 2 with what time t had sent it.
    assert visits == {"late": [([0], 0), ([1], 1)], "normal": [([1], 0), ([0], 0)]}
    assert plan["CPP omitted"][0].num_rounds == 1


def test_noise_comes_at_rounds_4_and_7():
    plan = fig8.plan(Settings(), 2, 1)
    assert {run.settings.noisy_edges for run in plan["CPP/accepted/1.0"]} == {"3,6"}
    assert [len(plan[f"CPP/omitted/{p}"]) for p in (0.3, 1.0)] == [1, 2]
    assert plan["CPP/clean"][0].settings.noisy_edges == ""


@pytest.mark.parametrize("name", FIGURES)
def test_every_run_of_a_figure_is_a_valid_setting_and_has_its_seed(name):
    plan = FIGURES[name].plan(Settings(), 3, 2)
    for runs in plan.values():
        assert [run.settings.seed for run in runs] == list(range(len(runs)))
        assert 2 <= len(runs) <= 3


def test_controls_have_names_of_their_own():
    assert len({control.name for control in CONTROLS}) == len(CONTROLS)


def test_rows_that_need_more_edges_are_left_out():
    few, many = (controls.plan(Settings(num_edges=n), 1, 1) for n in (3, 6))
    assert many.keys() - few.keys() == {
        "1 clone of 6 edges, in turn",
        "1 clone of 6 edges, 3 side by side",
    }


def test_equal_bytes_are_equal_bytes(command, tmp_path, monkeypatch):
    rows = [control for control in CONTROLS if control.group == "equal bytes"]
    monkeypatch.setattr(controls, "CONTROLS", rows)
    assert main(command("controls", tmp_path, num_edges=6)) == 0
    result = json.loads((tmp_path / "controls.json").read_text())["result"]
    # 12 models each: 3 x (1 down + 3 up), 6 x (1 + 1), 2 x 3 x (1 + 1).
    assert len(result) == 3
    assert len({row["bytes"] for row in result.values()}) == 1


SOME_CONTROLS = {
    "CEM, practical (ours)",
    "CPP, paper",
    "FedProx, R rounds",
    "average, then distil (FedDF), 2 rounds",
    "core only",
    "all data central",
    "memory 1, KD weight x 3",
    "CPP paper, alpha 1.0",
}
SOME_ATTACKS = (
    "clean/none",
    "clean/drop",
    "clean/none/Dirichlet 0.1",
    "omitted/none",
    "backdoor, 1/drop",
    "adaptive, 0.1/none",
    "omitted, 2 visits/none",
    "slow poison, 0.3, 2 visits/none",
)
SOME_METHODS = ("ours", "keep the clone", "FedAvg, 1 round", "ours, every sample")


def test_every_figure_comes_out(command, tmp_path, monkeypatch):
    some = [control for control in CONTROLS if control.name in SOME_CONTROLS]
    assert len(some) == len(SOME_CONTROLS)
    monkeypatch.setattr(controls, "CONTROLS", some)
    monkeypatch.setattr(skew, "ROWS", {name: skew.ROWS[name] for name in SOME_METHODS})
    monkeypatch.setattr(attacks, "ROWS", {name: attacks.ROWS[name] for name in SOME_ATTACKS})
    assert main(command("all", tmp_path)) == 0
    for name in FIGURES:
        data = json.loads((tmp_path / f"{name}.json").read_text())
        assert data["result"]
        num_lines = 2 + len(table_rows(name, data["result"]))
        assert (tmp_path / f"{name}.md").read_text().count("\n| ") >= num_lines
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    stored = {path.name for path in (tmp_path / "runs").iterdir()}
    assert not any(name.endswith(".safetensors") for name in stored)


def table_rows(name, result):
    if name == "fig7":
        return {row.split()[0] for row in result}
    if name == "skew":
        return {row["method"] for row in result.values()}
    if name == "attacks":
        return [row for row in result.values() if row["split"] == "IID"]
    return [row for row in result if "/roc/" not in row]


def test_without_matplotlib_the_numbers_are_still_written(command, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("matplotlib", "matplotlib_venn"):
        monkeypatch.setitem(sys.modules, name, None)  # an import raises ImportError
    assert main(command("fig4", tmp_path)) == 0
    assert "needs matplotlib" in capsys.readouterr().out
    assert json.loads((tmp_path / "fig4.json").read_text())["result"]["CPP"]["before"]
    assert (tmp_path / "fig4.md").is_file()
    assert not (tmp_path / "fig4.png").exists()
