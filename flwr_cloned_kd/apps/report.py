"""What a run leaves behind: metrics.jsonl, summary.json, pictures, and tables to read."""

import json
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch
from flwr.common import log
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..asynchronous.accounts import accounts
from ..asynchronous.timeline import Event, draw_timeline
from ..io.checkpoint import write_atomically
from ..method.core import Core
from .settings import Settings

PACKAGES = ("flwr-cloned-kd", "flwr", "ray", "torch", "torchvision", "numpy")
# Okabe and Ito's palette: told apart with every kind of colour vision, and in grey by marker.
STYLES = {
    "cloned-kd": ("Cloned KD", "#0072B2", "o"),
    "fedavg": ("FedAvg", "#D55E00", "s"),
    "fedprox": ("FedProx", "#009E73", "^"),
    "fedasync": ("FedAsync", "#CC79A7", "v"),
    "fedbuff": ("FedBuff", "#E69F00", "D"),
}


class Report:
    """Rows of one run, written as they come, summed up at its end.

    Args:
        settings: of the run.
        core: for its held-out data.
        first: held-out accuracy of the first core, before any edge; a fraction in [0, 1].
        plans: per phase, how it runs.
    """

    def __init__(
        self,
        settings: Settings,
        core: Core,
        first: float,
        plans: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.settings, self.first, self.plans = settings, first, plans or {}
        self.rows: list[dict[str, Any]] = []
        self._events: dict[str, Sequence[Event]] = {}
        self._device = core.runtime.target
        self._started = self._last = time.monotonic()
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = (
            f"{settings.dataset}-{settings.variant}-{settings.preset}-seed{settings.seed}-{stamp}"
        )
        self.folder = make_folder(Path(settings.results or "results").absolute() / name)

    def add(self, strategy: str, row: dict[str, Any]) -> None:
        """Append one round of a strategy, on disk too."""
        now = time.monotonic()
        row = {"strategy": strategy, **row, "seconds": now - self._last}
        self._last = now
        self.rows.append(row)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def precede(self, strategy: str, history: list[dict[str, Any]]) -> None:
        """Put the rounds of a history that a run before this one made in front of its own."""
        mine = [row for row in self.rows if row["strategy"] == strategy]
        times = [0.0, *(row["time"] for row in history)]
        earlier = [
            {"strategy": strategy, **row, "seconds": row["time"] - before}
            for row, before in zip(history[: len(history) - len(mine)], times)
        ]
        if not earlier:
            return
        place = self.rows.index(mine[0]) if mine else len(self.rows)
        self.rows[place:place] = earlier
        lines = [json.dumps(row) + "\n" for row in self.rows]
        write_atomically(self.folder / "metrics.jsonl", "".join(lines))

    def keep(self, strategy: str, events: Sequence[Event]) -> None:
        """Remember who was busy when, for a timeline."""
        self._events[strategy] = events

    def finish(self) -> None:
        """Write the summary and the picture, print the tables."""
        summary = self.summary()
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        try:
            draw(self.rows, self.first, self.folder / "accuracy.png")
            for name, events in self._events.items():
                draw_timeline(events, self.folder / f"timeline-{name}.png", title=name)
        except ImportError:
            log(30, 'No picture: it needs matplotlib, pip install "flwr-cloned-kd[plots]"')
        except Exception as error:  # whatever matplotlib raises: hours of training are done
            log(30, "No picture: %s: %s", type(error).__name__, error)
        console = Console(width=118)
        for table in (rounds_table(self.rows), comparison_table(self.rows, self.first)):
            console.print(table)
        log(20, "Results in %s", self.folder)

    def summary(self) -> dict[str, Any]:
        """Sum up the run: what was configured, on what it ran, what came out."""
        finals = {
            name: final_accuracy(self.rows, name, self.first) for name in self.settings.strategies
        }
        return {
            "final_core_accuracy": finals[self.settings.strategies[0]],
            "final_accuracies": finals,
            "first_core_accuracy": self.first,
            "seconds": time.monotonic() - self._started,
            "rounds": len(self.rows),
            "accounts": {
                name: accounts(row for row in self.rows if row["strategy"] == name)
                for name in dict.fromkeys(row["strategy"] for row in self.rows)
            },
            "refused": sum(not row["accepted"] for row in self.rows),
            "seed": self.settings.seed,
            "config": {k.replace("_", "-"): v for k, v in asdict(self.settings).items()},
            "runtime": self.plans,
            "versions": {"python": platform.python_version()} | _versions(),
            "hardware": hardware(self._device),
        }


def make_folder(path: Path) -> Path:
    """Make a folder of one's own: with a number behind its name if there is one already."""
    for number in count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def final_accuracy(rows: list[dict[str, Any]], strategy: str, first: float) -> float:
    """Return the core's accuracy after the last accepted round of a strategy."""
    mine = [row for row in rows if row["strategy"] == strategy and row["accepted"]]
    return float(mine[-1]["core-accuracy"]) if mine else first


def rounds_table(rows: list[dict[str, Any]]) -> Table:
    """Lay out every round of cloned KD, or of whatever else ran."""
    table = Table(title="Rounds")
    table.add_column("strategy")
    columns = (
        "round",
        "edge",
        "edge acc.",
        "ensemble",
        "knows",
        "start",
        "core acc.",
        "consensus",
        "kB",
        "seconds",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        core = _number(row, "core-accuracy") if row["accepted"] else "refused"
        table.add_row(
            row["strategy"],
            str(row["round"]),
            escape(str(row["edge"])),  # a name that an edge has given itself
            _number(row, "edge-accuracy"),
            _number(row, "ensemble-accuracy"),
            _number(row, "known"),
            _number(row, "student-start"),
            core,
            _number(row, "consensus"),
            f"{(row['bytes-down'] + row['bytes-up']) / 1e3:.1f}",
            f"{row['seconds']:.1f}",
        )
    return table


def comparison_table(rows: list[dict[str, Any]], first: float) -> Table:
    """Lay out one line per strategy: rounds, edges asked, bytes and final accuracy."""
    table = Table(title=f"Comparison (first core: {first:.3f})")
    table.add_column("strategy")
    for column in ("rounds", "core acc. after 1", "core acc. at end", "MB in total", "seconds"):
        table.add_column(column, justify="right")
    for name in dict.fromkeys(row["strategy"] for row in rows):
        mine = [row for row in rows if row["strategy"] == name]
        total = sum(row["bytes-down"] + row["bytes-up"] for row in mine) / 1e6
        table.add_row(
            STYLES.get(name, (name,))[0],
            str(len(mine)),
            f"{final_accuracy(mine[:1], name, first):.3f}",
            f"{final_accuracy(mine, name, first):.3f}",
            f"{total:.3f}",
            f"{sum(row['seconds'] for row in mine):.1f}",
        )
    return table


def draw(rows: list[dict[str, Any]], first: float, path: Path) -> None:
    """Draw core accuracy per round, and per megabyte exchanged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name in dict.fromkeys(row["strategy"] for row in rows):
        label, colour, marker = STYLES.get(name, (name, "black", "x"))
        rounds, megabytes, accuracies = [0.0], [0.0], [first]
        for row in (row for row in rows if row["strategy"] == name):
            rounds.append(row["round"])
            megabytes.append(megabytes[-1] + (row["bytes-down"] + row["bytes-up"]) / 1e6)
            accuracies.append(row["core-accuracy"] if row["accepted"] else accuracies[-1])
        for axes, x in ((left, rounds), (right, megabytes)):
            axes.plot(x, accuracies, color=colour, marker=marker, label=label, markersize=5)
    left.set_xlabel("round (cloned KD: one edge; FedAvg, FedProx: all edges)")
    right.set_xlabel("megabytes exchanged, down and up")
    left.set_ylabel("core accuracy on held-out data")
    for axes in (left, right):
        axes.axhline(first, color="0.6", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
    left.legend(loc="lower right", title=f"first core: {first:.3f}")
    figure.savefig(path, dpi=120)


def _number(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.3f}" if key in row else "-"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ImportError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Name the processor, the number of its cores, and the GPU if `device` is one."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": model, "cores": os.cpu_count(), "gpu": gpu}
