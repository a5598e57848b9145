"""The state of a core: its model, its temporal memory and what they are saved as."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from ..engine.ensemble import Ensemble, StateDict, as_ensemble, member, size


@dataclass(frozen=True, eq=False)
class CoreState:
    """The progress of a core. Each accepted edge makes a new state; a state equals only itself.

    Args:
        params: the core model.
        memory: temporal memory, ensembles of the latest edges, newest last (Sec. 4.3).
        version: number of edges that the core has learned from.
        train_accuracy: the core's accuracy on its own data after Phase 0, if it was measured, and
            after each accepted edge; fractions in [0, 1].
        memory_weights: the weight of the KD term of each ensemble in the memory, below 1 for an
            edge that was late; empty is 1 for all.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import CoreState
        >>> state = CoreState({"w": torch.zeros(2)})
        >>> state.version, len(state.memory)
        (0, 0)
        >>> tensors, header = state.state_dict()
        >>> CoreState.from_state_dict(tensors, header, like=state.params).params
        {'w': tensor([0., 0.])}
    """

    params: StateDict
    memory: tuple[Ensemble, ...] = ()
    version: int = 0
    train_accuracy: tuple[float, ...] = ()
    memory_weights: tuple[float, ...] = ()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return this state as named tensors and a header that JSON can hold.

        A tensor of the model is called "core/NAME", one of the memory "0/NAME", "1/NAME", ...,
        oldest ensemble first.
        """
        ensembles = {"core": self.params}
        ensembles |= {str(index): ensemble for index, ensemble in enumerate(self.memory)}
        tensors = dict[str, Tensor]()
        for prefix, ensemble in ensembles.items():
            tensors |= prefixed(prefix, ensemble)
        header = {
            "memory": len(self.memory),
            "memory_weights": list(self.memory_weights),
            "train_accuracy": list(self.train_accuracy),
            "version": self.version,
        }
        return tensors, header

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], like: Mapping[str, Tensor]
    ) -> Self:
        """Make the state that `state_dict` returned, and check it with `as_ensemble`.

        Args:
            tensors: may hold other tensors too, under other prefixes.
            header: may hold other entries too.
            like: a state dict of the model; it says which names, shapes and dtypes are expected.

        Raises:
            ValueError: for a header without one of its entries, or tensors that do not fit `like`.
        """
        expected = ("memory", "memory_weights", "train_accuracy", "version")
        if missing := [name for name in expected if name not in header]:
            raise ValueError(f"core state: expected {', '.join(expected)}, missing {missing}")

        core = ensemble_at("core", tensors, like)
        if size(core) != 1:
            raise ValueError(f"core: expected one model, got an ensemble of {size(core)}")
        return cls(
            params=member(core, 0),
            memory=tuple(
                ensemble_at(str(index), tensors, like) for index in range(header["memory"])
            ),
            version=header["version"],
            train_accuracy=tuple(header["train_accuracy"]),
            memory_weights=tuple(header["memory_weights"]),
        )


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names "PREFIX/NAME"."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def ensemble_at(prefix: str, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Ensemble:
    """Return the tensors whose names begin with "PREFIX/", checked with `as_ensemble`.

    Raises:
        ValueError: with the prefix in front, if they do not fit.
    """
    start = f"{prefix}/"
    named = {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }
    try:
        return as_ensemble(named, like)
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from None
