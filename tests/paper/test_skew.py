"""Even and skewed edges: what the figure compares, and how the splits are made."""

import itertools

import pytest
import torch

from flwr_cloned_kd import load_digits
from flwr_cloned_kd.apps.build import split
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.paper import skew
from flwr_cloned_kd.paper.figures import choose
from flwr_cloned_kd.paper.runs import Run, describe
from flwr_cloned_kd.paper.skew import ROWS, SPLITS

LABELS = load_digits()[0][1]


def parts_of(**options):
    return split(Settings(**options), LABELS)


def test_every_edge_has_one_class_and_the_core_keeps_its_part():
    core, *edges = parts_of(split="one-class", seed=3)
    assert torch.equal(core, parts_of(seed=3)[0])
    classes = [set(LABELS[rows].tolist()) for rows in edges]
    assert all(len(held) == 1 for held in classes)
    assert len(set.union(*classes)) == len(edges) == 9
    held = torch.cat([core, *edges])
    assert len(held.unique()) == len(held)
    assert parts_of(split="one-class", seed=4)[1].tolist() != edges[0].tolist()


def test_edges_share_a_class_only_if_there_are_more_edges():
    edges = parts_of(split="one-class", num_edges=12)[1:]
    classes = [int(LABELS[rows][0]) for rows in edges]
    assert sorted(classes[:10]) == [*range(10)]
    assert classes[10:] == classes[:2]


def test_every_method_is_planned_on_every_split():
    plan = skew.plan(Settings(), 5, 3)
    assert len(plan) == len(SPLITS) * len(ROWS)
    for (name, method), split_name in itertools.product(ROWS.items(), SPLITS):
        runs = plan[f"{name} | {split_name}"]
        is_ablation = name.startswith("ours") and bool(runs[0].distillation)
        assert method.main != is_ablation
        assert [run.settings.seed for run in runs] == [*range(3 if is_ablation else 5)]
        assert runs[0].settings.split == SPLITS[split_name]["split"]


def test_rows_and_splits_of_the_figure_are_chosen_by_their_names():
    plan = skew.plan(Settings(), 1, 1)
    some = choose("skew", plan, ["ours", "keep the clone"], ["IID", "one class"])
    assert [*some] == [
        "ours | IID",
        "keep the clone | IID",
        "ours | one class",
        "keep the clone | one class",
    ]
    with pytest.raises(ValueError, match="--rows: expected some of first core; ours; "):
        choose("skew", plan, ["mine"])


def test_a_choice_of_splits_leaves_other_figures_as_they_are():
    plan = {"CPP": [], "CEM": []}
    assert choose("fig5", plan, ["CPP"], ["IID"]) == {"CPP": []}


def records_of(*accuracies):
    costs = {"bytes-down": 1, "bytes-up": 3, "images": 10}
    return [{"round": i, "core-accuracy": a, **costs} for i, a in enumerate(accuracies)]


def test_a_row_has_the_last_core_the_mean_and_the_fall():
    runs = [records_of(0.5, 0.6, 0.4), records_of(0.5, 0.7, 0.8)]
    (row,) = skew.reduce({"ours | IID": runs}).values()
    assert (row["method"], row["split"]) == ("ours", "IID")
    assert row["final"]["values"] == [0.4, 0.8]
    assert row["mean of rounds"]["values"] == pytest.approx([0.5, 0.75])
    assert row["worst drop"] == pytest.approx(0.2)
    assert (row["bytes"], row["images"]) == (12, 30)


def test_a_row_of_one_round_is_read_after_that_round():
    runs = [records_of(0.5, 0.6, 0.4)]
    summary = skew.reduce({"FedAvg, 1 round | IID": runs, "first core | IID": runs})
    one_round, first_core = summary.values()
    assert one_round["final"]["mean"] == 0.6
    assert one_round["bytes"] == 8
    assert first_core["final"]["mean"] == 0.5
    assert first_core["worst drop"] == 0


def test_records_are_of_phase_2_and_not_of_its_presets_name():
    ours = Run(settings=Settings())
    spelled_out = Run(
        settings=Settings(preset="unselective"),
        distillation={
            "temperature": 2.0,
            "core_as_teacher": True,
            "selection": "correct",
            "student_start": "retained",
        },
    )
    assert describe(ours) == describe(spelled_out)
    assert describe(ours)["distillation"]["student_start"] == "retained"
    assert describe(ours) != describe(Run(settings=Settings(preset="unselective")))
