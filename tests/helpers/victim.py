"""A process that runs a small federation on request and can be killed at any of its instants.

It reads one JSON object a line, {"checkpoint", "kill_at", "keep_rounds"}, forks, runs there, and
answers with one line: how the run ended. An instant is a call or a return of a function, Python's
or C's. Only a run with "kill_at" counts its instants; 0 is no instant, so that the run ends by
itself.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager

import torch
from flwr.app import ArrayRecord
from torch import nn

from flwr_cloned_kd import (
    ClonedKD,
    Core,
    Distillation,
    EdgeClient,
    Recipe,
    VirtualGrid,
    edge_app,
)
from flwr_cloned_kd.io import checkpoint as file

RECIPE = Recipe(epochs=1, batch_size=6, lr=0.1)
NUM_EDGES = 5
NUM_ROUNDS = 4


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(12) % 3
    return torch.randn(12, 4, generator=generator) + labels[:, None], labels


def model():
    linear = nn.Linear(4, 3)
    for index, parameter in enumerate(linear.parameters()):
        parameter.data = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) / 2
        parameter.data += index
    return linear


def client(context):
    return EdgeClient(model(), data(1 + int(context.node_config["partition-id"])), RECIPE)


def make(checkpoint=None, **options):
    core = Core(model=model(), dataset=data(0), distillation=Distillation(recipe=RECIPE), seed=3)
    return ClonedKD(core, num_clones=2, checkpoint=checkpoint, **options)


def grid():
    return VirtualGrid([edge_app(client)] * NUM_EDGES, compute=3.0, core=1.0)


def run(strategy, rounds):
    return strategy.start(grid(), ArrayRecord(strategy.core.model.state_dict()), num_rounds=rounds)


class Instants:
    """Counts them, notes those inside of writing a checkpoint, and kills at one."""

    def __init__(self, kill_at):
        self.count, self.kill_at, self.writing, self.inside = 0, kill_at, [], False

    def __call__(self, frame, event, argument):
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if frame.f_code is file.write.__code__ and event in ("call", "return"):
            self.writing.append(self.count)


def child(order):
    strategy = make(order["checkpoint"], keep_rounds=order["keep_rounds"])
    instants = Instants(order["kill_at"])
    if order["kill_at"] is not None:
        sys.setprofile(instants)
    result = run(strategy, NUM_ROUNDS)
    sys.setprofile(None)
    tensors, state = strategy.state_dict()
    columns = ("round", "edge", "accepted", "number", "staleness", "bytes-up", "train-accuracy")
    return {
        "count": instants.count,
        "writing": instants.writing,
        "digest": file.digest(tensors, json.dumps(state)),
        "history": [[row[name] for name in columns] for row in strategy.history],
        "rounds": sorted(result.train_metrics_clientapp),
    }


@contextmanager
def killer(keep_rounds=0):
    """Start this file as a process; yield the function that orders a run and returns its answer.

    The process forks for each run, so that PyTorch is imported once.
    """
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def order(checkpoint, kill_at=None):
        content = {"checkpoint": str(checkpoint), "kill_at": kill_at, "keep_rounds": keep_rounds}
        process.stdin.write(json.dumps(content) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield order
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def main():
    torch.set_num_threads(1)
    # What is imported or compiled at first use happens here: all children have the same instants.
    with tempfile.TemporaryDirectory() as folder:
        run(make(f"{folder}/core.ckpt"), 2)
        run(make(f"{folder}/core.ckpt"), 3)
    for line in sys.stdin:
        order = json.loads(line)
        receive, send = os.pipe()
        if not (pid := os.fork()):
            answer = json.dumps(child(order)).encode()
            with os.fdopen(send, "wb") as pipe:
                pipe.write(answer)
            os._exit(0)
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            answer = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status, **json.loads(answer or b"{}")}), flush=True)


if __name__ == "__main__":
    main()
