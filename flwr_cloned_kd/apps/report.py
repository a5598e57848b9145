"""The results folder of a run: its config, rounds, events, summary and pictures."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from logging import INFO, WARNING
from pathlib import Path
from shlex import quote
from typing import Any

from flwr.common import log
from rich.console import Console

from ..asynchronous.accounts import accounts
from ..asynchronous.strategy import AsyncStrategy
from ..asynchronous.timeline import Event, draw_timeline
from ..io.checkpoint import write_atomically
from ..method.core import Core
from ..reading.events import write_events
from ..reading.runs import CONFIG, METRICS, SUMMARY
from .build import plans
from .machine import hardware, versions
from .plots import draw_accuracy
from .settings import Settings
from .tables import comparison_table, final_accuracy, rounds_table


class Report:
    """The rounds of a run, each on disk as soon as it is over.

    Args:
        settings: name the folder.
        core: runs Phases 0 and 2.
        first: accuracy of the core before any edge, a fraction in [0, 1].

    Attributes:
        folder: of the results.
        rows: one dict per round, in the order of metrics.jsonl.
    """

    def __init__(self, settings: Settings, core: Core, first: float) -> None:
        self.settings = settings
        self.core = core
        self.first = first
        self.rows: list[dict[str, Any]] = []
        self.events: dict[str, Sequence[Event]] = {}
        self._measured: dict[str, float] = {}
        self._started = time.monotonic()
        self._row_ended = self._started
        self.folder = make_folder(settings)
        start = {"config": self._config(), "first_core_accuracy": first}
        write_atomically(self.folder / CONFIG, json.dumps(start, indent=2) + "\n")

    def add(self, strategy: str, row: dict[str, Any]) -> None:
        """Append one round of a strategy, with its seconds since the round before.

        Args:
            strategy: also the name of a strategy of your own.
            row: as `on_round` gets it. "round" and "accepted" are needed, and "core-accuracy" is
                drawn. Without "edge" the round counts for all edges, and without "bytes-down" and
                "bytes-up" no bytes are counted.
        """
        now = time.monotonic()
        row = {
            "strategy": strategy,
            "edge": "all",
            "bytes-down": 0,
            "bytes-up": 0,
            **row,
            "seconds": now - self._row_ended,
        }
        self._row_ended = now
        self.rows.append(row)
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def keep(self, name: str, strategy: AsyncStrategy) -> None:
        """Keep the events of a strategy that has ended, on disk and for its picture.

        If it resumed from a checkpoint, the rounds before that are put in front of its own.
        """
        self.events[name] = strategy.events
        write_events(self.folder, name, strategy.events)
        history = strategy.history
        if any(row.get("undone") for row in history):  # No row has measured the rebuilt core.
            params = strategy.arrays.to_torch_state_dict(keep_input=True)
            self._measured[name] = self.core.held_out_accuracy(params) or 0.0
        own_rows = [row for row in self.rows if row["strategy"] == name]
        times = [0.0, *(row["time"] for row in history)]
        earlier = [
            {"strategy": name, **row, "seconds": row["time"] - previous}
            for row, previous in zip(history[: len(history) - len(own_rows)], times)
        ]
        if not earlier:
            return
        place = self.rows.index(own_rows[0]) if own_rows else len(self.rows)
        self.rows[place:place] = earlier
        lines = [json.dumps(row) + "\n" for row in self.rows]
        write_atomically(self.folder / METRICS, "".join(lines))

    def finish(self) -> None:
        """Write the summary and the pictures, and print the tables."""
        text = json.dumps(self.summary(), indent=2) + "\n"
        write_atomically(self.folder / SUMMARY, text)
        try:
            draw_accuracy(self.rows, self.first, self.folder / "accuracy.png")
            for name, events in self.events.items():
                draw_timeline(events, self.folder / f"timeline-{name}.png", title=name)
        except ImportError:
            log(WARNING, 'No picture: it needs matplotlib, pip install "flwr-cloned-kd[plots]"')
        except Exception as error:  # No failure of a picture may cost hours of training.
            log(WARNING, "No picture: %s: %s", type(error).__name__, error)
        console = Console(width=118)
        console.print(rounds_table(self.rows))
        console.print(comparison_table(self.rows, self.first, self._measured))
        log(INFO, "Results in %s", self.folder)
        # The environment of the run may not be the one of the reader's shell.
        command = f"{quote(sys.executable)} -m flwr_cloned_kd report {quote(str(self.folder))}"
        log(INFO, "To make a page of figures: %s", command)

    def summary(self) -> dict[str, Any]:
        """Sum up the run: the settings, the machine and the results."""
        settings = self.settings
        played = dict.fromkeys(row["strategy"] for row in self.rows)
        names = dict.fromkeys([*settings.strategies, *played])
        finals = {name: final_accuracy(self.rows, name, self.first) for name in names}
        finals |= self._measured
        return {
            "final_core_accuracy": finals[settings.strategies[0]],
            "final_accuracies": finals,
            "first_core_accuracy": self.first,
            "seconds": time.monotonic() - self._started,
            "rounds": len(self.rows),
            "accounts": {
                name: accounts(row for row in self.rows if row["strategy"] == name)
                for name in played
            },
            "refused": sum(not row["accepted"] for row in self.rows),
            "seed": settings.seed,
            "config": self._config(),
            "runtime": plans(settings, self.core),
            "versions": versions(),
            "hardware": hardware(self.core.runtime.target),
        }

    def _config(self) -> dict[str, Any]:
        return {key.replace("_", "-"): value for key, value in asdict(self.settings).items()}


def make_folder(settings: Settings) -> Path:
    """Make a new folder for the results of a run, numbered if there is one of the same second."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{settings.dataset}-{settings.variant}-{settings.preset}-seed{settings.seed}-{stamp}"
    path = Path(settings.results or "results").absolute() / name
    for number in count(1):
        folder = path if number == 1 else path.with_name(f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder
