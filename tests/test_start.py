"""`import flwr_cloned_kd` is fast: it imports nothing that few users need."""

import json
import subprocess
import sys

import pytest

MAX_SECONDS = 0.5
"""Limit for the processor's time of the import beside PyTorch and Flower; it takes 0.13 s."""
MEASURE = """
import json, sys, time
import torch
import flwr.app, flwr.client, flwr.client.mod, flwr.clientapp, flwr.clientapp.mod, flwr.common
import flwr.server, flwr.server.strategy, flwr.serverapp, flwr.serverapp.strategy
before = set(sys.modules)
started = time.process_time()
import flwr_cloned_kd
seconds = time.process_time() - started
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""
LATER = {
    "datasets",
    "flwr_datasets",
    "matplotlib",
    "matplotlib_venn",
    "mlflow",
    "pandas",
    "plotly",
    "psutil",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "tensorboard",
    "torchvision",
    "triton",
    "wandb",
}
"""Modules that are imported when something needs them: optional ones, and slow ones."""


@pytest.fixture(scope="module")
def start():
    """The smallest processor time of up to three imports, and the top-level modules imported."""
    smallest, names = float("inf"), []
    for _ in range(3):
        completed = subprocess.run(
            [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
        )
        seconds, names = json.loads(completed.stdout)
        smallest = min(smallest, seconds)
        if smallest < MAX_SECONDS:
            break
    return smallest, set(names)


def test_the_import_takes_less_than_half_a_second_of_the_processor(start):
    assert start[0] < MAX_SECONDS


def test_the_import_leaves_out_what_only_some_users_need(start):
    assert not start[1] & LATER
