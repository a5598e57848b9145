"""Client mods for ensemble replies: clipping and noise per clone, and Flower's own made safe."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import ERROR
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MessageType
from flwr.client import mod as legacy_mod
from flwr.clientapp import mod as message_mod
from flwr.common import log

from ..engine.ensemble import Ensemble, StateDict, member, size
from ..io.messages import ensemble_of, only

CallNext = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, CallNext], Message]

MOD_FAILED = 6
"""Flower's error code for a mod whose precondition does not hold."""

ONE_MODEL = (
    message_mod.fixedclipping_mod,
    message_mod.adaptiveclipping_mod,
    message_mod.LocalDpMod,
    legacy_mod.fixedclipping_mod,
    legacy_mod.adaptiveclipping_mod,
    legacy_mod.LocalDpMod,
)
"""Flower's mods that take a reply for one model."""

LEGACY_ONLY = ONE_MODEL[3:]
SECURE_AGGREGATION = (legacy_mod.secagg_mod, legacy_mod.secaggplus_mod)


@dataclass(frozen=True)
class ClipClones:
    """Client mod: clip every clone's movement to an L2 norm (McMahan et al. 2018, FlatClip).

    Each clone becomes sent + min(1, C / |clone - sent|) (clone - sent), with the norm over all of
    its floating tensors. A clone within the norm keeps its bits. Integer tensors, which count
    batches, go back as they were sent. The reply reports "clipped", the share of clones that
    were, in [0, 1]. A plain model in the reply is one clone.

    Args:
        clipping_norm: C, above 0; None takes "clipping_norm" of the request's config, the key of
            Flower's own clipping mods.

    Raises:
        ValueError: if it is not above 0.
    """

    clipping_norm: float | None = None

    def __post_init__(self) -> None:
        if self.clipping_norm is not None:
            _check_norm(self.clipping_norm)

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return call_next(message, context)
        try:
            norm = _norm_of(message) if self.clipping_norm is None else self.clipping_norm
        except ValueError as error:
            return refuse(message, f"ClipClones: {error}")

        def change(sent: StateDict, edge: Ensemble) -> tuple[Ensemble, dict[str, float]]:
            clipped, share = clip(sent, edge, norm)
            return clipped, {"clipped": share}

        return _changed(message, call_next(message, context), change, "ClipClones")


@dataclass(frozen=True)
class LocalDpClones:
    """Client mod: local differential privacy for an ensemble, by the Gaussian mechanism.

    Every clone is clipped as by `ClipClones`, then each of its floating values gets noise of
    standard deviation sqrt(E) * sensitivity * sqrt(2 ln(1.25 / delta)) / epsilon (Dwork and Roth
    2014, Theorem A.1). All E clones tell of the same data: the root of E makes (epsilon, delta)
    hold for the arrays of the whole reply. The metrics of the reply are not covered.

    Args:
        clipping_norm: C, above 0.
        epsilon: in (0, 1], where the theorem holds.
        delta: in (0, 1).
        sensitivity: of one clone, above 0; None is 2 C, the farthest that two clipped clones can
            be from each other.
        generator: makes the source of the noise. From the operating system's entropy unless it is
            given: noise that somebody can draw again can be subtracted.

    Raises:
        ValueError: for a number out of range.
    """

    clipping_norm: float
    epsilon: float
    delta: float
    sensitivity: float | None = None
    generator: Callable[[], np.random.Generator] = np.random.default_rng

    def __post_init__(self) -> None:
        _check_norm(self.clipping_norm)
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon: expected above 0, at most 1, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta: expected between 0 and 1, got {self.delta}")
        if self.sensitivity is not None and not 0 < self.sensitivity < math.inf:
            raise ValueError(f"sensitivity: expected above 0, got {self.sensitivity}")

    def standard_deviation(self, num_clones: int) -> float:
        """Return that of the noise for an ensemble of so many clones."""
        each = 2 * self.clipping_norm if self.sensitivity is None else self.sensitivity
        return math.sqrt(num_clones * 2 * math.log(1.25 / self.delta)) * each / self.epsilon

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return call_next(message, context)

        def change(sent: StateDict, edge: Ensemble) -> tuple[Ensemble, dict[str, float]]:
            clipped, _ = clip(sent, edge, self.clipping_norm)
            scale, rng = self.standard_deviation(size(edge)), self.generator()
            for name, tensor in clipped.items():
                if tensor.is_floating_point():
                    noise = torch.from_numpy(rng.normal(0, scale, tuple(tensor.shape)))
                    clipped[name] = (tensor + noise).to(tensor.dtype)
            return clipped, {}

        return _changed(message, call_next(message, context), change, "LocalDpClones")


def clip(sent: StateDict, edge: Ensemble, norm: float) -> tuple[Ensemble, float]:
    """Clip every clone's movement from what was sent; return the share that was, too."""
    floating = [name for name, tensor in edge.items() if tensor.is_floating_point()]
    moved = {name: edge[name].double() - sent[name].double() for name in floating}
    squares = [change.reshape(size(edge), -1).square().sum(1) for change in moved.values()]
    lengths = torch.stack(squares).sum(0).sqrt() if squares else torch.zeros(size(edge))
    outside = lengths > norm
    factors = torch.where(outside, norm / lengths, 1.0)
    clipped: Ensemble = {}
    for name, tensor in edge.items():
        if name not in moved:
            clipped[name] = torch.stack([sent[name]] * size(edge))
            continue
        shape = (-1, *[1] * (tensor.dim() - 1))
        near = (sent[name] + factors.view(shape) * moved[name]).to(tensor.dtype)
        clipped[name] = torch.where(outside.view(shape), near, tensor)
    return clipped, float(outside.double().mean())


def guarded(mods: Sequence[Mod] | None) -> list[Mod]:
    """Prepare mods for a client app whose replies may be ensembles, so that none fails silently.

    Flower's clipping and privacy mods run around training only, and only around replies that are
    one model; secure aggregation never around a request for clones. What they cannot do becomes
    an error reply that names the mod, and every error reply goes to who asked.
    """
    if not mods:
        return []
    chain = [_deliver, *(_explained(mod) for mod in mods)]
    single = next((mod for mod in mods if _is(mod, ONE_MODEL)), None)
    return chain if single is None else [*chain, _only_one_model(_name(single))]


def refuse(message: Message, reason: str) -> Message:
    """Log why, and reply with an error."""
    log(ERROR, "%s", reason)
    return Message(Error(MOD_FAILED, reason), reply_to=message)


def _deliver(message: Message, context: Context, call_next: CallNext) -> Message:
    """Address errors to who asked: Flower's mods reply to their own reply, which nobody gets."""
    reply = call_next(message, context)
    asked = message.metadata
    if reply.has_error() and reply.metadata.reply_to_message_id != asked.message_id:
        log(ERROR, "A mod's error was addressed to nobody and is sent on: %s", reply.error.reason)
        return Message(reply.error, reply_to=message)
    return reply


def _explained(mod: Mod) -> Mod:
    """Say what a mod of Flower's cannot do before it fails in words of its own."""
    name = _name(mod)

    def call(message: Message, context: Context, call_next: CallNext) -> Message:
        training = message.metadata.message_type == MessageType.TRAIN
        if _is(mod, ONE_MODEL) and not training:
            return call_next(message, context)
        if _is(mod, SECURE_AGGREGATION) and training and _asks_for_clones(message):
            return refuse(
                message,
                f"{name}: secure aggregation only reveals a sum of many edges, but the core must "
                f"see the models of each one to learn from them",
            )
        if _is(mod, LEGACY_ONLY) and "fitins.parameters" not in message.content:
            return refuse(
                message,
                f"{name}: that of flwr.client.mod is for legacy servers, this request is of the "
                f"Message API; use ClipClones or LocalDpClones, which answer both",
            )
        return mod(message, context, call_next)

    return call


def _only_one_model(name: str) -> Mod:
    def call(message: Message, context: Context, call_next: CallNext) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type != MessageType.TRAIN or reply.has_error():
            return reply
        try:
            _, edge, plain = _read(message, reply)
        except ValueError as error:
            return refuse(message, f"{name}: {error}")
        if plain:
            return reply
        return refuse(
            message,
            f"{name}: expected one model in the reply, got an ensemble of {size(edge)} clones; "
            f"use ClipClones or LocalDpClones instead",
        )

    return call


def _changed(
    message: Message,
    reply: Message,
    change: Callable[[StateDict, Ensemble], tuple[Ensemble, dict[str, float]]],
    name: str,
) -> Message:
    """Replace the arrays of a reply, in the form they have."""
    if reply.has_error():
        return reply
    try:
        sent, edge, plain = _read(message, reply)
    except ValueError as error:
        return refuse(message, f"{name}: {error}")
    changed, metrics = change(sent, edge)
    arrays = member(changed, 0) if plain else changed
    key = next(iter(reply.content.array_records))
    # In the reply's own order: a legacy server knows arrays by nothing else.
    order = reply.content.array_records[key]
    record = ArrayRecord({each: Array(arrays[each].numpy()) for each in order})
    reply.content.array_records[key] = record
    legacy = reply.content.config_records.get("fitres.metrics")
    for found in reply.content.metric_records.values() if legacy is None else [legacy]:
        found.update(metrics)
    return reply


def _read(message: Message, reply: Message) -> tuple[StateDict, Ensemble, bool]:
    """Return what was sent, the ensemble that came back, and whether that is one plain model."""
    asked = only(message.content.array_records, "ArrayRecord")
    record = only(reply.content.array_records, "ArrayRecord")
    sent = {name: torch.from_numpy(np.array(array.numpy())) for name, array in asked.items()}
    for name in sent.keys() & record.keys():
        # FedAvg averages integer counters into floats; an edge answers with what its model has.
        dtype = torch.from_numpy(np.array(record[name].numpy())).dtype
        if dtype.is_floating_point != sent[name].is_floating_point():
            sent[name] = sent[name].to(dtype)
    edge = ensemble_of(record, sent)
    first = next(iter(sent))
    return sent, edge, record[first].numpy().ndim == sent[first].dim()


def _asks_for_clones(message: Message) -> bool:
    return any("num-clones" in config for config in message.content.config_records.values())


def _norm_of(message: Message) -> float:
    found = [c["clipping_norm"] for c in message.content.config_records.values()
             if "clipping_norm" in c]  # fmt: skip
    if len(found) != 1 or not isinstance(found[0], int | float):
        raise ValueError("expected a number as clipping_norm in the request's config, got none")
    _check_norm(found[0])
    return float(found[0])


def _check_norm(norm: float) -> None:
    if not 0 < norm < math.inf:
        raise ValueError(f"clipping_norm: expected above 0, got {norm}")


def _is(mod: Mod, known: Sequence[Any]) -> bool:
    return mod in known or type(mod) in known


def _name(mod: Any) -> str:
    return getattr(mod, "__name__", type(mod).__name__)
