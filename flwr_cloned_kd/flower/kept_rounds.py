"""The latest distillations of a run on disk, one file for each, so that edges can be undone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from logging import WARNING
from pathlib import Path
from typing import Any, NamedTuple, Self

from flwr.common import log
from safetensors import SafetensorError
from torch import Tensor

from ..engine.counts import check_count
from ..engine.ensemble import Ensemble
from ..io.checkpoint import Damaged, read, write
from ..method.rollback import KeptAnswer, KeptRound, Replayed
from ..method.state import CoreState


class Entry(NamedTuple):
    """What a checkpoint says about one file."""

    file: int
    """Number of the file."""
    sha256: str
    """Of the content of the file."""
    has_memory: bool
    """Whether the file holds the memory of the core before the round; if not, the memory is made
    of the ensembles in the files before."""
    numbers: tuple[int, ...]
    """Numbers of the requests whose answers the file holds."""

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Make an entry of what JSON has made of one."""
        file, sha256, has_memory, numbers = row
        return cls(int(file), str(sha256), bool(has_memory), tuple(map(int, numbers)))


class Rebuilt(NamedTuple):
    """What became of the core and of its kept rounds."""

    state: CoreState
    numbers: list[int]
    """Numbers of the requests whose answers the core has learned from again."""
    refused: dict[int, str]
    """Number of a request -> why its answer is refused now."""
    metrics: dict[int, dict[str, Any]]
    """Number of a request -> what the core has measured now."""


class KeptRounds:
    """Files that are written once and never changed; a checkpoint lists those that count.

    A round is written before the checkpoint that lists it. A process that is killed in between
    leaves a file that no checkpoint lists; it is deleted later, or written again. Files are deleted
    after a checkpoint was written, and only if neither this checkpoint nor the one before lists
    them. Every checkpoint therefore finds its files.

    Args:
        checkpoint: the files lie in the folder "CHECKPOINT.rounds". None keeps nothing.
        keep_rounds: number of latest answers that can be undone; 0 keeps none. Answers that were
            distilled together are kept together.
        memory_size: M; so many answers more are kept, for the memory of the core before the
            first round that can be undone.

    Raises:
        ValueError: for a number out of range, or `keep_rounds` without a checkpoint.
    """

    def __init__(self, checkpoint: Path | None, keep_rounds: int, memory_size: int) -> None:
        check_count("keep_rounds", keep_rounds, minimum=0)
        if keep_rounds and checkpoint is None:
            raise ValueError(f"checkpoint: expected a file for keep_rounds={keep_rounds}, got None")
        self.folder = Path(f"{checkpoint}.rounds")
        self.keep_rounds = keep_rounds
        self.memory_size = memory_size
        self.entries: tuple[Entry, ...] = ()
        self.next_file = 0
        """Number of the next file."""
        self._listed: frozenset[int] = frozenset()
        """The files of the newest checkpoint."""

    def resume(self, entries: Sequence[Entry], next_file: int = 0) -> None:
        """Continue with the files that a checkpoint lists; () for a new run.

        Args:
            next_file: what `next_file` was. After an undo it can be above all files of the list,
                and the checkpoint before may list a file in between.
        """
        self.entries = tuple(entries)
        self._listed = frozenset(entry.file for entry in entries)
        self.next_file = max(next_file, 1 + max(self._listed, default=-1))

    def add(self, kept: KeptRound) -> None:
        """Write a round and drop those that need not be kept any more.

        If the disk is full, the rounds up to this one are lost and the run continues.
        """
        if not self.keep_rounds:
            self.entries = ()
            return
        has_memory = not self.entries
        path = self.path(self.next_file)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sha256 = write(path, *kept.state_dict(with_memory=has_memory))
        except (OSError, SafetensorError) as error:
            log(WARNING, "The rounds up to this one cannot be undone: %s: %s", path, error)
            self.entries = ()
            return
        numbers = tuple(answer.number for answer in kept.answers)
        entry = Entry(self.next_file, sha256, has_memory, numbers)
        self.next_file += 1
        self.entries = (*self.entries, entry)
        first = self._first_of_last(len(self.entries), self.keep_rounds)
        self.entries = self.entries[self._first_of_last(first, self.memory_size) :]

    def rewrite(self, first: int, replayed: Iterator[Replayed]) -> Rebuilt:
        """Replace the rounds from an index on by what became of them.

        If the iterator raises an error, the rounds stay as they were.
        """
        before = self.entries
        self.entries = before[:first]
        state: CoreState | None = None
        numbers = list[int]()
        refused = dict[int, str]()
        metrics = dict[int, dict[str, Any]]()
        try:
            for result in replayed:
                for kept in result.rounds:
                    self.add(kept)
                    numbers += [answer.number for answer in kept.answers]
                refused |= result.refused
                metrics |= result.metrics
                state = result.after
        except BaseException:
            self.entries = before
            raise
        if state is None:
            raise ValueError("rounds: expected at least one, got none")
        return Rebuilt(state, numbers, refused, metrics)

    def undoable(self) -> list[int]:
        """Return the numbers of the requests whose answers can be undone, oldest first."""
        return [
            number
            for index, entry in enumerate(self.entries)
            if self._memory_start(index) is not None
            for number in entry.numbers
        ]

    def index_of(self, numbers: Sequence[int]) -> int:
        """Return the index of the first round that holds one of these answers."""
        return next(
            index
            for index, entry in enumerate(self.entries)
            if not set(numbers).isdisjoint(entry.numbers)
        )

    def read(self, first: int, like: Mapping[str, Tensor]) -> Iterator[KeptRound]:
        """Read the rounds from an index on, one after the other; the first one with its memory.

        Args:
            like: a state dict of the model.

        Raises:
            ValueError: naming the file that is damaged or missing.
        """
        start = self._memory_start(first)
        if start is None:
            path = self.path(self.entries[first].file)
            raise ValueError(f"{path}: expected files with the memory before this one, got none")
        return self._read_from(self.entries[start:], first - start, like)

    def answers(self, like: Mapping[str, Tensor]) -> Iterator[KeptAnswer]:
        """Read all answers that are kept, oldest first.

        Raises:
            ValueError: naming the file that is damaged or missing.
        """
        for entry in self.entries:
            yield from self._read(entry, like).answers

    def tidy(self) -> None:
        """Delete files that no checkpoint lists, after a checkpoint with the present ones."""
        files = frozenset(entry.file for entry in self.entries)
        names = {self.path(file).name for file in files | self._listed}
        self._listed = files
        if self.folder.is_dir():
            for path in self.folder.glob("*.round*"):
                if path.name not in names:
                    path.unlink(missing_ok=True)

    def path(self, file: int) -> Path:
        """Return the path of a file."""
        return self.folder / f"{file:08d}.round"

    def _read_from(
        self, entries: Sequence[Entry], first: int, like: Mapping[str, Tensor]
    ) -> Iterator[KeptRound]:
        """Read the rounds from an index on, with the memory that those before leave behind."""
        memory: tuple[Ensemble, ...] = ()
        weights: tuple[float, ...] = ()
        for index, entry in enumerate(entries):
            kept = self._read(entry, like)
            if entry.has_memory:
                memory, weights = kept.before.memory, kept.before.memory_weights
            if index >= first:
                before = replace(kept.before, memory=memory, memory_weights=weights)
                yield kept._replace(before=before)
            memory = (*memory, *(answer.ensemble for answer in kept.answers))
            weights = (*weights, *(answer.weight * answer.trust for answer in kept.answers))
            memory, weights = memory[-self.memory_size :], weights[-self.memory_size :]

    def _read(self, entry: Entry, like: Mapping[str, Tensor]) -> KeptRound:
        path = self.path(entry.file)
        try:
            return KeptRound.from_state_dict(*read(path, entry.sha256), like)
        except OSError as error:
            raise ValueError(f"{path}: expected a kept round, got {error}") from None
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a complete header, got {error!r}") from None
        except Damaged:
            raise
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _memory_start(self, index: int) -> int | None:
        """Return the index of the last round from which the memory before a round can be made."""
        num_answers = 0
        for start in range(index, -1, -1):
            num_answers += len(self.entries[start].numbers) if start < index else 0
            if self.entries[start].has_memory or num_answers >= self.memory_size:
                return start
        return None

    def _first_of_last(self, end: int, num_answers: int) -> int:
        """Return where the last rounds before `end` begin that have so many answers together."""
        for start in range(end - 1, -1, -1):
            num_answers -= len(self.entries[start].numbers)
            if num_answers <= 0:
                return start
        return 0
