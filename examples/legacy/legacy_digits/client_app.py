"""The edges: a NumPyClient in a legacy client app.

`edge_app(client_fn)` instead of `ClientApp(client_fn)` would also answer servers of the Message
API, and would name the edge by its partition id without `get_properties`.
"""

from flwr.app import Context
from flwr.client import Client
from flwr.clientapp import ClientApp

from flwr_cloned_kd import EdgeClient, Recipe, digits_cnn
from legacy_digits.task import load_part


class Edge(EdgeClient):
    """An EdgeClient with a name, by which the server asks it once and in a fixed order."""

    name = ""

    def get_properties(self, config):
        return {"edge": self.name}


def client_fn(context: Context) -> Client:
    edge = int(context.node_config["partition-id"])
    config = context.run_config
    dataset = load_part(1 + edge, int(config["num-edges"]))
    client = Edge(digits_cnn(), dataset, Recipe(epochs=int(config["edge-epochs"])))
    client.name = str(edge)
    return client.to_client()


app = ClientApp(client_fn)
