"""What is made of the records: hand-computed numbers, and a picture of everything."""

import itertools
import json
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.paper import controls, experiments, figures, skew
from flwr_cloned_kd.paper.__main__ import main
from flwr_cloned_kd.paper.controls import CONTROLS
from flwr_cloned_kd.paper.experiments import FIGURES, plan_lag, reduce_lag
from flwr_cloned_kd.paper.noise import guard_scores, plan_noise, roc
from flwr_cloned_kd.paper.overview import COMPARED, OVER_ROUNDS
from flwr_cloned_kd.paper.seeds import spread
from flwr_cloned_kd.paper.skew import METHODS, SPLITS
from tests.paper.test_study import archive  # noqa: F401


def test_venn_circles_have_one_scale_for_all_panels():
    venns = [
        {"student_only": 0.04, "both": 0.67, "teacher_only": 0.24},
        {"student_only": 0.2, "both": 0.1, "teacher_only": 0.0},
    ]
    for venn in venns:
        axes = Figure().subplots()
        figures._venn(axes, venn)
        assert np.ptp(axes.get_xlim()) == 2
        # The two exclusive regions and the common one, each a patch: their areas are the shares.
        found = [area(patch) for patch in axes.patches]
        shares = venn["student_only"], venn["teacher_only"], venn["both"]
        assert found == pytest.approx(shares, abs=2e-3)


def area(patch):
    (polygon, *_) = patch.get_path().to_polygons(closed_only=True) or [np.zeros((1, 2))]
    x, y = polygon.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def test_a_spread_is_the_mean_and_the_sample_deviation():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": 2**0.5, "n": 2, "values": [1.0, 3.0]}
    assert spread([1.0])["sd"] == 0


def test_a_roc_by_hand():
    # Noisy 3, 1; honest 2, 0. Thresholds 3, 2, 1, 0. Of the four pairs three are in order.
    found = roc([3, 1], [2, 0])
    assert found["detected"] == [0, 0.5, 0.5, 1, 1]
    assert found["false alarms"] == [0, 0, 0.5, 0.5, 1]
    assert found["area"] == 0.75
    assert roc([1, 1], [1])["area"] == 0.5


def test_guards_are_scored_on_a_history_of_honest_rounds():
    accuracies, accepted = [0.5, 0.7, 0.1, 0.9], [1, 1, 0, 1]
    rounds = [{"train-accuracy": a, "accepted": k} for a, k in zip(accuracies, accepted)]
    jumps, drops = (guard_scores(rounds, guard) for guard in ("jump", "drop"))
    # Means of the accepted before: 0.5, then 0.6, and still 0.6 after the refusal.
    assert [s for s, _ in jumps] == pytest.approx([0.2, -0.5, 0.3])
    assert [s for s, _ in drops] == pytest.approx([-0.2, 0.6, -0.2])
    assert [bad for _, bad in jumps] == [False, True, False]


def test_what_a_late_answer_gains_is_counted_seed_by_seed():
    results = {
        "CPP omitted": [[{"core-accuracy": 0.5}], [{"core-accuracy": 0.7}]],
        "CPP late": [[{"core-accuracy": 0.6}], [{"core-accuracy": 0.7}]],
    }
    assert reduce_lag(results)["CPP late"]["gain"]["values"] == pytest.approx([0.1, 0.0])


def test_lag_is_sec_5_2():
    plan = plan_lag(Settings(), 1, 1)
    assert {run.settings.num_edges for runs in plan.values() for run in runs} == {2}
    visits = {
        case: [plan[f"CPP {case}"][0].visits(r) for r in range(1, 3)] for case in ("late", "normal")
    }
    # In time: edge 2 (id 1), then edge 1. Late: edge 1, then edge 2 with what time t had sent it.
    assert visits == {"late": [([0], 0), ([1], 1)], "normal": [([1], 0), ([0], 0)]}
    assert plan["CPP omitted"][0].num_rounds == 1


def test_noise_comes_at_rounds_4_and_7():
    plan = plan_noise(Settings(), 2, 1)
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


def test_equal_bytes_are_equal_bytes(archive, tmp_path, monkeypatch):  # noqa: F811
    rows = [control for control in CONTROLS if control.group == "equal bytes"]
    for module in (controls, experiments):
        monkeypatch.setattr(module, "CONTROLS", rows)
    assert main(tiny("controls", archive, tmp_path, num_edges=6)) == 0
    found = json.loads((tmp_path / "controls.json").read_text())["result"]
    # 12 models each: 3 x (1 down + 3 up), 6 x (1 + 1), 2 x 3 x (1 + 1).
    assert len({row["bytes"] for row in found.values()}) == 1


def tiny(figure, archive, out, num_edges=2):  # noqa: F811
    return [figure, "--dataset", "npz", "--data-path", str(archive), "--model", "digits-cnn",
            "--num-edges", str(num_edges), "--epochs", "1", "--seeds", "1",
            "--out", str(out)]  # fmt: skip


SOME = {
    "CEM, practical (ours)",
    "CPP, paper",
    "FedProx, R rounds",
    "average, then distil (FedDF), 2 rounds",
    "core only",
    "all data central",
    "memory 1, KD weight x 3",
    "CPP paper, alpha 1.0",
}


def test_every_figure_comes_out(archive, tmp_path, monkeypatch):  # noqa: F811
    some = [control for control in CONTROLS if control.name in SOME]
    assert len(some) == len(SOME)
    for module in (controls, experiments):
        monkeypatch.setattr(module, "CONTROLS", some)
    methods = {name: skew.METHODS[name] for name in ("ours", "keep the clone", "FedAvg, 1 round")}
    monkeypatch.setattr(skew, "METHODS", methods)
    ablations = {"ours, every sample": skew.ABLATIONS["ours, every sample"]}
    monkeypatch.setattr(skew, "ABLATIONS", ablations)
    assert main(tiny("all", archive, tmp_path)) == 0
    for name in FIGURES:
        data = json.loads((tmp_path / f"{name}.json").read_text())
        assert data["result"]
        assert (tmp_path / f"{name}.md").read_text().count("\n| ") >= 2 + len(some_rows(name, data))
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    shared = {path.name for path in (tmp_path / "runs").iterdir()}
    assert not any(name.endswith(".safetensors") for name in shared)


def some_rows(name, data):
    if name == "fig7":
        return {row.split()[0] for row in data["result"]}
    if name == "skew":
        return {row.split(" | ")[0] for row in data["result"]}
    return [row for row in data["result"] if "/roc/" not in row]


def skew_of(*methods, n=2):
    """Make a summary of `skew` as its JSON file holds it, with invented numbers."""
    result = {}
    for place, (method, split) in enumerate(itertools.product(methods, SPLITS)):
        curve = {"rounds": [0, 1], "mean": [0.5, 0.7 - place / 100], "sd": [0.0, 0.01]}
        result[f"{method} | {split}"] = {
            "method": method,
            "split": split,
            "final": spread([0.7 - place / 100] * n),
            "mean of rounds": spread([0.6] * n),
            "worst drop": 0.0,
            "core": curve,
            "bytes": 1_000_000 * (1 + place % 3),
            "images": 100,
        }
    settings = {"num_edges": 2, "model": "digits-cnn"}
    seeds = dict.fromkeys(result, n)
    return {"figure": "skew", "seeds": seeds, "settings": settings, "result": result}


def overview_of(folder, digits, cifar100):
    for name, data in (("digits", digits), ("cifar100", cifar100)):
        (folder / name).mkdir()
        (folder / name / "skew.json").write_text(json.dumps(data))
    return main(["overview", "--results", str(folder), "--out", str(folder / "pictures")])


def test_an_overview_is_drawn_of_two_datasets(tmp_path):
    digits = skew_of(*OVER_ROUNDS, "FedAvg, 1 round", "FedAvg, R rounds")
    assert overview_of(tmp_path, digits, skew_of("ours", "FedAvg, 1 round", n=1)) == 0
    assert (tmp_path / "pictures" / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_an_overview_names_the_row_it_lacks(tmp_path, capsys):
    digits = skew_of(*[method for method in OVER_ROUNDS if method != "unselective"])
    assert overview_of(tmp_path, digits, skew_of("ours")) == 2
    assert "expected the row 'unselective | IID' too" in capsys.readouterr().err


def test_an_overview_names_the_row_that_the_other_dataset_lacks(tmp_path, capsys):
    assert overview_of(tmp_path, skew_of(*OVER_ROUNDS), skew_of("unselective")) == 2
    assert "expected the row 'ours | IID' too" in capsys.readouterr().err


def test_methods_of_skew_that_are_compared_exist():
    compared = {method for methods in COMPARED.values() for method in methods}
    assert compared | {*OVER_ROUNDS} <= METHODS.keys()


def test_a_picture_of_skew_has_a_row_for_each_method_and_its_bytes(tmp_path):
    result = skew_of("first core", "ours", "CEM, paper")["result"]
    del result["CEM, paper | one class"]
    panels = figures.draw_skew(result).axes
    assert [panel.get_title().split("\n")[0] for panel in panels] == [*SPLITS]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["ours", "CEM, paper"]
    assert [text.get_text() for text in panels[-1].texts] == [" 2.00 MB", " 3.00 MB"]


def test_rows_that_need_more_edges_are_left_out():
    few, many = (FIGURES["controls"].plan(Settings(num_edges=n), 1, 1) for n in (3, 6))
    assert many.keys() - few.keys() == {
        "1 clone of 6 edges, in turn",
        "1 clone of 6 edges, 3 side by side",
    }


def test_an_overview_says_what_it_lacks(tmp_path, capsys):
    assert main(["overview", "--results", str(tmp_path)]) == 2
    missing = tmp_path / "digits"
    expected = f"expected {missing / 'skew.json'}; run skew --out {missing} first"
    assert expected in capsys.readouterr().err


def test_without_matplotlib_the_numbers_are_still_written(archive, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(sys.modules, "flwr_cloned_kd.paper.figures", None)
    assert main(tiny("fig4", archive, tmp_path)) == 0
    assert "needs matplotlib" in capsys.readouterr().out
    assert json.loads((tmp_path / "fig4.json").read_text())["result"]["CPP"]["before"]
