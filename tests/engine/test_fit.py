import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from flwr_cloned_kd import (
    AccuracyReached,
    CropAndFlip,
    Plateau,
    Recipe,
    Runtime,
    accuracy,
    clone,
    cross_entropy,
    digits_cnn,
    fit,
    fold_in,
    member,
    predict,
    shuffle_labels,
)
from flwr_cloned_kd.engine.ensemble import seeded
from flwr_cloned_kd.engine.fit import Predictor
from tests.helpers import reference
from tests.helpers.reference import ROUNDING, cnn, distance, few, images, mlp, same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

TOGETHER, ONE_BY_ONE = (
    Runtime(device="cpu", batch_clones=True),
    Runtime(device="cpu", batch_clones=False),
)
paths = pytest.mark.parametrize("runtime", [TOGETHER, ONE_BY_ONE], ids=["together", "one by one"])
architectures = pytest.mark.parametrize("build", ["mlp", "cnn"])


def model_of(build):
    return mlp() if build == "mlp" else cnn()


DATA = images(38)
RECIPE = Recipe(epochs=2, batch_size=8, augment=CropAndFlip(1))


def trained(model, num_clones, recipe=RECIPE, dataset=DATA, **options):
    return fit(model, clone(model.state_dict(), num_clones), dataset, recipe, **options)


def weights_of(model, ensemble):
    return {name: ensemble[name] for name, _ in model.named_parameters()}


def twin(model, recipe=RECIPE, dataset=DATA, **options):
    return reference.train(model, model.state_dict(), dataset, recipe, **options)


@architectures
@paths
def test_each_clone_trains_as_it_would_alone_in_a_plain_loop(build, runtime):
    # 38 is 4 batches of 8 and one of 6, so a smaller last batch is covered; so is BatchNorm, whose
    # running statistics and counters are part of the state.
    model = model_of(build)
    ensemble = trained(model, 3, seed=5, runtime=runtime)
    for e in range(3):
        assert distance(member(ensemble, e), twin(model, seed=5, clone=e)) < ROUNDING
    start = clone(model.state_dict(), 3)
    assert distance(weights_of(model, ensemble), weights_of(model, start)) > 0.1


@paths
def test_the_librarys_own_model_trains_as_the_plain_loop(runtime):
    # One epoch only: its ReLUs have kinks, see ROUNDING.
    model, recipe = digits_cnn(3), Recipe(epochs=1, batch_size=8)
    ensemble = trained(model, 2, recipe, runtime=runtime)
    for e in range(2):
        assert distance(member(ensemble, e), twin(model, recipe, clone=e)) < ROUNDING


def test_one_clone_has_the_bits_of_a_plain_loop_with_fused_sgd():
    model = mlp()
    assert same_bits(member(trained(model, 1, seed=5), 0), twin(model, seed=5, fused=True))


@architectures
def test_batched_clones_equal_clones_one_by_one(build):
    model = model_of(build)
    together = trained(model, 3, runtime=TOGETHER)
    one_by_one = trained(model, 3, runtime=ONE_BY_ONE)
    assert distance(together, one_by_one) < ROUNDING
    counters = [name for name in together if name.endswith("num_batches_tracked")]
    assert counters
    # 2 epochs of 5 batches.
    assert all(together[name].tolist() == [10, 10, 10] for name in counters)
    assert all(one_by_one[name].tolist() == [10, 10, 10] for name in counters)


def test_a_clone_has_the_same_bits_beside_other_clones():
    model = mlp()
    starts = clone(model.state_dict(), 3)
    others = {name: tensor.clone() for name, tensor in starts.items()}
    for name in others:
        others[name][0] = 0
    ensemble = fit(model, starts, DATA, RECIPE, runtime=ONE_BY_ONE)
    beside = fit(model, others, DATA, RECIPE, runtime=ONE_BY_ONE)
    assert same_bits(member(ensemble, 2), member(beside, 2))
    assert same_bits(member(ensemble, 0), member(trained(model, 1), 0))


def test_clones_differ_by_their_draws_only():
    recipe = Recipe(epochs=2, batch_size=len(DATA[0]), augment=None)
    model = nn.Sequential(nn.Flatten(), seeded(nn.Linear(64, 3), 0))
    whole_batches = trained(model, 2, recipe)
    # If a batch is the whole dataset, clones differ only in the order of a sum.
    assert distance(member(whole_batches, 0), member(whole_batches, 1)) < ROUNDING
    ensemble = trained(model, 2)
    assert distance(member(ensemble, 0), member(ensemble, 1)) > 1e-2


@paths
def test_the_same_seed_gives_the_same_bits_and_another_gives_others(runtime):
    model = mlp()
    first = trained(model, 2, seed=1, runtime=runtime)
    torch.manual_seed(123)
    assert same_bits(trained(model, 2, seed=1, runtime=runtime), first)
    assert distance(trained(model, 2, seed=2, runtime=runtime), first) > 1e-2


@paths
def test_nothing_that_is_passed_in_is_changed(runtime):
    model = mlp().eval()
    model[1].bias.requires_grad_(False)
    starts = clone(model.state_dict(), 2)
    before = [snapshot(model.state_dict()), snapshot(starts), DATA[0].clone(), DATA[1].clone()]
    fit(model, starts, DATA, RECIPE, runtime=runtime)
    predict(model, starts, DATA[0], runtime=runtime)
    assert same_bits(model.state_dict(), before[0])
    assert same_bits(starts, before[1])
    assert torch.equal(DATA[0], before[2])
    assert torch.equal(DATA[1], before[3])
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not any(tensor.requires_grad for tensor in starts.values())


@paths
def test_the_weights_of_the_template_are_not_read(runtime):
    starts = clone(mlp().state_dict(), 2)
    other = seeded(mlp(), 77)
    actual = fit(other, starts, DATA, RECIPE, runtime=runtime)
    assert same_bits(actual, trained(mlp(), 2, runtime=runtime))


@pytest.mark.parametrize("between", [None, nn.Dropout(0.5)], ids=["plain", "dropout"])
def test_the_global_generator_is_left_as_it_was(between):
    model = mlp(between)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    ensemble = trained(model, 2)
    predict(model, ensemble, DATA[0])
    assert torch.equal(torch.get_rng_state(), before)


@paths
def test_the_result_is_detached_on_the_cpu_and_in_order(runtime):
    model = mlp()
    ensemble = trained(model, 2, runtime=runtime)
    assert list(ensemble) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert ensemble[name].shape == (2, *tensor.shape)
        assert ensemble[name].dtype == tensor.dtype
        assert ensemble[name].device.type == "cpu"
        assert not ensemble[name].requires_grad
        assert ensemble[name].is_contiguous()


def test_one_step_of_descent_by_hand():
    # Logits are 0, so p = (1/2, 1/2) and with label 0 the gradient by the logits is (-1/2, 1/2),
    # by the weights that times x = 2. With lr 1/2 from w = 0 and b = 0: w = (1/2, -1/2), b half.
    model = nn.Linear(1, 2)
    start = {"weight": torch.zeros(1, 2, 1), "bias": torch.zeros(1, 2)}
    dataset = (torch.tensor([[2.0]]), torch.tensor([0]))
    recipe = Recipe(epochs=1, batch_size=1, lr=0.5, weight_decay=0)
    actual = fit(model, start, dataset, recipe)
    assert actual["weight"].flatten().tolist() == [0.5, -0.5]
    assert actual["bias"].flatten().tolist() == [0.25, -0.25]


@paths
def test_frozen_parameters_stay(runtime):
    model = mlp()
    model[1].requires_grad_(False)
    ensemble = trained(model, 2, runtime=runtime)
    start = clone(model.state_dict(), 2)
    assert torch.equal(ensemble["1.weight"], start["1.weight"])
    assert torch.equal(ensemble["1.bias"], start["1.bias"])
    assert not torch.equal(ensemble["5.weight"], start["5.weight"])
    assert distance(member(ensemble, 1), twin(model, clone=1)) < ROUNDING


@paths
def test_the_proximal_term_adds_half_mu_times_the_squared_movement(runtime):
    model = mlp()
    recipe = Recipe(epochs=2, batch_size=8, proximal_mu=0.5)
    ensemble = trained(model, 2, recipe, runtime=runtime)
    for e in range(2):
        assert distance(member(ensemble, e), twin(model, recipe, clone=e)) < ROUNDING
    assert distance(ensemble, trained(model, 2, Recipe(epochs=2, batch_size=8))) > 1e-2


@paths
def test_label_noise_is_drawn_after_the_views(runtime):
    recipe = Recipe(epochs=2, batch_size=8, augment=CropAndFlip(1), label_noise=shuffle_labels)
    model = mlp()
    ensemble = trained(model, 2, recipe, runtime=runtime)
    assert distance(member(ensemble, 1), twin(model, recipe, clone=1)) < ROUNDING


@paths
def test_the_schedule_sees_the_share_of_steps_taken(runtime):
    seen = []
    recipe = Recipe(epochs=2, batch_size=8, schedule=lambda done: seen.append(done) or 1.0)
    trained(mlp(), 2, recipe, runtime=runtime)
    assert seen == [step / 10 for step in range(10)]


def rows_seen(dataset, recipe, *, seed=0):
    """Record the rows of every batch of a clone."""
    seen = []

    def loss(logits, batch):
        assert torch.equal(batch.inputs, dataset[0][batch.rows])
        assert torch.equal(batch.labels, dataset[1][batch.rows])
        seen.append(batch.rows.tolist())
        return cross_entropy(logits, batch)

    trained(mlp(), 1, recipe, dataset, loss=loss, seed=seed)
    return seen


def test_a_lone_left_over_sample_is_skipped():
    recipe = Recipe(epochs=1, batch_size=4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(fold_in(3, 0))).tolist()
    assert rows_seen(images(9), recipe, seed=3) == [order[:4], order[4:8]]


@paths
def test_a_single_left_over_sample_is_skipped_as_in_the_plain_loop(runtime):
    model, dataset, recipe = mlp(), images(17), Recipe(epochs=3, batch_size=8)
    ensemble = trained(model, 2, recipe, dataset, runtime=runtime)
    assert ensemble["2.num_batches_tracked"].tolist() == [6, 6]
    for e in range(2):
        expected = twin(model, recipe, dataset, clone=e)
        assert distance(member(ensemble, e), expected) < ROUNDING


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "sizes"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (9, 4, [4, 4]), (3, 4, [3]), (2, 128, [2])],
)
def test_batches_of_an_epoch(num_samples, batch_size, sizes):
    seen = rows_seen(images(num_samples), Recipe(epochs=1, batch_size=batch_size))
    assert [len(rows) for rows in seen] == sizes
    assert len({row for rows in seen for row in rows}) == sum(sizes)


@pytest.mark.parametrize(("num_samples", "batch_size", "steps"), [(1, 8, 1), (3, 1, 3)])
def test_batches_of_one_are_trained_on_where_there_are_no_others(num_samples, batch_size, steps):
    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    def loss(logits, batch):
        seen.append(len(batch.rows))
        return cross_entropy(logits, batch)

    recipe = Recipe(epochs=1, batch_size=batch_size)
    trained(model, 1, recipe, images(num_samples), loss=loss)
    assert seen == [1] * steps


def recorded(stop):
    lengths = []

    def recording(history):
        lengths.append(list(history))
        return stop(history)

    return recording, lengths


@paths
def test_training_stops_at_the_learning_threshold(runtime):
    stop, seen = recorded(AccuracyReached(0.9))
    recipe = Recipe(epochs=40, batch_size=8, stop=stop)
    model = mlp()
    ensemble = trained(model, 1, recipe, runtime=runtime)
    history = []
    expected = twin(model, recipe, history=history)
    stops_at = len(history)
    assert 1 < stops_at < 40
    assert [len(epochs) for epochs in seen[:stops_at]] == list(range(1, stops_at + 1))
    assert seen[stops_at - 1][-1].accuracy >= 0.9 > seen[stops_at - 2][-1].accuracy
    assert [epoch.accuracy for epoch in seen[stops_at - 1]] == pytest.approx(
        [epoch.accuracy for epoch in history]
    )
    assert [epoch.loss for epoch in seen[stops_at - 1]] == pytest.approx(
        [epoch.loss for epoch in history], abs=ROUNDING
    )
    assert distance(member(ensemble, 0), expected) < ROUNDING


@pytest.mark.parametrize("stop", [AccuracyReached(0.9), Plateau(2, 0.05)], ids=type)
def test_both_paths_stop_at_the_same_epoch(stop):
    histories = []
    for runtime in (TOGETHER, ONE_BY_ONE):
        recording, seen = recorded(stop)
        recipe = Recipe(epochs=40, batch_size=8, stop=recording)
        trained(mlp(), 3, recipe, runtime=runtime)
        histories.append(seen[-1])
    together, one_by_one = histories
    assert 1 < len(together) < 40
    assert len(together) == len(one_by_one)
    assert [e.accuracy for e in together] == pytest.approx([e.accuracy for e in one_by_one])
    assert [e.loss for e in together] == pytest.approx([e.loss for e in one_by_one], abs=ROUNDING)


@paths
def test_a_loss_that_never_falls_stops_after_patience_epochs_more(runtime):
    # Without steps the loss of the first epoch stays the best; epochs 2 to 4 do not improve on it.
    stop, seen = recorded(Plateau(patience=3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    trained(model, 2, Recipe(epochs=40, batch_size=8, lr=0, stop=stop), runtime=runtime)
    assert len(seen) == 4


@paths
def test_the_history_is_the_mean_over_samples_and_clones(runtime):
    stop, seen = recorded(lambda history: False)
    recipe = Recipe(epochs=3, batch_size=8, stop=stop)
    model = mlp()
    trained(model, 3, recipe, runtime=runtime)
    histories = [[], [], []]
    for e, history in enumerate(histories):
        twin(model, Recipe(epochs=3, batch_size=8), clone=e, history=history)
    for actual, epochs in zip(seen[-1], zip(*histories)):
        assert actual.loss == pytest.approx(sum(e.loss for e in epochs) / 3, abs=ROUNDING)
        assert actual.accuracy == pytest.approx(sum(e.accuracy for e in epochs) / 3, abs=1e-6)


def test_a_dropout_model_is_trained_one_by_one_and_reproducibly():
    model = mlp(nn.Dropout(0.5))
    first = trained(model, 3, seed=1)
    torch.manual_seed(9)
    assert same_bits(trained(model, 3, seed=1), first)
    assert same_bits(trained(model, 3, seed=1, runtime=ONE_BY_ONE), first)
    assert distance(trained(model, 3, seed=2), first) > 1e-2
    assert distance(trained(mlp(), 3, seed=1), first) > 1e-2


def test_dropout_is_off_in_predictions():
    model = mlp(nn.Dropout(0.5))
    ensemble = clone(model.state_dict(), 2)
    logits = predict(model, ensemble, DATA[0])
    assert torch.equal(logits, predict(model, ensemble, DATA[0]))
    assert distance({"": logits}, {"": predict(mlp(), ensemble, DATA[0])}) == 0


def test_a_model_with_tied_weights_trains_as_the_plain_loop():
    model = seeded(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), 0)
    model[3].weight = model[1].weight
    recipe = Recipe(epochs=2, batch_size=8, lr=0.01)
    ensemble = trained(model, 2, recipe)
    assert torch.equal(ensemble["1.weight"], ensemble["3.weight"])
    assert distance(member(ensemble, 1), twin(model, recipe, clone=1)) < ROUNDING


@architectures
@paths
def test_bfloat16_changes_a_result_by_its_rounding_only(build, runtime):
    # bfloat16 has 8 bits, a relative error of 0.4 %. After 10 steps of a few layers the error was
    # 0.5 % of the movement of the weights. A broken path would differ by the whole movement.
    model = model_of(build)
    recipe = Recipe(epochs=2, batch_size=8)
    exact = trained(model, 2, recipe, runtime=runtime)
    options = {"device": "cpu", "bf16": True, "batch_clones": runtime.batch_clones}
    rounded = trained(model, 2, recipe, runtime=Runtime(**options))
    assert all(rounded[name].dtype == exact[name].dtype for name in exact)
    actual, expected = weights_of(model, rounded), weights_of(model, exact)
    start = weights_of(model, clone(model.state_dict(), 2))
    error = sum((actual[n] - expected[n]).square().sum().item() for n in actual) ** 0.5
    way = sum((expected[n] - start[n]).square().sum().item() for n in actual) ** 0.5
    assert 0 < error < 0.05 * way


@paths
def test_bfloat16_predictions_are_float32_and_close(runtime):
    model = digits_cnn(3)
    ensemble = trained(model, 2)
    exact = predict(model, ensemble, DATA[0], runtime=runtime)
    options = {"device": "cpu", "bf16": True, "batch_clones": runtime.batch_clones}
    rounded = predict(model, ensemble, DATA[0], runtime=Runtime(**options))
    assert rounded.dtype == torch.float32
    # Eight layers of 0.4 % each, on logits of a few units.
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@paths
def test_predictions_are_those_of_the_model_in_evaluation_mode(runtime):
    model = digits_cnn(3)
    ensemble = trained(model, 3)
    logits = predict(model, ensemble, DATA[0], runtime=runtime)
    assert logits.shape == (3, 38, 3)
    for e in range(3):
        model.load_state_dict(member(ensemble, e))
        with torch.no_grad():
            assert (logits[e] - model.eval()(DATA[0])).abs().max() < ROUNDING


def test_predictions_do_not_depend_on_their_batches():
    model = mlp()
    ensemble = trained(model, 2)
    whole = predict(model, ensemble, DATA[0])
    parts = predict(model, ensemble, DATA[0], batch_size=5)
    # Matrix products of other sizes may sum in another order.
    assert (whole - parts).abs().max() < ROUNDING


@pytest.mark.parametrize("num_clones", [1, 2])
@paths
def test_a_prediction_needs_no_gradient(runtime, num_clones):
    model = mlp()
    logits_of = Predictor(model, clone(model.state_dict(), num_clones), runtime)
    assert not logits_of(DATA[0]).requires_grad


def test_accuracy_by_hand():
    logits = torch.tensor([[[2.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [1.0, 0.0]]])
    assert accuracy(logits, torch.tensor([0, 1])).tolist() == [1.0, 0.5]
    assert accuracy(logits[1], torch.tensor([1, 1])) == 0


@few
@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    actual=st.lists(st.integers(0, 2), min_size=9, max_size=9),
)
def test_accuracy_is_the_share_of_equal_classes(labels, actual):
    logits = F.one_hot(torch.tensor(actual[: len(labels)]), 3).float()
    hits = sum(a == b for a, b in zip(labels, actual))
    assert accuracy(logits, torch.tensor(labels)).item() == pytest.approx(hits / len(labels))


@pytest.mark.parametrize(("num_inputs", "num_labels"), [(5, 4), (4, 5), (0, 0), (0, 3)])
def test_a_dataset_that_is_empty_or_of_two_lengths_is_refused(num_inputs, num_labels):
    dataset = (torch.zeros(num_inputs, 1, 8, 8), torch.zeros(num_labels, dtype=torch.int64))
    message = (
        "dataset: expected inputs and labels of one length above 0, "
        f"got {num_inputs} and {num_labels}"
    )
    with pytest.raises(ValueError, match=message):
        trained(mlp(), 1, RECIPE, dataset)


@pytest.mark.parametrize(
    "run", [lambda model: fit(model, {}, DATA, RECIPE), lambda model: predict(model, {}, DATA[0])]
)
def test_an_ensemble_without_a_tensor_is_refused(run):
    with pytest.raises(ValueError, match="ensemble: expected at least one tensor, got none"):
        run(mlp())


class Recurrent(nn.Module):
    """vmap has no rule for an LSTM."""

    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class DropsOut(nn.Module):
    """Draws in `forward`, so no submodule shows that the model has dropout."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        return self.head(nn.functional.dropout(x.flatten(1), 0.5, self.training))


@pytest.mark.parametrize("kind", [Recurrent, DropsOut])
def test_a_model_that_cannot_be_batched_trains_one_by_one(kind):
    model = kind()
    x, y = torch.randn(40, 5, 4), torch.arange(40) % 3
    start = clone(model.state_dict(), 2)
    recipe = Recipe(epochs=1, batch_size=20)
    actual = fit(model, start, (x, y), recipe, seed=3)
    alone = fit(model, start, (x, y), recipe, seed=3, runtime=Runtime(batch_clones=False))
    assert all(torch.equal(actual[name], alone[name]) for name in alone)
    assert predict(model, actual, x).shape == (2, 40, 3)


def test_a_model_without_anything_to_train_is_refused():
    model = nn.Linear(4, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="expected a parameter that requires a gradient"):
        fit(model, clone(model.state_dict(), 1), (torch.randn(4, 4), torch.arange(4) % 3), Recipe())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("batch_clones", [False, True])
def test_an_autocast_of_the_caller_changes_nothing(bf16, batch_clones):
    """Autocast keeps cast weights until its outermost context ends: they would go stale."""
    runtime = Runtime(bf16=bf16, batch_clones=batch_clones)
    data, recipe = images(24), Recipe(epochs=2, batch_size=8)

    def train():
        return fit(cnn(), clone(cnn().state_dict(), 2), data, recipe, runtime=runtime)

    alone = train()
    with torch.autocast("cpu", torch.bfloat16):
        inside = train()
    assert same_bits(inside, alone)
