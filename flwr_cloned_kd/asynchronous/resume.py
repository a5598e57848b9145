"""What a run writes to disk after every round, and how a later run reads it."""

import json
from collections.abc import Mapping
from logging import WARNING
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.app import MetricRecord
from flwr.common import log
from flwr.serverapp.strategy import Result
from safetensors import SafetensorError
from torch import Tensor

from ..io.checkpoint import newest, previous, write
from .rounds import NOT_METRICS
from .session import Progress

ROUNDS = "run/rounds"
"""Name of the tensor of bytes that holds the rounds: a safetensors header is limited to 100 MB."""


class SavedRun(NamedTuple):
    """A run between two rounds."""

    strategy: str
    """Name of the strategy's class."""
    settings: dict[str, Any]
    """What a resumed run must have in common with this one."""
    version: int
    tensors: dict[str, Tensor]
    """What `AsyncStrategy.state_dict` returned, as is `state`."""
    state: dict[str, Any]
    progress: Progress
    history: list[dict[str, Any]]
    """One row for each round."""
    evaluations: dict[int, dict[str, Any]]
    """Round -> metrics of the user's evaluation."""

    def require(self, strategy: str, settings: Mapping[str, Any]) -> None:
        """Raise ValueError unless this run was made by such a strategy."""
        saved = {"strategy": self.strategy, **self.settings}
        for name, value in {"strategy": strategy, **settings}.items():
            if saved.get(name) != value:
                raise ValueError(f"{name}: expected {value}, got {saved.get(name)}")

    def copy_metrics(self, result: Result) -> None:
        """Put the metrics of the rounds of this run into Flower's result."""
        for row in self.history:
            numbers = {name: value for name, value in row.items() if name not in NOT_METRICS}
            result.train_metrics_clientapp[row["round"]] = MetricRecord(numbers)
        for server_round, metrics in self.evaluations.items():
            result.evaluate_metrics_serverapp[server_round] = MetricRecord(metrics)


def save(path: Path, run: SavedRun) -> bool:
    """Write a run to disk. If the disk is full, the checkpoint is lost and the run continues.

    Returns:
        Whether the checkpoint was written.
    """
    header = {
        "strategy": run.strategy,
        "settings": run.settings,
        "version": run.version,
        "state": run.state,
        "progress": run.progress._asdict(),
    }
    rounds = json.dumps({"history": run.history, "evaluations": run.evaluations}).encode()
    rows = torch.frombuffer(bytearray(rounds), dtype=torch.uint8)
    try:
        write(path, {**run.tensors, ROUNDS: rows}, header)
    except (OSError, SafetensorError) as error:
        log(WARNING, "No checkpoint after round %d: %s", len(run.history), error)
        return False
    return True


def load(path: Path) -> SavedRun | None:
    """Read the newest good checkpoint of a run; return None without one.

    Raises:
        ValueError: naming the file, what was expected and what was found.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = newest(path)
    if checkpoint is None:
        return None
    tensors, header, damage = checkpoint
    if damage:
        log(WARNING, "%s; taking %s instead", damage, previous(path).name)
    try:
        rounds = json.loads(tensors.pop(ROUNDS).numpy().tobytes())
        return SavedRun(
            strategy=header["strategy"],
            settings=dict(header["settings"]),
            version=int(header["version"]),
            tensors=tensors,
            state=header["state"],
            progress=Progress(**header["progress"]),
            history=rounds["history"],
            evaluations={int(number): row for number, row in rounds["evaluations"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected a complete header, got {error!r}") from None
