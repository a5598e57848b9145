"""A process that runs a small federation on request and can be killed at any of its instants.

It reads one JSON object a line, {"checkpoint", "rounds", "kill_at"} and maybe "keep_rounds", forks,
runs there, and answers with one line: how the run ended. An instant is a call or a return of a
function, Python's or C's.
"""

import json
import os
import signal
import sys
import tempfile

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
    strategy = make(order["checkpoint"], keep_rounds=order.get("keep_rounds", 0))
    instants = Instants(order["kill_at"])
    sys.setprofile(instants)
    result = run(strategy, order["rounds"])
    sys.setprofile(None)
    tensors, state = strategy.state_dict()
    told = ("round", "edge", "accepted", "number", "staleness", "bytes-up", "train-accuracy")
    return {
        "count": instants.count,
        "writing": instants.writing,
        "digest": file.digest(tensors, json.dumps(state)),
        "history": [[row[name] for name in told] for row in strategy.history],
        "rounds": sorted(result.train_metrics_clientapp),
    }


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
