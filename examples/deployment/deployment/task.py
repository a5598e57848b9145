"""What both sides know: the model, how it is trained, and how this example splits its data."""

from flwr.app import UserConfig

from flwr_cloned_kd import Dataset, Recipe, load_digits, partition, take


def recipe(config: UserConfig, phase: str) -> Recipe:
    """Make the recipe of "core", "edge" or "distill"."""
    return Recipe(epochs=int(config[f"{phase}-epochs"]))


def part(index: int, num_edges: int, seed: int) -> Dataset:
    """Take part 0, the core's, or an edge's, from 1; your own app loads what the machine has."""
    train, _ = load_digits()
    return take(train, partition(len(train[1]), 1 + num_edges, seed=seed)[index])
