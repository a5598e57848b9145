"""The core: it learns from every edge once. FedAvg then trains with the same edges."""

import json
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flwr_cloned_kd import ClonedKD, Core, Recipe, load_digits, practical
from flwr_cloned_kd.apps.plots import draw_accuracy
from flwr_cloned_kd.engine.ensemble import StateDict, seeded
from own_training_loop.task import Net, load_part

Row = dict[str, Any]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run cloned KD, then FedAvg with at least as many bytes, from the same first model."""
    settings = context.run_config
    num_edges = int(settings["num-edges"])
    seed = int(settings["seed"])
    recipe = Recipe(epochs=int(settings["core-epochs"]), batch_size=32, lr=0.05)
    core = Core(
        model=seeded(Net(), seed),
        dataset=load_part(0, num_edges, seed),
        held_out=load_digits()[1],
        recipe=recipe,
        distillation=practical(recipe),
        seed=seed,
    )
    first = core.pretrain()
    cloned: list[Row] = []
    strategy = ClonedKD(core, num_clones=int(settings["num-clones"]), on_round=cloned.append)
    strategy.start(grid, ArrayRecord(first), num_rounds=num_edges)
    budget = sum(row["bytes-down"] + row["bytes-up"] for row in cloned)
    averaged = run_fedavg(grid, core, first, num_edges, budget)
    report(core, first, {"cloned-kd": cloned, "fedavg": averaged}, str(settings["results"]))


def run_fedavg(grid: Grid, core: Core, first: StateDict, num_edges: int, budget: int) -> list[Row]:
    """Run Flower's FedAvg until it has exchanged `budget` bytes, to the nearest round."""
    num_bytes = num_edges * sum(len(array.data) for array in ArrayRecord(first).values())
    rows: list[Row] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        accuracy = core.held_out_accuracy(arrays.to_torch_state_dict(keep_input=True))
        row = {"round": server_round, "accepted": True, "core-accuracy": accuracy}
        if server_round:
            rows.append(row | {"bytes-down": num_bytes, "bytes-up": num_bytes})
        return MetricRecord({"accuracy": accuracy})

    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=num_edges, min_available_nodes=num_edges
    )
    num_rounds = max(1, round(budget / (2 * num_bytes)))
    strategy.start(grid, ArrayRecord(first), num_rounds=num_rounds, evaluate_fn=evaluate)
    return rows


def report(core: Core, first: StateDict, runs: dict[str, list[Row]], folder: str) -> None:
    """Print the last accuracy of every strategy, and write all rounds and a picture."""
    results = Path(folder or "results").absolute()
    results.mkdir(parents=True, exist_ok=True)
    first_accuracy = core.held_out_accuracy(first)
    rows = [{"strategy": name} | row for name, run in runs.items() for row in run]
    (results / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_accuracy(rows, first_accuracy, results / "accuracy.png")
    print(f"first core: accuracy {first_accuracy:.3f}")
    for name, run in runs.items():
        megabytes = sum(row["bytes-down"] + row["bytes-up"] for row in run) / 1e6
        accuracy = run[-1].get("core-accuracy")
        print(f"{name}: accuracy {accuracy:.3f} after {len(run)} rounds and {megabytes:.2f} MB")
    print(f"Results: {results}")
