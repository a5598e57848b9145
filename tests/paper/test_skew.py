"""Even and skewed edges: what the figure compares, and how the splits are made."""

import itertools

import pytest
import torch

from flwr_cloned_kd import load_digits
from flwr_cloned_kd.apps.build import split
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.paper.experiments import choose
from flwr_cloned_kd.paper.runs import Run, describe
from flwr_cloned_kd.paper.skew import ABLATIONS, METHODS, SPLITS, plan_skew, reduce_skew

LABELS = load_digits()[0][1]


def parts_of(**options):
    return split(Settings(**options), LABELS)


def test_every_edge_has_the_images_of_one_class_and_the_core_keeps_its_part():
    core, *edges = parts_of(split="one-class", seed=3)
    assert torch.equal(core, parts_of(seed=3)[0])
    classes = [set(LABELS[rows].tolist()) for rows in edges]
    assert all(len(held) == 1 for held in classes)
    assert len(set.union(*classes)) == len(edges) == 9
    held = torch.cat([core, *edges])
    assert len(held.unique()) == len(held)
    assert parts_of(split="one-class", seed=4)[1].tolist() != edges[0].tolist()


def test_classes_are_held_by_several_edges_only_where_there_are_more_edges_than_classes():
    edges = parts_of(split="one-class", num_edges=12)[1:]
    classes = [int(LABELS[rows][0]) for rows in edges]
    assert sorted(classes[:10]) == [*range(10)]
    assert classes[10:] == classes[:2]


def test_every_method_is_planned_on_every_split_and_what_ours_is_made_of_on_fewer_seeds():
    plan = plan_skew(Settings(), 5, 3)
    assert len(plan) == len(SPLITS) * (len(METHODS) + len(ABLATIONS))
    for method, name in itertools.product(METHODS | ABLATIONS, SPLITS):
        runs = plan[f"{method} | {name}"]
        assert [run.settings.seed for run in runs] == [*range(3 if method in ABLATIONS else 5)]
        assert runs[0].settings.split == SPLITS[name]["split"]


def test_rows_and_splits_of_the_figure_are_chosen_by_their_names():
    plan = plan_skew(Settings(), 1, 1)
    some = choose("skew", plan, ["ours", "keep the clone"], ["IID", "one class"])
    assert [*some] == [
        "ours | IID",
        "keep the clone | IID",
        "ours | one class",
        "keep the clone | one class",
    ]
    with pytest.raises(ValueError, match="--rows: expected some of first core; ours; "):
        choose("skew", plan, ["mine"])


def records_of(*accuracies):
    costs = {"bytes-down": 1, "bytes-up": 3, "images": 10}
    return [{"round": i, "core-accuracy": a, **costs} for i, a in enumerate(accuracies)]


def test_a_row_has_the_last_core_the_mean_over_the_rounds_and_the_largest_fall():
    runs = [records_of(0.5, 0.6, 0.4), records_of(0.5, 0.7, 0.8)]
    (found,) = reduce_skew({"ours | IID": runs}).values()
    assert (found["method"], found["split"]) == ("ours", "IID")
    assert found["final"]["values"] == [0.4, 0.8]
    assert found["mean of rounds"]["values"] == pytest.approx([0.5, 0.75])
    assert found["worst drop"] == pytest.approx(0.2)
    assert (found["bytes"], found["images"]) == (12, 30)


def test_a_row_of_one_round_is_read_after_that_round():
    runs = [records_of(0.5, 0.6, 0.4)]
    found = reduce_skew({"FedAvg, 1 round | IID": runs, "first core | IID": runs})
    assert found["FedAvg, 1 round | IID"]["final"]["mean"] == 0.6
    assert found["FedAvg, 1 round | IID"]["bytes"] == 8
    assert found["first core | IID"]["final"]["mean"] == 0.5
    assert found["first core | IID"]["worst drop"] == 0


def test_records_are_of_what_phase_2_does_and_not_of_the_name_of_its_preset():
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
