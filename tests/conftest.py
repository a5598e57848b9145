"""What every test of the Flower side needs: an identity, a small federation, Flower's log."""

import gc
import logging

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity


def pytest_collection_finish(session):
    """Exclude all objects of the imports from garbage collection, so that it takes less time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def flower_identity():
    """A Message can only be made by a process that knows who it is."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


@pytest.fixture(autouse=True)
def one_thread():
    """Reductions depend on how many threads share them: bits are compared on one.

    For models this small one thread is also the faster choice.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def flower_log():
    """The lines that Flower's logger is given; it does not propagate to caplog."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("flwr")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
