"""Measure what it costs to keep rounds and to undo an edge: digits, the model of the quickstart.

`python -m benchmarks.rollback --help`

A core learns from nine edges, each asked once. Then random pairs of a round and an edge are undone:
the edge is left out of the first rounds up to this one. Each result is compared, bit for bit, with
a core that has made the same distillations without the edge. Distillations are timed in seconds of
the processor, and files in seconds of the clock.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flwr_cloned_kd import (
    Core,
    CoreState,
    Recipe,
    digits_cnn,
    edge_seed,
    fold_in,
    load_digits,
    partition,
    take,
    train_edge,
)
from flwr_cloned_kd.apps.machine import capability
from flwr_cloned_kd.engine.ensemble import Ensemble
from flwr_cloned_kd.flower.kept_rounds import KeptRounds
from flwr_cloned_kd.io.checkpoint import digest, write
from flwr_cloned_kd.method.results import EdgeResult
from flwr_cloned_kd.method.rollback import KeptAnswer, KeptRound, replay

NUM_EDGES = 9


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Play the rounds, undo the pairs, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollback",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--pairs", type=int, default=20, help="(default: 20)")
    add("--clones", type=int, default=3, help="(default: 3)")
    add("--epochs", type=int, default=30, help="of Phases 1 and 2 (default: 30)")
    add("--json", type=Path, help="save the results")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), options.pairs, options.clones, options.epochs)
    results |= {"hardware": capability(torch.device("cpu")), "torch": torch.__version__}
    Console(width=110).print(table(results))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def measure(folder: Path, num_pairs: int, num_clones: int, epochs: int) -> dict[str, Any]:
    """Return bytes, the seconds of every round, and what each pair cost."""
    train, _ = load_digits()
    parts = partition(len(train[1]), 1 + NUM_EDGES, seed=fold_in(0, "split"))
    recipe = Recipe(epochs=epochs)
    core = Core(model=digits_cnn(), dataset=take(train, parts[0]), recipe=recipe)
    states = [core.state(core.pretrain())]
    kept = KeptRounds(folder / "core.ckpt", NUM_EDGES, core.distillation.memory_size)
    ensembles = list[Ensemble]()
    distill_seconds, write_seconds = [], []
    for number in range(1, NUM_EDGES + 1):
        state = states[-1]
        data = take(train, parts[number])
        seed = edge_seed(core.seed, number)
        ensembles.append(
            train_edge(core.model, state.params, data, recipe, num_clones=num_clones, seed=seed)
        )
        began = time.process_time()
        states.append(core.distill(state, ensembles[-1], sent=state.params)[0])
        distill_seconds.append(time.process_time() - began)
        began = time.perf_counter()
        answer = KeptAnswer(str(number), number, ensembles[-1], state.params)
        kept.add(KeptRound(state, (answer,)))
        write_seconds.append(time.perf_counter() - began)
    write(folder / "core.ckpt", *states[-1].state_dict())
    choices = [(last, edge) for last in range(1, NUM_EDGES + 1) for edge in range(1, last + 1)]
    pairs = random.Random(14).sample(choices, min(num_pairs, len(choices)))
    like = core.model.state_dict()
    undone = []
    for last, edge in sorted(pairs):
        began = time.perf_counter()
        rounds = list(kept.read(edge - 1, like))[: last + 1 - edge]
        read_seconds = time.perf_counter() - began
        began = time.process_time()
        *_, result = replay(core, rounds, {str(edge)})
        replay_seconds = time.process_time() - began
        twin = states[edge - 1]
        for number in range(edge + 1, last + 1):
            sent = states[number - 1].params
            twin, _ = core.distill_all(twin, [EdgeResult(ensembles[number - 1], sent)])
        undone.append(
            {
                "round": last,
                "edge": edge,
                "repeated": last - edge,
                "read-seconds": read_seconds,
                "replay-seconds": replay_seconds,
                "bit-equal": same_bits(result.after, twin),
            }
        )
    return {
        "model-bytes": sum(tensor.nbytes for tensor in like.values()),
        "round-bytes": [path.stat().st_size for path in sorted(kept.folder.iterdir())],
        "checkpoint-bytes": (folder / "core.ckpt").stat().st_size,
        "distill-seconds": distill_seconds,
        "write-seconds": write_seconds,
        "undone": undone,
    }


def same_bits(left: CoreState, right: CoreState) -> bool:
    """Return whether two states of a core have the same bits."""
    (left_tensors, left_header), (right_tensors, right_header) = (
        left.state_dict(),
        right.state_dict(),
    )
    same_tensors = digest(left_tensors, "") == digest(right_tensors, "")
    return same_tensors and left_header == right_header


def table(results: dict[str, Any]) -> Table:
    """Make the table of the pairs, by the number of rounds that were repeated."""
    megabytes = [size / 1e6 for size in results["round-bytes"]]
    rows = Table(
        title=f"Undoing an edge of digits: {results['hardware']}",
        caption=(
            f"A model has {results['model-bytes'] / 1e6:.3f} MB, a kept round "
            f"{median(megabytes):.3f} MB, nine kept rounds {sum(megabytes):.2f} MB, the checkpoint "
            f"{results['checkpoint-bytes'] / 1e6:.3f} MB. One distillation takes "
            f"{median(results['distill-seconds']):.2f} s, writing a round "
            f"{1000 * median(results['write-seconds']):.0f} ms."
        ),
    )
    for column in ("rounds repeated", "pairs", "bit-equal", "seconds to read", "seconds to repeat"):
        rows.add_column(column, justify="right")
    for repeated in sorted({pair["repeated"] for pair in results["undone"]}):
        pairs = [pair for pair in results["undone"] if pair["repeated"] == repeated]
        rows.add_row(
            str(repeated),
            str(len(pairs)),
            str(sum(pair["bit-equal"] for pair in pairs)),
            f"{fmean(pair['read-seconds'] for pair in pairs):.3f}",
            f"{fmean(pair['replay-seconds'] for pair in pairs):.2f}",
        )
    return rows


if __name__ == "__main__":
    main()
