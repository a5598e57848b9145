"""Undo what a model has learned from edges, and mark the rounds that no longer count."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

UndoFn = Callable[[Set[str]], Set[int]]
"""Edges -> numbers of the requests whose answers the model no longer contains.

It raises ValueError if it cannot undo them all; then the model is as before.
"""


def learned_from(history: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the edges whose answers the model contains.

    Args:
        history: one row for each round, see `AsyncStrategy.on_round`.
    """
    return {row["edge"] for row in history if row["accepted"] and not row.get("undone")}


def undo_edges(
    undo: UndoFn, edges: Set[str], history: Sequence[dict[str, Any]]
) -> tuple[list[int], dict[str, str]]:
    """Undo all edges at once; if this is not possible, undo one by one those that can be undone.

    Args:
        undo: undoes edges, or raises ValueError.
        edges: names of edges that the model has learned from, at least one.
        history: one row for each round; the rounds that are undone get the entry "undone".

    Returns:
        The versions of the model that are undone, and edge -> why it cannot be undone.
    """
    try:
        return _mark(undo(edges), history), {}
    except ValueError as error:
        if len(edges) == 1:
            return [], dict.fromkeys(edges, str(error))
    versions = list[int]()
    failures = dict[str, str]()
    for edge in sorted(edges):
        try:
            versions += _mark(undo({edge}), history)
        except ValueError as error:
            failures[edge] = str(error)
    return versions, failures


def _mark(numbers: Set[int], history: Sequence[dict[str, Any]]) -> list[int]:
    """Mark the rounds of these requests as undone; return the versions that they had made."""
    # Each accepted answer has made one version, in the order of the rounds.
    accepted = (row for row in history if row["accepted"])
    versions = []
    for version, row in enumerate(accepted, 1):
        if row["number"] in numbers:
            row["undone"] = 1.0
            versions.append(version)
    return versions
