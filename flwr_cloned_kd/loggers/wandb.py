"""Rounds in a run of Weights & Biases."""

from typing import Any

from ..asynchronous.callbacks import Callback, RunStart
from .rows import cause_of, load, metrics_of, parameters_of


class WandbLogger(Callback):
    """Logs the metrics of each round, refusals as text, and settings as the run's config.

    Step n is round n. To continue a run of W&B after a resume, give `id` and `resume="allow"`:
    steps that the run of W&B has already are not logged again. In a new run of W&B, a resumed run
    logs the rounds before it too.

    One logger may log several runs: a resumed run continues the run of W&B before it, and every
    other run after the first starts one of its own, without the `id` and `resume` of `init`.

    Args:
        init: arguments of `wandb.init`, such as `project`, `name`, `dir` and `mode`. With
            `mode="offline"` nothing is sent, and `wandb sync` uploads the run later.

    Raises:
        ImportError: without the package wandb.

    Examples:
        >>> from flwr_cloned_kd import FedAsync, WandbLogger
        >>> logger = WandbLogger(project="edges", mode="offline")  # doctest: +SKIP
        >>> strategy = FedAsync(callbacks=[logger])  # doctest: +SKIP
    """

    def __init__(self, **init: Any) -> None:
        self.init = init
        self._library = load("wandb", "wandb")
        self._run: Any = None

    def started(self, run: RunStart) -> None:
        """Start a run of W&B with the settings, and log the rounds before a resume."""
        init = self.init
        if self._run is not None:
            init = {key: value for key, value in init.items() if key not in ("id", "resume")}
            if run.history:
                init |= {"id": self._run.id, "resume": "allow"}
        self._run = self._library.init(**init)
        self._run.config.update(parameters_of(run), allow_val_change=True)
        for row in run.history:
            self.absorbed(dict(row))

    def absorbed(self, row: dict[str, Any]) -> None:
        """Log a round."""
        step = row["round"]
        if step < self._run.step:
            return
        values: dict[str, Any] = {**metrics_of(row), "edge": row["edge"]}
        if cause := cause_of(row):
            values["refused"] = cause
        # Without `commit` a round would be sent only when the next one is logged.
        self._run.log(values, step=step, commit=True)

    refused = absorbed

    def finished(self, error: BaseException | None) -> None:
        """End the run of W&B; it counts as failed if an exception ended the training."""
        self._run.finish(exit_code=0 if error is None else 1)
