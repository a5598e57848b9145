"""What FedAsync and FedBuff share: a strategy around an average of models, and its arithmetic."""

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
from ..asynchronous.strategy import AsyncStrategy, LoopOptions
from ..engine.ensemble import StateDict, as_ensemble, member, size
from ..io.messages import ensemble_of, metrics_of, only

Measure = Callable[[StateDict], Mapping[str, float]]
"""Model -> metrics of it, such as {"core-accuracy": 0.9}.

A ValueError refuses the answer that would have made this model; the global model stays as it was.
"""

MAX_COUNT = 2**53
"""The largest integer up to which float64 holds every integer exactly."""


class Averaging(AsyncStrategy):
    """A strategy with one global model, whose answers are plain models.

    Args:
        staleness_weight: staleness -> weight of an answer, at least 0.
        proximal_mu: sent to the edges as "proximal-mu"; None sends nothing.
        measure: metrics of a model, joined to those of its round; may refuse the model.
        loop: options of `AsyncStrategy`, by default `max_in_flight` 10 and `revisit` True: the
            papers of both methods ask clients over and over, several at a time.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        staleness_weight: StalenessWeight,
        proximal_mu: float | None,
        measure: Measure | None,
        loop: LoopOptions,
    ) -> None:
        defaults: LoopOptions = {"max_in_flight": 10, "revisit": True}
        super().__init__(**(defaults | loop))
        if proximal_mu is not None and not 0 <= proximal_mu < float("inf"):
            raise ValueError(f"proximal_mu: expected at least 0, got {proximal_mu}")
        self.staleness_weight = staleness_weight
        self.proximal_mu = None if proximal_mu is None else float(proximal_mu)
        self.measure = measure
        self.params: StateDict | None = None
        self._measured: dict[str, float] = {}

    def begin(self, arrays: ArrayRecord) -> None:
        """Start from these arrays; answers must have the same names, shapes and types."""
        self._take(arrays.to_torch_state_dict(keep_input=True))

    @property
    def arrays(self) -> ArrayRecord:
        """The global model as it is now."""
        return ArrayRecord(self.current)

    @property
    def current(self) -> StateDict:
        """The global model as it is now.

        Raises:
            RuntimeError: before the start of a run.
        """
        if self.params is None:
            raise RuntimeError(f"{type(self).__name__}: expected start() first")
        return self.params

    def request(self, server_round: int, config: ConfigRecord) -> tuple[RecordDict, StateDict]:
        """Send the global model and, if it was given, the weight of the proximal term."""
        if self.proximal_mu is not None:
            config["proximal-mu"] = self.proximal_mu
        sent = self.current
        return RecordDict({"arrays": ArrayRecord(sent), "config": config}), sent

    def absorb(self, dispatch: Dispatch, content: RecordDict, staleness: int) -> dict[str, float]:
        """Average the model that an edge returned into the global model."""
        reported = metrics_of(content)
        trained = _plain_model(only(content.array_records, "ArrayRecord"), self.current)
        weight = float(self.staleness_weight(staleness))
        if not 0 <= weight < float("inf"):
            raise ValueError(f"staleness weight: expected at least 0, got {weight}")
        learned = self.learn(trained, dispatch.sent, weight)
        numbers = {"accepted": 1.0, "staleness-weight": weight}
        return {**reported, **numbers, **learned, **self._measured}

    @abstractmethod
    def learn(self, trained: StateDict, sent: StateDict, weight: float) -> dict[str, float]:
        """Learn from one checked model and return metrics.

        A ValueError refuses the model and must leave everything as it was.

        Args:
            trained: what the edge returned.
            sent: what the edge had been sent.
            weight: the staleness weight, at least 0.
        """

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the global model."""
        return {f"model/{name}": tensor for name, tensor in self.current.items()}, {}

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; raise ValueError if it does not fit."""
        self._take(under("model/", tensors))

    def summary(self) -> None:
        """Log the configuration."""
        super().summary()
        log(INFO, "\t├── Staleness weight: %s", self.staleness_weight)
        if self.proximal_mu is not None:
            log(INFO, "\t├── Proximal mu: %g", self.proximal_mu)

    def measurements(self, params: StateDict) -> dict[str, float]:
        """Return the metrics of a model, none without `measure`."""
        measured = {} if self.measure is None else self.measure(params)
        return {name: float(number) for name, number in measured.items()}

    def advance(self, params: StateDict, measured: dict[str, float]) -> None:
        """Publish a new global model and its metrics as the next version."""
        with self.publishing:
            self.params = params
            self._measured = measured
            self.version += 1

    def _take(self, arrays: Mapping[str, Tensor]) -> None:
        params = member(as_ensemble(arrays, arrays), 0)
        check_counts(params)
        self._measured = self.measurements(params)
        self.params = params


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


def cast(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> StateDict:
    """Return float64 averages in the types of a model; counters become the nearest integer."""
    return {name: _round(value, like[name].dtype) for name, value in values.items()}


def check_counts(params: Mapping[str, Tensor]) -> None:
    """Refuse integers that float64, in which averages are taken, does not hold exactly.

    Raises:
        ValueError: naming the first tensor that holds one.
    """
    for name, tensor in params.items():
        if tensor.dtype == torch.int64 and tensor.numel():
            low, high = int(tensor.min()), int(tensor.max())
            if max(-low, high) > MAX_COUNT:
                worst = low if -low > high else high
                raise ValueError(f"{name}: expected integers within 2**53, got {worst}")


def under(prefix: str, tensors: Mapping[str, Tensor]) -> StateDict:
    """Return the tensors whose names start with a prefix, without the prefix."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _round(value: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return value.to(dtype)
    if dtype == torch.bool:
        return value >= 0.5
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    return value.round().clamp(max(low, -MAX_COUNT), min(high, MAX_COUNT)).to(dtype)


def _plain_model(record: ArrayRecord, like: StateDict) -> StateDict:
    """Decode and check one model; refuse an ensemble, which was not asked for."""
    ensemble = ensemble_of(record, like)
    if size(ensemble) > 1:
        raise ValueError(f"clones: expected a plain model, got {size(ensemble)}")
    params = member(ensemble, 0)
    check_counts(params)
    return params
