"""The client mod `attack` turns any client app, of either API, into a bad edge."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flwr_cloned_kd import ClonedKD, LegacyClonedKD, clone, edge_app, train_clones
from flwr_cloned_kd.attacks import (
    FreeRider,
    ScaleMovement,
    attack,
    attack_model,
    first_answer_again,
)
from tests.flower.test_legacy import LegacyGrid
from tests.flower.test_legacy import run as run_legacy
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import edge_client, small_core


class Spy:
    """A mod that keeps what was sent and what came back, as tensors."""

    def __init__(self):
        self.sent, self.edges, self.metrics = [], [], []

    def __call__(self, message, context, call_next):
        reply = call_next(message, context)
        if message.metadata.message_type == "train":
            for kept, content in ((self.sent, message.content), (self.edges, reply.content)):
                record = next(iter(content.array_records.values()))
                kept.append({n: torch.tensor(np.array(a.numpy())) for n, a in record.items()})
            records = [*reply.content.metric_records.values()]
            self.metrics.append({name: v for record in records for name, v in record.items()})
        return reply


def app(*mods):
    make = lambda context: edge_client(int(context.node_config["partition-id"]))  # noqa: E731
    return edge_app(make, mods=list(mods))


def run_message(client_app, rounds, **options):
    core = small_core()
    rows = []
    strategy = ClonedKD(core, num_clones=2, on_round=rows.append, **options)
    grid = FakeGrid([client_app])
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=rounds, timeout=30)
    return rows


def run_old(client_app, rounds, **options):
    core = small_core()
    rows = []
    strategy = LegacyClonedKD(
        core, core.model.state_dict(), num_clones=2, timeout=0, on_round=rows.append, **options
    )
    run_legacy(strategy, LegacyGrid([client_app]), rounds=rounds)
    return rows


BOTH = pytest.mark.parametrize("start", [run_message, run_old], ids=["message", "legacy"])


@BOTH
def test_the_mod_sends_what_the_plain_function_returns(start):
    outside, inside = Spy(), Spy()
    (row,) = start(app(outside, attack(ScaleMovement(-3.0)), inside), 1)
    assert row["accepted"]
    assert row["num-clones"] == 2
    expected, _ = attack_model(ScaleMovement(-3.0), inside.sent[0], inside.edges[0])
    (sent_back,) = outside.edges
    assert list(sent_back) == list(expected)
    assert all(torch.equal(sent_back[name], expected[name]) for name in expected)
    assert outside.metrics == inside.metrics


@BOTH
def test_the_mod_remembers_the_first_visit(start):
    outside, inside = Spy(), Spy()
    start(app(outside, attack(first_answer_again), inside), 2, revisit=True)
    assert len(outside.edges) == 2
    for sent_back in outside.edges:
        assert all(torch.equal(sent_back[name], inside.edges[0][name]) for name in sent_back)
    assert not all(torch.equal(inside.edges[0][n], inside.edges[1][n]) for n in inside.edges[0])


def test_the_mod_attacks_before_the_reply_is_encoded_for_the_wire():
    outside = Spy()
    (row,) = run_message(app(outside, attack(FreeRider())), 1, wire_dtype="int8")
    assert row["accepted"], row["cause"]
    # The mods of `edge_app` receive float32 arrays; the reply of the app is encoded after them.
    assert all(torch.equal(tensor[0], outside.sent[0][n]) for n, tensor in outside.edges[0].items())


def test_the_mod_goes_around_train_clones_and_an_app_of_its_own():
    client_app = ClientApp(mods=[attack(FreeRider()), train_clones()])
    names = []

    @client_app.train()
    def train(message, context):
        record = next(iter(message.content.array_records.values()))
        names.extend(record)
        arrays = ArrayRecord({n: Array(np.asarray(a.numpy() + 1)) for n, a in record.items()})
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    (row,) = run_message(client_app, 1)
    assert row["accepted"], row["cause"]
    core = small_core()
    sent = core.model.state_dict()
    _, metrics = core.distill(core.state(sent), clone(sent, 2))
    assert row["core-accuracy"] == metrics["core-accuracy"]
    assert len(names) == 2 * len(sent)


def test_fedavg_receives_the_attack_too_and_evaluation_is_untouched():
    core = small_core()
    options = {"min_train_nodes": 2, "min_evaluate_nodes": 2, "min_available_nodes": 2}
    result = FedAvg(**options).start(
        FakeGrid([app(attack(FreeRider()))] * 2),
        ArrayRecord(core.model.state_dict()),
        num_rounds=1,
        train_config=ConfigRecord({}),
    )
    end = result.arrays.to_torch_state_dict(keep_input=True)
    start = core.model.state_dict()
    assert all(torch.allclose(end[name].double(), start[name].double()) for name in start)
    assert "loss" in result.evaluate_metrics_clientapp[1]
