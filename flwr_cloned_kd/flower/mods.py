"""Client mods for ensemble replies: clipping, noise, and a safe way to use Flower's own mods."""

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

CLONE_INDEX = "clone-index"
"""Key of the config of a request for one clone, which `train_clones` makes: its index, from 0."""

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
"""Flower's mods that treat every reply as one model."""

LEGACY_ONLY = ONE_MODEL[3:]
"""Mods that read the records of a legacy server only."""

SECURE_AGGREGATION = (legacy_mod.secagg_mod, legacy_mod.secaggplus_mod)


@dataclass(frozen=True)
class ClipClones:
    """Client mod: clip every clone's movement to an L2 norm (McMahan et al. 2018, FlatClip).

    Each clone becomes sent + min(1, C / |clone - sent|) (clone - sent), with the norm over all of
    its floating tensors. A clone within the norm keeps its bits. Integer tensors, which count
    batches, go back as they were sent. The metric "clipped" of the reply is the share of clones
    that were clipped, in [0, 1]. A plain model in the reply is one clone.

    Args:
        clipping_norm: C, above 0. None: use "clipping_norm" of the request's config, the key that
            Flower's own clipping mods use.

    Raises:
        ValueError: if the norm is not above 0.

    Examples:
        >>> from flwr.clientapp import ClientApp
        >>> from flwr_cloned_kd import ClipClones, train_clones
        >>> app = ClientApp(mods=[ClipClones(5.0), train_clones()])
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

        return change_reply(message, call_next(message, context), change, "ClipClones")


@dataclass(frozen=True)
class LocalDpClones:
    """Client mod: local differential privacy for an ensemble, by the Gaussian mechanism.

    Every clone is clipped as by `ClipClones`, then each of its floating values gets noise of
    standard deviation sqrt(E) * sensitivity * sqrt(2 ln(1.25 / delta)) / epsilon (Dwork and Roth
    2014, Theorem A.1). All E clones depend on the same data, so the factor sqrt(E) is needed for
    (epsilon, delta) to hold for the arrays of the whole reply. The metrics of the reply are not
    covered. After `train_clones` in the list of mods, this mod would get one clone at a time and
    add too little noise; it then replies with an error.

    Args:
        clipping_norm: C, above 0.
        epsilon: in (0, 1], where the theorem holds.
        delta: in (0, 1).
        sensitivity: of one clone, above 0. None: 2 C, the largest distance of two clipped clones.
        generator: makes the source of the noise. The default takes a new seed from the operating
            system each time, because an attacker who can repeat the draws can subtract the noise.

    Raises:
        ValueError: for a number out of range.

    Examples:
        >>> from flwr.clientapp import ClientApp
        >>> from flwr_cloned_kd import LocalDpClones
        >>> app = ClientApp(mods=[LocalDpClones(clipping_norm=5.0, epsilon=1.0, delta=1e-5)])
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
        """Return the standard deviation of the noise for an ensemble of `num_clones`."""
        sensitivity = 2 * self.clipping_norm if self.sensitivity is None else self.sensitivity
        return math.sqrt(num_clones * 2 * math.log(1.25 / self.delta)) * sensitivity / self.epsilon

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        if message.metadata.message_type != MessageType.TRAIN:
            return call_next(message, context)
        if _has_key(message, CLONE_INDEX):
            return refuse(
                message,
                "LocalDpClones: expected the request for all clones, got that for one clone; "
                "put this mod before train_clones in the list of mods",
            )

        def change(sent: StateDict, edge: Ensemble) -> tuple[Ensemble, dict[str, float]]:
            clipped, _ = clip(sent, edge, self.clipping_norm)
            scale = self.standard_deviation(size(edge))
            rng = self.generator()
            for name, tensor in clipped.items():
                if tensor.is_floating_point():
                    noise = torch.from_numpy(rng.normal(0, scale, tuple(tensor.shape)))
                    clipped[name] = (tensor + noise).to(tensor.dtype)
            return clipped, {}

        return change_reply(message, call_next(message, context), change, "LocalDpClones")


def clip(sent: StateDict, edge: Ensemble, norm: float) -> tuple[Ensemble, float]:
    """Clip every clone's movement from `sent`; return the clones and the share clipped."""
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
        scaled = (sent[name] + factors.view(shape) * moved[name]).to(tensor.dtype)
        clipped[name] = torch.where(outside.view(shape), scaled, tensor)
    return clipped, float(outside.double().mean())


def guarded(mods: Sequence[Mod] | None) -> list[Mod]:
    """Prepare mods for a client app whose replies may be ensembles, so that none fails silently.

    Flower's clipping and privacy mods run around training only, and only around replies that hold
    one model. Its secure aggregation never runs around a request for clones. Where such a mod
    cannot run, the reply is an error that names the mod. Every error reply reaches the server.
    """
    return [_deliver, *(_checked(mod) for mod in mods)] if mods else []


def refuse(message: Message, reason: str) -> Message:
    """Log the reason and reply with an error."""
    log(ERROR, "%s", reason)
    return Message(Error(MOD_FAILED, reason), reply_to=message)


def _deliver(message: Message, context: Context, call_next: CallNext) -> Message:
    """Address errors to the server: Flower's mods reply to the edge's own reply, which is lost."""
    reply = call_next(message, context)
    request = message.metadata
    if reply.has_error() and reply.metadata.reply_to_message_id != request.message_id:
        log(
            ERROR, "A mod's error has no receiver; it is sent to the server: %s", reply.error.reason
        )
        return Message(reply.error, reply_to=message)
    return reply


def _checked(mod: Mod) -> Mod:
    """Wrap a mod: where it cannot work, reply with an error that names it and the reason."""
    name = _name(mod)
    one_model = _is(mod, ONE_MODEL)

    def call(message: Message, context: Context, call_next: CallNext) -> Message:
        training = message.metadata.message_type == MessageType.TRAIN
        if one_model and not training:
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
                f"{name}: the mod of flwr.client.mod is for legacy servers, but this request uses "
                f"the Message API; use ClipClones or LocalDpClones, which support both",
            )

        def checked_next(message: Message, context: Context) -> Message:
            return _only_one_model(name, message, call_next(message, context))

        return mod(message, context, checked_next if one_model else call_next)

    return call


def _only_one_model(name: str, message: Message, reply: Message) -> Message:
    """Return a reply that holds one model; reply with an error to any other."""
    if reply.has_error():
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


def change_reply(
    message: Message,
    reply: Message,
    change: Callable[[StateDict, Ensemble], tuple[Ensemble, dict[str, float]]],
    name: str,
) -> Message:
    """Replace the arrays of a reply, and keep whether they are one model or an ensemble."""
    if reply.has_error():
        return reply
    try:
        sent, edge, plain = _read(message, reply)
    except ValueError as error:
        return refuse(message, f"{name}: {error}")
    changed, metrics = change(sent, edge)
    arrays = member(changed, 0) if plain else changed
    key = next(iter(reply.content.array_records))
    # A legacy server knows arrays by their order only, so keep that of the reply.
    order = reply.content.array_records[key]
    record = ArrayRecord({tensor: Array(arrays[tensor].numpy()) for tensor in order})
    reply.content.array_records[key] = record
    legacy = reply.content.config_records.get("fitres.metrics")
    for record_of_metrics in reply.content.metric_records.values() if legacy is None else [legacy]:
        record_of_metrics.update(metrics)
    return reply


def _read(message: Message, reply: Message) -> tuple[StateDict, Ensemble, bool]:
    """Return what was sent, the ensemble in the reply, and whether the reply is one plain model."""
    request = only(message.content.array_records, "ArrayRecord")
    record = only(reply.content.array_records, "ArrayRecord")
    sent = {name: torch.from_numpy(np.array(array.numpy())) for name, array in request.items()}
    for name in sent.keys() & record.keys():
        # FedAvg averages integer counters into floats; an edge replies in its model's dtype.
        dtype = torch.from_numpy(np.array(record[name].numpy())).dtype
        if dtype.is_floating_point != sent[name].is_floating_point():
            sent[name] = sent[name].to(dtype)
    edge = ensemble_of(record, sent)
    first = next(iter(sent))
    return sent, edge, record[first].numpy().ndim == sent[first].dim()


def _asks_for_clones(message: Message) -> bool:
    return _has_key(message, "num-clones") or _has_key(message, CLONE_INDEX)


def _has_key(message: Message, key: str) -> bool:
    """Return whether a config of the request has a key."""
    return any(key in config for config in message.content.config_records.values())


def _norm_of(message: Message) -> float:
    key = "clipping_norm"
    norms = [config[key] for config in message.content.config_records.values() if key in config]
    if len(norms) != 1 or not isinstance(norms[0], int | float):
        raise ValueError("expected a number as clipping_norm in the request's config, got none")
    _check_norm(norms[0])
    return float(norms[0])


def _check_norm(norm: float) -> None:
    if not 0 < norm < math.inf:
        raise ValueError(f"clipping_norm: expected above 0, got {norm}")


def _is(mod: Mod, known: Sequence[Any]) -> bool:
    return mod in known or type(mod) in known


def _name(mod: Any) -> str:
    return getattr(mod, "__name__", type(mod).__name__)
