"""The frozen part of a model, which does not travel: core and edges compare its digest."""

from torch import nn

from ..engine.ensemble import frozen_state
from .checkpoint import digest

FROZEN_KEY = "frozen-digest"
"""The key of a request's config that holds the digest of the core's frozen part."""


def frozen_digest(model: nn.Module) -> str:
    """Hash the frozen part of a model: 64 hexadecimal digits, "" if nothing is frozen."""
    frozen = frozen_state(model)
    return digest({name: tensor.cpu() for name, tensor in frozen.items()}, "") if frozen else ""


def check_frozen(model: nn.Module, expected: object) -> None:
    """Refuse a request for another frozen part than that of this model.

    Args:
        expected: the value of `FROZEN_KEY` in the request's config; "" if it has none.

    Raises:
        ValueError: if the digest of the model differs.
    """
    digest_here = frozen_digest(model)
    if not expected or digest_here == expected:
        return
    start = f"{FROZEN_KEY}: expected the core's {str(expected)[:12]}, got"
    if not digest_here:
        raise ValueError(f"{start} none: no weight of this edge's model is frozen")
    raise ValueError(
        f"{start} {digest_here[:12]!r}: "
        "the frozen weights of this edge's model are not those of the core"
    )
