"""Dicts and tuples of tensors take every path of the engine that one tensor takes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from flwr_cloned_kd import CropAndFlip, Recipe, Runtime, clone, fit, predict, take
from flwr_cloned_kd.engine.losses import Batch
from flwr_cloned_kd.engine.nested import num_rows, split_rows
from flwr_cloned_kd.engine.runtime import count_flop, samples_at_once
from flwr_cloned_kd.method.targets import TargetBank
from tests.engine.test_step import recording
from tests.helpers.cores import make_core, start_of
from tests.helpers.reference import cnn, images, mlp, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = images(22)
TOP, BOTTOM = PLAIN[0].split(4, dim=2)
FORMS = {
    "dict": {"top": TOP, "bottom": BOTTOM},
    "tuple": (TOP, BOTTOM),
    "nested": {"top": (TOP,), "bottom": {"pixels": BOTTOM}},
}
RECIPE = Recipe(epochs=2, batch_size=8)


class Halves(nn.Module):
    """Joins two halves of an image and runs a model of one tensor on it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, top, bottom):
        top = top[0] if isinstance(top, tuple) else top
        bottom = bottom["pixels"] if isinstance(bottom, dict) else bottom
        return self.model(torch.cat([top, bottom], 2))


class Whole(nn.Module):
    """The same model of one tensor, with the same names of its weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


forms = pytest.mark.parametrize("inputs", FORMS.values(), ids=FORMS)
RUNTIMES = {
    "together": Runtime(device="cpu", batch_clones=True),
    "one by one": Runtime(device="cpu", batch_clones=False),
    "side by side": Runtime(device="cpu", batch_clones=False, workers=2),
    "bfloat16": Runtime(device="cpu", bf16=True),
}


def trained(model, dataset, runtime, **options):
    return fit(model, clone(model.state_dict(), 3), dataset, RECIPE, runtime=runtime, **options)


@forms
@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
@pytest.mark.parametrize("build", [mlp, cnn])
def test_nested_inputs_train_and_predict_to_the_bits_of_one_tensor(inputs, runtime, build):
    nested, whole = Halves(build()), Whole(build())
    edge = trained(nested, (inputs, PLAIN[1]), runtime)
    assert same_bits(edge, trained(whole, PLAIN, runtime))
    logits = predict(nested, edge, inputs, runtime=runtime, batch_size=5)
    assert torch.equal(logits, predict(whole, edge, PLAIN[0], runtime=runtime, batch_size=5))


@forms
def test_nested_inputs_are_copied_for_every_replay_of_a_recorded_step(inputs):
    model, data = Halves(mlp()), (inputs, PLAIN[1])
    recipe = replace(RECIPE, epochs=4)
    expected = fit(model, clone(model.state_dict(), 2), data, recipe)
    with recording() as counts:
        actual = fit(model, clone(model.state_dict(), 2), data, recipe)
    assert counts.replays
    assert same_bits(actual, expected)


@forms
@pytest.mark.parametrize("target_bytes", [0, 2**20])
def test_a_round_with_nested_inputs_has_the_bits_of_one_tensor(inputs, target_bytes):
    states = []
    for model, x in ((Halves(mlp()), inputs), (Whole(mlp()), PLAIN[0])):
        data = (x, PLAIN[1])
        core = make_core(data, RECIPE, model, runtime=Runtime(target_bytes=target_bytes))
        edge = trained(model, data, Runtime())
        states.append(core.distill(start_of(core), edge)[0])
    assert same_bits(states[0].params, states[1].params)
    assert states[0].train_accuracy == states[1].train_accuracy


@forms
def test_an_augmentation_gets_the_nested_inputs(inputs):
    def brighter(x, generator):
        shift = torch.rand((), generator=generator)
        return torch.utils._pytree.tree_map(lambda tensor: tensor + shift, x)

    recipe = replace(RECIPE, augment=brighter)
    nested, whole = Halves(mlp()), Whole(mlp())
    actual = fit(nested, clone(nested.state_dict(), 1), (inputs, PLAIN[1]), recipe)
    assert same_bits(actual, fit(whole, clone(whole.state_dict(), 1), PLAIN, recipe))


@forms
def test_crops_of_anything_but_one_tensor_of_images_are_refused(inputs):
    recipe = replace(RECIPE, augment=CropAndFlip(1))
    model = Halves(mlp())
    with pytest.raises(ValueError, match=r"augment: expected images \[B, C, H, W\] as one tensor"):
        fit(model, clone(model.state_dict(), 1), (inputs, PLAIN[1]), recipe)


def test_crops_of_vectors_are_refused():
    recipe, model = replace(RECIPE, augment=CropAndFlip(1)), nn.Linear(64, 3)
    with pytest.raises(ValueError, match=r"one tensor, got \[8, 64\]"):
        fit(model, clone(model.state_dict(), 1), (PLAIN[0].flatten(1), PLAIN[1]), recipe)


@forms
def test_rules_count_all_tensors_of_the_inputs(inputs):
    assert samples_at_once(torch.device("cuda"), inputs) == samples_at_once(
        torch.device("cuda"), PLAIN[0]
    )
    one = next(split_rows(inputs, 1))
    assert num_rows(one) == 1
    assert count_flop(Halves(cnn()), one) == count_flop(Whole(cnn()), PLAIN[0][:1]) > 0


@forms
def test_rows_of_nested_inputs_can_be_taken(inputs):
    part, labels = take((inputs, PLAIN[1]), [3, 1])
    assert torch.equal(labels, PLAIN[1][[3, 1]])
    logits = predict(Halves(mlp()), clone(Halves(mlp()).state_dict(), 1), part)
    assert torch.equal(logits, predict(mlp(), clone(mlp().state_dict(), 1), PLAIN[0][[3, 1]]))


@forms
@pytest.mark.parametrize("max_bytes", [0, 2**20])
def test_the_targets_of_nested_inputs_are_those_of_one_tensor(inputs, max_bytes):
    rows = torch.arange(22)
    targets = []
    for model, x in ((Halves(mlp()), inputs), (Whole(mlp()), PLAIN[0])):
        bank = TargetBank(
            model,
            clone(model.state_dict(), 2),
            (x, PLAIN[1]),
            RECIPE,
            view_seed=1,
            temperature=4.0,
            max_bytes=max_bytes,
        )
        targets.append(bank(Batch(x, PLAIN[1], rows)))
    assert torch.equal(*targets)


class Encoder(nn.Module):
    """A small transformer that is called as those of HuggingFace are."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        hidden = self.layer(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        kept = attention_mask[..., None]
        return {"logits": self.head((hidden * kept).sum(1) / kept.sum(1))}


def test_a_transformer_with_a_dict_of_inputs_trains_its_clones_one_by_one():
    # PyTorch's vmap runs attention on a CPU clone after clone, and warns; warnings are errors here.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (24, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(2, 7, (24, 1), generator=generator)).long()
    data = {"input_ids": ids, "attention_mask": mask}, ids[:, 0] % 3
    model, recipe = Encoder(), Recipe(epochs=2, batch_size=8, lr=0.05)
    start = clone(model.state_dict(), 3)
    edge = fit(model, start, data, recipe, runtime=Runtime(device="cpu"))
    expected = fit(model, start, data, recipe, runtime=RUNTIMES["one by one"])
    assert same_bits(edge, expected)
    assert predict(model, edge, data[0]).shape == (3, 24, 3)
