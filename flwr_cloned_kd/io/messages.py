"""Reading what edges send; every failure is a ValueError of one line."""

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from ..engine.ensemble import Ensemble, as_ensemble

Record = TypeVar("Record")

MOST_METRICS = 32
MOST_NAME_CHARACTERS = 64
MOST_CHARACTERS = 200


def content_of(reply: Message | None, waited: float) -> RecordDict:
    """Return what a reply carries; refuse an error and silence."""
    if reply is None:
        raise ValueError(f"expected an answer, got none in {waited:.0f} s")
    if reply.has_error():
        lines = [line for line in str(reply.error.reason).splitlines() if line.strip()]
        reason = lines[-1].strip()[:MOST_CHARACTERS] if lines else "no reason"
        raise ValueError(f"expected a reply, got error {reply.error.code}: {reason!r}")
    return reply.content


def only(records: Mapping[str, Record], kind: str) -> Record:
    """Return the one record of a kind."""
    if len(records) != 1:
        raise ValueError(f"expected one {kind}, got {len(records)}")
    return next(iter(records.values()))


def ensemble_of(record: ArrayRecord, like: Mapping[str, Tensor]) -> Ensemble:
    """Decode an ArrayRecord without trusting its headers, and check it against the core."""
    arrays: dict[str, Any] = {}
    for name, array in record.items():
        try:
            arrays[name] = array.numpy()
        except Exception as error:  # NumPy raises what it likes on bytes it cannot read
            found = f"{type(error).__name__}: {str(error)[:MOST_CHARACTERS]}"
            raise ValueError(f"{name[:80]!r}: expected a NumPy array, got {found!r}") from None
    return as_ensemble(arrays, like)


def metrics_of(content: RecordDict) -> dict[str, float]:
    """Return the finite numbers of the one MetricRecord; it must hold "num-examples" above 0.

    What else an edge reports of itself is marked as such: "train_loss" is "reported-train_loss".
    """
    record = only(content.metric_records, "MetricRecord")
    count = record.get("num-examples")
    if not _is_finite(count) or count <= 0:
        raise ValueError(f"num-examples: expected a number above 0, got {str(count)[:80]}")
    finite = [(name, value) for name, value in record.items() if _is_finite(value)]
    reported = {f"reported-{name[:MOST_NAME_CHARACTERS]}": v for name, v in finite[:MOST_METRICS]}
    reported.pop("reported-num-examples", None)
    return {"num-examples": count, **reported}


def _is_finite(value: object) -> TypeGuard[int | float]:
    """Say whether this is a number that a float can hold, which a long integer is not."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def name_of(reply: Message | None) -> str:
    """Return who an edge says it is, or "" if it did not say."""
    if reply is None or reply.has_error():
        return ""
    said = [
        str(config["edge"]) for config in reply.content.config_records.values() if "edge" in config
    ]
    return said[0][:MOST_NAME_CHARACTERS] if said and said[0].isprintable() else ""


def num_bytes(content: RecordDict) -> int:
    """Count the bytes of all arrays."""
    records = content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())
