"""The edges: each one trains heads on its own digits."""

from flwr.app import Context

from flwr_cloned_kd import EdgeClient, edge_app
from frozen_backbone_app.task import build_model, load, recipe_of


def client_fn(context: Context) -> EdgeClient:
    """Make the edge that a node stands for."""
    config = context.run_config
    edge, seed = int(context.node_config["partition-id"]), int(config["seed"])
    parts, held_out = load(int(config["num-edges"]), seed)
    model = build_model(str(config["backbone"]), seed)
    recipe = recipe_of(int(config["epochs"]))
    return EdgeClient(model, parts[1 + edge], recipe, held_out=held_out, seed=seed)


app = edge_app(client_fn)
