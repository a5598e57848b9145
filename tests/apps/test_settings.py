"""Every knob is stated once; a wrong value stops the run with the key, expected and got."""

import math
import tomllib
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from flwr.common.config import parse_config_args

from flwr_cloned_kd import FedAsync, FedBuff, HingeStaleness, PolynomialStaleness, Recipe, resnet
from flwr_cloned_kd.apps.__main__ import config_section, main, table
from flwr_cloned_kd.apps.settings import Settings, affects_result, knobs

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart_digits"


def app_config():
    text = (QUICKSTART / "pyproject.toml").read_text()
    return tomllib.loads(text)["tool"]["flwr"]["app"]["config"]


def test_the_app_offers_every_knob_as_it_is_stated():
    assert (QUICKSTART / "pyproject.toml").read_text().endswith("\n\n" + config_section())
    assert set(app_config()) == {field.name.replace("_", "-") for field in fields(Settings)}


def test_the_page_of_settings_has_the_table_of_knobs():
    assert (ROOT / "docs" / "settings.md").read_text().endswith("\n\n" + table())


def test_the_quickstart_runs_on_the_defaults():
    assert Settings.read(app_config()) == Settings()


def test_the_run_config_of_cifar100_is_the_papers_setting():
    changes = parse_config_args([str(QUICKSTART / "cifar100.toml")])  # what `flwr run` reads of it
    settings = Settings.read(app_config() | changes)
    assert (settings.model, settings.num_edges, settings.variant) == ("resnet-32", 9, "CEM")
    assert {settings.core_epochs, settings.edge_epochs, settings.distill_epochs} == {164}
    assert (settings.preset, settings.augment) == ("paper", "crop-and-flip")
    assert all(value != app_config()[key] for key, value in changes.items())


@pytest.mark.parametrize(("form", "text"), [("config", config_section()), ("table", table())])
def test_a_command_prints_the_knobs(form, text, capsys):
    assert main([form]) == 0
    assert capsys.readouterr().out == text


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "[tool.flwr.app.config]" in capsys.readouterr().out


def test_every_knob_is_explained_in_words_of_its_own():
    assert max(Counter(knob.meaning for knob in knobs()).values()) == 1
    assert all(len(knob.meaning.split()) > 1 and "|" not in knob.meaning for knob in knobs())
    ranged = [knob for knob in knobs() if knob.kind in (int, float) and knob.key != "seed"]
    assert all(knob.expected for knob in ranged)


def test_a_default_is_one_of_the_choices():
    assert all(knob.default in knob.choices for knob in knobs() if knob.choices)


def test_the_knobs_that_do_not_affect_the_plain_loop_are_these():
    """Records of the study are found by the other knobs: one more or less here loses them."""
    assert {field.name for field in fields(Settings)} - affects_result() == {
        "baseline_rounds",
        "batch_clones",
        "bf16",
        "checkpoint",
        "client_device",
        "compile",
        "cuda_graphs",
        "data_path",
        "device",
        "edge_delays",
        "fedasync_alpha",
        "fedbuff_lr",
        "fedbuff_size",
        "keep_rounds",
        "max_in_flight",
        "max_staleness",
        "max_together",
        "proximal_mu",
        "quarantine",
        "results",
        "staleness_a",
        "staleness_b",
        "staleness_weight",
        "strategy",
        "timeout",
        "watch",
        "wire_dtype",
        "workers",
    }


def test_settings_are_values_that_the_standard_library_copies():
    settings = replace(Settings(seed=3), temperature=2)
    assert asdict(settings) == asdict(Settings(seed=3)) | {"temperature": 2}
    # Records are found by a hash of the values: a whole number stays one.
    assert type(settings.temperature) is int
    with pytest.raises(ValueError, match="run-config seed: expected int, got '3'"):
        replace(settings, seed="3")


def test_naming_a_model_builds_no_network(monkeypatch):
    def build(*args, **options):
        raise AssertionError("a module was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", build)
    assert Settings(model="resnet-110").model == "resnet-110"


def accepts(make, value):
    try:
        make(value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("depth", range(1, 33))
def test_a_model_can_be_named_if_it_can_be_built(depth):
    named = accepts(lambda depth: Settings(model=f"resnet-{depth}"), depth)
    assert named == accepts(lambda depth: resnet(depth, 2, width=1), depth)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("core_epochs", lambda value: Recipe(epochs=value)),
        ("edge_epochs", lambda value: Recipe(epochs=value)),
        ("distill_epochs", lambda value: Recipe(epochs=value)),
        ("batch_size", lambda value: Recipe(batch_size=value)),
        ("lr", lambda value: Recipe(lr=value)),
        ("momentum", lambda value: Recipe(momentum=value)),
        ("weight_decay", lambda value: Recipe(weight_decay=value)),
        ("proximal_mu", lambda value: Recipe(proximal_mu=value)),
        ("staleness_a", PolynomialStaleness),
        ("staleness_b", lambda value: HingeStaleness(1.0, value)),
        ("fedasync_alpha", lambda value: FedAsync(alpha=value)),
        ("fedbuff_size", lambda value: FedBuff(buffer_size=value)),
        ("fedbuff_lr", lambda value: FedBuff(server_lr=value)),
        ("max_in_flight", lambda value: FedAsync(max_in_flight=value)),
    ],
)
def test_the_range_of_a_knob_is_that_of_the_object_it_is_for(name, make):
    values = [-1, 0, 1, 2]
    if isinstance(getattr(Settings(), name), float):
        values += [0.5, 1.5, math.nan, math.inf]
    for value in values:
        assert accepts(lambda value: Settings(**{name: value}), value) == accepts(make, value), (
            value
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"varaint": "CEM"}, r"run-config varaint: expected a known key \(nearest: variant\)"),
        (
            {"x": 1},
            r"run-config x: expected a known key \(python -m flwr_cloned_kd.apps table lists",
        ),
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
        ({"dataset": "npz"}, "data-path: expected the place of the npz data, got ''"),
        ({"noisy-edges": "3,9"}, "noisy-edges: expected partition ids below 9"),
        ({"noise-probability": 1.5}, "noise-probability: expected a fraction, 0 to 1, got 1.5"),
        (
            {"guard": "gap", "guard-threshold": 0.0},
            "guard-threshold: expected above 0 and below 1 for the guard gap, got 0.0",
        ),
        ({"validation-share": 1.0}, "validation-share: expected a fraction, 0 to 1, and below 1"),
        ({"trust": "blind"}, "trust: expected one of full, relative-accuracy, got 'blind'"),
        ({"timeout": 0}, "timeout: expected above 0, got 0.0"),
        ({"split": "sorted"}, "split: expected one of random, dirichlet, one-class"),
        ({"edge-delays": "1,x"}, "edge-delays: expected at most 9 numbers of seconds, got '1,x'"),
        ({"edge-delays": "1,-2"}, "edge-delays: expected at most 9 numbers"),
        ({"edge-delays": "1,2", "num-edges": 1}, "edge-delays: expected at most 1 numbers"),
        ({"max-staleness": -2}, "max-staleness: expected at least 0, or -1 for any, got -2"),
        ({"watch": "live,tensorbord"}, "watch: expected the empty text or some of live, tensorb"),
        ({"staleness-weight": "linear"}, "staleness-weight: expected one of"),
        ({"fedasync-alpha": 1.5}, "fedasync-alpha: expected a fraction"),
        ({"fedasync-alpha": 0}, "fedasync-alpha: expected a fraction, above 0 to 1, got 0.0"),
        ({"fedbuff-size": 0}, "fedbuff-size: expected at least 1"),
        ({"checkpoint": "core.ckpt"}, "checkpoint: expected an absolute path, got 'core.ckpt'"),
        ({"device": "tpu9"}, "device: expected auto, cpu, cuda, .* got 'tpu9'"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(config, message):
    with pytest.raises(ValueError, match=message):
        Settings.read(config)


def test_whole_numbers_are_taken_for_fractions():
    assert Settings.read({"lr": 1}).lr == 1.0
