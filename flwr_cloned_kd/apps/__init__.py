"""What the example apps share."""

from .experiment import build_edge, serve
from .settings import Settings

__all__ = ["Settings", "build_edge", "serve"]
