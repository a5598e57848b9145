"""What the loggers write of a round and of a run."""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ..asynchronous.callbacks import RunStart
from ..asynchronous.rounds import NOT_METRICS


def load(module: str, extra: str) -> Any:
    """Import an optional library.

    Raises:
        ImportError: with the command that installs the library.
    """
    try:
        return import_module(module)
    except ImportError as error:
        command = f'pip install "flwr-cloned-kd[{extra}]"'
        message = f"{extra}: expected an installed package ({command}), got {error}"
        raise ImportError(message) from None


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a round by their names.

    An edge chooses the names of what it reports, and some libraries refuse a whole round for one
    unusual name. Therefore characters other than letters, digits, "_", "-", "." and " " become "_".
    """
    return {
        re.sub(r"[^\w .-]", "_", name): float(value)
        for name, value in row.items()
        if name not in NOT_METRICS and isinstance(value, int | float)
    }


def cause_of(row: Mapping[str, Any]) -> str:
    """Return which edge was refused in a round and why; "" for an accepted edge."""
    return "" if row["accepted"] else f"edge {row['edge']}: {row.get('cause', '')}"


def parameters_of(run: RunStart) -> dict[str, Any]:
    """Return the settings of a run, with the name of its strategy and its number of rounds.

    All values are texts, numbers, booleans or None; a value of another type becomes a text.
    """
    settings = {"strategy": run.strategy, "num_rounds": run.num_rounds, **run.settings}
    return {
        name: value if value is None or isinstance(value, str | int | float) else str(value)
        for name, value in settings.items()
    }
