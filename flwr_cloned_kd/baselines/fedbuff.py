"""FedBuff: the global model moves by the mean of a buffer of answers."""

from logging import INFO
from typing import Any, Unpack

import torch
from flwr.app import ArrayRecord
from flwr.common import log
from torch import Tensor

from ..asynchronous.staleness import PolynomialStaleness, StalenessWeight
from ..asynchronous.strategy import LoopOptions
from ..engine.counts import check_count
from ..engine.ensemble import StateDict, as_ensemble, check_finite, member
from .averaging import Averaging, Measure, cast, under

RUNNING_STATISTICS = ("running_mean", "running_var")
"""How PyTorch's names of normalisation statistics end."""


class FedBuff(Averaging):
    """Federated learning with buffered asynchronous aggregation (Nguyen et al. 2022).

    The buffer takes K answers. The K-th answer makes a version and empties the buffer:

        w <- w + server_lr / K * sum_k s(staleness_k) (w_k - w_sent_k)

    The paper's Delta is w_sent - w_k, and is subtracted. The staleness is counted when an answer
    arrives; it is the same when the buffer is full, since no version is made in between. Only the
    sum is kept, in float64, so that memory does not grow with K. Answers that are in the buffer
    when a run ends are not applied: ask for a multiple of K rounds.

    The paper knows weights only. Running statistics are mixed instead: they move from their value
    in w, and at most as far as the answer's. Otherwise two stale answers that both saw a variance
    fall from 10 to 1 would make it -5.4 (K = 1). For a fresh answer both rules give the same.

    Args:
        buffer_size: K, at least 1; 1 applies each answer at once.
        server_lr: eta_g, above 0.
        statistics: endings of the names of running statistics.
        staleness_weight: staleness -> s; the default is the paper's 1 / sqrt(1 + staleness).
        proximal_mu: sent as "proximal-mu": the edge adds mu/2 |w - w_sent|^2 to its loss; None
            sends nothing.
        measure: metrics of a model, joined to those of its round; may refuse it. It is called for
            every answer, on the model that this answer and those in the buffer would make, so that
            a refused answer never enters the sum.
        loop: options of `AsyncStrategy`; here `max_in_flight` is 10 and `revisit` True by default.

    Raises:
        ValueError: for a number out of range.

    Examples:
        >>> from flwr_cloned_kd import FedBuff
        >>> strategy = FedBuff(buffer_size=5, max_in_flight=10)
        >>> # in a server app: strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=50)
    """

    def __init__(
        self,
        *,
        buffer_size: int = 10,
        server_lr: float = 1.0,
        statistics: tuple[str, ...] = RUNNING_STATISTICS,
        staleness_weight: StalenessWeight = PolynomialStaleness(0.5),
        proximal_mu: float | None = None,
        measure: Measure | None = None,
        **loop: Unpack[LoopOptions],
    ) -> None:
        super().__init__(staleness_weight, proximal_mu, measure, loop)
        check_count("buffer_size", buffer_size)
        if not 0 < server_lr < float("inf"):
            raise ValueError(f"server_lr: expected above 0, got {server_lr}")
        self.buffer_size = int(buffer_size)
        self.server_lr = float(server_lr)
        self.statistics = statistics
        self.buffered = 0
        """Number of answers in the buffer, below K."""
        self._sum: StateDict = {}

    def begin(self, arrays: ArrayRecord) -> None:
        """Start from these arrays, with an empty buffer."""
        super().begin(arrays)
        self._empty()

    def learn(self, trained: StateDict, sent: StateDict, weight: float) -> dict[str, float]:
        """Add a model's movement to the buffer; a full buffer moves the global model."""
        total: StateDict = {}
        moved: StateDict = {}
        for name, tensor in self.current.items():
            if name.endswith(self.statistics):
                origin, share, server_lr = tensor, min(weight, 1.0), min(self.server_lr, 1.0)
            else:
                origin, share, server_lr = sent[name], weight, self.server_lr
            movement = share * (trained[name].double() - origin.double())
            total[name] = self._sum[name] + movement
            moved[name] = tensor.double() + server_lr / self.buffer_size * total[name]
        params = cast(moved, self.current)
        # Check now: once the buffer is full, the offending answer can no longer be identified.
        check_finite(params, "model after the buffer: ")
        measured = self.measurements(params)
        if self.buffered + 1 < self.buffer_size:
            self._sum = total
            self.buffered += 1
        else:
            self.advance(params, measured)
            self._empty()
        return {"buffered": self.buffered}

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common."""
        return {"buffer_size": self.buffer_size, "server_lr": self.server_lr}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the global model and the buffer."""
        tensors, state = super().state_dict()
        tensors |= {f"sum/{name}": tensor for name, tensor in self._sum.items()}
        return tensors, {**state, "buffered": self.buffered}

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, with the buffer as it was."""
        super().load_state_dict(tensors, state)
        like = {name: tensor.double() for name, tensor in self.current.items()}
        self._sum = member(as_ensemble(under("sum/", tensors), like), 0)
        self.buffered = int(state["buffered"])

    def summary(self) -> None:
        """Log the configuration."""
        super().summary()
        log(INFO, "\t└── Buffer: %d, server rate %g", self.buffer_size, self.server_lr)

    def _empty(self) -> None:
        self._sum = {
            name: torch.zeros_like(tensor, dtype=torch.float64)
            for name, tensor in self.current.items()
        }
        self.buffered = 0
