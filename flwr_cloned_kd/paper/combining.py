"""What the study compares Phase 2 with: averages, robust averages, FLTrust's rule, and clipping."""

from collections.abc import Callable, Sequence
from statistics import median

import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..attacks.models import movement_norms
from ..engine.ensemble import Ensemble, StateDict, member
from ..flower.mods import clip
from ..virtual.superlink import identify_process

NUM_BAD = 2
"""Number of bad edges that Krum, MultiKrum and the trimmed mean assume; the study has as many."""


def num_assumed_bad(num_edges: int) -> int:
    """Return how many of these edges may be bad, which is `NUM_BAD` but always a minority."""
    return min(NUM_BAD, (num_edges - 1) // 2)


def _multi_krum(num_edges: int) -> FedAvg:
    num_bad = num_assumed_bad(num_edges)
    return MultiKrum(num_malicious_nodes=num_bad, num_nodes_to_select=num_edges - num_bad)


def _trimmed_mean(num_edges: int) -> FedAvg:
    # Flower cuts int(beta * num_edges) values at both ends; 0.1 keeps a rounding from changing it.
    return FedTrimmedAvg(beta=(num_assumed_bad(num_edges) + 0.1) / num_edges)


FLOWER: dict[str, Callable[[int], FedAvg]] = {
    "Krum": lambda num_edges: Krum(num_malicious_nodes=num_assumed_bad(num_edges)),
    "MultiKrum": _multi_krum,
    "trimmed mean": _trimmed_mean,
    "median": lambda num_edges: FedMedian(),
}
"""Name of a rule -> a function that makes Flower's strategy for a number of edges a round.

MultiKrum averages all edges but as many as may be bad, and the trimmed mean cuts as many values at
both ends.
"""

COMBINE = ("distill", "average", "FLTrust", *FLOWER)
"""Names of the rules by which clones become the next core."""


def weighted_mean(ensemble: Ensemble, weights: Sequence[int]) -> StateDict:
    """Average clones `[E, ...]` by weight (McMahan et al. 2017).

    Flower's FedAvg computes the same average, but its `aggregate_train` needs Flower's messages,
    turns counters into float64, and adds in another order, which moves the last bit of float32: the
    records on disk would no longer be those that a run plays today.

    Args:
        ensemble: the clones; integer tensors, which count, are taken from the first clone.
        weights: of each clone, for example the number of its edge's images.
    """
    shares = torch.tensor(weights, dtype=torch.float32) / sum(weights)
    return {
        name: torch.einsum("e,e...->...", shares, tensor)
        if tensor.is_floating_point()
        else tensor[0]
        for name, tensor in ensemble.items()
    }


def flower_aggregate(strategy: FedAvg, ensemble: Ensemble, num_images: Sequence[int]) -> StateDict:
    """Let a strategy of Flower aggregate one model of each edge.

    Args:
        strategy: its `aggregate_train` computes the result.
        ensemble: `[E, ...]`, the models. The strategy receives the floating tensors. Integer
            tensors are counters and are taken from the first model: a distance between models, as
            Krum computes it, would consist almost only of the difference of counters.
        num_images: of each edge.

    Raises:
        ValueError: if the strategy returns no model.
    """
    identify_process()
    floating = {name: tensor for name, tensor in ensemble.items() if tensor.is_floating_point()}
    replies = []
    for index, images in enumerate(num_images):
        request = Message(RecordDict(), dst_node_id=1 + index, message_type=MessageType.TRAIN)
        arrays = {name: tensor.contiguous() for name, tensor in member(floating, index).items()}
        metrics = MetricRecord({"num-examples": images})
        content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
        replies.append(Message(content, reply_to=request))
    record, _ = strategy.aggregate_train(1, replies)
    if record is None:
        raise ValueError(f"{type(strategy).__name__}: expected a model, got none")
    aggregated = record.to_torch_state_dict(keep_input=True)
    return {
        name: aggregated[name].to(tensor.dtype) if name in floating else tensor[0]
        for name, tensor in ensemble.items()
    }


def fltrust(
    model: nn.Module, sent: StateDict, server: StateDict, edge: StateDict
) -> tuple[StateDict, float]:
    """Combine one edge and the server's own training by FLTrust's rule (Cao et al. 2021).

    The trust in an edge is the cosine between its movement and that of the server, which has
    trained on its own data, or 0 for a negative cosine. The movement of the edge is scaled to the
    norm of the server's movement. FLTrust averages the movements of many edges, weighted by trust.
    With a single edge the weight of this edge would always be 1, so here the server counts too,
    with trust 1: sent + (server movement + trust * scaled edge movement) / (1 + trust).

    Running statistics are averaged with the same weights, without scaling, so that a variance stays
    positive. Counters are those of the server.

    Args:
        model: says which tensors train.
        sent: the model from which the edge and the server have trained.
        server: trained on the data of the server.
        edge: trained on the data of the edge.

    Returns:
        The new model, and the trust, in [0, 1].
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def movement(params: StateDict) -> Tensor:
        return torch.cat([(params[name] - sent[name]).flatten().double() for name in trained])

    server_movement = movement(server)
    edge_movement = movement(edge)
    trust = max(0.0, float(cosine_similarity(server_movement, edge_movement, dim=0)))
    if trust == 0:
        return server, 0.0
    scale = float(server_movement.norm() / edge_movement.norm())
    combined = dict(server)
    for name, tensor in server.items():
        if name in trained:
            steps = (tensor - sent[name]) + trust * scale * (edge[name] - sent[name])
            combined[name] = sent[name] + steps / (1 + trust)
        elif tensor.is_floating_point():
            combined[name] = (tensor + trust * edge[name]) / (1 + trust)
    return combined, trust


def clip_to_median(
    sent: StateDict, edge: Ensemble, lengths: Sequence[float]
) -> tuple[Ensemble, tuple[float, ...]]:
    """Clip the movement of each clone to the median length of all clones before it.

    Args:
        sent: the model that the edge was sent.
        edge: `[E, ...]`, the clones.
        lengths: L2 norm of the movement of each clone of earlier rounds over all floating tensors,
            before it was clipped. Without such a clone nothing is clipped.

    Returns:
        The clipped clones, and the lengths for the next round.
    """
    seen = (*lengths, *movement_norms(sent, edge).tolist())
    if not lengths:
        return edge, seen
    clipped, _ = clip(sent, edge, median(lengths))
    return clipped, seen
