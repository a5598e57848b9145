"""Many runs, in this process or in several processes side by side."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from threading import Thread

import torch

from .rounds import Record
from .runs import Run
from .store import key, records

POLL_SECONDS = 1.0


def all_records(
    runs: Sequence[Run],
    folder: Path,
    *,
    jobs: int = 1,
    threads: int = 1,
    on_round: Callable[[], None],
) -> dict[str, list[Record]]:
    """Play many runs, each of them once even if it is named several times.

    Args:
        runs: what to play.
        folder: holds the records.
        jobs: number of processes; 1 stays in this process.
        threads: number of PyTorch's threads in each process. More threads round differently.
        on_round: called after each round played.

    Returns:
        Key of a run -> its records.

    Raises:
        Exception: the first one that a run raises. The other runs are ended at once, and lose the
            round in progress.
    """
    by_key = {key(run): run for run in runs}
    if jobs == 1:
        torch.set_num_threads(threads)
        return {name: records(run, folder, on_round=on_round) for name, run in by_key.items()}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _begin, (threads,))
    reported = sum(_num_records(name, folder) for name in by_key)
    try:
        futures = {name: pool.submit(records, run, folder) for name, run in by_key.items()}
        waiting = set(futures.values())
        while waiting:
            done, waiting = wait(waiting, POLL_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
            # The files of the records show the progress of the other processes.
            written = sum(_num_records(name, folder) for name in by_key)
            for _ in range(reported, written):
                on_round()
            reported = max(reported, written)
        return {name: future.result() for name, future in futures.items()}
    except BaseException:
        for child in multiprocessing.active_children():  # Their runs would continue for hours.
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _num_records(name: str, folder: Path) -> int:
    """Count the records on disk of the run with this key; the first line is their header."""
    try:
        num_lines = (folder / f"{name}.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
    return max(num_lines - 1, 0)


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    signal(SIGINT, SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its children.
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent was killed: it would wait for the queue for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
