"""The edge, called through both of Flower's APIs."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import Client, NumPyClient
from flwr.common import Array

from flwr_cloned_kd import (
    EdgeClient,
    Recipe,
    clone,
    edge_app,
    fit,
    fold_in,
    member,
    take,
    train_edge,
)
from flwr_cloned_kd.flower import client as client_module
from tests.helpers.federation import PARTS, RECIPE, TRAIN, app, edge_client, network


def context(**node_config):
    return Context(1, 100, node_config, RecordDict(), {})


def ask(content, kind="train", client_app=None, **node_config):
    message = Message(RecordDict(content), dst_node_id=100, message_type=kind)
    message.metadata.__dict__["_message_id"] = "id"
    return (client_app or app())(message, context(**({"partition-id": 0} | node_config)))


def arrays():
    return ArrayRecord(network().state_dict())


def test_the_model_of_a_client_may_be_on_another_device(monkeypatch):
    # PyTorch's device "meta", which has no numbers, stands for a GPU: NumPy can read neither.
    monkeypatch.setattr(client_module, "fit", lambda model, ensemble, *rest, **options: ensemble)
    data = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    client = EdgeClient(torch.nn.Linear(2, 2).to("meta"), data, RECIPE)
    sent = [np.ones((2, 2)), np.zeros(2)]  # float64, as some strategies average
    trained, _, _ = client.fit(sent, {})
    assert [array.dtype for array in trained] == [np.float32, np.float32]
    assert (trained[0] == 1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_model_of_a_client_may_be_on_a_gpu():
    client = EdgeClient(network().cuda(), take(TRAIN, PARTS[1]), RECIPE)
    trained, _, _ = client.fit(client.get_parameters({}), {"num-clones": 2})
    assert all(len(array) == 2 for array in trained)


def test_a_request_for_clones_is_answered_with_an_ensemble():
    config = ConfigRecord({"num-clones": 2, "seed": 5, "server-round": 1})
    reply = ask({"arrays": arrays(), "config": config})
    expected = train_edge(
        network(), network().state_dict(), take(TRAIN, PARTS[1]), RECIPE, num_clones=2, seed=5
    )
    ensemble = reply.content["arrays"].to_torch_state_dict()
    assert list(ensemble) == list(expected)
    assert all(torch.equal(ensemble[name], expected[name]) for name in expected)
    assert reply.content["metrics"]["num-examples"] == 60
    assert reply.content["metrics"]["train-seconds"] > 0


def test_a_request_without_clones_is_answered_with_a_plain_model():
    reply = ask({"arrays": arrays(), "config": ConfigRecord({"server-round": 1})})
    shapes = {name: tuple(a.numpy().shape) for name, a in reply.content["arrays"].items()}
    assert shapes == {name: tuple(t.shape) for name, t in network().state_dict().items()}


def test_a_client_fn_may_return_to_client():
    usual = edge_app(lambda context: edge_client(0).to_client())
    reply = ask({"arrays": arrays(), "config": ConfigRecord({"seed": 5})}, client_app=usual)
    plain = ask({"arrays": arrays(), "config": ConfigRecord({"seed": 5})})
    assert dict(reply.content["arrays"]) == dict(plain.content["arrays"])
    reply = ask({"arrays": arrays()}, "evaluate", client_app=usual)
    assert reply.content["metrics"]["num-examples"] == 60


def test_a_client_that_is_no_numpy_client_is_an_error():
    class Bare(Client):
        pass

    with pytest.raises(TypeError, match="client_fn: expected a NumPyClient, got Bare"):
        ask({"arrays": arrays()}, client_app=edge_app(lambda context: Bare()))


def test_another_number_of_arrays_is_an_error_with_both_numbers():
    class Short(NumPyClient):
        def fit(self, parameters, config):
            return parameters[:-2], 1, {}

    count = len(network().state_dict())
    with pytest.raises(ValueError, match=f"reply: expected {count} arrays, got {count - 2}"):
        ask({"arrays": arrays()}, client_app=edge_app(lambda context: Short()))


def test_a_request_without_a_config_is_answered():
    assert "arrays" in ask({"arrays": arrays()}).content


def test_rounds_without_a_seed_draw_differently_and_reproducibly():
    def train(server_round):
        config = ConfigRecord({"server-round": server_round})
        return ask({"arrays": arrays(), "config": config}).content["arrays"]["conv.weight"].numpy()

    assert np.array_equal(train(1), train(1))
    assert not np.array_equal(train(1), train(2))


def test_the_servers_proximal_mu_is_used():
    config = {"proximal-mu": 0.5, "seed": 3}
    parameters = [t.numpy() for t in network().state_dict().values()]
    trained, _, _ = edge_client(0).fit(parameters, config)
    recipe = Recipe(epochs=2, batch_size=32, proximal_mu=0.5)
    start = clone(network().state_dict(), 1)
    expected = member(fit(network(), start, take(TRAIN, PARTS[1]), recipe, seed=3), 0)
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(trained, expected.values()))


def test_counters_that_fedavg_averaged_into_floats_are_accepted():
    parameters = [t.double().numpy() for t in network().state_dict().values()]
    trained, _, _ = edge_client(0).fit(parameters, {})
    dtypes = [array.dtype for array in trained]
    assert dtypes == [t.numpy().dtype for t in network().state_dict().values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:-1], "parameters: expected 8 arrays, got 7"),
        (lambda p: [p[0][:1], *p[1:]], "conv.weight: expected shape"),
        (lambda p: [p[0] * np.nan, *p[1:]], "conv.weight: expected finite values"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(change, message):
    parameters = [t.numpy() for t in network().state_dict().values()]
    with pytest.raises(ValueError, match=message):
        edge_client(0).fit(change(parameters), {})


@pytest.mark.parametrize("num_clones", [0, -1, 17])
def test_more_clones_than_agreed_are_refused(num_clones):
    parameters = [t.numpy() for t in network().state_dict().values()]
    with pytest.raises(ValueError, match="num-clones: expected 1 to 16"):
        edge_client(0).fit(parameters, {"num-clones": num_clones})


def test_evaluation_reports_loss_and_accuracy():
    reply = ask({"arrays": arrays()}, "evaluate")
    metrics = reply.content["metrics"]
    assert metrics["num-examples"] == 60
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["loss"] > 0


@pytest.mark.parametrize(
    ("node_config", "edge"),
    [({}, "0"), ({"partition-id": 4}, "4"), ({"name": "clinic", "partition-id": 4}, "clinic")],
)
def test_a_query_is_answered_with_the_name_of_the_edge(node_config, edge):
    reply = ask({}, "query", **node_config)
    assert reply.content["config"]["edge"] == edge


def legacy_request(config):
    """Make a request of `ServerAppComponents`: arrays without names and headers."""
    tensors = network().state_dict().values()
    record = {}
    for index, tensor in enumerate(tensors):
        array = Array(tensor.numpy())
        record[str(index)] = Array(dtype="", shape=(), stype=array.stype, data=array.data)
    return {"fitins.parameters": ArrayRecord(record), "fitins.config": ConfigRecord(config)}


def test_a_legacy_request_is_answered_in_legacy_form():
    reply = ask(legacy_request({"num-clones": 2, "seed": 5}))
    content = reply.content
    assert content["fitres.num_examples"]["num_examples"] == 60
    assert content["fitres.status"]["code"] == 0
    modern = ask({"arrays": arrays(), "config": ConfigRecord({"num-clones": 2, "seed": 5})})
    legacy = [a.numpy() for a in content["fitres.parameters"].values()]
    assert all(
        np.array_equal(a, b.numpy()) for a, b in zip(legacy, modern.content["arrays"].values())
    )


def test_any_numpy_client_becomes_an_app():
    class Doubling(NumPyClient):
        def fit(self, parameters, config):
            return [2 * p for p in parameters], 3, {"note": "text is dropped", "loss": 1.5}

    doubling = edge_app(lambda context: Doubling())
    reply = ask({"arrays": ArrayRecord({"w": Array(np.ones(2))})}, client_app=doubling)
    assert reply.content["arrays"]["w"].numpy().tolist() == [2, 2]
    assert dict(reply.content["metrics"]) == {"num-examples": 3, "loss": 1.5}


def test_client_mods_wrap_both_apis():
    seen = []

    def spy(message, context, call_next):
        seen.append(sorted(message.content))
        return call_next(message, context)

    spied = edge_app(lambda context: edge_client(0), mods=[spy])
    ask({"arrays": arrays()}, client_app=spied)
    ask(legacy_request({}), client_app=spied)
    assert seen == [["arrays"], ["fitins.config", "fitins.parameters"]]


def test_an_edge_without_a_seed_from_the_server_uses_its_own():
    parameters = [t.numpy() for t in network().state_dict().values()]
    data = take(TRAIN, PARTS[1])
    own, _, _ = EdgeClient(network(), data, RECIPE, seed=9).fit(parameters, {"server-round": 2})
    sent, _, _ = EdgeClient(network(), data, RECIPE).fit(parameters, {"seed": fold_in(9, 2)})
    assert all(np.array_equal(a, b) for a, b in zip(own, sent))


def test_metrics_of_the_reply_are_a_metric_record():
    assert isinstance(ask({"arrays": arrays()}).content["metrics"], MetricRecord)
