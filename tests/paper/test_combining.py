"""What Phase 2 is compared with: Flower's robust averages, FLTrust's rule, and clipping."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from flwr_cloned_kd import member, take, train_edge
from flwr_cloned_kd.apps.build import build_core, load, recipe, split
from flwr_cloned_kd.attacks import ScaleMovement, attack_model
from flwr_cloned_kd.engine.recipe import fold_in
from flwr_cloned_kd.paper import rounds
from flwr_cloned_kd.paper.combining import (
    FLOWER,
    clip_to_median,
    flower_aggregate,
    fltrust,
    num_assumed_bad,
)
from flwr_cloned_kd.paper.rounds import play
from flwr_cloned_kd.paper.runs import Run

# Nine models of one weight; the last two are bad. The counters would decide for Krum.
MODELS = {
    "w": torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0], [100.0], [-300.0]]),
    "count": torch.tensor([7, 9, 9, 9, 900, 9, 9, 9, 9]),
}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # The sums of the five smallest squared distances to others are least for 4.
        ("Krum", 4.0),
        ("MultiKrum", 4.0),  # the mean of 1 to 7
        ("trimmed mean", 4.0),  # without -300, 1, 7 and 100: the mean of 2 to 6
        ("median", 4.0),
    ],
)
def test_a_strategy_of_flower_withstands_two_bad_edges_of_nine(rule, expected):
    params = flower_aggregate(FLOWER[rule](9), MODELS, [10] * 9)
    assert params["w"].tolist() == [expected]
    assert params["w"].dtype == torch.float32
    assert params["count"] == 7


def test_the_images_of_an_edge_are_its_weight_in_multi_krum():
    params = flower_aggregate(FLOWER["MultiKrum"](9), MODELS, [10, 10, 10, 10, 10, 10, 80, 1, 1])
    assert params["w"].item() == pytest.approx((10 * 21 + 80 * 7) / 140)


def test_less_than_half_of_the_edges_is_assumed_to_be_bad():
    assert [num_assumed_bad(n) for n in (1, 2, 3, 4, 5, 9, 30)] == [0, 0, 1, 1, 2, 2, 2]
    for num_edges in range(1, 31):
        strategy = FLOWER["trimmed mean"](num_edges)
        assert int(strategy.beta * num_edges) == num_assumed_bad(num_edges)


def linear(weight, bias):
    return {"weight": torch.tensor([weight]), "bias": torch.tensor([bias])}


def test_fltrust_by_hand():
    model = nn.Linear(2, 1)
    sent = linear([1.0, 1.0], 0.0)
    server = linear([2.0, 1.0], 0.0)  # moves by (1, 0, 0)
    edge = linear([4.0, 5.0], 0.0)  # moves by (3, 4, 0): cosine 0.6, scaled to (0.6, 0.8, 0)
    params, trust = fltrust(model, sent, server, edge)
    assert trust == pytest.approx(0.6)
    expected = [1 + (1 + 0.6 * 0.6) / 1.6, 1 + 0.6 * 0.8 / 1.6]
    assert params["weight"][0].tolist() == pytest.approx(expected)
    larger = linear([31.0, 41.0], 0.0)
    again, _ = fltrust(model, sent, server, larger)
    torch.testing.assert_close(again, params)  # The length of the movement does not count.


@pytest.mark.parametrize(
    "edge",
    [linear([0.0, 1.0], 0.0), linear([1.0, 5.0], 0.0), linear([1.0, 1.0], 0.0)],
    ids=["reversed", "at a right angle", "free rider"],
)
def test_an_edge_without_trust_leaves_the_training_of_the_server(edge):
    server = linear([2.0, 1.0], 0.5)
    params, trust = fltrust(nn.Linear(2, 1), linear([1.0, 1.0], 0.5), server, edge)
    assert trust == 0
    assert params is server


def test_fltrust_averages_statistics_and_keeps_counters():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    sent = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    server = sent | {"0.weight": sent["0.weight"] + 1, "1.num_batches_tracked": torch.tensor(5)}
    edge = sent | {
        "0.weight": sent["0.weight"] + 3,  # the same direction: trust 1
        "1.running_var": torch.tensor([3.0]),
        "1.num_batches_tracked": torch.tensor(99),
    }
    params, trust = fltrust(model, sent, server, edge)
    assert trust == pytest.approx(1)
    torch.testing.assert_close(params["0.weight"], server["0.weight"])
    torch.testing.assert_close(params["1.running_var"], torch.tensor([2.0]))
    assert params["1.num_batches_tracked"] == 5


def test_a_run_of_fltrust_is_the_plain_loop(tiny):
    tiny = replace(tiny, variant="CPP")
    run = Run(settings=tiny, combine="FLTrust", attack="noise", strength=1e3, bad_edges=(2,))
    core, (train, _) = build_core(tiny), load(tiny)
    params = core.pretrain()
    for index, rows in enumerate(split(tiny, train[1])[1:]):
        edge, server = (
            member(
                train_edge(core.model, params, data, recipe(tiny, 1), num_clones=1, seed=seed), 0
            )
            for data, seed in (
                (take(train, rows), rounds.edge_seed(core.seed, 1 + index)),
                (core.dataset, fold_in(core.seed, "FLTrust", index)),
            )
        )
        if index < 2:
            params, _ = fltrust(core.model, params, server, edge)
    played = [*play(run)]
    before_last = played[-2][1].core.params
    assert all(torch.equal(before_last[name], tensor) for name, tensor in params.items())
    records = [record for record, _ in played]
    assert all(0 <= record["trust"] <= 1 for record in records[1:])
    assert [record["accepted"] for record in records[1:]] == [
        float(record["trust"] > 0) for record in records[1:]
    ]
    assert records[-1]["trust"] < 0.1 < records[1]["trust"]
    # 60 images in 4 parts: the edge and the server train one epoch each.
    assert [record["images"] for record in records] == [15, 30, 30, 30]


def clones_at(*values):
    return {"w": torch.tensor([[value, 0.0] for value in values])}


def test_clones_are_clipped_to_the_median_length_of_all_before():
    sent = {"w": torch.tensor([1.0, 0.0])}
    first, lengths = clip_to_median(sent, clones_at(2.0, 4.0, 101.0), ())
    assert torch.equal(first["w"], clones_at(2.0, 4.0, 101.0)["w"])  # nothing to compare with
    assert lengths == (1, 3, 100)
    second, lengths = clip_to_median(sent, clones_at(3.0, 11.0), lengths)
    assert second["w"].tolist() == [[3, 0], [4, 0]]  # the lengths 2 and 10, at most 3
    assert lengths == (1, 3, 100, 2, 10)  # as they were before they were clipped


def test_a_run_that_clips_distils_clipped_clones(tiny):
    run = Run(settings=tiny, clip=True, attack="movement scaled", strength=1e3, bad_edges=(1,))
    core, (train, _) = build_core(tiny), load(tiny)
    state = core.state(core.pretrain())
    lengths = ()
    for index, rows in enumerate(split(tiny, train[1])[1:]):
        seed = rounds.edge_seed(core.seed, 1 + index)
        data = take(train, rows)
        edge = train_edge(core.model, state.params, data, recipe(tiny, 1), seed=seed)
        if index == 1:
            edge, _ = attack_model(ScaleMovement(1e3), state.params, edge)
        edge, lengths = clip_to_median(state.params, edge, lengths)
        state, _ = core.distill(state, edge)
    *_, (_, last) = play(run)
    assert all(torch.equal(last.core.params[name], t) for name, t in state.params.items())
    assert last.lengths == lengths
    assert max(lengths) > 100 * min(lengths)


def test_an_unknown_rule_of_a_run_is_refused(tiny):
    with pytest.raises(ValueError, match=r"combine: expected one of distill, .* got 'vote'"):
        Run(settings=tiny, combine="vote")
