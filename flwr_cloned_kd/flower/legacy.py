"""Cloned knowledge distillation as a strategy for servers on `ServerAppComponents`."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from logging import WARNING
from typing import Any

from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
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

from ..asynchronous.rounds import tell
from ..engine.ensemble import StateDict, member, size
from ..engine.losses import Batch, cross_entropy
from ..io.messages import (
    MOST_CHARACTERS,
    MOST_NAME_CHARACTERS,
    ensemble_of,
    metrics_of,
    num_bytes,
)
from ..method.core import Core, CoreState, edge_seed
from ..method.variants import Send, cloned

ClientProxy = Any
"""`flwr.server.client_proxy.ClientProxy`, which Flower does not export."""
Failure = tuple[ClientProxy, FitRes] | BaseException

QUERY_SECONDS = 60.0
WAIT_SECONDS = 0.2


class LegacyClonedKD(Strategy):
    """`ClonedKD` for `ServerAppComponents`: one edge a round, Algorithm 1.

    The clients are NumPyClients, as they are: the config of a request carries "num-clones",
    "seed" and "server-round", and a client that does not know them returns a plain model, an
    ensemble of one. Arrays go by position, in the order of the core's state dict. Whatever does
    not fit the core is refused, in one line of the log, and leaves it as it was.

    Args:
        core: the service; its dataset, recipes and seed.
        params: the first core, such as `core.pretrain()`.
        num_clones: E, how many clones each edge is asked for; 1 is no ensemble.
        send: what an edge starts from; `cloned` sends the core, see `variants` for others.
        revisit: ask edges again once all that are present were asked as often.
        timeout: seconds to wait for an edge that was not asked yet; once they have passed, later
            rounds only look whether one is there.
        on_fit_config_fn: round -> further config of the request, as in Flower's FedAvg.
        on_round: called with one flat dict after each round: round, edge, accepted (1 or 0), cause,
            staleness (0), bytes-down, bytes-up, edge-seconds, core-seconds, num-clones, and what
            `Core.distill` returned; see `AsyncStrategy`. An answer never waits, so there is no
            wait-seconds, and none of idle times.

    Raises:
        ValueError: for a number out of range, or params that are not the core's.
    """

    def __init__(
        self,
        core: Core,
        params: StateDict,
        *,
        num_clones: int = 3,
        send: Send = cloned,
        revisit: bool = False,
        timeout: float = 3600.0,
        on_fit_config_fn: Callable[[int], dict[str, Scalar]] | None = None,
        on_round: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        if num_clones < 1:
            raise ValueError(f"num_clones: expected at least 1, got {num_clones}")
        if not timeout >= 0:
            raise ValueError(f"timeout: expected at least 0, got {timeout}")
        like = core.model.state_dict()
        first = member(ensemble_of(ArrayRecord(params), like), 0)
        self.core, self.num_clones, self.send, self.revisit = core, num_clones, send, revisit
        self.timeout, self.on_fit_config_fn, self.on_round = timeout, on_fit_config_fn, on_round
        self._first, self._like = first, like
        self.state: CoreState | None = None
        self._asked: tuple[str, StateDict, int, float] | None = None
        self._open()

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Start a new run from the first core."""
        self._open()
        self.state = self.core.state(self._first)
        return to_parameters(self._first)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Ask one edge that was not asked yet; wait until there is one."""
        client = self._wait_for_edge(client_manager)
        if client is None:
            log(WARNING, "No edge left to ask")
            return []
        sent = self.send(self._current)
        further = self.on_fit_config_fn(server_round) if self.on_fit_config_fn else {}
        config: dict[str, Scalar] = {
            **further,
            "server-round": server_round,
            "num-clones": self.num_clones,
            "seed": edge_seed(self.core.seed, server_round),
        }
        request = to_parameters(sent)
        edge = self._names[client.cid]
        self._visits[edge] = self._visits.get(edge, 0) + 1
        down = sum(map(len, request.tensors))
        self._asked = (edge, sent, down, time.monotonic())
        return [(client, FitIns(request, config))]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[Failure],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Distil the ensemble that came back (Phase 2), or say why not."""
        if self._asked is None:
            return to_parameters(self._current.params), {}
        edge, sent, down, sent_at = self._asked
        self._asked = None
        answered, cause, up = time.monotonic(), "", 0
        metrics: dict[str, Any] = {"accepted": 0.0}
        try:
            content = content_of(results, failures, list(self._like))
            up = num_bytes(content)
            metrics |= self._absorb(content, sent)
        except ValueError as error:
            cause = str(error)
        metrics |= {
            "staleness": 0,
            "bytes-down": down,
            "bytes-up": up,
            "edge-seconds": answered - sent_at,
            "core-seconds": time.monotonic() - answered,
        }
        cause = tell(server_round, edge, metrics, cause)
        if self.on_round is not None:
            self.on_round({"round": server_round, "edge": edge, "cause": cause, **metrics})
        return to_parameters(self._current.params), metrics

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Ask nobody: an edge is used once, to train."""
        return []

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Return nothing, since nobody was asked."""
        return None, {}

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Return the core's cross entropy and accuracy on held-out data, None if there is none."""
        if self.core.held_out is None:
            return None
        arrays = record_of(parameters, list(self._like))
        logits = self.core.predictions(member(ensemble_of(arrays, self._like), 0))
        inputs, labels = self.core.held_out
        loss = float(cross_entropy(logits, Batch(inputs, labels, labels)))
        return loss, {"core-accuracy": float((logits.argmax(-1) == labels).float().mean())}

    def _open(self) -> None:
        self._names = dict[str, str]()  # Flower's client id -> edge
        self._visits = dict[str, int]()
        self._asked, self._patient = None, True

    def _absorb(self, content: RecordDict, sent: StateDict) -> dict[str, float]:
        found = metrics_of(content)
        edge = ensemble_of(next(iter(content.array_records.values())), self._current.params)
        if size(edge) > self.num_clones:
            raise ValueError(f"clones: expected at most {self.num_clones}, got {size(edge)}")
        self.state, metrics = self.core.distill(self._current, edge, sent=sent)
        return {**found, **metrics, "num-clones": size(edge)}

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
        """Pick, of the clients present, the least visited one; named ones in order of name."""
        present = list(client_manager.all().values())
        self._introduce(present)
        free = [client for client in present if self.revisit or not self._visited(client)]
        return min(
            free, key=lambda client: (self._visited(client), self._rank(client)), default=None
        )

    def _visited(self, client: ClientProxy) -> int:
        return self._visits.get(self._names[client.cid], 0)

    def _rank(self, client: ClientProxy) -> tuple[bool, int, str]:
        # Flower's ids are drawn anew in every run and its manager keeps no order of arrival: names,
        # where there are any, give the same order, and so the same bits, every time.
        name = self._names[client.cid]
        unnamed = name.startswith("node ")
        return (unnamed, 0, "") if unnamed else (unnamed, len(name), name)

    def _introduce(self, present: list[ClientProxy]) -> None:
        """Ask newcomers who they are; a name that somebody present bears is not believed."""
        new = [client for client in present if client.cid not in self._names]
        if not new:
            return
        with ThreadPoolExecutor(min(len(new), 16)) as pool:
            answers = list(pool.map(name_of, new))
        for client, name in zip(new, answers):
            taken = {self._names.get(other.cid) for other in present}
            believed = name and name not in taken and not name.startswith("node ")
            self._names[client.cid] = name if believed else f"node {client.cid}"

    @property
    def _current(self) -> CoreState:
        if self.state is None:
            raise RuntimeError("LegacyClonedKD: expected initialize_parameters() first")
        return self.state


def to_parameters(params: StateDict) -> Parameters:
    """Serialise a model in the order of its state dict."""
    return ndarrays_to_parameters([tensor.numpy() for tensor in params.values()])


def record_of(parameters: Parameters, names: list[str]) -> ArrayRecord:
    """Give arrays that go by position the core's names; nothing is decoded yet.

    Raises:
        ValueError: if there are fewer or more of them.
    """
    tensors, kind = parameters.tensors, parameters.tensor_type
    if len(tensors) != len(names):
        raise ValueError(f"parameters: expected {len(names)} arrays, got {len(tensors)}")
    return ArrayRecord(
        {
            name: Array(dtype="", shape=(), stype=kind, data=data)
            for name, data in zip(names, tensors)
        }
    )


def content_of(
    results: list[tuple[ClientProxy, FitRes]], failures: list[Failure], names: list[str]
) -> RecordDict:
    """Return what the one client asked replied, as a Message-API reply; refuse everything else.

    Raises:
        ValueError: with the cause.
    """
    for failure in failures:
        if isinstance(failure, BaseException):
            lines = [line for line in str(failure).splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else type(failure).__name__
            raise ValueError(f"expected a reply, got an error: {reason[:MOST_CHARACTERS]!r}")
        results = [*results, failure]
    if len(results) != 1:
        raise ValueError(f"expected one answer, got {len(results)}")
    reply = results[0][1]
    if reply.status.code != Code.OK:
        found = f"{reply.status.code.name}: {reply.status.message[:MOST_CHARACTERS]!r}"
        raise ValueError(f"expected status OK, got {found}")
    claims: dict[str, Any] = {**reply.metrics, "num-examples": reply.num_examples}
    metrics = MetricRecord({k: v for k, v in claims.items() if type(v) in (int, float)})
    return RecordDict({"arrays": record_of(reply.parameters, names), "metrics": metrics})


def name_of(client: ClientProxy) -> str:
    """Ask a client who it is; "" if it does not say."""
    try:
        answer = client.get_properties(GetPropertiesIns({}), timeout=QUERY_SECONDS, group_id=None)
    except Exception:  # whatever the transport or the client raises; it may train all the same
        return ""
    name = str(answer.properties.get("edge", "")) if answer.status.code == Code.OK else ""
    return name[:MOST_NAME_CHARACTERS] if name.isprintable() else ""
