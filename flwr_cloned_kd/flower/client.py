"""The edge: a NumPyClient that trains clones, and one client app for both Flower APIs."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, Scalar
from torch import nn

from ..engine.ensemble import StateDict, as_ensemble, clone, frozen_state, member, trained_state
from ..engine.fit import accuracy, fit, predict
from ..engine.inputs import Dataset
from ..engine.recipe import Recipe, fold_in
from ..engine.runtime import Runtime
from ..engine.samples import as_dataset
from ..engine.tasks import Task, classification
from ..io.frozen import FROZEN_KEY, check_frozen
from ..io.messages import only
from ..io.wire import KEY, check_wire_dtype, decode_request, encode_reply
from .mods import CallNext, guarded
from .train_clones import MAX_CLONES, NUM_CLONES, check_num_clones

LEGACY_REQUESTS = ("fitins.", "evaluateins.", "getparametersins.", "getpropertiesins.")


class EdgeClient(NumPyClient):
    """An edge: trains the model of a request on its own data (Phase 1).

    The config of the request decides the form of the reply. With "num-clones" E, the reply is an
    ensemble, every array `[E, *shape]`. Without it, the reply is a plain model, so that FedAvg,
    FedProx and any other strategy work with this client. The keys "proximal-mu", "seed" and
    "server-round" are read too.

    Args:
        model: the architecture of the core.
        dataset: the edge's private data, in any form that `as_dataset` converts.
        recipe: how Phase 1 trains.
        task: what the outputs of the model mean.
        held_out: data that `evaluate` measures on. None: `dataset`.
        seed: determines the random draws of a request without "seed".
        runtime: how to compute; changes only the speed.
        max_clones: the largest number of clones that this edge trains for one request.

    Raises:
        ValueError: if the data does not fit the model or the task.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import EdgeClient, Recipe
        >>> data = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> client = EdgeClient(torch.nn.Linear(1, 2), data, Recipe(epochs=2))
        >>> arrays, num_samples, metrics = client.fit(client.get_parameters({}), {"num-clones": 3})
        >>> arrays[0].shape, num_samples  # the weights of three clones
        ((3, 2, 1), 2)
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        recipe: Recipe,
        *,
        task: Task = classification,
        held_out: Dataset | None = None,
        seed: int = 0,
        runtime: Runtime = Runtime(),
        max_clones: int = MAX_CLONES,
    ) -> None:
        self.model = model
        self.dataset = as_dataset(dataset, model, task)
        self.task = task
        self.recipe = recipe
        self.held_out = (
            self.dataset if held_out is None else as_dataset(held_out, model, task, name="held_out")
        )
        self.seed = seed
        self.runtime = runtime
        self.max_clones = max_clones

    def get_parameters(self, config: dict[str, Scalar]) -> NDArrays:
        """Return the weights of the model that travel, in the order of its state dict."""
        return [tensor.cpu().numpy() for tensor in trained_state(self.model).values()]

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train; return (arrays, number of samples, metrics).

        The arrays of the request and of the reply have the order of the model's state dict.

        Raises:
            ValueError: if the arrays do not fit the model, or if a config value is out of range.
        """
        num_clones = check_num_clones(config.get(NUM_CLONES, 1), self.max_clones)
        check_frozen(self.model, config.get(FROZEN_KEY, ""))
        mu = float(config.get("proximal-mu", self.recipe.proximal_mu))
        own_seed = fold_in(self.seed, int(config.get("server-round", 0)))
        started = time.perf_counter()
        # This is `train_edge` without its check of the data, which were checked when the client was
        # made. The check copies and runs the model: 6 ms for the one of the demo.
        trained = fit(
            self.model,
            clone(self._params(parameters), num_clones),
            self.dataset,
            replace(self.recipe, proximal_mu=mu),
            task=self.task,
            seed=int(config.get("seed", own_seed)),
            runtime=self.runtime,
            phase="Phase 1",
        )
        reply = trained if NUM_CLONES in config else member(trained, 0)
        seconds = time.perf_counter() - started
        arrays = [tensor.numpy() for tensor in reply.values()]
        return arrays, len(self.dataset[1]), {"train-seconds": seconds}

    def evaluate(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Return (loss of the task, number of samples, accuracy as a fraction in [0, 1])."""
        inputs, labels = self.held_out
        ensemble = clone(self._params(parameters), 1)
        outputs = predict(self.model, ensemble, inputs, runtime=self.runtime)[0]
        loss = float(self.task.loss(outputs, labels))
        return loss, len(labels), {"accuracy": float(accuracy(outputs, labels, self.task))}

    def _params(self, parameters: NDArrays) -> StateDict:
        like = trained_state(self.model)
        if len(parameters) != len(like):
            num_frozen = len(frozen_state(self.model))
            why = f", as {num_frozen} of this edge's model are frozen" if num_frozen else ""
            raise ValueError(f"parameters: expected {len(like)} arrays{why}, got {len(parameters)}")
        # FedAvg averages integer counters into floats; the model needs integers. The model may be
        # on a GPU: only the types of its tensors are converted to those of NumPy.
        dtypes = [torch.empty(0, dtype=tensor.dtype).numpy().dtype for tensor in like.values()]
        named = {
            name: np.asarray(array).astype(dtype)
            for name, array, dtype in zip(like, parameters, dtypes)
        }
        return member(as_ensemble(named, like), 0)


class _EdgeApp(ClientApp):
    """A client app that passes the requests of a legacy server to a legacy client app."""

    legacy: ClientApp

    def __call__(self, message: Message, context: Context) -> Message:
        if any(name.startswith(LEGACY_REQUESTS) for name in message.content):
            reply = self.legacy(message, context)
            return _with_edge(reply, context)
        return super().__call__(message, context)


def edge_app(
    client_fn: Callable[[Context], NumPyClient | Client],
    *,
    mods: list[Callable[..., Message]] | None = None,
) -> ClientApp:
    """Make one client app that answers both of Flower's APIs with one NumPyClient.

    Message API: "train" and "evaluate" take one ArrayRecord and an optional ConfigRecord. "query"
    returns the name of this edge: the "name" of its node config, or else the "partition-id".
    Legacy API: every request that `ServerAppComponents` sends. In both APIs, "wire-dtype" in the
    config of a "train" request decides the form in which the arrays of the reply travel.

    Args:
        client_fn: called for every request but "query". Returns an `EdgeClient` or any other
            NumPyClient, with or without `.to_client()`.
        mods: client mods around every request but "query", each prepared by `guarded`. Flower's
            own mods handle one model and reply to a request for clones with an error that says
            so. `ClipClones` and `LocalDpClones` handle ensembles.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import ClipClones, EdgeClient, Recipe, edge_app
        >>> def client_fn(context):
        ...     data = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        ...     return EdgeClient(torch.nn.Linear(1, 2), data, Recipe(epochs=2))
        >>> app = edge_app(client_fn, mods=[ClipClones(5.0)])
    """
    guarded_mods = [in_wire_dtype, *guarded(mods)]
    app = _EdgeApp()
    app.legacy = ClientApp(lambda context: client_fn(context).to_client(), mods=guarded_mods)

    @app.train(mods=guarded_mods)
    def train(message: Message, context: Context) -> Message:
        names, arrays, config = _unpack(message)
        reply, num_examples, metrics = _numpy_client(client_fn(context)).fit(arrays, config)
        if len(reply) != len(names):
            raise ValueError(f"reply: expected {len(names)} arrays, got {len(reply)}")
        record = ArrayRecord({name: Array(array) for name, array in zip(names, reply)})
        content = {"arrays": record, "metrics": _metrics(num_examples, metrics)}
        return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]

    @app.evaluate(mods=guarded_mods)
    def evaluate(message: Message, context: Context) -> Message:
        _, arrays, config = _unpack(message)
        loss, num_examples, metrics = _numpy_client(client_fn(context)).evaluate(arrays, config)
        record = _metrics(num_examples, {"loss": loss, **metrics})
        return Message(RecordDict({"metrics": record}), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        config = ConfigRecord({"edge": _edge(context)})
        return Message(RecordDict({"config": config}), reply_to=message)

    return app


def in_wire_dtype(message: Message, context: Context, call_next: CallNext) -> Message:
    """Client mod: reply in the form that "wire-dtype" of the request's config names.

    It is the first mod of a list, so that the client and its other mods handle float32 arrays only.
    `edge_app` adds it; another client app may list it.

    Raises:
        ValueError: if the form is unknown.

    Examples:
        >>> from flwr.clientapp import ClientApp
        >>> from flwr_cloned_kd import in_wire_dtype, train_clones
        >>> app = ClientApp(mods=[in_wire_dtype, train_clones()])
    """
    configs = message.content.config_records.values()
    wire_dtype = next((config[KEY] for config in configs if KEY in config), None)
    if wire_dtype is None or message.metadata.message_type != MessageType.TRAIN:
        return call_next(message, context)
    check_wire_dtype(wire_dtype, KEY)
    sent = decode_request(_tensors(only(message.content.array_records, "ArrayRecord")))
    reply = call_next(_with_arrays(message, sent), context)
    if reply.has_error():
        return reply
    edge = _tensors(only(reply.content.array_records, "ArrayRecord"))
    return _with_arrays(reply, encode_reply(edge, sent, str(wire_dtype)))


def _tensors(record: ArrayRecord) -> StateDict:
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}


def _with_arrays(message: Message, tensors: StateDict) -> Message:
    """Return a copy of a message with other arrays in its only ArrayRecord."""
    changed = copy.copy(message)
    key = next(iter(message.content.array_records))
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})
    changed.content = RecordDict({**message.content, key: arrays})
    return changed


def _numpy_client(client: NumPyClient | Client) -> NumPyClient:
    """Undo `.to_client()`, with which most client functions end."""
    numpy_client = getattr(client, "numpy_client", client)
    if not isinstance(numpy_client, NumPyClient):
        raise TypeError(f"client_fn: expected a NumPyClient, got {type(client).__name__}")
    return numpy_client


def _edge(context: Context) -> str:
    """Return the name of this edge, "" if its node config has none."""
    config = context.node_config
    return str(config.get("name", config.get("partition-id", "")))


def _with_edge(reply: Message, context: Context) -> Message:
    """Add the name of this edge to the properties that a legacy server requests."""
    properties = "getpropertiesres.properties"
    if reply.has_content() and properties in reply.content:
        reply.content.config_records[properties].setdefault("edge", _edge(context))
        reply.content["getpropertiesres.status"] = ConfigRecord({"code": 0, "message": ""})
    return reply


def _unpack(message: Message) -> tuple[list[str], NDArrays, dict[str, Any]]:
    """Return the names, arrays and config of a request of the Message API."""
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise ValueError(f"request: expected one ArrayRecord, got {len(records)}")
    configs = list(message.content.config_records.values())
    arrays = [array.numpy() for array in records[0].values()]
    return list(records[0]), arrays, dict(configs[0]) if configs else {}


def _metrics(num_examples: int, metrics: dict[str, Any]) -> MetricRecord:
    numbers = {key: value for key, value in metrics.items() if type(value) in (int, float)}
    return MetricRecord({"num-examples": num_examples, **numbers})
