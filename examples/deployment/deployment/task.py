"""What core and edges share: the recipes, and how this example splits its data."""

from flwr.app import UserConfig

from flwr_cloned_kd import Dataset, Recipe, load_digits, partition, take


def recipe(config: UserConfig, phase: str) -> Recipe:
    """Make the recipe of a phase: "core", "edge" or "distill"."""
    return Recipe(epochs=int(config[f"{phase}-epochs"]))


def part(index: int, num_edges: int, seed: int) -> Dataset:
    """Take a part of the digits: 0 is the core's, 1, 2, ... are the edges'.

    Your own app loads the data of its machine instead.
    """
    train, _ = load_digits()
    return take(train, partition(len(train[1]), 1 + num_edges, seed=seed)[index])
