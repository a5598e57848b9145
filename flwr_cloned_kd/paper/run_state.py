"""The progress of a run, and what it is saved as."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor

from ..attacks.models import Visit
from ..engine.ensemble import StateDict
from ..method.state import CoreState


@dataclass(frozen=True)
class RunState:
    """Everything that the next round of a run needs.

    Args:
        server_round: number of rounds played.
        core: the core's progress.
        past: the core models after the latest rounds, newest last, as far back as an edge of the
            run may be late.
        right: `[N]`, whether the first edge's ensemble classifies each held-out sample correctly;
            empty before the first round.
        visits: bad edge -> its latest visit.
        lengths: of the movements of all clones so far, see `combining.clip_to_median`; empty in a
            run that does not clip.
        metrics: what `Core.distill` returned in each round so far, with "edges", the edges of the
            round; for the guard, which may know the earlier rounds of an edge.
    """

    server_round: int
    core: CoreState
    past: tuple[StateDict, ...]
    right: Tensor
    visits: dict[int, Visit] = field(default_factory=dict)
    lengths: tuple[float, ...] = ()
    metrics: tuple[dict[str, Any], ...] = ()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return this state as named tensors and a header that JSON can hold."""
        tensors, header = self.core.state_dict()
        for index, params in enumerate(self.past):
            tensors |= {f"past-{index}/{name}": tensor for name, tensor in params.items()}
        for edge, visit in self.visits.items():
            tensors |= {f"sent-{edge}/{name}": tensor for name, tensor in visit.sent.items()}
            tensors |= {f"edge-{edge}/{name}": tensor for name, tensor in visit.edge.items()}
        return tensors | {"right": self.right}, {
            **header,
            "server_round": self.server_round,
            "past": len(self.past),
            "visits": {str(edge): visit.number for edge, visit in self.visits.items()},
            "lengths": list(self.lengths),
            "metrics": list(self.metrics),
        }

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Self:
        """Make the state that `state_dict` returned.

        Raises:
            ValueError, KeyError: if a tensor or an entry of the header is missing.
        """
        model = _with_prefix("core/", tensors)
        past = range(header["past"])
        return cls(
            server_round=header["server_round"],
            core=CoreState.from_state_dict(tensors, header, like=model),
            past=tuple(_with_prefix(f"past-{index}/", tensors) for index in past),
            right=tensors["right"],
            visits={
                int(edge): Visit(
                    number,
                    _with_prefix(f"sent-{edge}/", tensors),
                    _with_prefix(f"edge-{edge}/", tensors),
                )
                for edge, number in header.get("visits", {}).items()
            },
            lengths=tuple(header.get("lengths", ())),
            metrics=tuple(header.get("metrics", ())),
        )


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> StateDict:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
