"""Rounds as event files for TensorBoard."""

from pathlib import Path
from typing import Any

from ..asynchronous.callbacks import Callback, RunStart
from .rows import cause_of, load, metrics_of, parameters_of

PREFIX = "round/"
"""TensorBoard shows all metrics with one prefix in one section."""


class TensorBoardLogger(Callback):
    """Writes the metrics of each round, refusals as text, and settings for the HParams page.

    Step n is round n. TensorBoard shows the latest run of a folder only. A resumed run writes the
    rounds before it too: whether its folder is new or that of the run before, TensorBoard shows
    each step once.

    One logger may log several runs: a resumed run continues in the folder of the run before it, and
    every other run after the first gets a folder of its own, with "-2", "-3", ... after the name.

    Args:
        log_dir: the folder of this run's event files; `tensorboard --logdir` of a folder above
            compares runs.

    Raises:
        ImportError: without the package tensorboard.

    Examples:
        >>> from flwr_cloned_kd import FedAsync, TensorBoardLogger
        >>> strategy = FedAsync(callbacks=[TensorBoardLogger("logs/nine-edges")])  # doctest: +SKIP
    """

    def __init__(self, log_dir: str | Path) -> None:
        self.log_dir = Path(log_dir)
        self._library = load("torch.utils.tensorboard", "tensorboard")
        self._writer: Any = None
        self._num_runs = 0

    def started(self, run: RunStart) -> None:
        """Open an event file and write the settings, and the rounds before a resume."""
        if not self._num_runs or not run.history:
            self._num_runs += 1
        number = f"-{self._num_runs}" if self._num_runs > 1 else ""
        folder = self.log_dir.with_name(self.log_dir.name + number)
        # TensorBoard hides what an earlier run wrote to the folder, steps from 0 on.
        self._writer = self._library.SummaryWriter(str(folder), purge_step=0)
        summaries = load("torch.utils.tensorboard.summary", "tensorboard")
        # `SummaryWriter.add_hparams` would make a folder, and with it a second run.
        for summary in summaries.hparams(parameters_of(run), {f"{PREFIX}core-accuracy": 0.0}):
            self._writer.file_writer.add_summary(summary)
        for row in run.history:
            self.absorbed(dict(row))

    def absorbed(self, row: dict[str, Any]) -> None:
        """Write a round."""
        step = row["round"]
        for name, value in metrics_of(row).items():
            self._writer.add_scalar(PREFIX + name, value, step)
        if cause := cause_of(row):
            self._writer.add_text("refused", cause, step)
        self._writer.flush()

    refused = absorbed

    def finished(self, error: BaseException | None) -> None:
        """Close the event file."""
        self._writer.close()
