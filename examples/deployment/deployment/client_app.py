"""The edges: each SuperNode says by its node config which part of the data it has."""

from flwr.app import Context

from deployment.task import part, recipe
from flwr_cloned_kd import EdgeClient, digits_cnn, edge_app


def client_fn(context: Context) -> EdgeClient:
    node, config = context.node_config, context.run_config
    # num-edges, as on the server: split into another number, an edge would hold the core's data.
    num_edges, edge = int(config["num-edges"]), int(node["partition-id"])
    if not 0 <= edge < num_edges:
        raise ValueError(f"partition-id: expected below num-edges ({num_edges}), got {edge}")
    data = part(1 + edge, num_edges, int(config["seed"]))
    return EdgeClient(digits_cnn(), data, recipe(config, "edge"))


app = edge_app(client_fn)
