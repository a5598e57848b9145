"""How the example apps let a run be seen while it runs."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ..asynchronous.callbacks import Callback
from ..loggers.live import LiveView
from ..loggers.mlflow import MlflowLogger
from ..loggers.tensorboard import TensorBoardLogger
from ..loggers.wandb import WandbLogger
from .settings import Settings

PROJECT = "flwr-cloned-kd"
"""Name of the project in W&B, and of the experiment in MLflow."""


def _live(folder: Path, strategy: str) -> Callback:
    return LiveView()


def _tensorboard(folder: Path, strategy: str) -> Callback:
    return TensorBoardLogger(folder / "tensorboard" / strategy)


def _mlflow(folder: Path, strategy: str) -> Callback:
    # One store for all runs, beside their folders: MLflow compares runs of one store.
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.parent / 'mlflow.db'}")
    return MlflowLogger(uri, experiment=PROJECT, run_name=f"{folder.name}-{strategy}")


def _wandb(folder: Path, strategy: str) -> Callback:
    return WandbLogger(
        project=PROJECT,
        name=f"{folder.name}-{strategy}",
        dir=folder,
        mode=os.environ.get("WANDB_MODE", "offline"),
    )


WATCHERS: Mapping[str, Callable[[Path, str], Callback]] = {
    "live": _live,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
"""Name in a run-config -> function that makes the callback for one strategy of a run."""


def check_watch(settings: Settings) -> None:
    """Check that the packages that `watch` needs are there, before a run has trained for hours.

    Raises:
        ImportError: with the command that installs what is missing.
    """
    watchers(settings, Path(), "")


def watchers(settings: Settings, folder: Path, strategy: str) -> list[Callback]:
    """Make the callbacks that `watch` names, for one strategy of a run.

    Args:
        folder: of the results.
        strategy: its name in the run-config.

    Raises:
        ImportError: if a package is missing, with the command that installs it.
    """
    return [WATCHERS[name](folder, strategy) for name in settings.watched]
