"""Checked reading of replies; every failure is a ValueError with a message of one line."""

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from ..engine.ensemble import Ensemble, StateDict, as_ensemble
from .wire import decode_reply

Record = TypeVar("Record")

MAX_METRICS = 32
MAX_NAME_CHARACTERS = 64
MAX_CHARACTERS = 200


def content_of(reply: Message | None, waited: float) -> RecordDict:
    """Return the content of a reply; refuse a missing reply and an error.

    Args:
        waited: seconds since the request.
    """
    if reply is None:
        raise ValueError(f"expected an answer, got none in {waited:.0f} s")
    if reply.has_error():
        lines = [line for line in str(reply.error.reason).splitlines() if line.strip()]
        reason = lines[-1].strip()[:MAX_CHARACTERS] if lines else "no reason"
        raise ValueError(f"expected a reply, got error {reply.error.code}: {reason!r}")
    return reply.content


def only(records: Mapping[str, Record], kind: str) -> Record:
    """Return the only record of a kind."""
    if len(records) != 1:
        raise ValueError(f"expected one {kind}, got {len(records)}")
    return next(iter(records.values()))


def ensemble_of(
    record: ArrayRecord,
    like: Mapping[str, Tensor],
    *,
    sent: StateDict | None = None,
    wire_dtype: str = "float32",
) -> Ensemble:
    """Decode an ArrayRecord, whose headers may be wrong, and check it with `as_ensemble`.

    Args:
        like: state dict of the core.
        sent: the model that the edge was sent, from which it counts the clones' movement. Needed
            unless `wire_dtype` is "float32".
        wire_dtype: the requested form of the arrays, see `wire`.
    """
    return as_ensemble(decode_reply(arrays_of(record), sent or {}, wire_dtype), like)


def arrays_of(record: ArrayRecord) -> dict[str, Any]:
    """Decode the arrays of a record; what the bytes of an array contain is not checked."""
    arrays: dict[str, Any] = {}
    for name, array in record.items():
        try:
            arrays[name] = array.numpy()
        except Exception as error:  # NumPy raises errors of many types for malformed bytes
            cause = f"{type(error).__name__}: {str(error)[:MAX_CHARACTERS]}"
            raise ValueError(f"{name[:80]!r}: expected a NumPy array, got {cause!r}") from None
    return arrays


def metrics_of(content: RecordDict) -> dict[str, float]:
    """Return the finite numbers of the only MetricRecord; "num-examples" must be above 0.

    All other metrics get a prefix, because an edge can report any value: "train_loss" becomes
    "reported-train_loss".
    """
    record = only(content.metric_records, "MetricRecord")
    count = record.get("num-examples")
    if not _is_finite(count) or count <= 0:
        raise ValueError(f"num-examples: expected a number above 0, got {str(count)[:80]}")
    finite = [(name, value) for name, value in record.items() if _is_finite(value)]
    reported = {f"reported-{name[:MAX_NAME_CHARACTERS]}": v for name, v in finite[:MAX_METRICS]}
    reported.pop("reported-num-examples", None)
    return {"num-examples": count, **reported}


def _is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number that fits a float; very long integers do not."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def name_of(reply: Message | None) -> str:
    """Return the name that an edge gave itself in its reply, or "" without a valid name."""
    if reply is None or reply.has_error():
        return ""
    for config in reply.content.config_records.values():
        if "edge" in config:
            name = str(config["edge"])
            return name[:MAX_NAME_CHARACTERS] if name.isprintable() else ""
    return ""


def num_bytes(content: RecordDict) -> int:
    """Count the bytes of all arrays."""
    records = content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())
