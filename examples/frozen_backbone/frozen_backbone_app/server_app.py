"""The core: it learns from every edge once. FedAvg then trains with the same edges."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from flwr_cloned_kd import Core
from flwr_cloned_kd.apps.compare import compare, read_counts
from frozen_backbone_app.task import build_model, load, recipe_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run cloned KD, then FedAvg for the same bytes, from the same first core."""
    config = context.run_config
    num_edges, num_clones, epochs, seed = read_counts(
        config, "num-edges", "num-clones", "epochs", "seed"
    )
    parts, held_out = load(num_edges, seed)
    core = Core(
        model=build_model(str(config["backbone"]), seed),
        dataset=parts[0],
        held_out=held_out,
        recipe=recipe_of(epochs),
        seed=seed,
    )
    folder = str(config["results"])
    compare(core, grid, num_clones=num_clones, num_edges=num_edges, folder=folder)
