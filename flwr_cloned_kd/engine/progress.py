"""Progress lines of a long phase, and lines that are logged once."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache

LOG_SECONDS = 5.0
"""Time between two lines."""


class Progress:
    """Log one line every few seconds: the epoch, the speed and the time left.

    Args:
        log: called with each line; None logs nothing.
        phase: name of the phase.
        num_epochs: number of planned epochs.
        num_samples: number of samples in one epoch, over all clones.
        num_parts: number of parts of the clones that report separately.
    """

    def __init__(
        self,
        log: Callable[[str], None] | None,
        phase: str,
        num_epochs: int,
        num_samples: int,
        num_parts: int = 1,
    ) -> None:
        self._log = log
        self._phase = phase
        self._num_epochs = num_epochs
        self._num_samples = num_samples
        self._epochs_done = [0.0] * num_parts
        self._start = time.monotonic()
        self._last_line = self._start

    def step(self, epoch: int, share: float, part: int = 0) -> None:
        """Record that one part has done `share`, in [0, 1], of epoch `epoch`, counted from 0."""
        self._epochs_done[part] = epoch + share
        now = time.monotonic()
        if self._log is None or now - self._last_line < LOG_SECONDS:
            return
        self._last_line = now
        epochs_done = sum(self._epochs_done) / len(self._epochs_done)
        rate = epochs_done * self._num_samples / (now - self._start)
        seconds_left = (self._num_epochs - epochs_done) * self._num_samples / rate
        self._log(
            f"{self._phase}: epoch {epoch + 1} of {self._num_epochs}, {rate:,.0f} samples/s, "
            f"{timedelta(seconds=round(seconds_left))} left"
        )


@cache
def log_once(line: str) -> None:
    """Log a warning once in a process."""
    logging.getLogger("flwr_cloned_kd").warning(line)
