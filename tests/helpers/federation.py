"""A small federation on digits, the same for every path through the code."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import nn
from torch.nn import functional as F

from flwr_cloned_kd import (
    AsyncStrategy,
    Core,
    Distillation,
    EdgeClient,
    Recipe,
    edge_app,
    edge_seed,
    load_digits,
    partition,
    take,
    train_edge,
)
from flwr_cloned_kd.engine.ensemble import seeded

RECIPE = Recipe(epochs=2, batch_size=32)
TRAIN, TEST = load_digits()
PARTS = partition(600, 10)


class Network(nn.Module):
    """A convolution, running statistics with their counter, and a head: one of each in a ResNet.

    It is copied and run in a fraction of the time that the ResNet of the examples takes.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(F.relu(self.bn(self.conv(x))).flatten(1))


def network():
    """Build the model of the core and of the edges; all have the same weights."""
    return seeded(Network(), 0)


def small_core(**changes):
    options = {
        "model": network(),
        "dataset": take(TRAIN, PARTS[0]),
        "recipe": RECIPE,
        "distillation": Distillation(recipe=RECIPE),
        "held_out": take(TEST, range(100)),
        "seed": 7,
    }
    return Core(**(options | changes))


def edge_client(edge):
    return EdgeClient(network(), take(TRAIN, PARTS[1 + edge]), RECIPE)


def app():
    return edge_app(lambda context: edge_client(int(context.node_config["partition-id"])))


def apps(num_edges):
    return [app() for _ in range(num_edges)]


def plain_loop(core, num_rounds, num_clones, send=lambda state: state.params):
    """Algorithm 1 without Flower."""
    state = core.state(core.pretrain())
    for server_round in range(1, num_rounds + 1):
        sent = send(state)
        edge = train_edge(
            core.model,
            sent,
            take(TRAIN, PARTS[server_round]),
            RECIPE,
            num_clones=num_clones,
            seed=edge_seed(core.seed, server_round),
        )
        state, _ = core.distill(state, edge, sent=sent)
    return state


class Tally(AsyncStrategy):
    """A strategy small enough to follow by hand: w <- w + what the edge sent, w starts at 0."""

    def begin(self, arrays):
        self.w = float(arrays["w"].numpy())

    @property
    def arrays(self):
        return ArrayRecord({"w": Array(np.array(self.w))})

    def request(self, server_round, config):
        return RecordDict({"arrays": self.arrays, "config": config}), self.w

    def absorb(self, dispatch, content, staleness):
        number = float(content["arrays"]["w"].numpy())
        with self.publishing:
            self.w, self.version = self.w + number, self.version + 1
        return {"w": self.w, "sent": dispatch.sent}


NOTHING = ArrayRecord({"w": Array(np.array(0.0))})


def adds(number):
    """A node that answers every request with one number, and says it is that number."""

    def answer(message, context):
        if message.metadata.message_type == "query":
            content = {"config": ConfigRecord({"edge": str(number)})}
        else:
            arrays = ArrayRecord({"w": Array(np.array(float(number)))})
            content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    return answer
