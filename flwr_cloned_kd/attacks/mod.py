"""A client mod that runs a client app and attacks with its reply."""

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict

from ..engine.ensemble import Ensemble, StateDict
from ..flower.mods import CallNext, Mod, change_reply
from .models import ModelAttack, Visit, attack_model

VISITS = "attack-visits"
FIRST_SENT = "attack-first-sent"
FIRST_EDGE = "attack-first-edge"
"""Names of the records in `context.state` that hold the latest `Visit` of this edge."""


def attack(change: ModelAttack, *, seed: int = 0) -> Mod:
    """Make a client mod that turns any client app, of either API, into a bad edge.

    The mod runs the app and changes the models in its reply to a "train" request. The rest of the
    reply, and the replies to other requests, stay as they are. The first visit is kept in
    `context.state`, so that an attack can refer to it at a later visit.

    The mod belongs after `in_wire_dtype`, which `edge_app` adds, and before `train_clones` in the
    list of mods, so that it receives all clones as float32 arrays. For an attack on data, give the
    app attacked data.

    Args:
        change: the attack.
        seed: of the random draws. Edges with the same seed draw the same numbers.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import EdgeClient, Recipe, edge_app
        >>> from flwr_cloned_kd.attacks import ScaleMovement, attack
        >>> data = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> def client_fn(context):
        ...     return EdgeClient(torch.nn.Linear(1, 2), data, Recipe(epochs=2))
        >>> bad_app = edge_app(client_fn, mods=[attack(ScaleMovement(3.0))])
    """

    def run_and_attack(message: Message, context: Context, call_next: CallNext) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type != MessageType.TRAIN:
            return reply

        def attacked(sent: StateDict, edge: Ensemble) -> tuple[Ensemble, dict[str, float]]:
            last = _last_visit(context.state)
            models, visit = attack_model(change, sent, edge, last=last, seed=seed)
            _keep(visit, context.state)
            return models, {}

        return change_reply(message, reply, attacked, "attack")

    return run_and_attack


def _last_visit(state: RecordDict) -> Visit | None:
    if VISITS not in state.config_records:
        return None
    number = state.config_records[VISITS]["number"]
    if not isinstance(number, int):
        raise ValueError(f"{VISITS}: expected an integer, got {type(number).__name__}")
    sent, edge = (_tensors(state.array_records[name]) for name in (FIRST_SENT, FIRST_EDGE))
    return Visit(number, sent, edge)


def _keep(visit: Visit, state: RecordDict) -> None:
    state[VISITS] = ConfigRecord({"number": visit.number})
    if visit.number == 0:
        state[FIRST_SENT] = _record(visit.sent)
        state[FIRST_EDGE] = _record(visit.edge)


def _record(tensors: StateDict) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})


def _tensors(record: ArrayRecord) -> StateDict:
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}
