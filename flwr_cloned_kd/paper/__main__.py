"""Reproduce the paper's figures, and put its claims to the test."""

import argparse
import json
import platform
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import __version__
from ..apps.build import load
from ..apps.settings import CHOICES, Settings
from ..io.checkpoint import write_atomically
from .cache import all_records, key, stored
from .experiments import FIGURES, choose
from .page import rewrite
from .seeds import Plan, Results
from .skew import SPLITS
from .tables import table

OVERVIEW = ("digits", "cifar100")
"""The datasets whose `skew` is drawn for the README."""

NO_PICTURE = 'No picture: it needs matplotlib, pip install "flwr-cloned-kd[plots]"'
EPILOG = """\
Results go to OUT/FIGURE.json, .md (a table) and .png. Rounds are kept under OUT/runs by the hash of
what determines them: the same command again goes on where it was interrupted; figures share runs.

  python -m flwr_cloned_kd.paper fig5 --seeds 5 --out results/paper
  python -m flwr_cloned_kd.paper all --dataset npz --data-path cifar100.npz --seeds 3
  python -m flwr_cloned_kd.paper fig5 --dataset npz --data-path cifar100.npz --seeds 2 \\
      --schedule short --rows CPP IPP CEM practical      # hours on a CPU
  python -m flwr_cloned_kd.paper skew --out docs/results/digits
  python -m flwr_cloned_kd.paper overview --results docs/results --out docs/figures
  python -m flwr_cloned_kd.paper page --results docs/results --page docs/results.md
"""
SHORT = {"model": "resnet-8", "core_epochs": 12, "epochs": 4}
"""--schedule short: what a CPU does of CIFAR-100 in hours; the paper's schedule takes it months."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    if options.figure == "page":
        return rewrite(options.page, options.results)
    if options.figure == "overview":
        return overview(options.results, options.out)
    names = [name for name in FIGURES if options.figure in (name, "all")]
    try:
        for name in ("seeds", "lesser_seeds", "jobs", "threads", "epochs", "core_epochs"):
            number = getattr(options, name)
            if number is not None and number < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: expected at least 1, got {number}")
        base = base_settings(options)
        if names:
            load(base)  # before hours of work, does the data exist?
        lesser = min(options.lesser_seeds, options.seeds)
        plans = {
            name: choose(
                name, FIGURES[name].plan(base, options.seeds, lesser), options.rows, options.splits
            )
            for name in names
        }
        if options.stored:
            folder = options.out / "runs"
            plans = {name: finished(name, plan, folder) for name, plan in plans.items()}
    except (ValueError, OSError, ImportError) as error:
        print(str(error).replace("run-config ", "--"), file=sys.stderr)
        return 2
    for name, plan in plans.items():
        results = play_all(name, plan, options)
        write(name, base, plan, results, options.out)
    return 0


def base_settings(options: argparse.Namespace) -> Settings:
    """Make the settings that all runs share: the digits demo's, or the paper's on CIFAR-100."""
    digits, short = options.dataset == "digits", options.schedule == "short"
    if digits and short:
        raise ValueError("--schedule short: expected another dataset than digits, which are quick")
    usual: dict[str, Any] = SHORT if short else {"model": "resnet-32", "epochs": 164}
    if digits:
        usual = {"model": "digits-cnn", "epochs": 30, "core_epochs": 12}
    epochs = options.epochs or usual["epochs"]
    return Settings(
        dataset=options.dataset,
        data_path=options.data_path,
        model=options.model or usual["model"],
        augment="none" if digits else "crop-and-flip",
        num_edges=options.num_edges,
        core_epochs=options.core_epochs or usual.get("core_epochs", epochs),
        edge_epochs=epochs,
        distill_epochs=epochs,
        device=options.device,
        cuda_graphs=options.cuda_graphs,
        bf16=options.bf16,
        batch_clones=options.batch_clones,
        compile="auto",
    )


def finished(name: str, plan: Plan, folder: Path) -> Plan:
    """Keep the runs of a figure whose records are all on disk, and the rows that have any.

    Raises:
        ValueError: if there is no such run, or one is missing of a figure that needs every row.
    """
    kept = {
        row: [run for run in runs if len(stored(run, folder)) == 1 + run.num_rounds]
        for row, runs in plan.items()
    }
    kept = {row: runs for row, runs in kept.items() if runs}
    if not kept or (kept != plan and not FIGURES[name].apart):
        raise ValueError(f"--stored: expected finished runs of {name} in {folder}")
    return kept


def play_all(name: str, plan: Plan, options: argparse.Namespace) -> Results:
    """Play the runs of a figure that are not on disk yet, with a progress bar."""
    folder = options.out / "runs"
    runs = {key(run): run for rows in plan.values() for run in rows}
    total = sum(1 + run.num_rounds for run in runs.values())
    done = sum(len(stored(run, folder)) for run in runs.values())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("rounds"), TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, completed=done)
        found = all_records(
            [*runs.values()],
            folder,
            jobs=options.jobs,
            threads=options.threads,
            on_round=lambda: bar.advance(task),
        )
    return {label: [found[key(run)] for run in rows] for label, rows in plan.items()}


def write(name: str, base: Settings, plan: Plan, results: Results, out: Path) -> None:
    """Write FIGURE.json and FIGURE.md, and FIGURE.png where there is matplotlib."""
    figure = FIGURES[name]
    data: dict[str, Any] = {
        "figure": name,
        "title": figure.title,
        "dataset": Path(base.data_path).stem if base.dataset == "npz" else base.dataset,
        "seeds": {label: len(rows) for label, rows in plan.items()},
        "settings": asdict(base) | {"data_path": Path(base.data_path).name},
        "versions": {"python": platform.python_version(), "flwr-cloned-kd": __version__},
        "played on": played_on(results),
        "result": figure.reduce(results),
    }
    path = out / f"{name}.json"
    write_atomically(path, json.dumps(data, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), table(data))
    try:
        from .figures import draw
    except ImportError:
        print(NO_PICTURE)
    else:
        draw(data, path.with_suffix(".png"))
    print(f"{name}: {path}")


def played_on(results: Results) -> dict[str, int]:
    """Count the runs, each once, by the processor and the version of PyTorch that played them."""
    runs = {id(records): records[0] for rows in results.values() for records in rows}
    return dict(Counter(first.get("played-on", "unknown") for first in runs.values()))


def overview(results: Path, out: Path) -> int:
    """Draw OUT/overview.png from RESULTS/DATASET/skew.json of two datasets."""
    try:
        from .overview import draw_overview

        paths = {name: results / name / "skew.json" for name in OVERVIEW}
        found = {name: json.loads(path.read_text()) for name, path in paths.items()}
    except FileNotFoundError as error:
        lacking = f"expected {error.filename}; run skew --out {Path(error.filename).parent} first"
        print(f"overview: {lacking}", file=sys.stderr)
        return 2
    except ImportError:
        print(NO_PICTURE)
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw_overview(found, out / "overview.png")
    except KeyError as error:
        lacking = f"expected the row {error} too; run its figure without --rows"
        print(f"overview: {lacking}", file=sys.stderr)
        return 2
    print(f"overview: {out / 'overview.png'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flwr_cloned_kd.paper",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "figure",
        choices=[*FIGURES, "all", "overview", "page"],
        help="which experiment; or the README's picture, or the numbers of a page",
    )
    add("--dataset", choices=["digits", "cifar100", "npz"], default="digits")
    add("--data-path", default="", help="folder of cifar100, or the archive of npz")
    add("--schedule", choices=["full", "short"], default="full",
        help="short: ResNet-8, 12 epochs in Phase 0 and 4 after (default: full)")  # fmt: skip
    add("--rows", nargs="+", default=[], metavar="ROW",
        help="only these rows of a figure, by their names in its JSON")  # fmt: skip
    add("--splits", nargs="+", default=[], choices=[*SPLITS], metavar="SPLIT",
        help=f"of skew, only these: {', '.join(SPLITS)}")  # fmt: skip
    add("--stored", action="store_true", help="play nothing: sum up the runs that are finished")
    add("--seeds", type=int, default=5, help="0, 1, ... (default: 5)")
    add("--lesser-seeds", type=int, default=3, help="of lesser controls (default: 3)")
    add("--epochs", type=int, help="of Phases 1 and 2 (digits: 30, full: 164, short: 4)")
    add("--core-epochs", type=int, help="of Phase 0 (digits, short: 12, full: --epochs)")
    add("--num-edges", type=int, default=9, help="(default: 9)")
    add("--model", default="", help="(digits: digits-cnn, full: resnet-32, short: resnet-8)")
    add("--cuda-graphs", action="store_true", help="record training steps, on a GPU")
    add("--bf16", choices=[*CHOICES], default="auto", help="(default: auto)")
    add("--batch-clones", choices=[*CHOICES], default="auto", help="(default: auto)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--out", type=Path, default=Path("results/paper"), help="(default: ./results/paper)")
    add(
        "--results",
        type=Path,
        default=Path("docs/results"),
        metavar="FOLDER",
        help="of overview and page: DATASET/FIGURE.json are there (default: ./docs/results)",
    )
    add(
        "--page",
        type=Path,
        default=Path("docs/results.md"),
        metavar="FILE",
        help="of page: whose numbers are rewritten (default: ./docs/results.md)",
    )
    add("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    add("--threads", type=int, default=1, help="of PyTorch in each; more round differently")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from the last round", file=sys.stderr)
        sys.exit(130)
