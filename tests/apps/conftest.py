"""Data and a network that make a run of the quickstart a matter of a second."""

import pytest

from flwr_cloned_kd import take
from flwr_cloned_kd.apps import build
from tests.helpers.federation import TEST, TRAIN, network


@pytest.fixture
def small_quickstart(monkeypatch):
    """Replace the digits by some of them, and the ResNet by a small network, for one test."""
    monkeypatch.setattr(build, "load", lambda settings: (take(TRAIN, range(100)), TEST))
    monkeypatch.setattr(build, "model", lambda settings: network())
