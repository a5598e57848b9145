"""FedAsync: every answer is mixed into the global model the moment it arrives."""

from logging import INFO
from typing import Any

from flwr.common import log

from ..asynchronous.staleness import ConstantStaleness, StalenessWeight
from ..engine.ensemble import StateDict
from .averaging import Averaging, Measure, mix


class FedAsync(Averaging):
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
        params = mix(self._current, trained, alpha_t)
        self._advance(params, self._measurements(params))
        return {"mixing-weight": alpha_t}
