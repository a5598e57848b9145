import threading
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from flwr_cloned_kd import (
    CropAndFlip,
    Recipe,
    Runtime,
    clone,
    cross_entropy,
    fit,
    member,
    predict,
)
from flwr_cloned_kd.engine.ensemble import seeded
from flwr_cloned_kd.engine.lanes import Lane, _can_batch, lanes
from flwr_cloned_kd.engine.losses import Batch
from tests.helpers.reference import ROUNDING, cnn, distance, images, mlp, same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Runtime(device="cpu")
TOGETHER, ONE_BY_ONE = replace(CPU, batch_clones=True), replace(CPU, batch_clones=False)
DATA = images(22)
RECIPE = Recipe(epochs=2, batch_size=8)


def lanes_of(model, runtime=CPU, *, num_clones=3, training=True, inputs=None, ensemble=None):
    return lanes(
        model,
        clone(model.state_dict(), num_clones) if ensemble is None else ensemble,
        DATA[0] if inputs is None else inputs,
        runtime,
        training=training,
        batch_size=8,
        num_samples=100,
    )


def different(num_clones, build=mlp):
    params = [build(seed=seed).state_dict() for seed in range(num_clones)]
    return {name: torch.stack([model[name] for model in params]) for name in params[0]}


def tied():
    layers = [nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)]
    model = seeded(nn.Sequential(*layers), 0)
    model[3].weight = model[1].weight
    return model


class Recurrent(nn.Module):
    """vmap has no rule for an LSTM."""

    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.cells(x.flatten(1, 2))[0][:, -1])


class Chooses(nn.Module):
    """Branches on the data, which vmap cannot do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(x.flatten(1)) if x.sum() > 0 else self.head(-x.flatten(1))


class Averages(nn.Module):
    """Subtracts a running mean of its inputs, which each training step makes anew.

    Args:
        keep: "buffer" of the state dict, "hidden" buffer, plain "attribute", or buffer "in place".
    """

    def __init__(self, keep):
        super().__init__()
        self.keep, self.head = keep, nn.Linear(64, 3)
        if keep == "attribute":
            self.mean = torch.zeros(64)
        else:
            self.register_buffer("mean", torch.zeros(64), persistent=keep != "hidden")

    def forward(self, x):
        x = x.flatten(1)
        if self.training and self.keep == "in place":
            self.mean.mul_(0.5).add_(0.5 * x.mean(0))
        elif self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        return self.head(x - self.mean)


class Views(nn.Module):
    """Calls `view` on its activations, as the network of Flower's PyTorch app does."""

    def __init__(self, *, convolve, flatten=torch.Tensor.view):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1) if convolve else nn.Identity()
        self.head, self.flatten = nn.Linear(3 * 8 * 8, 3), flatten

    def forward(self, x):
        return self.head(self.flatten(self.convolution(x), (-1, 3 * 8 * 8)))


CANNOT = {
    "tied": tied,
    "dropout": lambda: mlp(nn.Dropout(0.5)),
    "LSTM": lambda: seeded(Recurrent(), 0),
}


@pytest.mark.parametrize(("build", "runtime"), [(mlp, CPU), (cnn, TOGETHER)], ids=["mlp", "cnn"])
@pytest.mark.parametrize("training", [True, False])
def test_a_small_model_is_one_lane_for_all_clones(build, runtime, training):
    clone_lanes, chosen = lanes_of(build(), runtime, training=training)
    assert len(clone_lanes) == 1
    assert chosen.batch_clones
    assert all(len(leaf) == 3 for leaf in clone_lanes[0].leaves)


def test_a_small_model_with_convolutions_is_a_lane_per_clone():
    clone_lanes, chosen = lanes_of(cnn())
    assert (len(clone_lanes), chosen.batch_clones) == (3, False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("runtime", [CPU, TOGETHER, ONE_BY_ONE], ids=["rule", "together", "alone"])
@pytest.mark.parametrize("build", [mlp, cnn], ids=["mlp", "cnn"])
def test_lanes_start_with_the_state_of_the_ensemble(build, runtime, training):
    # The trial of vmap runs a batch in training mode, which changes the statistics and counters of
    # batch normalisation. Both must be restored.
    ensemble = different(3, build)
    before = snapshot(ensemble)
    clone_lanes, _ = lanes_of(build(), runtime, ensemble=ensemble, training=training)
    parts = [part.read() for part in clone_lanes]
    assert same_bits({n: torch.cat([p[n] for p in parts]) for n in ensemble}, before)
    assert same_bits(ensemble, before)
    assert all("num_batches_tracked" not in n or not before[n].any() for n in before)
    # Training changes the state of the lane, not the ensemble.
    views = DATA[0][:8].expand(3 // len(clone_lanes), 8, 1, 8, 8)
    clone_lanes[0].forward(views)
    assert same_bits(ensemble, before)
    moved = clone_lanes[0].read()
    changed = {n for n in moved if not torch.equal(moved[n][0], before[n][0])}
    assert bool(changed) == training
    assert all("running" in n or "num_batches" in n for n in changed)


@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_be_batched_falls_back_to_a_lane_per_clone(kind):
    model = CANNOT[kind]()
    torch.manual_seed(2)
    generator = torch.get_rng_state()
    clone_lanes, chosen = lanes_of(model)
    assert len(clone_lanes) == 3
    assert not chosen.batch_clones
    assert torch.equal(torch.get_rng_state(), generator)
    ensemble = clone(model.state_dict(), 3)
    parts = [part.read() for part in clone_lanes]
    assert same_bits({n: torch.cat([p[n] for p in parts]) for n in ensemble}, ensemble)


@pytest.mark.parametrize("kind", CANNOT)
def test_what_fell_back_has_the_bits_of_clones_one_by_one(kind):
    model = CANNOT[kind]()
    start, recipe = clone(model.state_dict(), 3), replace(RECIPE, lr=0.01)
    actual = fit(model, start, DATA, recipe, seed=4, runtime=CPU)
    assert same_bits(actual, fit(model, start, DATA, recipe, seed=4, runtime=ONE_BY_ONE))
    assert distance(member(actual, 0), member(actual, 1)) > 1e-4
    logits = predict(model, actual, DATA[0], runtime=CPU)
    alone = predict(model, actual, DATA[0], runtime=ONE_BY_ONE)
    assert (logits - alone).abs().max() < ROUNDING


def test_a_model_that_chooses_by_its_data_falls_back():
    clone_lanes, chosen = lanes_of(seeded(Chooses(), 0))
    assert (len(clone_lanes), chosen.batch_clones) == (3, False)


@pytest.mark.parametrize("keep", ["buffer", "hidden", "attribute", "in place"])
def test_what_a_model_learns_outside_of_its_parameters_is_that_of_clones_one_by_one(keep):
    model = seeded(Averages(keep), 0)
    start = clone(model.state_dict(), 3)
    actual = fit(model, start, DATA, RECIPE, runtime=CPU)
    assert distance(actual, fit(model, start, DATA, RECIPE, runtime=ONE_BY_ONE)) < ROUNDING


def test_forced_batching_of_a_model_that_assigns_to_a_buffer_is_an_error():
    model = seeded(Averages("buffer"), 0)
    start = clone(model.state_dict(), 3)
    with pytest.raises(RuntimeError, match=r"batch_clones: expected .* changes mean in place"):
        fit(model, start, DATA, RECIPE, runtime=TOGETHER)


def test_dropout_is_batched_where_it_does_nothing():
    clone_lanes, chosen = lanes_of(mlp(nn.Dropout(0.5)), training=False)
    assert (len(clone_lanes), chosen.batch_clones) == (1, True)


@pytest.mark.parametrize("kind", CANNOT)
def test_clones_that_cannot_be_batched_are_still_compiled(kind, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda module, **options: compiled.append(options) or module
    )
    clone_lanes, chosen = lanes_of(CANNOT[kind](), replace(CPU, compile=True))
    assert chosen.compile
    assert compiled == [{"dynamic": False}] * len(clone_lanes)


def test_clones_in_one_pass_are_not_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    clone_lanes, chosen = lanes_of(mlp(), replace(CPU, compile=True))
    assert (len(clone_lanes), chosen.compile) == (1, False)


def test_only_batches_of_full_size_reach_the_compiled_model(monkeypatch):
    sizes = []

    def compiled(module, **options):
        def call(x):
            sizes.append(len(x))
            return module(x)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    model = mlp()
    runtime = replace(ONE_BY_ONE, compile=True)
    start = clone(model.state_dict(), 2)
    actual = fit(model, start, DATA, RECIPE, runtime=runtime)
    assert sizes == [8] * 8  # 2 clones, 2 epochs, 2 full batches; 6 samples are left over
    assert same_bits(actual, fit(model, start, DATA, RECIPE, runtime=ONE_BY_ONE))
    sizes.clear()
    predict(model, start, images(300)[0], runtime=runtime)
    assert sizes == [128] * 4


@pytest.mark.parametrize("kind", CANNOT)
def test_forced_batching_of_an_unsuitable_model_is_an_error(kind):
    # Otherwise all clones would have the same dropout, and tied weights would come apart.
    model = CANNOT[kind]()
    with pytest.raises((RuntimeError, ValueError), match=r"vmap|tied|Batching rule"):
        fit(model, clone(model.state_dict(), 3), DATA, RECIPE, runtime=TOGETHER)


def test_batching_can_be_forced_upon_a_large_model():
    model = seeded(nn.Sequential(nn.Flatten(), nn.Linear(64, 800), nn.Tanh(), nn.Linear(800, 3)), 0)
    assert not lanes_of(model)[1].batch_clones  # 54,403 parameters
    clone_lanes, chosen = lanes_of(model, TOGETHER)
    assert (len(clone_lanes), chosen.batch_clones) == (1, True)
    start = clone(model.state_dict(), 2)
    together = fit(model, start, DATA, RECIPE, runtime=TOGETHER)
    alone = fit(model, start, DATA, RECIPE, runtime=ONE_BY_ONE)
    # With a learning rate of 0.1 these 800 units move further than the models for which ROUNDING
    # was measured; the difference is still rounding of 6 steps in float32.
    assert distance(together, alone) < 5 * ROUNDING
    assert same_bits(together, fit(model, start, DATA, RECIPE, runtime=TOGETHER))


@pytest.mark.parametrize("num_clones", [2, 3])
def test_one_forward_and_backward_pass_is_equal_in_both_lanes(num_clones):
    ensemble = different(num_clones, cnn)
    x, y = DATA[0][:8], DATA[1][:8]
    grads = []
    for runtime in (TOGETHER, ONE_BY_ONE):
        clone_lanes, _ = lanes_of(cnn(), runtime, ensemble=ensemble)
        logits = torch.cat(
            [p.forward(x.expand(num_clones // len(clone_lanes), *x.shape)) for p in clone_lanes]
        )
        losses = [cross_entropy(one, Batch(x, y, torch.arange(8))) for one in logits]
        torch.stack(losses).sum().backward()
        per_leaf = zip(*[[leaf.grad for leaf in part.leaves] for part in clone_lanes])
        joined = [
            leaves[0] if len(clone_lanes) == 1 else torch.stack(leaves) for leaves in per_leaf
        ]
        grads.append({"logits": logits.detach(), **dict(enumerate(joined))})
    assert distance(*grads) < 1e-5  # one step, so less than ROUNDING allows for twenty


def test_frozen_parameters_are_no_leaves():
    model = mlp()
    model[1].requires_grad_(False)
    for runtime, lanes_expected in ((TOGETHER, 1), (ONE_BY_ONE, 3)):
        clone_lanes, _ = lanes_of(model, runtime)
        assert len(clone_lanes) == lanes_expected
        # The two of BatchNorm and the two of the head are trained.
        assert [len(part.leaves) for part in clone_lanes] == [4] * lanes_expected


def test_evaluation_needs_no_gradients():
    clone_lanes, _ = lanes_of(mlp(), TOGETHER, training=False)
    assert not any(leaf.requires_grad for leaf in clone_lanes[0].leaves)


@pytest.mark.slow
def test_compiled_clones_train_as_uncompiled_ones_and_compile_once(monkeypatch):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    compiling = replace(ONE_BY_ONE, compile=True)
    start, recipe = clone(cnn().state_dict(), 2), replace(RECIPE, augment=CropAndFlip(1))

    actual = fit(cnn(), start, DATA, recipe, runtime=compiling)
    # One graph serves both clones; the 6 samples left over by batches of 8 do not need another.
    assert counters["stats"]["unique_graphs"] == 1
    # Fused loops sum in another order: the rounding of two computations of the same sums.
    assert distance(actual, fit(cnn(), start, DATA, recipe, runtime=ONE_BY_ONE)) < ROUNDING
    assert distance(actual, start) > 0.1

    # A second phase with another number of clones and other data uses the compiled model.
    assert same_bits(fit(cnn(), start, DATA, recipe, runtime=compiling), actual)
    fit(cnn(seed=2), clone(cnn().state_dict(), 3), images(30), recipe, runtime=compiling)
    assert counters["stats"]["unique_graphs"] == 1

    # Predictions are another graph: no gradients, other modes, batches of 128 and one of 44.
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", False)
    logits = predict(cnn(), actual, images(300)[0], runtime=compiling)
    assert counters["stats"]["unique_graphs"] == 2
    expected = predict(cnn(), actual, images(300)[0], runtime=ONE_BY_ONE)
    assert (logits - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("num_clones", [1, 3])
@pytest.mark.parametrize("convolve", [True, False], ids=["convolution", "linear"])
def test_a_model_that_views_trains_as_one_that_reshapes(convolve, num_clones):
    colours = DATA[0].repeat(1, 3, 1, 1), DATA[1]
    views = seeded(Views(convolve=convolve), 0)
    reshapes = seeded(Views(convolve=convolve, flatten=torch.Tensor.reshape), 0)
    start = clone(views.state_dict(), num_clones)
    generator = torch.get_rng_state()
    actual = fit(views, start, colours, RECIPE, seed=4, runtime=ONE_BY_ONE)
    assert torch.equal(torch.get_rng_state(), generator)
    expected = fit(reshapes, start, colours, RECIPE, seed=4, runtime=ONE_BY_ONE)
    assert distance(actual, expected) < ROUNDING
    outputs = predict(views, actual, colours[0], runtime=CPU)
    assert torch.allclose(outputs, predict(reshapes, actual, colours[0], runtime=CPU), atol=1e-5)


def test_images_of_a_model_that_can_run_so_have_their_channels_last():
    leaves = lanes_of(cnn(), ONE_BY_ONE)[0][0].leaves
    weights = [leaf for leaf in leaves if leaf.dim() == 4 and leaf.shape[1] > 1]
    assert weights
    assert all(leaf.is_contiguous(memory_format=torch.channels_last) for leaf in weights)


def test_trials_in_two_threads_leave_the_filters_of_warnings_as_they_were():
    second_is_inside, first_is_over = threading.Event(), threading.Event()

    def first(inputs):
        thread.start()
        second_is_inside.wait(0.5)  # One trial at a time: the second one does not come.

    def second(inputs):
        second_is_inside.set()
        first_is_over.wait(60)

    def trial(forward):
        return _can_batch(Lane(nn.Linear(2, 2), [], forward, dict), torch.zeros(2, 2), 2)

    before = list(warnings.filters)
    thread = threading.Thread(target=trial, args=[second])
    trial(first)
    first_is_over.set()
    thread.join()
    leftover = list(warnings.filters)
    warnings.filters[:] = before
    assert leftover == before
