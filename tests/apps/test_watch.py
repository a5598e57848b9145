"""The run-config key `watch` of the example apps."""

import importlib.util
import sys

import pytest

from flwr_cloned_kd import Callback
from flwr_cloned_kd.apps.settings import WATCHERS as NAMES
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.apps.watch import WATCHERS, check_watch
from tests.apps.quickstart import play, server
from tests.apps.test_serve import QUICK

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


class Names(Callback):
    """Keeps the names of the calls, and the rounds."""

    def __init__(self, strategy):
        self.strategy = strategy
        self.calls = []

    def started(self, run):
        self.calls.append(run.strategy)

    def absorbed(self, row):
        self.calls.append(row["round"])

    def finished(self, error):
        self.calls.append(error)


def test_each_name_has_a_callback():
    assert tuple(WATCHERS) == NAMES
    assert Settings(watch="live, tensorboard,live").watched == ["live", "tensorboard"]
    assert Settings().watched == []


@pytest.mark.usefixtures("small_quickstart")
def test_each_strategy_of_a_run_is_watched(tmp_path, monkeypatch):
    made = []

    def make(folder, strategy):
        made.append(Names(strategy))
        return made[-1]

    monkeypatch.setitem(WATCHERS, "live", make)
    names = "cloned-kd,fedavg,fedbuff"
    play(QUICK | {"strategy": names, "watch": "live", "results": str(tmp_path)})
    # The first callback was made by the check before Phase 0.
    assert [(one.strategy, one.calls) for one in made] == [
        ("", []),
        ("cloned-kd", ["ClonedKD", 1, 2, 3, None]),
        ("fedavg", ["FedAvg", 1, 2, None]),
        ("fedbuff", ["FedBuff", 1, 2, 3, 4, 5, 6, None]),
    ]


@pytest.mark.usefixtures("small_quickstart")
@pytest.mark.skipif(not HAS_TENSORBOARD, reason="needs the package tensorboard")
def test_event_files_are_in_the_folder_and_the_view_is_lines(tmp_path):
    run = play(
        QUICK
        | {"strategy": "cloned-kd,fedavg", "watch": "live,tensorboard", "results": str(tmp_path)}
    )
    written = {path.parent.name for path in run.folder.glob("tensorboard/*/events.*")}
    assert written == {"cloned-kd", "fedavg"}


def test_a_missing_package_ends_the_run_before_it_trains(tmp_path, monkeypatch):
    def train(settings):
        raise AssertionError("the run has begun")

    monkeypatch.setattr(server.build, "build_core", train)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'pip install "flwr-cloned-kd\[wandb\]"'):
        play(QUICK | {"watch": "wandb", "results": str(tmp_path)})
    with pytest.raises(ImportError):
        check_watch(Settings(watch="live,wandb"))
