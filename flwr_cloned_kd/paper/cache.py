"""Records of runs on disk, by the hash of what determines them; runs go on where they stopped."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import suppress
from functools import lru_cache
from logging import WARNING
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from threading import Thread
from typing import Any

import torch
from filelock import FileLock
from flwr.common import log

from .. import __version__
from ..apps.build import load
from ..apps.settings import Settings
from ..engine.ensemble import StateDict
from ..io.checkpoint import digest, newest, previous, write, write_atomically
from ..method.core import CoreState
from .runs import Progress, Record, Run, describe, play

Tick = Callable[[], None]
POLL_SECONDS = 1.0
DATA = ("dataset", "data_path", "image_key", "label_key")


def key(run: Run) -> str:
    """Hash what determines the records of a run: its description, the data, and our version.

    What only rounds differently is left out: the device, its number type, the number of threads
    and the version of PyTorch. The record of round 0 says on what a run was played.
    """
    return hashlib.sha256(_header(run).encode()).hexdigest()


def records(run: Run, folder: Path, *, on_round: Tick = lambda: None) -> list[Record]:
    """Return the records of a run, from disk as far as they are there, playing the rest.

    After every round the records and the core are on disk: an interruption costs one round. Where
    another process plays the same run, this one waits for it.

    Args:
        folder: holds `KEY.jsonl`, and while the run is under way `KEY.safetensors` and a lock.
        on_round: called after each round played.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key(run)}.jsonl"
    lock = path.with_suffix(".lock")
    with FileLock(lock):
        found = _records(run, folder, path, on_round)
        with suppress(OSError):  # Windows removes no open file
            lock.unlink()  # who waits for it, or comes after, finds all the records
        return found


def _records(run: Run, folder: Path, path: Path, on_round: Tick) -> list[Record]:
    checkpoint = path.with_suffix(".safetensors")
    found = stored(run, folder)
    if len(found) == run.num_rounds + 1:
        return found
    progress = _load(checkpoint) if found else None
    # The records are written first, so that they may be one round ahead of the core, never behind.
    if progress is None or progress.server_round >= len(found):
        found, progress = [], None
    else:
        found = found[: progress.server_round + 1]
    for record, reached in play(run, progress):
        found.append(record)
        lines = [_header(run), *(json.dumps(one) for one in found)]
        write_atomically(path, "\n".join(lines) + "\n")
        if len(found) <= run.num_rounds:
            _save(checkpoint, reached)
        on_round()
    for file in (checkpoint, previous(checkpoint)):
        file.unlink(missing_ok=True)
    return found


def stored(run: Run, folder: Path) -> list[Record]:
    """Read the records that are on disk; none, and a warning, if the file is damaged."""
    path = folder / f"{key(run)}.jsonl"
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        if header != _header(run) or [one["round"] for one in found] != [*range(len(found))]:
            raise ValueError("not the records of this run")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        log(WARNING, "%s is damaged and will be computed again: %s", path, error)
        return []
    return found


def all_records(
    runs: Sequence[Run], folder: Path, *, jobs: int = 1, threads: int = 1, on_round: Tick
) -> dict[str, list[Record]]:
    """Play many runs, each once however often it is named.

    Args:
        jobs: processes; 1 stays in this one.
        threads: of PyTorch in each. More round differently.
        on_round: called after each round played.

    Returns:
        Key of a run -> its records.

    Raises:
        Exception: the first that a run raises; the others end at once, with their round.
    """
    wanted = {key(run): run for run in runs}
    if jobs == 1:
        torch.set_num_threads(threads)
        return {name: records(run, folder, on_round=on_round) for name, run in wanted.items()}
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(jobs, context, _begin, (threads, counter))
    told = 0
    try:
        futures = {pool.submit(_work, run, folder): name for name, run in wanted.items()}
        left = set(futures)
        while left:
            done, left = wait(left, POLL_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
            for _ in range(counter.value - told):
                on_round()
                told += 1
        return {name: future.result() for future, name in futures.items()}
    except BaseException:
        for child in multiprocessing.active_children():  # else their runs go on for hours
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_played: Any = None
"""Rounds played by all processes of a pool."""


def _begin(threads: int, counter: Any) -> None:
    global _played
    torch.set_num_threads(threads)
    _played = counter
    signal(SIGINT, SIG_IGN)  # Ctrl-C goes to all: the parent ends us
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Do not outlive a parent that was killed: its queue would be waited on for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _work(run: Run, folder: Path) -> list[Record]:
    def tick() -> None:
        with _played.get_lock():
            _played.value += 1

    return records(run, folder, on_round=tick)


def _header(run: Run) -> str:
    versions = {"flwr-cloned-kd": __version__}
    data = _data(*(getattr(run.settings, name) for name in DATA))
    return json.dumps({"run": describe(run), "data": data, "versions": versions}, sort_keys=True)


@lru_cache
def _data(*where: str) -> str:
    """Hash the images and labels themselves: a path may hold others tomorrow."""
    train, test = load(Settings(**dict(zip(DATA, where))))  # type: ignore[arg-type]
    names = ("train images", "train labels", "test images", "test labels")
    return digest(dict(zip(names, (*train, *test))), "")


def _save(path: Path, progress: Progress) -> None:
    state = progress.state
    models: dict[str, StateDict] = {"core": state.params}
    models |= {f"memory-{i}": ensemble for i, ensemble in enumerate(state.memory)}
    models |= {f"past-{i}": params for i, params in enumerate(progress.cores)}
    tensors = {f"{m}/{name}": t for m, model in models.items() for name, t in model.items()}
    numbers = {"server_round": progress.server_round, "version": state.version,
               "train_accuracy": state.train_accuracy, "memory": len(state.memory),
               "memory_weights": state.memory_weights, "past": len(progress.cores)}  # fmt: skip
    write(path, tensors | {"right": progress.right}, numbers)


def _load(path: Path) -> Progress | None:
    try:
        found = newest(path)
    except ValueError as error:
        log(WARNING, "%s; its run starts again", error)
        return None
    if found is None:
        return None
    tensors, numbers, damage = found
    if damage:
        log(WARNING, "%s; its run goes on from the round before", damage)
    right, models = tensors.pop("right"), dict[str, StateDict]()
    for name, tensor in tensors.items():
        model, _, inner = name.partition("/")
        models.setdefault(model, {})[inner] = tensor
    state = CoreState(
        models["core"],
        tuple(models[f"memory-{i}"] for i in range(numbers["memory"])),
        numbers["version"],
        tuple(numbers["train_accuracy"]),
        tuple(numbers["memory_weights"]),
    )
    cores = tuple(models[f"past-{i}"] for i in range(numbers["past"]))
    return Progress(numbers["server_round"], state, cores, right)
