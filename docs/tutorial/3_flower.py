# %% [markdown]
# # 3. In Flower
#
# In a real federation the edges are Flower clients on other machines. This part writes
# the client app and the server code that you would deploy, and runs them in one
# process: a `VirtualGrid` stands for the network. It passes real Flower messages to
# real client apps, so the same code runs under `flwr run`
# ([quickstart](../examples/quickstart_digits/README.md)) and in a
# [deployment](../deployment.md).

# %%
import logging

import matplotlib.pyplot as plt
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg

from flwr_cloned_kd import (
    ClonedKD,
    Core,
    EdgeClient,
    Recipe,
    VirtualGrid,
    accounts,
    digits_cnn,
    edge_app,
    load_digits,
    partition,
    take,
)

# This page does not show Flower's log.
logging.getLogger("flwr").setLevel(logging.ERROR)

NUM_EDGES = 5
train, test = load_digits()
parts = partition(len(train[1]), num_parts=10)
recipe = Recipe(epochs=12, batch_size=32)

# %% [markdown]
# ## The client app
#
# `client_fn` is Flower's: it makes the client of one node. `EdgeClient` trains as many
# clones as the server asks for; a request that asks for none, such as that of FedAvg,
# gets one plain model back.

# %%


def client_fn(context):
    rows = parts[1 + int(context.node_config["partition-id"])]
    return EdgeClient(digits_cnn(), take(train, rows), recipe)


client_app = edge_app(client_fn)

# %% [markdown]
# If you have a client app already, it stays as it is: a plain model is an ensemble of
# one. The mod `train_clones` makes it train several clones ([use it in your
# app](../drop_in.md)).
#
# ## The server
#
# In a server app these lines stand in `main(grid, context)`, and Flower gives you the
# grid.

# %%
core = Core(
    model=digits_cnn(), dataset=take(train, parts[0]), held_out=test, recipe=recipe
)
first = core.pretrain()

grid = VirtualGrid([client_app] * NUM_EDGES)
strategy = ClonedKD(core, num_clones=3)
result = strategy.start(grid, ArrayRecord(first), num_rounds=NUM_EDGES)

for row in strategy.history:
    kilobytes = row["bytes-up"] / 1e3
    accuracy = row["core-accuracy"]
    print(
        f"round {row['round']}: edge {row['edge']}, {kilobytes:.0f} kB, core {accuracy:.3f}"
    )

# %% [markdown]
# `result.arrays` is the last core. `strategy.history` has one row per round;
# [asynchronous runs](../asynchronous.md#what-a-round-costs) explains the columns.
#
# ## The same client app under FedAvg
#
# Nothing but the strategy changes. One round of FedAvg asks all five clients, so it
# costs as many messages as our five rounds, and a third of the bytes that the edges
# send. `evaluate_fn` measures the model of the server on the test images.

# %%


def evaluate(server_round, arrays):
    accuracy = core.held_out_accuracy(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": accuracy})


fedavg = FedAvg(fraction_evaluate=0.0).start(
    VirtualGrid([client_app] * NUM_EDGES),
    ArrayRecord(first),
    num_rounds=2,
    evaluate_fn=evaluate,
)

# %%
up, down = (accounts(strategy.history)[key] / 1e6 for key in ("bytes-up", "bytes-down"))
ours = [
    core.held_out_accuracy(first),
    *(row["core-accuracy"] for row in strategy.history),
]
measured = fedavg.evaluate_metrics_serverapp.values()
averaged = [metrics["accuracy"] for metrics in measured]

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
megabytes = [(up + down) * number / NUM_EDGES for number in range(NUM_EDGES + 1)]
axes.plot(megabytes, ours, "o-", label="cloned KD, one edge a round")
# Each round of FedAvg sends five models each way.
megabytes = [2 * down * number for number in range(3)]
axes.plot(megabytes, averaged, "s--", label="FedAvg, five clients a round")
axes.set(xlabel="megabytes, both directions", ylabel="accuracy on the test images")
axes.legend()
plt.show()
print(f"cloned KD: {down:.2f} MB down, {up:.2f} MB up")

# %% [markdown]
# One seed and 12 epochs are a demonstration and no measurement; [when to use
# what](../choosing.md) compares the methods by measured results.
#
# **Try it.** Give one edge wrong labels (`take(train, rows)[1].flip(0)`), and look at
# its row in `strategy.history`.
#
# Next: [several edges at a time](4_asynchronous.md).
