"""The textbook implementation agrees with the engine, and the benchmarks measure what they name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import engine, machine, phase0, presets, small_models, steps
from benchmarks import reference as textbook
from flwr_cloned_kd import (
    PRESETS,
    Core,
    CoreState,
    CropAndFlip,
    Distillation,
    Recipe,
    Runtime,
    clone,
    crop_and_flip,
    member,
    train_edge,
)
from tests.helpers.reference import ROUNDING, distance, images, mlp

# One batch per epoch: then every order of the samples sums the same gradient.
DATA = images(90)
RECIPE = Recipe(epochs=4, batch_size=128)


def stacked(models):
    states = [model.state_dict() for model in models]
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def test_the_textbook_trains_the_clones_that_the_engine_trains():
    model = mlp()
    trained = train_edge(model, model.state_dict(), DATA, RECIPE, num_clones=2)
    expected = textbook.train_clones(model, textbook.Images(*DATA), num_clones=2, epochs=4)
    assert distance(trained, stacked(expected)) < ROUNDING
    assert distance(trained, clone(model.state_dict(), 2)) > 1e-2


def test_the_textbook_distils_the_core_that_the_engine_distils():
    model = mlp()
    edges = [
        textbook.train_clones(model, textbook.Images(*images(40, seed=s)), num_clones=2, epochs=3)
        for s in (1, 2)
    ]
    core = Core(model=model, dataset=DATA, distillation=Distillation(recipe=RECIPE, memory_size=2))
    state = CoreState(model.state_dict(), memory=(stacked(edges[0]),))
    new, _ = core.distill(state, stacked(edges[1]))
    expected = textbook.distill(model, edges, textbook.Images(*DATA), epochs=4)
    assert distance(new.params, expected.state_dict()) < ROUNDING
    assert distance(new.params, model.state_dict()) > 1e-2


def test_the_transforms_of_the_textbook_are_views_of_the_engine():
    pixels = torch.randint(256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    transform = textbook.crop_flip_and_normalise(8, [0.0] * 3, [1.0] * 3)
    views = torch.arange(crop_and_flip.num_views)
    all_views = crop_and_flip.view(pixels.expand(len(views), -1, -1, -1), views).float()
    torch.manual_seed(0)
    for _ in range(20):
        assert (all_views == transform(pixels[0])).flatten(1).all(1).any()


@pytest.mark.parametrize("options", [["--dataset", "digits"], ["--model", "resnet-8"]])
def test_the_benchmark_times_both_and_saves_the_ratios(tmp_path, options, capsys):
    saved = tmp_path / "results.json"
    size = ["--samples", "16", "--epochs", "1", "--repetitions", "2"]
    results = engine.main([*options, *size, "--num-clones", "2", "--json", str(saved)])
    assert json.loads(saved.read_text()) == json.loads(json.dumps(results))
    assert results["ratios"].keys() == results["spread"].keys() == {"phase1", "phase2", "round"}
    for phase, ratio in results["ratios"].items():
        seconds = [results["seconds"][f"{side} {phase}"] for side in ("reference", "engine")]
        ratios = [slow / fast for slow, fast in zip(*seconds)]
        assert ratio == pytest.approx(sum(ratios) / 2)
        assert results["spread"][phase] == [min(ratios), max(ratios)]
    assert "engine against textbook" in capsys.readouterr().out


def test_the_benchmark_times_the_engine_beside_a_load(monkeypatch, capsys):
    monkeypatch.setattr(engine, "LOAD_START_SECONDS", 0.0)
    size = ["--samples", "16", "--epochs", "1", "--repetitions", "1", "--model", "resnet-8"]
    results = engine.main([*size, "--load", "1"])
    load = results["load"]
    assert load["processes"] == 1
    for phase in ("phase1", "phase2"):
        quiet = results["seconds"][f"engine {phase}"][0]
        assert load["kept"][phase] == pytest.approx(quiet / load["seconds"][phase])
    assert "Beside 1 busy processes: Phase 1 keeps" in capsys.readouterr().out


def test_the_demand_of_a_linear_layer_by_hand():
    # A pass of 3 inputs to 2 outputs multiplies and adds 6 numbers: 12 FLOP. The gradient of the
    # weight costs the same again, and the gradient of the input is not computed.
    cost = machine.demand(torch.nn.Linear(3, 2, bias=False), torch.zeros(5, 3), bf16=False)
    assert cost["flop"] == 24
    assert cost["bytes"] > (3 + 2) * 4


def test_the_textbook_does_not_import_the_library():
    assert "flwr_cloned_kd" not in Path(textbook.__file__).read_text().split('"""')[2]
    assert member(stacked([mlp()]), 0).keys() == mlp().state_dict().keys()


@pytest.fixture
def archive(tmp_path):
    """Ten parts of 24 coloured images of 8x8, and 32 held-out ones."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, num_images in (("train", 240), ("test", 32)):
        shape = (num_images, 8, 8, 3)
        arrays[f"x_{part}"] = generator.integers(256, size=shape, dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(num_images) % 4
    path = tmp_path / "tiny.npz"
    np.savez(path, **arrays)
    return path


def test_phase_0_resumes_from_its_results(archive, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "results.json"
    command = ["--data", str(archive), "--seeds", "2", "--epochs", "1", "--device", "cpu"]
    command += ["--json", str(saved), "--only"]
    first = phase0.main([*command, "own-loop"])
    assert list(first) == ["baseline", "own-loop"]
    assert json.loads(saved.read_text()) == first
    assert "own-loop" in capsys.readouterr().out

    tasks = []
    run = phase0.run

    def watched(task):
        tasks.append((task.name, task.seed))
        return run(task)

    monkeypatch.setattr(phase0, "run", watched)
    altered = {**first, "own-loop": {**first["own-loop"], "words": "something else"}}
    saved.write_text(json.dumps(altered))
    # The order in which a combination is written does not matter.
    second = phase0.main([*command, "own-loop", "lr-0.2+cosine", "cosine+lr-0.2"])
    name = "cosine+lr-0.2"
    assert tasks == [("own-loop", 0), ("own-loop", 1), (name, 0), (name, 1)]
    assert second[name]["words"] == "lr cosine to 0; lr 0.2"
    assert second["baseline"] == first["baseline"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_own_loop_of_phase_0_trains_what_fit_trains(epochs):
    inputs = torch.randint(256, (24, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    dataset = inputs.to(torch.uint8), torch.arange(24) % 4
    moments = torch.full((3,), 127.0), torch.full((3,), 70.0)
    recipe = Recipe(epochs=epochs, batch_size=10, augment=CropAndFlip())
    trial = phase0.Trial(recipe=recipe, moments=moments, pixels=moments)
    model = phase0.build(trial, 4, seed=0)
    by_fit, by_own_loop = (
        phase0.pretrain(
            model, dataset, phase0.ROWS[row].change(trial), seed=1, runtime=Runtime(device="cpu")
        )
        for row in ("baseline", "own-loop")
    )
    assert distance(by_own_loop, by_fit) < ROUNDING
    assert distance(by_own_loop, model.state_dict()) > 1e-2


def test_crops_of_phase_0_differ_only_in_their_padding():
    images = torch.randint(256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    colour = torch.tensor([1.0, 2.0, 3.0])
    views = torch.tensor([0, 161])
    plain = CropAndFlip().view(images, views).float()
    padded = phase0.MeanPaddedCrop(colour=colour).view(images, views)
    reflected = phase0.ReflectedCrop().view(images, views)
    inside = CropAndFlip().view(torch.ones_like(images), views) == 1
    assert (padded[inside] == plain[inside]).all()
    assert (reflected[inside] == plain[inside]).all()
    assert (padded == torch.where(inside, padded, colour[:, None, None])).all()
    # View 0 begins four pixels up and to the left. Reflection does not repeat the border.
    assert (reflected[0, :, 0, 0] == images[0, :, 4, 4]).all()


def test_an_unknown_row_of_phase_0_is_an_error_with_its_name(archive, capsys):
    with pytest.raises(SystemExit):
        phase0.main(["--data", str(archive), "--only", "cosine+nothing"])
    assert "got nothing" in capsys.readouterr().err


def test_steps_are_timed_by_a_short_and_a_long_training(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "NUM_IMAGES", 256)
    path = tmp_path / "steps.json"
    arguments = ["--device", "cpu", "--depths", "8", "--clones", "1", "--epochs", "1", "2"]
    results = steps.main([*arguments, "--json", str(path)])
    assert json.loads(path.read_text()) == results
    (row,) = results["rows"]
    assert (row["depth"], row["clones"]) == (8, 1)
    assert row["milliseconds"].keys() == {"plain"}


def test_every_small_model_trains_in_every_way(tmp_path, capsys):
    path = tmp_path / "small.json"
    options = ["--device", "cpu", "--epochs", "1", "--repeats", "2", "--json", str(path)]
    results = small_models.main(options)
    assert json.loads(path.read_text()) == results
    for name in small_models.MODELS:
        assert results[name].keys() == small_models.WAYS.keys()
        assert all(len(times) == 2 and min(times) > 0 for times in results[name].values())
    assert "19,074" in capsys.readouterr().out


@pytest.mark.parametrize("epochs", [("2", "2"), ("0", "1")])
def test_epochs_that_cannot_be_subtracted_are_refused(epochs, capsys):
    with pytest.raises(SystemExit):
        steps.main(["--epochs", *epochs])
    assert "expected two numbers, 0 < short < long" in capsys.readouterr().err


def test_every_preset_is_timed_as_often_as_asked(monkeypatch, tmp_path):
    def tiny():
        data = [images(12, seed=party) for party in range(1 + presets.ROUNDS)]
        return mlp(), data, Recipe(epochs=1)

    monkeypatch.setattr(presets, "SETUPS", {"digits": tiny})
    path = tmp_path / "presets.json"
    results = presets.main(
        ["--setup", "digits", "--repeats", "2", "--device", "cpu", "--json", str(path)]
    )
    assert json.loads(path.read_text()) == results
    assert results["digits"].keys() == {*PRESETS, "practical, no teachers"}
    assert all(len(values) == 2 and min(values) > 0 for values in results["digits"].values())


def test_the_summary_of_phase0_by_hand():
    baseline = {"words": "defaults", "accuracy": [0.1, 0.3], "epochs": 12, "device": "CPU"}
    content = phase0.summary(["baseline"], {"baseline": baseline})
    accuracy = content["result"]["baseline"]["accuracy"]
    assert (accuracy["mean"], accuracy["n"]) == (pytest.approx(0.2), 2)
    assert accuracy["sd"] == pytest.approx(0.02**0.5)  # (0.1^2 + 0.1^2) / (2 - 1)
    assert (content["epochs"], content["played on"]) == (12, "CPU")
