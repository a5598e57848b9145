"""What is made from the settings of a run."""

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from flwr_cloned_kd import (
    VARIANTS,
    HingeStaleness,
    Limit,
    PolynomialStaleness,
    Runtime,
    TrainAccuracyDrop,
    TrainAccuracyJump,
    calibrate,
    drop_confidence,
    ensemble_gap,
    relative_accuracy,
)
from flwr_cloned_kd.apps import build
from flwr_cloned_kd.apps.build import build_core, load, model, slow_edge, split, staleness_weight
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.method.guards import DEFAULT_GUARD
from tests.apps.quickstart import client_fn


def test_knobs_reach_what_they_are_for():
    settings = Settings(
        variant="CPP",
        preset="paper",
        memory_size=2,
        temperature=2,
        distill_lr=0.5,
        plateau_patience=4,
        guard="jump",
        guard_threshold=0.2,
        distill_epochs=3,
        core_epochs=5,
        batch_clones="off",
        bf16="on",
        compile="off",
        device="cpu",
    )
    core = build_core(settings)
    assert core.distillation.memory_size == 2
    assert core.distillation.temperature == 2
    assert core.distillation.recipe.lr == 0.5
    assert core.distillation.recipe.epochs == 3
    assert core.distillation.recipe.stop.patience == 4
    assert core.guard == TrainAccuracyJump(0.2)
    assert build_core(Settings(guard="drop")).guard == TrainAccuracyDrop(0.1)
    assert build_core(Settings()).guard == DEFAULT_GUARD
    assert build_core(Settings(preset="unselective")).guard == DEFAULT_GUARD
    assert build_core(Settings(preset="paper")).guard is None
    assert build_core(Settings(guard="none")).guard is None
    assert core.recipe.epochs == 5
    assert core.runtime == Runtime(device="cpu", bf16=True, compile=False, batch_clones=False)
    assert build_core(Settings(variant="CPP")).distillation.memory_size == 1
    assert build_core(Settings()).distillation.memory_size == VARIANTS["CEM"].memory_size


def test_a_guard_by_false_alarms_needs_no_threshold_of_accuracy():
    core = build_core(Settings(guard="validation", guard_threshold=0.01))
    assert core.guard == Limit(drop_confidence, 0.99)
    settings = Settings(guard="gap", guard_threshold=0.05, core_epochs=1, edge_epochs=1)
    core = build_core(settings)
    state = core.state(core.pretrain())
    edges = build.recipe(settings, 1)
    assert core.guard == calibrate(core, state, ensemble_gap, false_alarms=0.05, recipe=edges)


def test_validation_data_is_a_part_of_the_cores_data():
    whole = build_core(Settings()).dataset
    core = build_core(Settings(validation_share=0.2, trust="relative-accuracy"))
    num_validation = round(0.2 * len(whole[1]))
    assert len(core.validation[1]) == num_validation
    parts = zip(whole, core.dataset, core.validation)
    assert all(torch.equal(data, torch.cat(pair)) for data, *pair in parts)
    assert core.trust is relative_accuracy
    assert build_core(Settings()).validation is None


def context_of(partition_id, **run_config):
    config = {key.replace("_", "-"): value for key, value in run_config.items()}
    return Context(1, 5, {"partition-id": partition_id}, RecordDict(), config)


def edge(partition_id, **run_config):
    return client_fn(context_of(partition_id, **run_config))


def test_core_and_edges_share_no_sample():
    settings = Settings()
    core = build_core(settings)
    sizes = [len(edge(i).dataset[1]) for i in range(9)]
    assert sum(sizes) + len(core.dataset[1]) == 1437
    rows = [set(part.tolist()) for part in split(settings, core.held_out[1].new_zeros(1437))]
    assert len(set.union(*rows)) == sum(len(part) for part in rows) == 1437


def test_a_noisy_edge_shuffles_labels_and_its_neighbour_does_not():
    config = {"noisy_edges": "3", "noise_probability": 0.5}
    assert edge(3, **config).recipe.label_noise.keywords == {"p": 0.5}
    assert edge(2, **config).recipe.label_noise is None


def test_a_node_without_data_says_how_many_to_start():
    with pytest.raises(ValueError, match=r"partition-id: expected below num-edges \(9\), got 9"):
        edge(9)


def test_a_skewed_split_covers_the_same_data():
    pytest.importorskip("flwr_datasets")
    settings = Settings(split="dirichlet", dirichlet_alpha=0.1)
    core = build_core(settings)
    assert len(core.dataset[1]) == 144
    even, skewed = edge(0), edge(0, split="dirichlet", dirichlet_alpha=0.1)
    counts = [torch_counts(client.dataset[1]) for client in (even, skewed)]
    assert max(counts[1]) / sum(counts[1]) > max(counts[0]) / sum(counts[0])


def torch_counts(labels):
    return labels.bincount(minlength=10).tolist()


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_an_edge_sleeps_after_training_for_the_seconds_of_its_place(monkeypatch, kind):
    slept = []
    monkeypatch.setattr("flwr_cloned_kd.apps.build.time.sleep", slept.append)
    message = Message(RecordDict(), 1, kind)
    for partition in range(3):
        context = context_of(partition, edge_delays="0,2.5")
        assert slow_edge(message, context, lambda message, context: message) is message
    assert slept == ([0, 2.5] if kind == "train" else [])


def test_a_model_is_built_for_the_images_and_the_classes_of_the_data():
    logits = model(Settings(model="resnet-8"))(load(Settings())[1][0][:2])
    assert logits.shape == (2, 10)
    small, large = (model(Settings(model=name)) for name in ("digits-cnn", "resnet-8"))
    assert [len(network.bn.weight) for network in (small, large)] == [8, 16]


def test_the_staleness_weight_is_the_one_that_was_named():
    assert staleness_weight(Settings()) is None
    assert staleness_weight(Settings(staleness_weight="polynomial", staleness_a=2)) == (
        PolynomialStaleness(2)
    )
    named = Settings(staleness_weight="hinge", staleness_a=3, staleness_b=1)
    assert staleness_weight(named) == HingeStaleness(3, 1)
    assert staleness_weight(Settings(staleness_weight="constant"))(7) == 1
