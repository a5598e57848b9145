"""What a run writes down after every round, and how the next one goes on from there."""

import json
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import MetricRecord
from flwr.common import log
from flwr.serverapp.strategy import Result
from safetensors import SafetensorError

from ..io.checkpoint import newest, previous, write
from .session import Progress

if TYPE_CHECKING:
    from .strategy import AsyncStrategy

NOT_METRICS = ("round", "edge", "cause")
ROUNDS = "run/rounds"
"""The tensor of bytes that holds what grows with every round: safetensors allows a header 100 MB.
"""


def save(path: Path, strategy: "AsyncStrategy", progress: Progress, result: Result) -> None:
    """Write the run down; a disk that is full costs the checkpoint, not the run."""
    tensors, state = strategy.state_dict()
    header = {
        "strategy": type(strategy).__name__,
        "version": strategy.version,
        "state": state,
        "next_number": progress.next_number,
        "in_flight": progress.unsettled,
        "visits": progress.visits,
    }
    evaluations = {k: dict(v) for k, v in result.evaluate_metrics_serverapp.items()}
    rounds = json.dumps({"history": strategy.history, "evaluations": evaluations}).encode()
    tensors = {**tensors, ROUNDS: torch.frombuffer(bytearray(rounds), dtype=torch.uint8)}
    try:
        write(path, tensors, header)
    except (OSError, SafetensorError) as error:
        log(WARNING, "No checkpoint after round %d: %s", len(strategy.history), error)


def resume(path: Path, strategy: "AsyncStrategy", result: Result) -> Progress | None:
    """Go on from a checkpoint, if there is one: fill in the strategy and the result.

    Requests that were under way are lost, since a new run cannot pull their answers. They taught
    nothing: their edges are asked again, under the same numbers.

    Raises:
        ValueError: saying which file, what was expected and what was found.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    found = newest(path)
    if found is None:
        return None
    tensors, header, cause = found
    if cause:
        log(WARNING, "%s; taking %s instead", cause, previous(path).name)
    ours, theirs = type(strategy).__name__, header.get("strategy")
    if theirs != ours:
        raise ValueError(f"{path}: strategy: expected {ours}, got {theirs}")
    try:
        strategy.version = int(header["version"])
        rounds = json.loads(tensors.pop(ROUNDS).numpy().tobytes())
        strategy.load_state_dict(tensors, header["state"])
        rows: list[dict[str, Any]] = rounds["history"]
        for row in rows:
            numbers = {name: value for name, value in row.items() if name not in NOT_METRICS}
            result.train_metrics_clientapp[row["round"]] = MetricRecord(numbers)
        for server_round, metrics in rounds["evaluations"].items():
            result.evaluate_metrics_serverapp[int(server_round)] = MetricRecord(metrics)
        progress = Progress(header["next_number"], header["in_flight"], header["visits"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a complete header, got {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    strategy.history = rows
    text = "Resuming from %s after %d rounds; the initial arrays are not used"
    log(INFO, text, path, len(rows))
    return progress


def require(path: str | Path | None, strategy: "AsyncStrategy", base: type) -> Path | None:
    """Check that a strategy can write its state down, before it has run for days.

    Raises:
        ValueError: if it has no `state_dict` and `load_state_dict` of its own.
    """
    if path is None:
        return None
    for name in ("state_dict", "load_state_dict"):
        if getattr(type(strategy), name) is getattr(base, name):
            raise ValueError(f"checkpoint: expected {type(strategy).__name__} to have {name}()")
    return Path(path).absolute()
