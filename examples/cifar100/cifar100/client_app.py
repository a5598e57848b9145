"""The edges: one client app for cloned KD, FedAvg and FedProx."""

from flwr_cloned_kd import edge_app
from flwr_cloned_kd.apps import build_edge

app = edge_app(build_edge)
