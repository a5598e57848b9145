"""What edges returned to the core, and where the student starts from it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..engine.ensemble import Ensemble, StateDict, mean


class EdgeResult(NamedTuple):
    """What one edge returned, for `Core.distill_all`."""

    edge: Ensemble
    """`[E, ...]`, as `as_ensemble` returns it."""
    sent: StateDict | None = None
    """The model that the edge was sent; None is the present core."""
    weight: float = 1
    """Weight of this edge's KD term, at least 0; below 1 for a late edge."""
    trust: float = 1
    """Share of the KD term and of the movement of this edge that the core uses, in [0, 1]."""
    earlier: Sequence[Mapping[str, Any]] = ()
    """Metrics of the earlier rounds of this edge, oldest first, for the guard."""

    def check(self, core: StateDict) -> None:
        """Check the numbers, and that the ensemble fits the core.

        Args:
            core: a state dict of the model.

        Raises:
            ValueError: naming what was expected and what was found.
        """
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight: expected at least 0, got {self.weight}")
        check_trust(self.trust)
        _check_clone_axis(self.edge, core)


def student_start(
    model: nn.Module, core: StateDict, results: Sequence[EdgeResult], share: float
) -> StateDict:
    """Move the core by a share of the mean movement of all edges.

    The movement of an edge is the mean of its clones minus the model that the edge was sent, times
    the trust in this edge.
    Buffers are interpolated between the core and the mean of the edges' buffers instead, because
    adding a difference could make a running variance negative. Integer buffers are counters and
    stay those of the core.
    """
    if not share:
        return core
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    centres = [mean(result.edge) for result in results]
    origins = [result.sent or core for result in results]
    start = dict(core)
    for name, tensor in core.items():
        if tensor.is_floating_point():
            movements = [
                result.trust * (centre[name] - (origin[name] if name in trained else tensor))
                for result, centre, origin in zip(results, centres, origins)
            ]
            start[name] = tensor + share * torch.stack(movements).mean(0)
    return start


def check_trust(trust: float) -> None:
    """Check a trust in an edge; raise ValueError if it is outside [0, 1]."""
    if not 0 <= trust <= 1:
        raise ValueError(f"trust: expected 0 to 1, got {trust}")


def _check_clone_axis(edge: Ensemble, core: StateDict) -> None:
    for name, tensor in core.items():
        if name not in edge or edge[name].shape[1:] != tensor.shape:
            expected = f"[E{''.join(f', {length}' for length in tensor.shape)}]"
            actual = list(edge[name].shape) if name in edge else "no such tensor"
            raise ValueError(
                f"edge: {name}: expected {expected} as as_ensemble returns it, got {actual}"
            )
