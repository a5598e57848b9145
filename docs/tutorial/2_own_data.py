# %% [markdown]
# # 2. Your own data
#
# The method needs three things from you: a model, labelled data for the core, and a
# recipe. This part uses a table instead of images, a model of two layers, and another
# optimizer.
#
# ## The data
#
# The table has 569 rows with 30 measurements of a tumour; the label says whether it is
# benign. A `Core` takes arrays, tensors, a `torch.utils.data.Dataset`, or a dict of
# columns, as here. [The guide](../your_model.md#the-data) lists all forms.

# %%
from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer

from flwr_cloned_kd import Core, Recipe, edge_seed, train_edge

measurements, labels = load_breast_cancer(return_X_y=True)
measurements = (measurements - measurements.mean(0)) / measurements.std(0)
order = np.random.default_rng(0).permutation(len(labels))


def columns(rows):
    return {"measurements": measurements[rows], "label": labels[rows]}


held_out = columns(order[:169])
core_set = columns(order[169:209])
edge_sets = [columns(rows) for rows in np.array_split(order[209:], 5)]
print({name: column.shape for name, column in core_set.items()})

# %% [markdown]
# ## The model and the recipe
#
# Any `torch.nn.Module` will do. It gets the inputs and returns one number per class.

# %%
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(30, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)
)
recipe = Recipe(
    epochs=20,
    batch_size=16,
    lr=3e-3,
    optimizer=partial(torch.optim.AdamW, weight_decay=0.01),
)

# %% [markdown]
# `Core` checks data and model at once, before any training. A mistake is one line that
# says what was expected and what it got:

# %%
wrong = {"measurements": core_set["measurements"], "label": core_set["label"] + 1}
try:
    Core(model=model, dataset=wrong, recipe=recipe)
except ValueError as error:
    print(error)

# %% [markdown]
# ## The run
#
# This is the loop of [part 1](1_algorithm.md).

# %%
core = Core(model=model, dataset=core_set, held_out=held_out, recipe=recipe)
state = core.state(core.pretrain())
print(f"first core  {core.held_out_accuracy(state.params):.3f}")
for number, edge_set in enumerate(edge_sets, start=1):
    seed = edge_seed(core.seed, number)
    edge = train_edge(model, state.params, edge_set, recipe, num_clones=3, seed=seed)
    state, metrics = core.distill(state, edge)
    print(f"edge {number}      {metrics['core-accuracy']:.3f}")

# %% [markdown]
# On a table as easy as this one the first core is already good, and there is little to
# gain; the [measured apps](../your_model.md#four-small-apps-measured) say how little.
#
# ## Other tasks
#
# The class of a sample is the default. For classes of tokens or pixels, for several
# labels, or for numbers, give `Core` and every edge the same task:
# `Classification(ignore_index=-100)`, `SeveralLabels()`, or
# `Regression(tolerance=0.5)`. A task of your own takes [twenty
# lines](../your_model.md#a-task-of-your-own).
#
# **If the accuracy does not rise**, print the `metrics` of each round and go through
# [this list](../your_model.md#if-the-accuracy-does-not-rise).
#
# Next: [the same in Flower](3_flower.md).
