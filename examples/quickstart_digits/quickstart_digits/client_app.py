"""The edges: one client app for cloned KD, FedAvg and every other strategy."""

from flwr.app import Context

from flwr_cloned_kd import EdgeClient, edge_app, fold_in, take
from flwr_cloned_kd.apps import Settings, build


def client_fn(context: Context) -> EdgeClient:
    """Make the edge that a node stands for, with its own part of the data."""
    settings = Settings.read(context.run_config)
    edge = build.edge_of(settings, context)
    train, held_out = build.load(settings)
    return EdgeClient(
        build.model(settings),
        take(train, build.split(settings, train[1])[1 + edge]),
        build.edge_recipe(settings, edge),
        held_out=held_out,
        seed=fold_in(settings.seed, "edge", edge),
        runtime=build.runtime(settings, settings.client_device),
    )


app = edge_app(client_fn, mods=[build.slow_edge])
