"""Every knob is a run-config key; a wrong one stops the run with the key, expected and found."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from flwr_cloned_kd import VARIANTS, Runtime, TrainAccuracyDrop, TrainAccuracyJump
from flwr_cloned_kd.apps.experiment import build_core, build_edge, split
from flwr_cloned_kd.apps.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"


def app_config(name):
    return tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())["tool"]["flwr"]["app"]


@pytest.mark.parametrize("app", ["quickstart_digits", "cifar100"])
def test_an_app_offers_every_knob(app):
    config = app_config(app)["config"]
    assert set(config) == {field.name.replace("_", "-") for field in fields(Settings)}
    Settings.read(config)


def test_every_knob_is_explained():
    text = Settings.__doc__.split("Args:")[1].split("Raises:")[0]
    named = re.findall(r"^ {8}([a-z0-9_, ]+):", text, re.M)
    explained = {name.strip() for names in named for name in names.split(",")}
    inside = set(re.findall(r"`([a-z_]+)`", text))  # of another one's explanation
    assert explained <= {field.name for field in fields(Settings)} <= explained | inside


def test_the_quickstart_runs_on_the_defaults():
    assert Settings.read(app_config("quickstart_digits")["config"]) == Settings()


def test_the_cifar100_app_is_the_papers_setting():
    settings = Settings.read(app_config("cifar100")["config"])
    assert (settings.model, settings.num_edges, settings.variant) == ("resnet-32", 9, "CEM")
    assert {settings.core_epochs, settings.edge_epochs, settings.distill_epochs} == {164}
    assert (settings.preset, settings.augment) == ("paper", "crop-and-flip")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"varaint": "CEM"}, r"run-config varaint: expected a known key \(variant\)"),
        ({"x": 1}, r"run-config x: expected a known key \(dataset, data-path, "),
        ({"variant": "CEN"}, "variant: expected one of IsPP, IPP, .* got 'CEN'"),
        ({"dataset": "mnist"}, "dataset: expected one of digits, cifar100, npz, huggingface"),
        ({"preset": "best"}, "preset: expected one of paper, practical, unselective, got 'best'"),
        ({"num-clones": "3"}, "num-clones: expected int, got '3'"),
        ({"num-clones": True}, "num-clones: expected int, got True"),
        ({"num-clones": -1}, "num-clones: expected at least 0, got -1"),
        ({"edge-epochs": 0}, "edge-epochs: expected at least 1, got 0"),
        ({"lr": "fast"}, "lr: expected float, got 'fast'"),
        ({"lr": float("nan")}, "lr: expected at least 0, got nan"),
        ({"bf16": 1}, "bf16: expected str, got 1"),
        ({"model": "vgg"}, "model: expected digits-cnn or resnet-DEPTH .* got 'vgg'"),
        ({"model": "resnet-9"}, "model: expected digits-cnn or resnet-DEPTH .* got 'resnet-9'"),
        ({"strategy": "fedavg,fedsgd"}, "strategy: expected some of cloned-kd, fedavg, fedprox"),
        ({"strategy": "cloned-kd, cloned-kd"}, "strategy: expected each one once, got 'cloned-kd"),
        ({"dataset": "npz"}, "data-path: expected where the npz data is, got ''"),
        ({"noisy-edges": "3,9"}, "noisy-edges: expected partition ids below 9"),
        ({"noise-probability": 1.5}, "noise-probability: expected a fraction, 0 to 1, got 1.5"),
        ({"timeout": 0}, "timeout: expected above 0, got 0.0"),
        ({"split": "sorted"}, "split: expected one of random, dirichlet, one-class"),
        ({"device": "tpu9"}, "device: expected auto, cpu, cuda, .* got 'tpu9'"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(config, message):
    with pytest.raises(ValueError, match=message):
        Settings.read(config)


def test_whole_numbers_are_taken_for_fractions():
    assert Settings.read({"lr": 1}).lr == 1.0


def test_knobs_reach_what_they_are_for():
    settings = Settings(
        variant="CPP", preset="paper", memory_size=2, temperature=2, distill_lr=0.5,
        plateau_patience=4, guard="jump", guard_threshold=0.2, distill_epochs=3, core_epochs=5,
        batch_clones="off", bf16="on", compile="off", device="cpu",
    )  # fmt: skip
    core = build_core(settings)
    how = core.distillation
    assert (how.memory_size, how.temperature, how.recipe.lr, how.recipe.epochs) == (2, 2, 0.5, 3)
    assert how.recipe.stop.patience == 4
    assert core.guard == TrainAccuracyJump(0.2)
    assert build_core(Settings(guard="drop")).guard == TrainAccuracyDrop(0.1)
    assert build_core(Settings()).guard is None
    assert core.recipe.epochs == 5
    assert core.runtime == Runtime(device="cpu", bf16=True, compile=False, batch_clones=False)
    assert build_core(Settings(variant="CPP")).distillation.memory_size == 1
    assert build_core(Settings()).distillation.memory_size == VARIANTS["CEM"].memory_size


def edge(partition_id, **run_config):
    config = {key.replace("_", "-"): value for key, value in run_config.items()}
    return build_edge(Context(1, 5, {"partition-id": partition_id}, RecordDict(), config))


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
