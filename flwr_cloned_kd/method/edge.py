"""Phase 1: an edge trains clones of the core on its private data."""

from torch import nn

from ..engine.ensemble import Ensemble, StateDict, clone
from ..engine.fit import fit
from ..engine.inputs import Dataset
from ..engine.recipe import Recipe, fold_in
from ..engine.runtime import Runtime
from ..engine.samples import as_dataset
from ..engine.tasks import Task, classification


def edge_seed(seed: int, server_round: int) -> int:
    """Derive the seed of Phase 1 in one round from the seed of the core.

    Args:
        seed: of the core.
        server_round: number of the request, from 1.

    Returns:
        An integer of 63 bits.

    Examples:
        >>> from flwr_cloned_kd import edge_seed
        >>> edge_seed(0, 1) == edge_seed(0, 2)
        False
    """
    return fold_in(seed, "phase-1", server_round)


def train_edge(
    model: nn.Module,
    params: StateDict,
    dataset: Dataset,
    recipe: Recipe,
    *,
    task: Task = classification,
    num_clones: int = 3,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> Ensemble:
    """Phase 1: train clones of the core on private data; they differ in their batches (Sec. 4.2).

    Args:
        model: the architecture of the core; its own weights are not used.
        params: the model that the edge was sent, from which every clone starts.
        dataset: the private data, in any form that `as_dataset` converts.
        recipe: how Phase 1 trains.
        task: what the outputs of the model mean, as for the core.
        num_clones: E, at least 1.
        seed: of the shuffles and augmentations; `edge_seed` gives each round another one.
        runtime: speed only.

    Returns:
        The ensemble `[num_clones, ...]`.

    Raises:
        ValueError: as `fit`, if the labels do not fit the outputs of the model, or if
            `num_clones` is below 1.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Recipe, edge_seed, train_edge
        >>> data = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> model = torch.nn.Linear(1, 2)
        >>> recipe = Recipe(epochs=2)
        >>> edge = train_edge(model, model.state_dict(), data, recipe, seed=edge_seed(0, 1))
        >>> edge["bias"].shape  # three clones
        torch.Size([3, 2])
    """
    return fit(
        model,
        clone(params, num_clones),
        as_dataset(dataset, model, task),
        recipe,
        task=task,
        seed=seed,
        runtime=runtime,
        phase="Phase 1",
    )
