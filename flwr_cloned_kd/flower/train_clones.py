"""A client mod that makes clones with any client app: it runs the app once for every clone."""

import copy
import time
from functools import cache
from logging import WARN
from statistics import fmean
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common import log

from ..engine.recipe import fold_in
from ..io.messages import MAX_CHARACTERS, arrays_of, only
from .mods import CLONE_INDEX, CallNext, Mod, refuse

MAX_CLONES = 16
"""The largest number of clones that an edge trains for one request, unless it sets another."""

NUM_CLONES = "num-clones"
COUNTS = ("num-examples", "num_examples")
"""Names of the number of samples, in the Message API and in the legacy API."""
NUMBERS = (int, float)
"""Types of a number. The type bool is a subclass of int, so the exact type is compared."""
TRAIN_SECONDS = "train-seconds"
LEGACY_METRICS = "fitres.metrics"
LEGACY_STATUS = "fitres.status"

Arrays = dict[str, np.ndarray[Any, Any]]


def train_clones(*, max_clones: int = MAX_CLONES) -> Mod:
    """Make a client mod that trains clones with an app that trains one model.

    A "train" request with "num-clones" E in its config runs the wrapped app E times, from the same
    arrays. The arrays of the replies become one ensemble, every array `[E, *shape]`. A request
    without "num-clones", such as that of FedAvg, passes unchanged. The app may use either API of
    Flower and any framework: the mod reads its replies as NumPy arrays.

    The config of run e, which trains clone e, has no "num-clones". Its "seed" is
    `fold_in(seed, e)`, and "clone-index" is e, from 0. The app must draw its random numbers from
    this seed, for example after `torch.manual_seed(config["seed"])`. If the app ignores the seed,
    the clones can be equal, and equal clones give the core no more than one clone does. The mod
    then logs one warning per process, and the reply has the metric "identical-clones" with the
    value 1.

    Every run starts with the same `context.state`. The state after run 0 is kept, so that the state
    does not depend on E. If a run fails, the state stays as it was, and the reply is the error of
    that run, with the number of the clone.

    A number in the metrics of the reply is the mean over the runs. "num-examples" is rounded to an
    integer. "train-seconds" is the total over the runs: the sum of the app's own values, or else
    the time that the mod measured. The rest of the reply comes from run 0.

    Mods before this one in the list of mods receive ensembles, and mods after it receive one model
    per run. `in_wire_dtype`, `ClipClones` and `LocalDpClones` belong before it.

    Args:
        max_clones: the largest number of clones that this edge trains for one request.

    Examples:
        >>> from flwr.clientapp import ClientApp
        >>> from flwr_cloned_kd import train_clones
        >>> app = ClientApp(mods=[train_clones()])
    """

    def run_for_each_clone(message: Message, context: Context, call_next: CallNext) -> Message:
        configs = message.content.config_records
        keys = [key for key, config in configs.items() if NUM_CLONES in config]
        if message.metadata.message_type != MessageType.TRAIN or not keys:
            return call_next(message, context)
        started = time.perf_counter()
        try:
            config = only({key: configs[key] for key in keys}, f"config with {NUM_CLONES}")
            only(message.content.array_records, "ArrayRecord")
            num_clones = check_num_clones(config[NUM_CLONES], max_clones)
            seed = _integer("seed", config.get("seed"))
        except ValueError as error:
            return refuse(message, f"train_clones: {error}")
        contents = list[RecordDict]()
        ensemble = list[Arrays]()
        state = context.state
        for index in range(num_clones):
            run_context = copy.copy(context)
            run_context.state = _copy(context.state)
            request = _request(message, keys[0], index, fold_in(seed, index))
            try:
                reply = call_next(request, run_context)
            except Exception as error:  # the app may raise any exception
                text = " ".join(str(error).split())
                raise RuntimeError(f"clone {index}: {type(error).__name__}: {text}") from error
            if not isinstance(reply, Message):
                kind = type(reply).__name__
                return refuse(
                    message, f"train_clones: clone {index}: expected a Message, got {kind}"
                )
            if (failure := _failure(message, reply, index)) is not None:
                return failure
            try:
                arrays = _read(reply)
                _check_alike(arrays, ensemble[0] if ensemble else arrays)
            except ValueError as error:
                return refuse(message, f"train_clones: clone {index}: {error}")
            contents.append(reply.content)
            ensemble.append(arrays)
            if index == 0:
                state = run_context.state
        context.state = state
        return _combine(message, contents, ensemble, time.perf_counter() - started)

    return run_for_each_clone


def check_num_clones(num_clones: object, max_clones: int) -> int:
    """Return the number of clones of a request, or raise ValueError if it is out of range."""
    number = _integer(NUM_CLONES, num_clones)
    if not 1 <= number <= max_clones:
        raise ValueError(f"{NUM_CLONES}: expected 1 to {max_clones}, got {number}")
    return number


def _integer(name: str, value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{name}: expected an integer, got {str(value)[:MAX_CHARACTERS]!r}")
    return value


def _request(message: Message, key: str, index: int, seed: int) -> Message:
    """Return a copy of the request for one run; the app may change the copy."""
    request = copy.copy(message)
    request.content = _copy(message.content)
    config = request.content.config_records[key]
    del config[NUM_CLONES]
    config["seed"] = seed
    config[CLONE_INDEX] = index
    return request


def _copy(records: RecordDict) -> RecordDict:
    """Copy records, so that no run changes those of another run.

    The copies share the bytes of the arrays, which cannot change. `copy.deepcopy` of an Array fails
    after Flower has split the array into chunks.
    """
    return RecordDict(
        {
            name: record.copy() if isinstance(record, ArrayRecord) else copy.deepcopy(record)
            for name, record in records.items()
        }
    )


def _failure(message: Message, reply: Message, index: int) -> Message | None:
    """Return the error reply for a run that failed, with the number of the clone, or else None."""
    if reply.has_error():
        reason = f"clone {index}: {reply.error.reason}"
        return Message(Error(reply.error.code, reason), reply_to=message)
    status = reply.content.config_records.get(LEGACY_STATUS)
    if status is None or status.get("code") == 0:
        return None
    status["message"] = f"clone {index}: {status.get('message', '')!s}"
    return Message(reply.content, reply_to=message)


def _read(reply: Message) -> Arrays:
    """Return the arrays of one run; a reply must have metrics, too."""
    only(reply.content.metric_records, "MetricRecord")
    arrays = arrays_of(only(reply.content.array_records, "ArrayRecord"))
    if not arrays:
        raise ValueError("ArrayRecord: expected at least one array, got none")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name}: expected one array, got {type(array).__name__}")
    return arrays


def _check_alike(arrays: Arrays, first: Arrays) -> None:
    """Refuse arrays that cannot be stacked with those of clone 0."""
    differing = sorted(arrays.keys() ^ first.keys())
    if differing:
        raise ValueError(
            f"{differing[0]}: expected in the reply of every clone, got it in some replies only"
        )
    for name, array in arrays.items():
        expected = first[name]
        if array.shape != expected.shape:
            raise ValueError(f"{name}: expected shape {expected.shape}, got {array.shape}")
        if array.dtype != expected.dtype:
            raise ValueError(f"{name}: expected dtype {expected.dtype}, got {array.dtype}")


def _combine(
    message: Message, contents: list[RecordDict], ensemble: list[Arrays], seconds: float
) -> Message:
    """Make one reply of the replies of all runs."""
    content = contents[0]
    stacked = {name: np.stack([arrays[name] for arrays in ensemble]) for name in ensemble[0]}
    (key,) = content.array_records
    content.array_records[key] = ArrayRecord(
        {name: Array(array) for name, array in stacked.items()}
    )
    (key,) = content.metric_records
    metrics: MetricRecord | ConfigRecord = content.metric_records[key]
    _average(metrics, [other.metric_records.get(key, {}) for other in contents])
    if LEGACY_METRICS in content.config_records:
        metrics = content.config_records[LEGACY_METRICS]
        _average(metrics, [other.config_records.get(LEGACY_METRICS, {}) for other in contents])
    metrics.setdefault(TRAIN_SECONDS, seconds)
    # The first axis is that of the clones.
    if len(contents) > 1 and all((array == array[:1]).all() for array in stacked.values()):
        metrics["identical-clones"] = 1.0
        _warn_of_identical_clones()
    return Message(content, reply_to=message)


def _average(record: MetricRecord | ConfigRecord, records: list[Any]) -> None:
    """Replace every number of a record by its mean over the runs, in place.

    Args:
        records: the records of all runs; a run may lack a number.
    """
    for name, value in list(record.items()):
        if type(value) not in NUMBERS:
            continue
        values = [other[name] for other in records if type(other.get(name)) in NUMBERS]
        if name == TRAIN_SECONDS:
            record[name] = sum(values)
        else:
            record[name] = round(fmean(values)) if name in COUNTS else fmean(values)


@cache
def _warn_of_identical_clones() -> None:
    """Log a warning, once per process."""
    log(
        WARN,
        "train_clones: all clones of this edge are equal, so they give the core no more than one "
        'clone does. The train function should draw its random numbers from config["seed"], for '
        'example after torch.manual_seed(config["seed"]).',
    )
