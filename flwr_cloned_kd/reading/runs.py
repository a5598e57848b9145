"""The results folder of a run, read again for a comparison or a notebook."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..asynchronous.timeline import Event
from .events import TIMES, read_events, with_missing
from .lines import check_count, check_number, check_text, read_lines, read_object, shown

CONFIG = "config.json"
"""File that a run writes at its start: its config, and the accuracy of its first core."""
METRICS = "metrics.jsonl"
"""File that a run extends by one line per round."""
SUMMARY = "summary.json"
"""File that a run writes at its end."""

NUMBERS = ("core-accuracy", "bytes-down", "bytes-up", "seconds", *TIMES)
"""Entries of a round that are finite numbers where they are given."""


@dataclass(frozen=True)
class LoadedRun:
    """What a results folder holds, as `load_run` returns it.

    Examples:
        >>> from pathlib import Path
        >>> from flwr_cloned_kd import LoadedRun
        >>> rows = [{"round": 1, "strategy": "cloned-kd", "core-accuracy": 0.9}]
        >>> run = LoadedRun(Path("results/first"), {"seed": 0}, {}, rows, first_accuracy=0.7)
        >>> run.name, run.finished, run.strategies  # `load_run` returns such a value
        ('first', False, ['cloned-kd'])
    """

    folder: Path
    config: dict[str, Any]
    """The run-config, key -> value; empty if the folder does not say it."""
    summary: dict[str, Any]
    """The content of summary.json; empty for a run that still goes on or was killed."""
    rounds: list[dict[str, Any]]
    """One flat dict per round, in order, so that `pandas.DataFrame(run.rounds)` is a table."""
    first_accuracy: float | None
    """Accuracy of the core before any edge, a fraction in [0, 1]; None if it is not known."""

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    @property
    def seed(self) -> int | None:
        """The seed of the run; None if the folder does not say it."""
        return self.config.get("seed")

    @property
    def strategies(self) -> list[str]:
        """The strategies with at least one round, in the order in which they ran."""
        return list(dict.fromkeys(row["strategy"] for row in self.rounds))

    def rounds_of(self, strategy: str) -> list[dict[str, Any]]:
        """Return the rounds of one strategy."""
        return [row for row in self.rounds if row["strategy"] == strategy]

    def events_of(self, strategy: str) -> list[Event]:
        """Read the events of one strategy, for `draw_timeline`.

        A run writes them when the strategy has ended. Those of rounds that it did not write, in a
        run that was killed or before a resumption, are made from the seconds of these rounds.

        Returns:
            The events in order of time; empty for Flower's own strategies.

        Raises:
            ValueError: if the file of the events is damaged; the message has its path and the line.
        """
        return with_missing(read_events(self.folder, strategy), self.rounds_of(strategy))


def load_run(folder: str | Path) -> LoadedRun:
    """Read the results folder of a run: one that has ended, that still goes on, or was killed.

    A folder without summary.json is read as far as it goes, and a last line of metrics.jsonl that
    was cut is left out.

    Raises:
        ValueError: if the folder is not there or holds no results, or if a file in it is damaged or
            of another program; the message has the path, the line, what was expected and found.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from flwr_cloned_kd import load_run
        >>> row = '{"round": 1, "edge": "3", "strategy": "fedasync", "accepted": 1}'
        >>> with tempfile.TemporaryDirectory() as folder:  # a run writes this file into its folder
        ...     with Path(folder, "metrics.jsonl").open("w") as file:
        ...         print(row, file=file)
        ...     run = load_run(folder)
        >>> run.rounds_of("fedasync")[0]["edge"]
        '3'
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path}: expected a results folder, got {_kind(path)}")
    if not _is_results(path):
        raise ValueError(f"{path}: expected a results folder with {METRICS}, got none in it")
    summary = read_object(path / SUMMARY)
    source = path / (SUMMARY if summary else CONFIG)
    start = summary or read_object(source)
    config = start.get("config", {})
    if not isinstance(config, dict):
        raise ValueError(f"{source}: config: expected a JSON object, got {shown(config)}")
    if "seed" in config:
        check_number(str(source), "seed", config["seed"])
    first = start.get("first_core_accuracy")
    if first is not None:
        first = check_number(str(source), "first_core_accuracy", first)
    rounds = [_checked(place, row) for place, row in read_lines(path / METRICS)]
    return LoadedRun(path, config, summary, rounds, first)


def load_runs(paths: Iterable[str | Path]) -> list[LoadedRun]:
    """Read several results folders.

    Args:
        paths: results folders, or folders of such folders, in any mixture. A folder that is given
            twice is read once.

    Raises:
        ValueError: as `load_run`, and for a folder that neither is nor has a results folder.

    Examples:
        >>> from flwr_cloned_kd import load_runs
        >>> runs = load_runs(["results/seed-0", "results/seed-1"])  # doctest: +SKIP
        >>> load_runs(["results/no-such-run"])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: results/no-such-run: expected a results folder ...
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        inside = [path] if _is_results(path) else []
        if path.is_dir() and not inside:
            inside = [folder for folder in sorted(path.iterdir()) if _is_results(folder)]
        if not inside:
            what = "no such folder in it" if path.is_dir() else _kind(path)
            raise ValueError(
                f"{path}: expected a results folder (with {METRICS}) or a folder of such folders, "
                f"got {what}"
            )
        folders |= {folder.resolve(): folder for folder in inside}
    return [load_run(folder) for folder in folders.values()]


def _is_results(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (METRICS, CONFIG, SUMMARY))


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "no such folder"


def _checked(place: str, row: object) -> dict[str, Any]:
    """Return a row of metrics.jsonl if it has what every round has."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {shown(row)}")
    check_text(place, "strategy", row.get("strategy"))
    check_count(place, "round", row.get("round"))
    check_number(place, "accepted", row.get("accepted"))
    for name in NUMBERS:
        if name in row:
            check_number(place, name, row[name])
    return row
