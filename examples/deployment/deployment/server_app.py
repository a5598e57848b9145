"""The core: learns from every SuperNode once, and resumes from its checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from deployment.task import part, recipe
from flwr_cloned_kd import ClonedKD, Core, digits_cnn, load_digits, practical

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    num_edges = int(config["num-edges"])
    seed = int(config["seed"])
    core = Core(
        model=digits_cnn(seed=seed),
        dataset=part(0, num_edges, seed),
        held_out=load_digits()[1],
        recipe=recipe(config, "core"),
        distillation=practical(recipe(config, "distill")),
        seed=seed,
    )
    first = core.pretrain()
    results = Path(str(config["results"])) if config["results"] else None
    strategy = ClonedKD(
        core,
        max_in_flight=int(config["max-in-flight"]),
        on_round=_appender(results),
        checkpoint=str(config["checkpoint"]) or None,
    )
    strategy.start(
        grid,
        ArrayRecord(first),
        num_rounds=int(config["num-rounds"]) or num_edges,
        timeout=float(config["timeout"]),
    )
    if results is not None and strategy.state is not None:
        summary = {
            "version": strategy.state.version,
            "first-core-accuracy": core.held_out_accuracy(first),
            "core-accuracy": core.held_out_accuracy(strategy.state.params),
        }
        (results / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _appender(results: Path | None) -> Callable[[dict[str, Any]], None] | None:
    """Append one line a round at once, so that the rounds of a killed ServerApp stay."""
    if results is None:
        return None
    results.mkdir(parents=True, exist_ok=True)

    def append(row: dict[str, Any]) -> None:
        with (results / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    return append
