# %% [markdown]
# # 5. Reading the results
#
# Every round leaves one row of numbers. This part makes a run in which one edge is
# bad, and finds in the rows what happened: how the accuracy rose, which edge was
# refused and why, and what the run cost.

# %%
import json
import logging
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from flwr.app import ArrayRecord

from flwr_cloned_kd import (
    ClonedKD,
    Core,
    EdgeClient,
    Limit,
    Recipe,
    VirtualGrid,
    accounts,
    digits_cnn,
    edge_app,
    ensemble_gap,
    load_digits,
    partition,
    take,
)
from flwr_cloned_kd.attacks import ScaleMovement, attack

logging.getLogger("flwr").setLevel(logging.ERROR)

train, test = load_digits()
parts = partition(len(train[1]), num_parts=10)
recipe = Recipe(epochs=12, batch_size=32)


def client_fn(context):
    rows = parts[1 + int(context.node_config["partition-id"])]
    return EdgeClient(digits_cnn(), take(train, rows), recipe)


honest = edge_app(client_fn)
reverse = attack(ScaleMovement(-3.0))  # sends the opposite of what it has learned
bad = edge_app(client_fn, mods=[reverse])

# %% [markdown]
# ## A run with a guard
#
# The guard refuses an edge whose ensemble is more than 0.3 less accurate than the
# core, on the core data. `on_round` is called after every round; here it appends the
# row to a file.

# %%
core = Core(
    model=digits_cnn(),
    dataset=take(train, parts[0]),
    held_out=test,
    recipe=recipe,
    guard=Limit(ensemble_gap, 0.3),
)


Path("rounds.jsonl").unlink(missing_ok=True)  # of an earlier run of this page


def write(row):
    with Path("rounds.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


strategy = ClonedKD(core, num_clones=2, on_round=write)
grid = VirtualGrid([honest, honest, bad, honest, honest], compute=60.0, core=10.0)
result = strategy.start(grid, ArrayRecord(core.pretrain()), num_rounds=5)

# %% [markdown]
# ## The rows
#
# A row is a flat dict, so that a file of rows is a table. With pandas it is
# `pandas.read_json("rounds.jsonl", lines=True)`.

# %%
rows = [json.loads(line) for line in Path("rounds.jsonl").read_text().splitlines()]
print(len(rows), "rows; the columns of the first:")
print(textwrap.fill(", ".join(rows[0]), width=88))

# %%
print("round edge accepted  core  ensemble  consensus")
for row in rows:
    line = f"{row['round']:5} {row['edge']:>4} {row['accepted']:8.0f}"
    if row["accepted"]:
        line += f" {row['core-accuracy']:5.3f} {row['ensemble-accuracy']:9.3f}"
        line += f" {row['consensus']:10.3f}"
    print(line)

# %% [markdown]
# ## Which edge was refused, and why
#
# `cause` says what the guard expected and what it got. A refused round leaves the core
# exactly as it was.

# %%
for row in rows:
    if not row["accepted"]:
        print(f"round {row['round']}, edge {row['edge']}: {row['cause']}")

# %% [markdown]
# ## What to look at
#
# | you see | it means |
# | --- | --- |
# | `ensemble-accuracy` above `edge-accuracy` | the mean of the clones is better than one clone |
# | `consensus` rises | core and edges classify the same images correctly: less is left to learn |
# | `known` near 0 | the ensemble is wrong about the core data, so it teaches nearly nothing |
# | `student-start` below 1 | the whole way to the clones would have cost accuracy |
# | `train-accuracy` falls | the core unlearns its own data: try a lower rate, or a guard |
# | `wait-seconds` grows | answers arrive faster than the core learns: see `max_together` |
#
# ## A picture and the bill

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
accepted = [row for row in rows if row["accepted"]]
rounds = [row["round"] for row in accepted]
left.plot(rounds, [row["core-accuracy"] for row in accepted], "o-")
for row in rows:
    if not row["accepted"]:
        left.axvline(row["round"], color="tab:red", linestyle=":", label="refused")
left.set(xlabel="round", ylabel="accuracy of the core")
left.legend()
regions = ("student-only", "both", "teacher-only")
bottom = [0.0] * len(accepted)
for region in regions:
    shares = [row[region] for row in accepted]
    right.bar(rounds, shares, bottom=bottom, label=region)
    bottom = [low + share for low, share in zip(bottom, shares)]
right.set(xlabel="round", ylabel="share of the test images")
right.legend(loc="lower left")
plt.show()

totals = accounts(rows)
print(f"{totals['bytes-down'] / 1e6:.2f} MB down, {totals['bytes-up'] / 1e6:.2f} MB up")
print(f"the core learned for {totals['core-seconds']:.0f} virtual seconds")

# %% [markdown]
# The right picture is a Venn diagram for each round: the test images that only the
# core, both, or only the ensemble classify correctly (Fig. 4 of the paper).
#
# The example apps write these rows by themselves, with a summary and pictures
# ([quickstart](../examples/quickstart_digits/README.md#results)). `load_run` reads
# their folders, and a command [compares them](../comparing.md).
#
# That was the tutorial. [Use it in your app](../drop_in.md), or read [how it
# works](../how_it_works.md).
