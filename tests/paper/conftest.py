"""A study that is small enough for every figure."""

import numpy as np
import pytest
from torch import nn

from flwr_cloned_kd.apps import build
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.engine.ensemble import seeded


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """Replace the ResNet of a run: what these tests check does not depend on the network.

    The small one has what a ResNet has: convolutions, running statistics, and counters. It is
    copied and run in a fifth of the time.
    """

    def network(depth, num_classes, *, channels, width, seed, pixels):
        layers = [nn.Conv2d(channels, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
        return seeded(nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, num_classes)), seed)

    monkeypatch.setattr(build, "resnet", network)


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """Sixty images of two classes; the upper half of the images of class 1 is bright."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    parts = {}
    for part, count in (("train", 60), ("test", 20)):
        labels = rng.integers(0, 2, count)
        images = rng.normal(size=(count, 8, 8, 1)).astype(np.float32)
        images[labels == 1, :4] += 1
        parts |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(path, **parts)
    return path


@pytest.fixture(scope="session")
def tiny(archive):
    """Settings of a run that takes a second."""
    return Settings(
        dataset="npz",
        data_path=str(archive),
        num_edges=3,
        core_epochs=1,
        edge_epochs=1,
        distill_epochs=1,
        batch_size=16,
        preset="paper",
    )


@pytest.fixture(scope="session")
def command(archive):
    """Make the arguments of the command for one figure on the tiny data."""

    def arguments(figure, out, *, num_edges=2):
        return [
            figure,
            *("--dataset", "npz"),
            *("--data-path", str(archive)),
            *("--model", "digits-cnn"),
            *("--num-edges", str(num_edges)),
            *("--epochs", "1"),
            *("--seeds", "1"),
            *("--out", str(out)),
        ]

    return arguments
