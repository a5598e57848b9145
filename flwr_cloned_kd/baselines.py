"""FedAsync and FedBuff on the asynchronous loop: what a user would otherwise pick."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from logging import INFO
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common import log
from torch import Tensor

from ._session import Dispatch
from ._wire import ensemble_of, metrics_of, only
from .asynchronous import AsyncStrategy
from .averages import cast, check_counts
from .ensemble import StateDict, as_ensemble, check_finite, member, size
from .staleness import ConstantStaleness, PolynomialStaleness, StalenessWeight

Measure = Callable[[StateDict], Mapping[str, float]]
"""A model -> metrics of it, such as {"core-accuracy": 0.9}.

A ValueError refuses the answer that would have made the model, which stays what it was.
"""

RUNNING_STATISTICS = ("running_mean", "running_var")
"""How PyTorch's names of normalisation statistics end."""


class _Averaging(AsyncStrategy):
    """What FedAsync and FedBuff share: one global model, and answers that are plain models."""

    def __init__(
        self,
        staleness_weight: StalenessWeight,
        max_staleness: int | None,
        proximal_mu: float | None,
        measure: Measure | None,
        loop: dict[str, Any],
    ) -> None:
        # Both papers ask clients over and over, several at a time.
        super().__init__(**{"max_in_flight": 10, "revisit": True} | loop)
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(f"max_staleness: expected at least 0, got {max_staleness}")
        if proximal_mu is not None and not 0 <= proximal_mu < float("inf"):
            raise ValueError(f"proximal_mu: expected at least 0, got {proximal_mu}")
        self.staleness_weight, self.max_staleness = staleness_weight, max_staleness
        self.proximal_mu, self.measure = proximal_mu, measure
        self.params: StateDict | None = None
        self._measured: dict[str, float] = {}

    def begin(self, arrays: ArrayRecord) -> None:
        """Start from these arrays; their names, shapes and types are what answers must have."""
        self._take(arrays.to_torch_state_dict(keep_input=True))

    @property
    def arrays(self) -> ArrayRecord:
        """The global model as it is now."""
        return ArrayRecord(self._current)

    def request(self, server_round: int, config: ConfigRecord) -> tuple[RecordDict, StateDict]:
        """Send the global model and, if it was given, the weight of the proximal term."""
        if self.proximal_mu is not None:
            config["proximal-mu"] = self.proximal_mu
        sent = self._current
        return RecordDict({"arrays": ArrayRecord(sent), "config": config}), sent

    def absorb(self, dispatch: Dispatch[Any], content: RecordDict) -> dict[str, float]:
        """Average the model that came back into the global one."""
        staleness = self.version - dispatch.version
        if self.max_staleness is not None and staleness > self.max_staleness:
            raise ValueError(f"staleness: expected at most {self.max_staleness}, got {staleness}")
        found = metrics_of(content)
        trained = _plain(only(content.array_records, "ArrayRecord"), self._current)
        weight = float(self.staleness_weight(staleness))
        if not 0 <= weight < float("inf"):
            raise ValueError(f"staleness weight: expected at least 0, got {weight}")
        learned = self._learn(trained, dispatch.sent, weight)
        numbers = {"accepted": 1.0, "staleness-weight": weight}
        return {**found, **numbers, **learned, **self._measured}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint must hold besides the version: tensors by name, and JSON."""
        named = {f"model/{name}": tensor for name, tensor in self._current.items()}
        return named, {"settings": self._settings}

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, instead of `begin`; ValueError if it cannot be."""
        for name, value in self._settings.items():
            if (found := state["settings"][name]) != value:
                raise ValueError(f"{name}: expected {value}, got {found}")
        self._take(_under("model/", tensors))

    def summary(self) -> None:
        """Log the configuration."""
        super().summary()
        log(INFO, "\t├── Staleness weight: %s", self.staleness_weight)
        if self.proximal_mu is not None:
            log(INFO, "\t├── Proximal mu: %g", self.proximal_mu)

    @abstractmethod
    def _learn(self, trained: StateDict, sent: StateDict, weight: float) -> dict[str, float]:
        """Learn from one model, checked and weighed; a ValueError must leave all as it was."""

    @property
    @abstractmethod
    def _settings(self) -> dict[str, float]:
        """What a resumed run must share with the run before it."""

    def _take(self, given: Mapping[str, Tensor]) -> None:
        params = member(as_ensemble(given, given), 0)
        check_counts(params)
        self._measured = self._measurements(params)
        self.params = params

    def _advance(self, params: StateDict, measured: dict[str, float]) -> None:
        with self.publishing:
            self.params, self._measured, self.version = params, measured, self.version + 1

    def _measurements(self, params: StateDict) -> dict[str, float]:
        return {} if self.measure is None else dict(self.measure(params))

    @property
    def _current(self) -> StateDict:
        if self.params is None:
            raise RuntimeError(f"{type(self).__name__}: expected start() first")
        return self.params


class FedAsync(_Averaging):
    """Asynchronous federated optimization (Xie, Koyejo and Gupta 2019, Algorithm 1).

    Each answer w_k is mixed into the global model w the moment it arrives, and makes a version:

        w <- (1 - alpha_t) w + alpha_t w_k,    alpha_t = alpha * s(staleness)

    An edge is asked again and again, ten at a time, unless you say otherwise.

    Args:
        alpha: share of a fresh answer in the new model, above 0 to 1; 1 keeps the answer alone.
        staleness_weight: staleness -> s, with alpha * s at most 1; see `flwr_cloned_kd.staleness`.
        max_staleness: refuse answers to a model older than this many versions; None takes all.
        proximal_mu: the paper's rho, sent as "proximal-mu": the edge adds mu/2 |w - w_sent|^2 to
            its loss; None sends nothing.
        measure: metrics of a model, joined to those of its round; may refuse it.
        loop: options of `AsyncStrategy`: `max_in_flight` (10), `revisit` (True), `on_round`.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.6,
        staleness_weight: StalenessWeight = ConstantStaleness(),
        max_staleness: int | None = None,
        proximal_mu: float | None = None,
        measure: Measure | None = None,
        **loop: Any,
    ) -> None:
        super().__init__(staleness_weight, max_staleness, proximal_mu, measure, loop)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha: expected above 0 to 1, got {alpha}")
        self.alpha = alpha

    def summary(self) -> None:
        """Log the configuration."""
        super().summary()
        log(INFO, "\t└── Alpha: %g", self.alpha)

    @property
    def _settings(self) -> dict[str, float]:
        return {"alpha": self.alpha}

    def _learn(self, trained: StateDict, sent: StateDict, weight: float) -> dict[str, float]:
        # alpha itself stays as it is: a factor of it that is stored would compound.
        alpha_t = self.alpha * weight
        if alpha_t > 1:
            raise ValueError(f"alpha times staleness weight: expected at most 1, got {alpha_t}")
        mixed = {
            name: (1 - alpha_t) * tensor.double() + alpha_t * trained[name].double()
            for name, tensor in self._current.items()
        }
        params = cast(mixed, self._current)
        self._advance(params, self._measurements(params))
        return {"mixing-weight": alpha_t}


class FedBuff(_Averaging):
    """Federated learning with buffered asynchronous aggregation (Nguyen et al. 2022).

    The buffer takes K answers, and the K-th makes a version and empties it:

        w <- w + server_lr / K * sum_k s(staleness_k) (w_k - w_sent_k)

    The paper's Delta is w_sent - w_k, and is subtracted. The staleness is counted when an answer
    arrives, which is no different from when its buffer is full: no version is made in between.
    Only the sum is kept, in float64, so memory does not grow with K. Answers that are in the
    buffer when a run ends are not applied: ask for a multiple of K rounds.

    The papers know weights only. Running statistics are mixed instead: counted from the w that
    they are added to, by at most the whole way. Two stale answers that both saw a variance fall
    from 10 to 1 would otherwise make it -5.4 (K = 1). For a fresh answer it is the same.

    Args:
        buffer_size: K, at least 1; 1 applies each answer at once.
        server_lr: eta_g, above 0.
        statistics: endings of the names of running statistics.
        staleness_weight: staleness -> s; the default is the paper's 1 / sqrt(1 + staleness).
        max_staleness: refuse answers to a model older than this many versions; None takes all.
        proximal_mu: sent as "proximal-mu": the edge adds mu/2 |w - w_sent|^2 to its loss; None
            sends nothing.
        measure: metrics of a model, joined to those of its round; may refuse it. Called for every
            answer, on the model that it and those in the buffer so far would make, so that a
            refused one never enters the sum.
        loop: options of `AsyncStrategy`: `max_in_flight` (10), `revisit` (True), `on_round`.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        *,
        buffer_size: int = 10,
        server_lr: float = 1.0,
        statistics: tuple[str, ...] = RUNNING_STATISTICS,
        staleness_weight: StalenessWeight = PolynomialStaleness(0.5),
        max_staleness: int | None = None,
        proximal_mu: float | None = None,
        measure: Measure | None = None,
        **loop: Any,
    ) -> None:
        super().__init__(staleness_weight, max_staleness, proximal_mu, measure, loop)
        if buffer_size < 1:
            raise ValueError(f"buffer_size: expected at least 1, got {buffer_size}")
        if not 0 < server_lr < float("inf"):
            raise ValueError(f"server_lr: expected above 0, got {server_lr}")
        self.buffer_size, self.server_lr, self.statistics = buffer_size, server_lr, statistics
        self.buffered = 0
        """Answers in the buffer, below K."""
        self._sum: StateDict = {}

    def begin(self, arrays: ArrayRecord) -> None:
        """Start from these arrays, with an empty buffer."""
        super().begin(arrays)
        self._empty()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint must hold besides the version, the buffer among it."""
        named, state = super().state_dict()
        named |= {f"sum/{name}": tensor for name, tensor in self._sum.items()}
        return named, {**state, "buffered": self.buffered}

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, with the buffer as it was."""
        super().load_state_dict(tensors, state)
        like = {name: tensor.double() for name, tensor in self._current.items()}
        self._sum = member(as_ensemble(_under("sum/", tensors), like), 0)
        self.buffered = int(state["buffered"])

    def summary(self) -> None:
        """Log the configuration."""
        super().summary()
        log(INFO, "\t└── Buffer: %d, server rate %g", self.buffer_size, self.server_lr)

    @property
    def _settings(self) -> dict[str, float]:
        return {"buffer_size": self.buffer_size, "server_lr": self.server_lr}

    def _learn(self, trained: StateDict, sent: StateDict, weight: float) -> dict[str, float]:
        total, moved = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in self._current.items():
            origin, share, lr = sent[name], weight, self.server_lr
            if name.endswith(self.statistics):
                origin, share, lr = tensor, min(weight, 1.0), min(self.server_lr, 1.0)
            way = share * (trained[name].double() - origin.double())
            total[name] = self._sum[name] + way
            moved[name] = tensor.double() + lr / self.buffer_size * total[name]
        params = cast(moved, self._current)
        # Looked at before the buffer is full: later it could not be told who spoilt it.
        check_finite(params, "model after the buffer: ")
        measured = self._measurements(params)
        if self.buffered + 1 < self.buffer_size:
            self._sum, self.buffered = total, self.buffered + 1
        else:
            self._advance(params, measured)
            self._empty()
        return {"buffered": self.buffered}

    def _empty(self) -> None:
        self._sum = {
            name: torch.zeros_like(t, dtype=torch.float64) for name, t in self._current.items()
        }
        self.buffered = 0


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> StateDict:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _plain(record: ArrayRecord, like: StateDict) -> StateDict:
    """Decode and check one model; an ensemble was not asked for and is refused."""
    ensemble = ensemble_of(record, like)
    if size(ensemble) > 1:
        raise ValueError(f"clones: expected a plain model, got {size(ensemble)}")
    params = member(ensemble, 0)
    check_counts(params)
    return params
