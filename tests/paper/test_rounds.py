"""The rounds of a run, against Algorithm 1 and against the strategies that ship."""

from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from flwr_cloned_kd import FedAsync, FedBuff, edge_seed, member, take, train_edge
from flwr_cloned_kd.apps.build import build_core, load, recipe, split
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.io.wire import received, transfer
from flwr_cloned_kd.paper import rounds
from flwr_cloned_kd.paper.combining import weighted_mean
from flwr_cloned_kd.paper.rounds import play
from flwr_cloned_kd.paper.run_state import RunState
from flwr_cloned_kd.paper.runs import Run
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.reference import same_bits


@pytest.mark.parametrize("split", ["random", "one-class"])
@pytest.mark.parametrize("validation_share", [0.2, 0.9])
@pytest.mark.parametrize("data", [{}, {"core_share": 0.5}, {"core_share": 0.05}, {"central": True}])
def test_the_core_never_trains_on_its_validation_data(data, validation_share, split):
    settings = Settings(num_edges=3, split=split, validation_share=validation_share)
    core = rounds._set_up(Run(settings=settings, **data)).core
    trained, validation = (
        {tuple(x) for x in part[0].flatten(1).tolist()} for part in (core.dataset, core.validation)
    )
    assert trained
    assert validation
    everything = load(settings)[0][0].flatten(1)
    repeated = len(everything) - len(everything.unique(dim=0))
    assert len(trained & validation) <= repeated


def records_of(run):
    return [record for record, _ in play(run)]


def cores_of(run):
    return [state.core.params for _, state in play(run)]


def test_a_run_is_algorithm_1(tiny):
    core = build_core(tiny)
    train, _ = load(tiny)
    state = core.state(core.pretrain())
    expected = [core.held_out_accuracy(state.params)]
    for i, rows in enumerate(split(tiny, train[1])[1:], start=1):
        edge = train_edge(
            core.model,
            state.params,
            take(train, rows),
            recipe(tiny, 1),
            num_clones=3,
            seed=edge_seed(core.seed, i),
        )
        state, metrics = core.distill(state, edge)
        expected.append(metrics["core-accuracy"])
    *_, (_, last) = played = list(play(Run(settings=tiny)))
    assert [record["core-accuracy"] for record, _ in played] == pytest.approx(expected)
    assert same_bits(last.core.params, state.params)


def test_a_late_edge_was_sent_the_core_of_an_earlier_round(tiny, monkeypatch):
    sent = []

    def spy(model, params, *args, **options):
        sent.append(params)
        return train_edge(model, params, *args, **options)

    monkeypatch.setattr(rounds, "train_edge", spy)
    run = Run(settings=tiny, order=((0, 0), (1, 1), (2, 2), (0, 1)))
    played = list(play(run))
    cores = [state.core.params for _, state in played]
    assert [next(i for i, core in enumerate(cores) if core is one) for one in sent] == [0, 0, 0, 2]
    assert [record["late"] for record, _ in played[1:]] == [0, 1, 2, 1]


def test_an_oracle_leaves_the_core_as_if_the_edge_had_not_come(tiny):
    refused = records_of(Run(settings=replace(tiny, noisy_edges="2"), oracle=True))
    never = records_of(Run(settings=tiny, order=((0, 0), (1, 0))))
    assert [r["core-accuracy"] for r in refused[:3]] == [r["core-accuracy"] for r in never]
    assert refused[3]["core-accuracy"] == refused[2]["core-accuracy"]
    assert [r["accepted"] for r in refused] == [1, 1, 1, 0]


def test_the_images_and_bytes_of_averaging_by_hand(tiny):
    one_clone = replace(tiny, variant="CPP")
    kept = records_of(Run(settings=one_clone, combine="average"))
    two_rounds = replace(one_clone, num_rounds=2)
    fedavg = records_of(Run(settings=two_rounds, combine="average", edges_per_round=3))
    # 60 images in 4 parts; a phase of one epoch passes over 15.
    assert [record["images"] for record in kept] == [15, 15, 15, 15]
    assert [record["images"] for record in fedavg] == [15, 45, 45]
    assert fedavg[1]["bytes-down"] == fedavg[1]["bytes-up"] == 3 * kept[1]["bytes-up"]
    assert kept[1]["tried-accuracy"] == kept[1]["edge-accuracy"]


def reply_to(message, params, num_examples):
    content = {
        "arrays": ArrayRecord({name: tensor.contiguous() for name, tensor in params.items()}),
        "metrics": MetricRecord({"num-examples": num_examples}),
    }
    return Message(RecordDict(content), reply_to=message)


def global_model_after(strategy, first, models):
    """Run a strategy with one node for each model, which replies with that model."""
    nodes = [
        lambda message, context, params=params: reply_to(message, params, 1) for params in models
    ]
    result = strategy.start(FakeGrid(nodes), ArrayRecord(first), num_rounds=len(models), timeout=60)
    return result.arrays.to_torch_state_dict(keep_input=True)


def test_a_share_of_the_clone_is_what_fedasync_makes_of_it(tiny):
    one_round = replace(tiny, variant="CPP", num_rounds=1)
    first, trained = cores_of(Run(settings=one_round, combine="average"))
    _, mixed = cores_of(Run(settings=one_round, combine="average", mix=0.3))
    strategy = FedAsync(alpha=0.3, revisit=False)
    assert same_bits(mixed, global_model_after(strategy, first, [trained]))


def test_a_share_of_the_mean_is_what_fedbuff_makes_of_equal_edges(tiny, monkeypatch):
    ensembles = []

    def spy(*args, **options):
        ensembles.append(train_edge(*args, **options))
        return ensembles[-1]

    monkeypatch.setattr(rounds, "train_edge", spy)
    one_round = replace(tiny, variant="CPP", num_rounds=1)
    run = Run(settings=one_round, combine="average", edges_per_round=3, mix=0.5)
    first, mixed = cores_of(run)
    trained = [member(ensemble, 0) for ensemble in ensembles]
    strategy = FedBuff(buffer_size=3, server_lr=0.5, max_in_flight=1, revisit=False)
    expected = global_model_after(strategy, first, trained)
    # The run averages in float32, the strategy in float64: they differ by a rounding of the mean.
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_weights_of_an_average_are_the_images_of_each_edge():
    ensemble = {"w": torch.tensor([[0.0], [4.0]]), "count": torch.tensor([3, 9])}
    average = weighted_mean(ensemble, [1, 3])
    assert average["w"].tolist() == [3.0]  # (1 * 0 + 3 * 4) / 4
    assert average["count"] == 3


def test_an_average_is_that_of_flowers_fedavg():
    generator = torch.Generator().manual_seed(0)
    ensemble = {
        "w": torch.randn(9, 4, 3, generator=generator),
        "b": torch.randn(9, 5, generator=generator),
    }
    num_images = [144] * 5 + [143] * 4
    replies = [
        reply_to(
            Message(RecordDict({}), dst_node_id=1 + i, message_type="train"),
            member(ensemble, i),
            images,
        )
        for i, images in enumerate(num_images)
    ]
    arrays, _ = FedAvg().aggregate_train(1, replies)
    expected = arrays.to_torch_state_dict(keep_input=True)
    average = weighted_mean(ensemble, num_images)
    # Both sum nine float32 products, in different orders.
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_edges_that_do_not_train_cost_nothing(tiny):
    alone = records_of(Run(settings=tiny, edge_data="none", kd_weight=0.0))
    itself = records_of(Run(settings=tiny, edge_data="core"))
    assert [record["images"] for record in alone] == [15] * 4  # the core's restarts alone
    assert [record["images"] for record in itself] == [15] + [15 * 3 + 15] * 3
    assert not sum(record["bytes-up"] + record["bytes-down"] for record in alone + itself)


def test_central_data_is_one_phase(tiny):
    assert [r["images"] for r in records_of(Run(settings=tiny, central=True))] == [60]


def test_a_state_of_a_run_survives_its_form_on_disk(tiny):
    run = Run(settings=replace(tiny, variant="CPM"), order=((0, 0), (1, 1), (2, 2)))
    *_, (_, state) = play(run)
    restored = RunState.from_state_dict(*state.state_dict())
    assert (restored.server_round, restored.core.version) == (3, 3)
    assert torch.equal(restored.right, state.right)
    assert len(restored.past) == len(state.past) == 3
    assert all(same_bits(one, other) for one, other in zip(restored.past, state.past))
    assert same_bits(restored.core.params, state.core.params)
    assert len(restored.core.memory) == len(state.core.memory) == 3
    assert all(same_bits(one, other) for one, other in zip(restored.core.memory, state.core.memory))
    assert restored.core.train_accuracy == state.core.train_accuracy
    assert restored.core.memory_weights == state.core.memory_weights


@pytest.mark.parametrize("wire_dtype", ["float16", "int8"])
def test_what_travels_in_a_smaller_form_is_rounded_in_both_directions(tiny, wire_dtype):
    run = Run(settings=tiny, wire_dtype=wire_dtype)
    core, (train, _) = build_core(tiny), load(tiny)
    state = core.state(core.pretrain())
    for i, rows in enumerate(split(tiny, train[1])[1:], start=1):
        sent = received(state.params, wire_dtype)
        seed = edge_seed(core.seed, i)
        edge_data = take(train, rows)
        edge = train_edge(core.model, sent, edge_data, recipe(tiny, 1), num_clones=3, seed=seed)
        edge, num_bytes = transfer(edge, sent, wire_dtype)
        state, _ = core.distill(state, edge, sent=sent)
    *_, (record, last) = play(run)
    assert same_bits(last.core.params, state.params)
    assert record["bytes-up"] == num_bytes
    floats = sum(
        tensor.numel() for tensor in state.params.values() if tensor.dtype.is_floating_point
    )
    counters = len(state.params) - sum(
        tensor.dtype.is_floating_point for tensor in state.params.values()
    )
    assert record["bytes-down"] == 2 * floats + 8 * counters


@pytest.mark.parametrize("edge_data", ["core", "none"])
def test_what_does_not_travel_is_not_rounded(tiny, edge_data):
    plain, rounded = (
        cores_of(Run(settings=tiny, edge_data=edge_data, wire_dtype=form))
        for form in ("float32", "int8")
    )
    assert all(same_bits(one, other) for one, other in zip(plain, rounded))


def test_edges_side_by_side_each_travel_in_the_smaller_form(tiny):
    options = {"combine": "average", "edges_per_round": 3, "wire_dtype": "float16"}
    _, record = records_of(Run(settings=tiny, **options))
    _, whole = records_of(Run(settings=tiny, **(options | {"wire_dtype": "float32"})))
    for way in ("bytes-down", "bytes-up"):
        assert whole[way] / 2 < record[way] < whole[way] / 1.9


def test_an_unknown_form_of_a_run_is_refused(tiny):
    with pytest.raises(ValueError, match="wire_dtype: expected one of float32"):
        Run(settings=tiny, wire_dtype="int4")
