"""FedAsync: each answer is mixed into the global model when it arrives."""

from logging import INFO
from typing import Any, Unpack

from flwr.common import log

from ..asynchronous.staleness import ConstantStaleness, StalenessWeight
from ..asynchronous.strategy import LoopOptions
from ..engine.ensemble import StateDict
from .averaging import Averaging, Measure, mix


class FedAsync(Averaging):
    """Asynchronous federated optimization (Xie, Koyejo and Gupta 2019, Algorithm 1).

    Each answer w_k is mixed into the global model w when it arrives, and makes a version:

        w <- (1 - alpha_t) w + alpha_t w_k,    alpha_t = alpha * s(staleness)

    Args:
        alpha: share of a fresh answer in the new model, above 0 to 1; 1 keeps the answer alone.
        staleness_weight: staleness -> s, with alpha * s at most 1; see `asynchronous.staleness`.
        proximal_mu: the paper's rho, sent as "proximal-mu": the edge adds mu/2 |w - w_sent|^2 to
            its loss; None sends nothing.
        measure: metrics of a model, joined to those of its round; may refuse the model.
        loop: options of `AsyncStrategy`; here `max_in_flight` is 10 and `revisit` True by default.

    Raises:
        ValueError: for a number out of range.

    Examples:
        >>> from flwr_cloned_kd import FedAsync, PolynomialStaleness
        >>> strategy = FedAsync(staleness_weight=PolynomialStaleness(0.5), max_in_flight=4)
        >>> # in a server app: strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=50)
    """

    def __init__(
        self,
        *,
        alpha: float = 0.6,
        staleness_weight: StalenessWeight = ConstantStaleness(),
        proximal_mu: float | None = None,
        measure: Measure | None = None,
        **loop: Unpack[LoopOptions],
    ) -> None:
        super().__init__(staleness_weight, proximal_mu, measure, loop)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha: expected above 0 to 1, got {alpha}")
        self.alpha = float(alpha)

    def learn(self, trained: StateDict, sent: StateDict, weight: float) -> dict[str, float]:
        """Mix a model into the global one."""
        # `self.alpha` does not change: the factor of one answer must not apply to the next.
        alpha_t = self.alpha * weight
        if alpha_t > 1:
            raise ValueError(f"alpha times staleness weight: expected at most 1, got {alpha_t}")
        params = mix(self.current, trained, alpha_t)
        self.advance(params, self.measurements(params))
        return {"mixing-weight": alpha_t}

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common."""
        return {"alpha": self.alpha}

    def summary(self) -> None:
        """Log the configuration."""
        super().summary()
        log(INFO, "\t└── Alpha: %g", self.alpha)
