"""What the example apps share."""

from . import build
from .report import Report
from .serve import run_baseline
from .settings import Settings

__all__ = ["Report", "Settings", "build", "run_baseline"]
