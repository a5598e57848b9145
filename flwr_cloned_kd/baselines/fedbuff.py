"""FedBuff: the global model moves by the mean of a buffer of answers."""

from logging import INFO
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.common import log
from torch import Tensor

from ..asynchronous.staleness import PolynomialStaleness, StalenessWeight
from ..engine.ensemble import StateDict, as_ensemble, check_finite, member
from .averaging import Averaging, Measure, cast, under

RUNNING_STATISTICS = ("running_mean", "running_var")
"""How PyTorch's names of normalisation statistics end."""


class FedBuff(Averaging):
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
        self._sum = member(as_ensemble(under("sum/", tensors), like), 0)
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
