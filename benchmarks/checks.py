"""Run commands in turn, each within a limited time, and record the verdict on each of them."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from flwr_cloned_kd.io.checkpoint import write_atomically

Numbers = dict[str, float]
"""Results by their names."""
ROOT = Path(__file__).parents[1]
"""The root of the repository, where the commands run."""
MAX_SECONDS = 240.0
"""A check that needs more time than this has failed, unless it can be resumed."""
STOP_SECONDS = 90.0
"""Time for a command to end its own processes: `examples/run.py` has a SuperLink to end."""


class Check(NamedTuple):
    """One command, and how to read what it wrote.

    Args:
        command: exits with 0 if all is well.
        output: what the command writes; an older file is removed first.
        read: `output` -> numbers; raises an error if the numbers are not acceptable.
        missing: what this machine lacks; empty if the command can run.
        resumes: whether the same command continues where it was ended.
    """

    name: str
    command: list[str]
    output: Path
    read: Callable[[Path], Numbers]
    missing: str = ""
    resumes: bool = False


class Outcome(NamedTuple):
    """The verdict on one check ("passed", "failed" or "skipped"), its reason, and numbers."""

    verdict: str
    why: str
    numbers: Numbers


def do_all(
    checks: list[Check], seconds: float, folder: Path, path: Path, facts: dict[str, Any]
) -> int:
    """Do checks in turn until the time is over, and print a table of the verdicts.

    Args:
        seconds: time for all checks together.
        folder: gets the output of each command, as `NAME.log`.
        path: gets `facts` and the outcomes so far after each check, as JSON.

    Returns:
        The exit status: 0 if no check failed.
    """
    console = Console(width=110, markup=False)
    deadline = time.monotonic() + seconds
    table = Table("check", "verdict", "seconds", "numbers, or why", title="Checks of the machine")
    outcomes: dict[str, Any] = {}
    for number, check in enumerate(checks, 1):
        started = time.monotonic()
        limit = deadline - started if check.resumes else min(MAX_SECONDS, deadline - started)
        console.print(f"{number} of {len(checks)}: {check.name}, at most {max(limit, 0):.0f} s")
        outcome = do(check, limit, folder / f"{check.name}.log")
        elapsed = round(time.monotonic() - started, 1)
        outcomes[check.name] = outcome._asdict() | {"seconds": elapsed}
        write_atomically(path, json.dumps(facts | {"checks": outcomes}, indent=1) + "\n")
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in outcome.numbers.items())
        console.print(f"  {outcome.verdict} {outcome.why}{numbers}")
        table.add_row(check.name, outcome.verdict, str(elapsed), outcome.why + numbers)
    console.print(table)
    return int(any(outcome["verdict"] == "failed" for outcome in outcomes.values()))


def do(check: Check, seconds: float, log: Path) -> Outcome:
    """Run the command of one check and read what it wrote; an error becomes a verdict."""
    if check.missing or seconds <= 0:
        return Outcome("skipped", check.missing or "no time is left", {})
    if check.output.is_file():
        check.output.unlink()
    status = call(check.command, seconds, log)
    if status is None:
        if check.resumes:
            return Outcome("skipped", f"not done in {seconds:.0f} s; the same command resumes", {})
        verdict = "failed" if seconds >= MAX_SECONDS else "skipped"
        return Outcome(verdict, f"expected an end within {seconds:.0f} s", {})
    if status:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return Outcome("failed", f"exit status {status}, {log.name}: {lines[-1][-200:]}", {})
    try:
        return Outcome("passed", "", check.read(check.output))
    except Exception as error:  # the other checks must run all the same
        return Outcome("failed", f"{type(error).__name__}: {error}", {})


def call(command: list[str], seconds: float, log: Path) -> int | None:
    """Run a command with its output in a file; return its exit status, None if it was ended."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths}
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
