"""Any optimizer, limited gradients and phases that count steps."""

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn, optim

from flwr_cloned_kd import (
    ClonedKD,
    CropAndFlip,
    Recipe,
    Regression,
    Runtime,
    clone,
    fit,
    member,
    train_edge,
)
from flwr_cloned_kd.engine import fit as engine
from flwr_cloned_kd.engine.optimizers import make_optimizer
from flwr_cloned_kd.engine.progress import log_once
from tests.engine.test_step import recording
from tests.helpers import reference
from tests.helpers.cores import make_core, start_of
from tests.helpers.reference import ROUNDING, cnn, distance, images, mlp, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = images(38)
TOGETHER, ONE_BY_ONE = (
    Runtime(device="cpu", batch_clones=True),
    Runtime(device="cpu", batch_clones=False),
)
RUNTIMES = {
    "together": TOGETHER,
    "one by one": ONE_BY_ONE,
    "side by side": replace(ONE_BY_ONE, workers=3),
}
paths = pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
ADAMW = Recipe(epochs=2, batch_size=8, lr=0.01, optimizer=optim.AdamW, augment=CropAndFlip(1))
SGD = Recipe(epochs=2, batch_size=8)
# Adam divides a gradient by its size. A gradient that is 0 but for rounding, such as that of a bias
# before BatchNorm, therefore moves its weight by up to the learning rate in every step. An eps far
# above the rounding of 1e-8 leaves such a weight where it is.
CALM = partial(optim.AdamW, eps=1e-3)


def trained(recipe, runtime=ONE_BY_ONE, *, model=None, num_clones=3, **options):
    model = mlp() if model is None else model
    start = clone(model.state_dict(), num_clones)
    return fit(model, start, DATA, recipe, seed=5, runtime=runtime, **options)


def twin(recipe, index, *, model=None):
    model = mlp() if model is None else model
    return reference.train(model, model.state_dict(), DATA, recipe, seed=5, clone=index)


@paths
@pytest.mark.parametrize("build", [mlp, cnn], ids=["mlp", "cnn"])
def test_adamw_trains_each_clone_as_a_plain_loop(build, runtime):
    recipe = replace(ADAMW, optimizer=CALM)
    ensemble = trained(recipe, runtime, model=build())
    for index in range(3):
        assert distance(member(ensemble, index), twin(recipe, index, model=build())) < ROUNDING
    assert distance(ensemble, clone(build().state_dict(), 3)) > 0.05


def test_one_clone_has_the_bits_of_a_plain_loop_with_adamw():
    assert same_bits(member(trained(ADAMW, num_clones=1), 0), twin(ADAMW, 0))


@paths
@pytest.mark.parametrize(
    "optimizer",
    [optim.Adam, optim.NAdam, partial(optim.RMSprop, momentum=0.5), optim.Adagrad, optim.Adamax],
    ids=["Adam", "NAdam", "RMSprop", "Adagrad", "Adamax"],
)
def test_other_optimizers_train_in_one_pass_as_one_by_one(optimizer, runtime):
    recipe = Recipe(epochs=2, batch_size=8, lr=0.01, optimizer=partial(optimizer, eps=1e-3))
    assert distance(trained(recipe, runtime), trained(recipe)) < ROUNDING


@paths
def test_the_default_is_sgd_with_the_numbers_of_the_recipe(runtime):
    sgd = partial(optim.SGD, momentum=0.9, weight_decay=1e-4, fused=True)
    assert same_bits(trained(replace(SGD, optimizer=sgd), runtime), trained(SGD, runtime))


@pytest.mark.parametrize("runtime", [None, TOGETHER], ids=["rule", "together"])
def test_an_optimizer_that_mixes_numbers_trains_clones_one_by_one(runtime):
    class Normalised(optim.SGD):
        """Divides each gradient by its norm over the whole tensor."""

        def step(self, closure=None):
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.grad.div_(weight.grad.norm() + 1e-6)
            return super().step(closure)

    for optimizer in (Normalised, lambda parameters, lr: Normalised(parameters, lr=lr)):
        recipe = Recipe(epochs=2, batch_size=8, lr=0.01, optimizer=optimizer)
        ensemble = trained(recipe, runtime or Runtime(device="cpu"))
        assert same_bits(ensemble, trained(recipe, ONE_BY_ONE))
        assert distance(member(ensemble, 1), twin(recipe, 1)) < ROUNDING


def test_the_schedule_multiplies_the_rate_of_every_group():
    # Group rates of 1/2 and 3 times the rate of the recipe, 0.1; the schedule gives 1 and then 1/4.
    rates = []

    class Recording(optim.SGD):
        def step(self, closure=None):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def grouped(parameters, lr):
        return Recording(
            [{"params": parameters[:1], "lr": lr / 2}, {"params": parameters[1:], "lr": 3 * lr}]
        )

    recipe = Recipe(
        epochs=1, batch_size=19, optimizer=grouped, schedule=lambda done: 1 if done < 0.5 else 0.25
    )
    trained(recipe, num_clones=1)
    assert rates == [pytest.approx([0.05, 0.3]), pytest.approx([0.0125, 0.075])]


def test_a_fixed_rate_of_the_factory_is_kept():
    fixed = Recipe(
        epochs=1, batch_size=8, optimizer=lambda weights, lr: optim.SGD(weights, lr=0.02)
    )
    given = Recipe(epochs=1, batch_size=8, lr=0.02, optimizer=optim.SGD)
    assert distance(trained(fixed), trained(given)) < ROUNDING


@pytest.mark.parametrize(
    ("optimizer", "name"), [(optim.LBFGS, "LBFGS"), (lambda weights, lr: weights, "list")]
)
def test_what_is_no_optimizer_for_steps_is_refused(optimizer, name):
    with pytest.raises(ValueError, match=f"optimizer: expected an optimizer .*, got {name}"):
        trained(Recipe(epochs=1, batch_size=8, optimizer=optimizer))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (partial(optim.AdamW, decay=1), r"to call with \(parameters, lr=0.1\), got: .*'decay'"),
        (lambda weights: optim.SGD(weights), r"to call with .*, got: .*'lr'"),
        (lambda weights, lr: optim.Optimizer(weights, {}), 'a learning rate "lr" in each .* none'),
    ],
    ids=["a misspelled option", "a function without lr", "an optimizer without lr"],
)
def test_a_factory_that_does_not_fit_is_refused_by_name(optimizer, message):
    with pytest.raises(ValueError, match=f"^optimizer: expected .*{message}"):
        trained(Recipe(epochs=1, batch_size=8, optimizer=optimizer))


# Limits of the gradient


@paths
@pytest.mark.parametrize("max_grad_norm", [0.05, 0.5, 1e6])
def test_a_limited_gradient_trains_as_with_clip_grad_norm(max_grad_norm, runtime):
    recipe = replace(SGD, max_grad_norm=max_grad_norm)
    ensemble = trained(recipe, runtime)
    for index in range(3):
        assert distance(member(ensemble, index), twin(recipe, index)) < ROUNDING
    free = trained(SGD, runtime)
    assert (distance(ensemble, free) < ROUNDING) == (max_grad_norm == 1e6)


def test_the_gradient_of_one_clone_does_not_limit_another():
    # The first clone starts a hundred times further out, and its gradient is far larger.
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    starts = clone(model.state_dict(), 3)
    starts["3.weight"][0] *= 100
    recipe = replace(SGD, max_grad_norm=0.2)
    together = fit(model, starts, DATA, recipe, runtime=TOGETHER)
    alone = fit(model, clone(model.state_dict(), 3), DATA, recipe, runtime=TOGETHER)
    assert distance(member(together, 2), member(alone, 2)) < ROUNDING
    assert distance(member(together, 0), member(alone, 0)) > 0.1


def test_one_limited_step_by_hand():
    # Logits are 0 and label 0: the gradient by the logits is (-1/2, 1/2), by the weights that times
    # x = (3, 4), with the norm 5 / sqrt 2. Limited to 1 it is (-3, -4, 3, 4) / (5 sqrt 2).
    model = nn.Linear(2, 2, bias=False)
    data = torch.tensor([[3.0, 4.0]]), torch.tensor([0])
    recipe = Recipe(epochs=1, batch_size=1, lr=1, weight_decay=0, max_grad_norm=1.0)
    for runtime in (TOGETHER, ONE_BY_ONE):
        ensemble = fit(model, {"weight": torch.zeros(2, 2, 2)}, data, recipe, runtime=runtime)
        expected = [part / 5 / 2**0.5 for part in (3, 4, -3, -4)]
        assert ensemble["weight"][1].flatten().tolist() == pytest.approx(expected, abs=1e-6)


# Steps instead of epochs


@paths
@pytest.mark.parametrize("steps", [1, 3, 5, 12])
def test_a_phase_takes_as_many_steps_as_its_recipe_says(steps, runtime):
    # 38 samples are 4 batches of 8 and one of 6.
    seen = []
    recipe = Recipe(
        steps=steps, batch_size=8, schedule=lambda done: seen.append(done) or 1 - done / 2
    )
    ensemble = trained(recipe, runtime)
    assert sorted(set(seen)) == [step / steps for step in range(steps)]
    assert ensemble["2.num_batches_tracked"].tolist() == [steps] * 3
    for index in range(3):
        quiet = replace(recipe, schedule=lambda done: 1 - done / 2)
        assert distance(member(ensemble, index), twin(quiet, index)) < ROUNDING


def test_steps_of_whole_epochs_are_those_epochs():
    assert same_bits(trained(Recipe(steps=10, batch_size=8)), trained(SGD))


@pytest.mark.parametrize("augment", [None, CropAndFlip(1)])
@pytest.mark.parametrize("steps", [2, 7])
def test_a_round_of_steps_equals_teachers_run_on_every_batch(augment, steps):
    recipe = Recipe(steps=steps, batch_size=8, augment=augment)
    results = []
    for target_bytes in (0, 2**20):
        core = make_core(DATA, recipe, runtime=Runtime(target_bytes=target_bytes))
        edge = train_edge(core.model, core.model.state_dict(), images(20, seed=4), SGD)
        results.append(core.distill(start_of(core), edge)[0].params)
        # Targets are kept only if the phase sees a whole epoch of 5 batches.
        assert (core.target_cache.num_bytes > 0) == (target_bytes > 0 and steps > 5)
    assert distance(*results) < ROUNDING


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"steps": 5, "epochs": 3}, "epochs: expected either epochs or steps, got 3 and 5"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected above 0, got 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm: expected above 0, got nan"),
    ],
)
def test_a_recipe_refuses_steps_and_limits_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


# CUDA graphs


@pytest.mark.parametrize("runtime", [ONE_BY_ONE, TOGETHER], ids=["one by one", "together"])
@pytest.mark.parametrize("limit", [None, 0.2])
def test_a_recorded_step_with_a_limit_trains_to_the_same_bits(runtime, limit):
    recipe = replace(SGD, epochs=4, max_grad_norm=limit)
    plain = trained(recipe, runtime)
    with recording() as counts:
        assert same_bits(trained(recipe, runtime), plain)
    assert counts.replays


def test_an_optimizer_is_prepared_for_a_recording():
    weights = [torch.zeros(2, requires_grad=True)]
    (group,) = make_optimizer(weights, ADAMW, recorded=True).param_groups
    assert group["capturable"]
    (group,) = make_optimizer(weights, ADAMW).param_groups
    assert not group["capturable"]


@pytest.mark.parametrize(
    ("optimizer", "recorded"),
    [
        (None, True),
        (optim.AdamW, True),
        (CALM, True),
        (optim.Adagrad, False),
        (lambda weights, lr: optim.AdamW(weights, lr=lr), False),
    ],
)
def test_what_cannot_be_recorded_trains_with_plain_steps_and_one_line(
    optimizer, recorded, monkeypatch, caplog
):
    class Reached(Exception):
        pass

    def lanes_with_graphs(*args, **options):
        parts, plan = lanes(*args, **options)
        return parts, plan._replace(cuda_graphs=True)

    def recorded_step(step, device):
        raise Reached

    lanes = engine.lanes
    monkeypatch.setattr(engine, "lanes", lanes_with_graphs)
    monkeypatch.setattr(engine, "RecordedStep", recorded_step)
    log_once.cache_clear()
    recipe = replace(SGD, optimizer=optimizer)
    with caplog.at_level(logging.INFO):
        if recorded:
            with pytest.raises(Reached):
                trained(recipe)
            assert not caplog.records
            return
        for _ in range(2):
            actual = trained(recipe)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "cuda_graphs: expected SGD of the recipe or an optimizer with the option"
    )
    monkeypatch.undo()
    assert same_bits(actual, trained(recipe))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "together"])
@pytest.mark.parametrize("optimizer", [optim.AdamW, optim.NAdam, optim.RMSprop])
def test_a_recorded_step_of_an_optimizer_equals_a_plain_one_on_a_gpu(optimizer, batched):
    # Recorded steps compute the same update in another order; for the eps see CALM.
    recipe = replace(ADAMW, optimizer=partial(optimizer, eps=1e-3), epochs=4, max_grad_norm=0.5)
    runtime = Runtime(device="cuda", batch_clones=batched)
    recorded = trained(recipe, replace(runtime, cuda_graphs=True))
    assert distance(recorded, trained(recipe, runtime)) < 1e-4


# What a resumed run compares


def test_the_settings_of_a_default_recipe_are_those_of_older_checkpoints():
    # A checkpoint without one of these entries counts as one with None.
    settings = ClonedKD(make_core(DATA, SGD)).settings()
    options = ("steps", "optimizer", "max_grad_norm", "task")
    assert {name: settings[name] for name in options} == dict.fromkeys(options)


def test_the_settings_name_another_task():
    task = Regression(tolerance=1)
    core = make_core((DATA[0], DATA[1].float()[:, None].repeat(1, 3)), SGD, task=task)
    assert ClonedKD(core).settings()["task"] == "Regression"


def test_the_settings_name_another_optimizer():
    recipe = Recipe(steps=9, optimizer=CALM, max_grad_norm=1.0)
    settings = ClonedKD(make_core(DATA, recipe)).settings()
    assert settings["optimizer"] == "AdamW"
    assert settings["steps"] == 9
    assert settings["max_grad_norm"] == 1.0
