"""Cloned knowledge distillation as a strategy for servers on `ServerAppComponents`."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from logging import WARNING
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetPropertiesIns,
    Parameters,
    Scalar,
    log,
    ndarrays_to_parameters,
)
from flwr.server import ClientManager
from flwr.server.strategy import Strategy

from ..asynchronous.callbacks import Callback, Callbacks, RunStart
from ..asynchronous.rounds import log_round
from ..asynchronous.session import Dispatch, Session
from ..asynchronous.timeline import Event
from ..engine.ensemble import StateDict, frozen_state, member, trained_state
from ..engine.fit import accuracy
from ..io.messages import MAX_CHARACTERS, MAX_NAME_CHARACTERS, ensemble_of, num_bytes
from ..io.wire import scale_names
from ..method.core import Core
from ..method.state import CoreState
from ..method.variants import Send, cloned
from .cloned_kd import ClonedKD

ClientProxy = Any
"""`flwr.server.client_proxy.ClientProxy`, which Flower does not export."""
Failure = tuple[ClientProxy, FitRes] | BaseException

QUERY_SECONDS = 60.0
WAIT_SECONDS = 0.2


class LegacyClonedKD(Strategy):
    """`ClonedKD` for `ServerAppComponents`: one edge in each round (Algorithm 1).

    The clients are NumPyClients without any change. The config of a request carries "num-clones",
    "seed" and "server-round"; a client that does not read them returns a plain model, which is an
    ensemble of one. Arrays are identified by their position, in the order of the core's state dict.
    What does not fit the core is refused in one line of the log and changes nothing. There is no
    checkpoint, no quarantine and no undoing of an edge; `ClonedKD` has them.

    Args:
        core: the service: its model, dataset, recipes and seed.
        params: the first core, such as `core.pretrain()`.
        num_clones: E, how many clones each edge trains; 1 is no ensemble.
        send: what an edge starts from; `cloned` sends the core, see `variants` for others.
        wire_dtype: the form in which an edge should return its clones, see `ClonedKD`.
        revisit: ask edges again once all present edges were asked as often.
        timeout: seconds to wait for an edge that was not asked yet. Once they have passed, later
            rounds look only once whether such an edge is present.
        on_fit_config_fn: round -> further config of the request, as in Flower's FedAvg.
        on_round: called after each round with one flat dict: round, edge, accepted (1 or 0), cause,
            staleness (0), bytes-down, bytes-up, edge-seconds, core-seconds, num-clones, and what
            `Core.distill` returned; see `AsyncStrategy`. An answer never waits here, so
            wait-seconds and idle times are missing.
        callbacks: called as things happen, see `Callback`. As in Flower's own loop, the number of
            rounds is not known, and `finished` is not called.

    Raises:
        ValueError: for a number out of range, or params that are not the core's.

    Examples:
        >>> import torch
        >>> from flwr.server import ServerAppComponents, ServerConfig
        >>> from flwr.serverapp import ServerApp
        >>> from flwr_cloned_kd import Core, LegacyClonedKD, Recipe
        >>> data = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> def server_fn(context):
        ...     core = Core(model=torch.nn.Linear(1, 2), dataset=data, recipe=Recipe(epochs=2))
        ...     strategy = LegacyClonedKD(core, core.pretrain(), num_clones=3)
        ...     return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=9))
        >>> app = ServerApp(server_fn=server_fn)
    """

    def __init__(
        self,
        core: Core,
        params: StateDict,
        *,
        num_clones: int = 3,
        send: Send = cloned,
        wire_dtype: str = "float32",
        revisit: bool = False,
        timeout: float = 3600.0,
        on_fit_config_fn: Callable[[int], dict[str, Scalar]] | None = None,
        on_round: Callable[[dict[str, Any]], None] | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        if not timeout >= 0:
            raise ValueError(f"timeout: expected at least 0, got {timeout}")
        self.core = core
        self.timeout = timeout
        self.on_fit_config_fn = on_fit_config_fn
        self.on_round = on_round
        self._callbacks = Callbacks(callbacks)
        self._events: list[Event] = []
        self._started = time.monotonic()
        self._method = ClonedKD(
            core, num_clones=num_clones, send=send, wire_dtype=wire_dtype, revisit=revisit
        )
        self._like = trained_state(core.model)
        frozen = frozen_state(core.model)
        first = {name: tensor for name, tensor in params.items() if name not in frozen}
        self._first = member(ensemble_of(ArrayRecord(first), self._like), 0)
        self._session = Session(revisit)
        self._patient = True

    @property
    def state(self) -> CoreState | None:
        """The core as it is now; None before the start of a run."""
        return self._method.state

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Start a new run from the first core."""
        self._session = Session(self._method.revisit)
        self._patient = True
        self._method.begin(ArrayRecord(self._first))
        self._method.history = []
        self._events = []
        self._started = time.monotonic()
        run = RunStart(
            strategy=type(self).__name__,
            num_rounds=None,
            settings=self._method.settings(),
            history=[],
            events=self._events,
            now=lambda: time.monotonic() - self._started,
        )
        self._callbacks.start(run)
        return to_parameters(self._first)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Ask one edge that was not asked yet; wait until there is one."""
        client = self._wait_for_edge(client_manager)
        if client is None:
            log(WARNING, "No edge left to ask")
            return []
        further = self.on_fit_config_fn(server_round) if self.on_fit_config_fn else {}
        own_config = ConfigRecord({"server-round": server_round})
        content, sent = self._method.request(server_round, own_config)
        arrays = content.array_records["arrays"].values()
        request = Parameters([array.data for array in arrays], "numpy.ndarray")
        now = time.monotonic()
        dispatch = Dispatch(
            node_id=_node_of(client),
            edge=self._session.names[_node_of(client)],
            version=self._current.version,
            sent=sent,
            num_bytes=sum(map(len, request.tensors)),
            sent_at=now,
            deadline=float("inf"),
            number=server_round,
        )
        self._session.depart(client.cid, dispatch)
        self._record(now, "ask", dispatch)
        config: dict[str, Scalar] = {**further, **own_config}  # type: ignore[dict-item]
        return [(client, FitIns(request, config))]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[Failure],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Distil the ensemble that came back (Phase 2), or log why it was refused."""
        answered_at = time.monotonic()
        dispatch = self._session.arrive(next(iter(self._session.in_flight), ""), answered_at)
        if dispatch is None:
            return to_parameters(self._current.params), {}
        self._record(answered_at, "answer" if results else "error", dispatch)
        cause = ""
        bytes_up = 0
        metrics: dict[str, Any] = {"accepted": 0.0}
        try:
            scales = scale_names(self._like, self._method.wire_dtype)
            content = content_of(results, failures, list(self._like), scales)
            bytes_up = num_bytes(content)
            metrics |= self._method.absorb(dispatch, content, 0)
            cause = metrics.pop("cause", "")
        except ValueError as error:
            cause = str(error)
        self._session.settle(dispatch)
        metrics |= {
            "staleness": 0,
            "bytes-down": dispatch.num_bytes,
            "bytes-up": bytes_up,
            "edge-seconds": answered_at - dispatch.sent_at,
            "core-seconds": time.monotonic() - answered_at,
        }
        cause = log_round(server_round, dispatch.edge, metrics, cause)
        row = {"round": server_round, "edge": dispatch.edge, "cause": cause, **metrics}
        self._method.history.append(row)  # for the guard, if the edge is visited again
        if self.on_round is not None:
            self.on_round(dict(row))
        self._callbacks.settle(row)
        return to_parameters(self._current.params), metrics

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Ask no edge: an edge is used once, to train."""
        return []

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Return nothing, since no edge was asked to evaluate."""
        return None, {}

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Return the core's cross entropy and accuracy on held-out data; None without such data."""
        if self.core.held_out is None:
            return None
        arrays = record_of(parameters, list(self._like), [])
        outputs = self.core.predictions(member(ensemble_of(arrays, self._like), 0))
        _, labels = self.core.held_out
        loss = float(self.core.task.loss(outputs, labels))
        return loss, {"core-accuracy": float(accuracy(outputs, labels, self.core.task))}

    @property
    def _current(self) -> CoreState:
        if self.state is None:
            raise RuntimeError("LegacyClonedKD: expected initialize_parameters() first")
        return self.state

    def _record(self, at: float, kind: str, dispatch: Dispatch) -> None:
        time_of_run = at - self._started
        version = self._current.version
        self._events.append(Event(time_of_run, kind, dispatch.edge, dispatch.number, version))
        self._callbacks.catch_up()

    def _wait_for_edge(self, client_manager: ClientManager) -> ClientProxy | None:
        deadline = time.monotonic() + (self.timeout if self._patient else 0)
        while (client := self._choose(client_manager)) is None:
            if time.monotonic() >= deadline:
                self._patient = False
                return None
            time.sleep(WAIT_SECONDS)
        self._patient = True
        return client

    def _choose(self, client_manager: ClientManager) -> ClientProxy | None:
        """Choose the least visited of the clients present, and of these the first by rank."""
        present = list(client_manager.all().values())
        self._introduce(present)
        free = [client for client in present if self._session.revisit or not self._visits(client)]
        return min(
            free, key=lambda client: (self._visits(client), self._rank(client)), default=None
        )

    def _visits(self, client: ClientProxy) -> int:
        return self._session.visits.get(self._session.names[_node_of(client)], 0)

    def _rank(self, client: ClientProxy) -> tuple[bool, int, str]:
        """Order named edges by their names, and put edges without a name behind them.

        Flower draws client ids anew in every run and its client manager keeps no order of arrival.
        Names, where there are any, give the same order and therefore the same bits in every run.
        """
        name = self._session.names[_node_of(client)]
        unnamed = name.startswith("node ")
        return (unnamed, 0, "") if unnamed else (unnamed, len(name), name)

    def _introduce(self, present: list[ClientProxy]) -> None:
        """Ask new clients for their names, side by side, and introduce them to the session."""
        new = [client for client in present if _node_of(client) not in self._session.names]
        if not new:
            return
        with ThreadPoolExecutor(min(len(new), 16)) as pool:
            names = list(pool.map(name_of, new))
        online = {_node_of(client) for client in present}
        for client, name in zip(new, names):
            self._session.introduce(_node_of(client), name, online)


def to_parameters(params: StateDict) -> Parameters:
    """Serialise a model in the order of its state dict."""
    return ndarrays_to_parameters([tensor.numpy() for tensor in params.values()])


def record_of(parameters: Parameters, names: list[str], scales: list[str]) -> ArrayRecord:
    """Give the core's names to arrays that are identified by position; decode none of them.

    Args:
        names: of the arrays of the model.
        scales: names of the further arrays of a reply with int8 codes.

    Raises:
        ValueError: if the number of arrays differs from the number of names.
    """
    tensors, kind = parameters.tensors, parameters.tensor_type
    if len(tensors) == len(names) + len(scales):
        names = [*names, *scales]
    if len(tensors) != len(names):
        raise ValueError(f"parameters: expected {len(names)} arrays, got {len(tensors)}")
    return ArrayRecord(
        {
            name: Array(dtype="", shape=(), stype=kind, data=data)
            for name, data in zip(names, tensors)
        }
    )


def content_of(
    results: list[tuple[ClientProxy, FitRes]],
    failures: list[Failure],
    names: list[str],
    scales: list[str],
) -> RecordDict:
    """Return the reply of the one client that was asked, in the form of the Message API.

    Args:
        names: of the arrays of the model, in the order of its state dict.
        scales: names of the further arrays of a reply with int8 codes.

    Raises:
        ValueError: for anything but one good reply, with the cause.
    """
    replies = [reply for _, reply in results]
    for failure in failures:
        if isinstance(failure, BaseException):
            lines = [line for line in str(failure).splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else type(failure).__name__
            raise ValueError(f"expected a reply, got an error: {reason[:MAX_CHARACTERS]!r}")
        replies.append(failure[1])
    if len(replies) != 1:
        raise ValueError(f"expected one answer, got {len(replies)}")
    reply = replies[0]
    if reply.status.code != Code.OK:
        status = f"{reply.status.code.name}: {reply.status.message[:MAX_CHARACTERS]!r}"
        raise ValueError(f"expected status OK, got {status}")
    claims: dict[str, Any] = {**reply.metrics, "num-examples": reply.num_examples}
    metrics = MetricRecord({k: v for k, v in claims.items() if type(v) in (int, float)})
    return RecordDict({"arrays": record_of(reply.parameters, names, scales), "metrics": metrics})


def name_of(client: ClientProxy) -> str:
    """Ask a client for its name; return "" if it does not have one."""
    query = GetPropertiesIns({})
    try:
        answer = client.get_properties(query, timeout=QUERY_SECONDS, group_id=None)
    except Exception:  # whatever the transport or the client raises; the client may still train
        return ""
    name = str(answer.properties.get("edge", "")) if answer.status.code == Code.OK else ""
    return name[:MAX_NAME_CHARACTERS] if name.isprintable() else ""


def _node_of(client: ClientProxy) -> int:
    """Return the node id of a client: Flower's client ids are node ids in decimal."""
    return int(client.cid)
