"""Rounds in a run of MLflow."""

import time
from typing import Any

from ..asynchronous.callbacks import Callback, RunStart
from .rows import cause_of, load, metrics_of, parameters_of


class MlflowLogger(Callback):
    """Logs the metrics of each round, settings as parameters, and refusals as tags "refused-n".

    Step n is round n. A resumed run logs those of its rounds, and of the rounds before it, that the
    run of MLflow does not have: each step is logged once. MLflow's global state (the active run) is
    neither used nor changed.

    One logger may log several runs: a resumed run continues the run of MLflow before it, and every
    other run after the first starts one of its own.

    Args:
        tracking_uri: where MLflow keeps runs, such as "sqlite:////data/mlflow.db" or the address
            of a server; None is MLflow's default, the variable MLFLOW_TRACKING_URI.
        experiment: its name; it is created if it does not exist.
        run_name: the name of the run; None lets MLflow choose one.
        run_id: continue this run of MLflow at the first start; None starts a new one.

    Attributes:
        run_id: of the run of MLflow; None before the start.

    Raises:
        ImportError: without the package mlflow or mlflow-skinny.

    Examples:
        >>> from flwr_cloned_kd import FedAsync, MlflowLogger
        >>> logger = MlflowLogger("sqlite:////data/mlflow.db")  # doctest: +SKIP
        >>> strategy = FedAsync(callbacks=[logger])  # doctest: +SKIP
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str = "flwr-cloned-kd",
        run_name: str | None = None,
        run_id: str | None = None,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.run_name = run_name
        self.run_id = run_id
        self._library = load("mlflow", "mlflow")
        self._client: Any = None
        self._steps: set[int] = set()
        self._has_started = False

    def started(self, run: RunStart) -> None:
        """Start or continue a run of MLflow; log the settings, and the rounds before a resume."""
        self._client = self._library.MlflowClient(self.tracking_uri)
        is_another = self._has_started and not run.history
        self._has_started = True
        if self.run_id is None or is_another:
            created = self._client.create_run(self._experiment_id(), run_name=self.run_name)
            self.run_id = created.info.run_id
        else:
            self._client.update_run(self.run_id, status="RUNNING")
        logged = self._client.get_metric_history(self.run_id, "accepted")
        self._steps = {metric.step for metric in logged}
        present = self._client.get_run(self.run_id).data.params
        for name, value in parameters_of(run).items():
            if name not in present:  # MLflow refuses to change a parameter
                self._client.log_param(self.run_id, name, value)
        for row in run.history:
            self.absorbed(dict(row))

    def absorbed(self, row: dict[str, Any]) -> None:
        """Log a round."""
        step = row["round"]
        if step in self._steps:
            return
        now = int(time.time() * 1000)
        metric = self._library.entities.Metric
        metrics = [metric(name, value, now, step) for name, value in metrics_of(row).items()]
        self._client.log_batch(self.run_id, metrics=metrics)
        self._steps.add(step)
        if cause := cause_of(row):
            self._client.set_tag(self.run_id, f"refused-{step}", cause)

    refused = absorbed

    def finished(self, error: BaseException | None) -> None:
        """End the run of MLflow, as failed if an exception ended the training."""
        self._client.set_terminated(self.run_id, "FINISHED" if error is None else "FAILED")

    def _experiment_id(self) -> str:
        experiment = self._client.get_experiment_by_name(self.experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(self._client.create_experiment(self.experiment))
