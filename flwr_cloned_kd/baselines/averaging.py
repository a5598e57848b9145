"""What FedAsync and FedBuff share: the strategy around an average of models, and its arithmetic."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from logging import INFO
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common import log
from torch import Tensor

from ..asynchronous.session import Dispatch
from ..asynchronous.staleness import StalenessWeight
from ..asynchronous.strategy import AsyncStrategy
from ..engine.ensemble import StateDict, as_ensemble, member, size
from ..io.messages import ensemble_of, metrics_of, only

Measure = Callable[[StateDict], Mapping[str, float]]
"""A model -> metrics of it, such as {"core-accuracy": 0.9}.

A ValueError refuses the answer that would have made the model, which stays what it was.
"""

MAX_COUNT = 2**53
"""The integers that float64 holds exactly end here."""


class Averaging(AsyncStrategy):
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
        self._take(under("model/", tensors))

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


def mix(current: StateDict, trained: StateDict, share: float) -> StateDict:
    """Average two models, in float64, and return the average in the types of the first one.

    Args:
        share: the part of `trained` in the average, in [0, 1].
    """
    mixed = {
        name: (1 - share) * tensor.double() + share * trained[name].double()
        for name, tensor in current.items()
    }
    return cast(mixed, current)


def check_counts(params: Mapping[str, Tensor]) -> None:
    """Refuse integers that float64, in which the averages are taken, does not hold exactly.

    Raises:
        ValueError: naming the first tensor that holds one.
    """
    for name, tensor in params.items():
        if tensor.dtype == torch.int64 and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            if max(-low, high) > MAX_COUNT:
                raise ValueError(
                    f"{name}: expected integers within 2**53, got {low if -low > high else high}"
                )


def cast(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> StateDict:
    """Return float64 averages in the model's types: counters to the nearest integer they have."""
    return {name: _round(value, like[name].dtype) for name, value in values.items()}


def _round(value: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return value.to(dtype)
    if dtype == torch.bool:
        return value >= 0.5
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    return value.round().clamp(max(low, -MAX_COUNT), min(high, MAX_COUNT)).to(dtype)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> StateDict:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _plain(record: ArrayRecord, like: StateDict) -> StateDict:
    """Decode and check one model; an ensemble was not asked for and is refused."""
    ensemble = ensemble_of(record, like)
    if size(ensemble) > 1:
        raise ValueError(f"clones: expected a plain model, got {size(ensemble)}")
    params = member(ensemble, 0)
    check_counts(params)
    return params
