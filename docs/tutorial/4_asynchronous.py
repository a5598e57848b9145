# %% [markdown]
# # 4. Asynchronous, in virtual time
#
# Real edges need minutes or hours, and some need much longer than others. To try a
# setting without such a wait, use a `VirtualGrid`. It has a clock of its own: it runs
# real client apps and passes real messages, and a waiting time is only a number that
# is added to the clock. The same seed gives the same run, bit for bit.

# %%
import logging

import matplotlib.pyplot as plt
from flwr.app import ArrayRecord

from flwr_cloned_kd import (
    ClonedKD,
    Core,
    EdgeClient,
    LogNormal,
    Recipe,
    VirtualGrid,
    accounts,
    digits_cnn,
    draw_timeline,
    edge_app,
    load_digits,
    partition,
    take,
)

logging.getLogger("flwr").setLevel(logging.ERROR)

train, test = load_digits()
parts = partition(len(train[1]), num_parts=10)
recipe = Recipe(epochs=6, batch_size=32)


def client_fn(context):
    rows = parts[1 + int(context.node_config["partition-id"])]
    return EdgeClient(digits_cnn(), take(train, rows), recipe)


client_app = edge_app(client_fn)
core = Core(
    model=digits_cnn(), dataset=take(train, parts[0]), held_out=test, recipe=recipe
)
first = ArrayRecord(core.pretrain())

# %% [markdown]
# ## A federation with slow edges
#
# Seven edges. The time of one training is drawn from a log-normal distribution with a
# median of 60 seconds. The core needs 20 seconds to learn from an answer, and the
# links carry 100 kB per second. If you have measured such times, use them as a
# `Trace`.


# %%
def play(max_in_flight):
    grid = VirtualGrid(
        [client_app] * 7,
        compute=LogNormal(median=60.0, sigma=1.0),
        core=20.0,
        down=100e3,
        up=100e3,
        seed=3,
    )
    strategy = ClonedKD(core, num_clones=2, max_in_flight=max_in_flight)
    strategy.start(grid, first, num_rounds=7)
    return strategy


runs = {in_flight: play(in_flight) for in_flight in (1, 3)}

# %% [markdown]
# ## Who was busy when
#
# `strategy.events` holds what happened, and `draw_timeline` draws it. With one edge in
# flight, the core waits for every edge:

# %%


def show(strategy, title):
    draw_timeline(strategy.events, "timeline.png", title=title)
    _figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    axes.imshow(plt.imread("timeline.png"))
    axes.axis("off")
    plt.show()


show(runs[1], "one edge in flight")

# %% [markdown]
# With three in flight, an edge is asked as soon as a slot is free, and the core learns
# from answers in the order in which they arrive:

# %%
show(runs[3], "three edges in flight")

# %% [markdown]
# ## What it costs
#
# An answer that was under way while the core learned from another one is *stale*: the
# edge started from an older core. The staleness counts the versions in between.

# %%
for in_flight, strategy in runs.items():
    totals = accounts(strategy.history)
    minutes = strategy.history[-1]["time"] / 60
    print(f"{in_flight} in flight: {minutes:.1f} minutes")
    print(f"  seconds in which the core was idle: {totals['core-idle-seconds']:.0f}")
    print(f"  staleness -> number of rounds: {totals['staleness']}")

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for in_flight, strategy in runs.items():
    minutes = [row["time"] / 60 for row in strategy.history]
    accuracies = [row["core-accuracy"] for row in strategy.history]
    axes.step(minutes, accuracies, "o-", where="post", label=f"{in_flight} in flight")
axes.set(xlabel="virtual minutes", ylabel="accuracy on the test images")
axes.legend()
plt.show()

# %% [markdown]
# More edges in flight reach a good core sooner. They may also end lower, because more
# edges train an old core: with eight of nine in flight the
# [measured](../results.md#several-edges-in-flight-time-to-accuracy-in-virtual-time)
# loss is three to five points.
#
# **Try it.** `VirtualGrid(stay=..., away=..., crash=...)` lets edges leave, return and
# crash. `ClonedKD(max_staleness=2)` refuses answers that are too old, and
# `staleness_weight=PolynomialStaleness()` lets them count less.
#
# Next: [reading the results](5_results.md).
