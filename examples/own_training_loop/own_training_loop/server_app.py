"""The core: it learns from every edge once. FedAvg then trains with the same edges."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flwr_cloned_kd import Core, Recipe, load_digits
from flwr_cloned_kd.apps.compare import compare, read_counts
from flwr_cloned_kd.engine.ensemble import seeded
from own_training_loop.task import Net, load_part

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run cloned KD, then FedAvg for the same bytes, from the same first core."""
    config = context.run_config
    num_edges, num_clones, epochs, seed = read_counts(
        config, "num-edges", "num-clones", "core-epochs", "seed"
    )
    read_counts(config, "edge-epochs")  # the clients read it: check it before they do
    core = Core(
        model=seeded(Net(), seed),
        dataset=load_part(0, num_edges, seed),
        held_out=load_digits()[1],
        recipe=Recipe(epochs=epochs, batch_size=32, lr=0.05),
        seed=seed,
    )
    folder = str(config["results"])
    compare(core, grid, num_clones=num_clones, num_edges=num_edges, folder=folder)
