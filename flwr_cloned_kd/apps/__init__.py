"""What the example apps share."""

from . import build
from .report import Report
from .serve import run_baseline
from .settings import Settings
from .watch import check_watch, watchers

__all__ = ["Report", "Settings", "build", "check_watch", "run_baseline", "watchers"]
