"""A model with a frozen part: only what trains travels, is remembered and is saved."""

from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from flwr_cloned_kd import (
    VARIANTS,
    ClonedKD,
    Core,
    EdgeClient,
    LegacyClonedKD,
    Recipe,
    Runtime,
    VirtualGrid,
    clone,
    edge_app,
    fit,
    train_clones,
    train_edge,
    trained_state,
)
from flwr_cloned_kd.engine.ensemble import frozen_state, seeded
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.reference import distance, images, same_bits, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = images(24, seed=0)
RECIPE = Recipe(epochs=2, batch_size=8)
NUM_INPUTS = DATA[0][0].numel()


def backbone_and_head(seed=0):
    """A frozen backbone with batch normalisation, and a head that trains."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(NUM_INPUTS, 16), nn.BatchNorm1d(16), nn.ReLU())
    model = seeded(nn.Sequential(backbone, nn.Linear(16, 4)), seed)
    backbone.requires_grad_(False)
    return model


class LowRank(nn.Module):
    """An adapter as peft makes it: a frozen layer, and two small matrices beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, inputs):
        return self.base(inputs) + self.up(self.down(inputs))


def adapted(seed=0):
    first = LowRank(nn.Linear(NUM_INPUTS, 16))
    return seeded(nn.Sequential(nn.Flatten(), first, nn.ReLU(), LowRank(nn.Linear(16, 4))), seed)


BUILDS = pytest.mark.parametrize("build", [backbone_and_head, adapted])


def core_of(model, **options):
    return Core(model=model, dataset=DATA, recipe=RECIPE, held_out=images(16, seed=1), **options)


def edge_apps(build, count, seed=0):
    def app(index):
        client = EdgeClient(build(seed), images(24, seed=10 + index), RECIPE)
        return edge_app(lambda context: client)

    return [app(index) for index in range(count)]


def test_of_a_model_without_frozen_parameters_all_travels():
    model = seeded(nn.Sequential(nn.Flatten(), nn.Linear(NUM_INPUTS, 4), nn.BatchNorm1d(4)), 0)
    assert list(trained_state(model)) == list(model.state_dict())
    assert not frozen_state(model)


def test_the_trained_part_has_nothing_of_a_frozen_module():
    assert list(trained_state(backbone_and_head())) == ["1.weight", "1.bias"]
    names = ["1.down.weight", "1.up.weight", "3.down.weight", "3.up.weight"]
    assert list(trained_state(adapted())) == names


def test_buffers_of_a_module_that_trains_travel():
    model = backbone_and_head()
    model[0][2].weight.requires_grad_(True)
    names = ["running_mean", "running_var", "num_batches_tracked"]
    assert [f"0.2.{name}" for name in ("weight", *names)] == list(trained_state(model))[:4]
    assert "0.2.bias" not in trained_state(model)


@BUILDS
@pytest.mark.parametrize("batched", [False, True])
def test_the_trained_part_alone_trains_as_the_whole_state_does(build, batched):
    model = build()
    runtime = Runtime(batch_clones=batched)
    part = fit(model, clone(trained_state(model), 2), DATA, RECIPE, runtime=runtime)
    whole = fit(model, clone(snapshot(model.state_dict()), 2), DATA, RECIPE, runtime=runtime)
    assert same_bits(part, {name: whole[name] for name in part})
    start = clone(model.state_dict(), 2)
    assert all(torch.equal(whole[name], start[name]) for name in frozen_state(model))
    assert distance(part, {name: start[name] for name in part}) > 1e-3


@BUILDS
def test_a_run_carries_the_trained_part_alone(build, tmp_path):
    core = core_of(build())
    checkpoint = tmp_path / "core.safetensors"
    strategy = ClonedKD(core, num_clones=2, checkpoint=checkpoint)
    first = ArrayRecord(snapshot(core.model.state_dict()))
    result = strategy.start(VirtualGrid(edge_apps(build, 2)), first, num_rounds=2)
    trained = trained_state(core.model)
    assert [row["accepted"] for row in strategy.history] == [1, 1]
    assert set(result.arrays) == set(trained)
    assert all(set(ensemble) == set(trained) for ensemble in strategy.state.memory)
    num_bytes = sum(len(array.data) for array in ArrayRecord(trained).values())
    assert [row["bytes-down"] for row in strategy.history] == [num_bytes] * 2
    assert checkpoint.stat().st_size < 7 * sum(t.nbytes for t in trained.values()) + 6000


def test_a_run_equals_the_plain_loop():
    core = core_of(backbone_and_head())
    state = core.state(core.pretrain())
    edge = train_edge(core.model, state.params, images(24, seed=10), RECIPE, num_clones=2, seed=5)
    state, _ = core.distill(state, edge)
    assert set(state.params) == {"1.weight", "1.bias"}
    assert core.held_out_accuracy(state.params) is not None


def test_an_edge_with_another_backbone_is_refused_by_name():
    core = core_of(backbone_and_head(0))
    apps = [*edge_apps(backbone_and_head, 1, seed=1), *edge_apps(backbone_and_head, 1, seed=0)]
    strategy = ClonedKD(core, num_clones=2)
    strategy.start(VirtualGrid(apps), ArrayRecord(trained_state(core.model)), num_rounds=2)
    assert [row["accepted"] for row in strategy.history] == [0, 1]
    cause = strategy.history[0]["cause"]
    assert "frozen-digest: expected the core's" in cause
    assert "frozen weights of this edge" in cause


def unfrozen(seed=0):
    return backbone_and_head(seed).requires_grad_(True)


@pytest.mark.parametrize(
    ("build_core", "build_edge", "cause"),
    [
        (backbone_and_head, unfrozen, "got none: no weight of this edge's model is frozen"),
        (
            unfrozen,
            backbone_and_head,
            "parameters: expected 2 arrays, as 7 of this edge's model are frozen, got 9",
        ),
    ],
    ids=["the core", "the edge"],
)
def test_a_backbone_that_is_frozen_on_one_side_only_is_named(build_core, build_edge, cause):
    core = core_of(build_core())
    strategy = ClonedKD(core, num_clones=2)
    first = ArrayRecord(trained_state(core.model))
    strategy.start(VirtualGrid(edge_apps(build_edge, 1)), first, num_rounds=1)
    assert strategy.history[0]["accepted"] == 0
    assert cause in strategy.history[0]["cause"]


def test_a_core_that_is_wholly_frozen_is_refused_by_name():
    core = core_of(backbone_and_head().requires_grad_(False))
    message = "model: expected a parameter that requires a gradient, got none"
    with pytest.raises(ValueError, match=message):
        core.pretrain()


def test_a_loop_of_ones_own_loads_and_returns_the_trained_part():
    app = ClientApp(mods=[train_clones()])

    @app.train()
    def train(message, context):
        torch.manual_seed(message.content["config"]["seed"])
        model = backbone_and_head()
        arrays = message.content["arrays"].to_torch_state_dict()
        assert not model.load_state_dict(arrays, strict=False).unexpected_keys
        nn.init.normal_(model[1].bias)  # stands for the training
        metrics = MetricRecord({"num-examples": 24})
        content = RecordDict({"arrays": ArrayRecord(trained_state(model)), "metrics": metrics})
        return Message(content, reply_to=message)

    core = core_of(backbone_and_head())
    strategy = ClonedKD(core, num_clones=2)
    first = ArrayRecord(trained_state(core.model))
    result = strategy.start(VirtualGrid([app]), first, num_rounds=1)
    assert strategy.history[0]["accepted"] == 1
    core.model.load_state_dict(result.arrays.to_torch_state_dict(), strict=False)


def test_fedavg_sends_no_digest_and_averages_the_trained_part():
    model = backbone_and_head()
    strategy = FedAvg(min_train_nodes=2, min_available_nodes=2, fraction_evaluate=0.0)
    grid = FakeGrid(edge_apps(backbone_and_head, 2, seed=1))
    result = strategy.start(grid, ArrayRecord(trained_state(model)), num_rounds=1)
    assert set(result.arrays) == {"1.weight", "1.bias"}


def test_a_legacy_server_sends_the_trained_part_and_the_digest():
    core = core_of(backbone_and_head())
    strategy = LegacyClonedKD(core, snapshot(core.model.state_dict()))
    assert len(strategy.initialize_parameters(None).tensors) == 2
    content, _ = strategy._method.request(1, ConfigRecord({"server-round": 1}))
    assert len(content.config_records["config"]["frozen-digest"]) == 64


@pytest.mark.parametrize("name", ["IsPP", "IEM"])
def test_independent_variants_start_from_new_heads_alone(name):
    core = replace(core_of(backbone_and_head()), seed=3)
    send = VARIANTS[name].init(core)
    sent = send(core.state(core.pretrain()))
    assert set(sent) == {"1.weight", "1.bias"}


def test_an_ensemble_that_lacks_a_trained_tensor_is_refused():
    model = backbone_and_head()
    start = clone({"1.weight": model[1].weight, "other": model[1].bias}, 1)
    with pytest.raises(ValueError, match=r"missing \['1.bias'\], unknown \['other'\]"):
        fit(model, start, DATA, RECIPE)
