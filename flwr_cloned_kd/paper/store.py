"""Records of runs on disk, by the hash of what determines them; an interrupted run is resumed."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from logging import WARNING
from pathlib import Path

from filelock import FileLock
from flwr.common import log

from .. import __version__
from ..apps.build import load
from ..apps.settings import Settings
from ..io.checkpoint import digest, newest, previous, write, write_atomically
from .rounds import Record, play
from .run_state import RunState
from .runs import Run, describe

DATA = ("dataset", "data_path", "image_key", "label_key")
"""The settings that locate the data."""


def key(run: Run) -> str:
    """Hash what determines the records of a run: its description, the data, and our version.

    What changes no more than the rounding is left out: the device, its number type, the number of
    threads and the version of PyTorch. The record of round 0 names the machine.
    """
    return hashlib.sha256(_header(run).encode()).hexdigest()


def _header(run: Run) -> str:
    versions = {"flwr-cloned-kd": __version__}
    data = _hash_of_data(*(getattr(run.settings, name) for name in DATA))
    return json.dumps({"run": describe(run), "data": data, "versions": versions}, sort_keys=True)


@lru_cache
def _hash_of_data(*location: str) -> str:
    """Hash the images and the labels themselves: the data at a path may change."""
    train, test = load(Settings(**dict(zip(DATA, location))))  # type: ignore[arg-type]
    names = ("train images", "train labels", "test images", "test labels")
    return digest(dict(zip(names, (*train, *test))), "")


def records(run: Run, folder: Path, *, on_round: Callable[[], None] = lambda: None) -> list[Record]:
    """Return all records of a run: read those on disk, and play the missing rounds.

    After every round the records and the core are on disk: an interruption costs one round. While
    another process plays the same run, this function waits for that process.

    Args:
        run: what to play.
        folder: holds `KEY.jsonl`, and while the run is played `KEY.safetensors` and a lock.
        on_round: called after each round played.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = path_of(run, folder).with_suffix(".lock")
    with FileLock(lock):
        complete = _complete(run, folder, on_round)
        with suppress(OSError):  # Windows does not remove an open file.
            lock.unlink()  # Every other process that wants the run will read all the records.
        return complete


def _complete(run: Run, folder: Path, on_round: Callable[[], None]) -> list[Record]:
    path = path_of(run, folder)
    checkpoint = path.with_suffix(".safetensors")
    played = stored(run, folder)
    if len(played) == run.num_rounds + 1:
        return played
    state = _read_state(checkpoint) if played else None
    # The records are written first: they may be one round ahead of the core, but never behind it.
    if state is None or state.server_round >= len(played):
        state = None
        played = []
    else:
        played = played[: state.server_round + 1]
    for record, state_after in play(run, state):
        played.append(record)
        lines = [_header(run), *(json.dumps(one) for one in played)]
        write_atomically(path, "\n".join(lines) + "\n")
        if len(played) <= run.num_rounds:
            write(checkpoint, *state_after.state_dict())
        on_round()
    for file in (checkpoint, previous(checkpoint)):
        file.unlink(missing_ok=True)
    return played


def path_of(run: Run, folder: Path) -> Path:
    """Return the file that holds the records of a run."""
    return folder / f"{key(run)}.jsonl"


def stored(run: Run, folder: Path) -> list[Record]:
    """Read the records that are on disk; log a warning and return none if the file is damaged."""
    path = path_of(run, folder)
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        played: list[Record] = [json.loads(line) for line in lines]
        rounds = [record["round"] for record in played]
        if header != _header(run) or rounds != [*range(len(played))]:
            raise ValueError("not the records of this run")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        log(WARNING, "%s is damaged and will be computed again: %s", path, error)
        return []
    return played


def _read_state(checkpoint: Path) -> RunState | None:
    """Read the state of a run; log a warning and return None if the run must start again."""
    try:
        content = newest(checkpoint)
        if content is None:
            return None
        tensors, header, damage = content
        state = RunState.from_state_dict(tensors, header)
    except (ValueError, KeyError) as error:
        log(WARNING, "%s: its run starts again: %s", checkpoint, error)
        return None
    if damage:
        log(WARNING, "%s; its run is resumed from the round before", damage)
    return state
