"""The edges: the node config of a SuperNode says which part of the data it has."""

from flwr.app import Context

from deployment.task import part, recipe
from flwr_cloned_kd import EdgeClient, digits_cnn, edge_app


def client_fn(context: Context) -> EdgeClient:
    node = context.node_config
    config = context.run_config
    # The server splits into num-edges parts too. With another number, edges get data of the core.
    num_edges = int(config["num-edges"])
    edge = int(node["partition-id"])
    if not 0 <= edge < num_edges:
        raise ValueError(f"partition-id: expected below num-edges ({num_edges}), got {edge}")
    data = part(1 + edge, num_edges, int(config["seed"]))
    return EdgeClient(digits_cnn(), data, recipe(config, "edge"))


app = edge_app(client_fn)
