# %% [markdown]
# # 1. The algorithm
#
# This part runs the method without Flower: one **core** learns from five **edges**,
# one after the other. All that happens is a call of a function, so you can look at
# every value.
#
# The data are the handwritten digits of scikit-learn, 1,797 images of 8x8 pixels. They
# are part of scikit-learn; nothing is downloaded.

# %%
import matplotlib.pyplot as plt

from flwr_cloned_kd import (
    Core,
    Recipe,
    digits_cnn,
    edge_seed,
    load_digits,
    member,
    partition,
    take,
    train_edge,
)

train, test = load_digits()
core_rows, *edge_rows = partition(len(train[1]), num_parts=10)
print(len(core_rows), "images for the core,", len(edge_rows[0]), "for each edge")

# %% [markdown]
# ## Phase 0: the core trains on its own data
#
# A `Core` has a model, a small labelled dataset and a `Recipe`, which says how to
# train. The recipe of the paper has 164 epochs; 12 are enough to see what happens.
# `held_out` is data on which accuracies are measured. The core never trains on it.

# %%
recipe = Recipe(epochs=12, batch_size=32)
core = Core(
    model=digits_cnn(),
    dataset=take(train, core_rows),
    held_out=test,
    recipe=recipe,
)
state = core.state(core.pretrain())
print(f"first core: accuracy {core.held_out_accuracy(state.params):.3f}")

# %% [markdown]
# `state` is a `CoreState`: the model, the temporal memory, and the number of edges
# that the core has learned from. It never changes; a round makes a new one.
#
# ## Phase 1: an edge trains clones
#
# The edge gets the model of the core and trains three copies of it, the **clones**, on
# its private data. The clones start equal and see the images in different orders, so
# they end different.

# %%
private = take(train, edge_rows[0])
seed = edge_seed(core.seed, 1)
edge = train_edge(core.model, state.params, private, recipe, num_clones=3, seed=seed)

name = "head.weight"
print("core: ", name, tuple(state.params[name].shape))
print("edge: ", name, tuple(edge[name].shape), " <- the clones are the first axis")
print("clone:", name, tuple(member(edge, 0)[name].shape))

# %% [markdown]
# ![An ensemble is a state dict with a leading clone axis](../figures/clone_axis.svg)
#
# An ensemble is nothing but a state dict whose tensors have a leading axis. Training,
# memory, messages and checkpoints all use this form.
#
# ## Phase 2: the core distils the ensemble
#
# The ensemble is the teacher and the core is the student. Both look at the images of
# the core, and the student learns from the labels and from the predictions of the
# teacher. The edge's data never leave the edge.

# %%
state, metrics = core.distill(state, edge)
shown = ["core-accuracy", "edge-accuracy", "ensemble-accuracy", "consensus", "known"]
for key in shown:
    print(f"{key:18} {metrics[key]:.3f}")

# %% [markdown]
# - `core-accuracy` is that of the new core, `edge-accuracy` is the mean of the clones,
#   and `ensemble-accuracy` belongs to the mean of their predictions.
# - `consensus` compares the new core with the ensemble: of the images that at least
#   one of them classifies correctly, the share that both do.
# - `known` is the share of the core data that the ensemble classifies correctly. With
#   the preset `practical`, which a `Core` uses by default, the ensemble is a teacher
#   of these images only.
#
# ## The loop
#
# Every further edge is asked once. The last three ensembles stay in the temporal
# memory and are teachers too.

# %%
rows = [metrics]
for number, edge_part in enumerate(edge_rows[1:5], start=2):
    private = take(train, edge_part)
    seed = edge_seed(core.seed, number)
    edge = train_edge(core.model, state.params, private, recipe, seed=seed)
    state, metrics = core.distill(state, edge)
    rows.append(metrics)
print("edges that the core has learned from:", state.version)
print("ensembles in the memory:", len(state.memory))

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
rounds = range(1, len(rows) + 1)
styles = {"core-accuracy": "o-", "ensemble-accuracy": "s--", "edge-accuracy": "^:"}
for key, style in styles.items():
    axes.plot(rounds, [row[key] for row in rows], style, label=key)
axes.set(xlabel="round", ylabel="accuracy on the test images", xticks=rounds)
axes.legend()
plt.show()

# %% [markdown]
# The core has seen only its own 144 images, and still it became better with every
# edge, because the clones carried over what they had learned. One run of so few epochs
# proves nothing: [results](../results.md) has all numbers, with five seeds and with
# the methods that are compared.
#
# **Try it.** Give an edge images of two digits only (`train[1] <= 1` says which rows),
# and compare the `core-accuracy` of `Core(distillation=practical(recipe))` and of
# `Core(distillation=unselective(recipe))` after this edge.
#
# Next: [your own data](2_own_data.md).
