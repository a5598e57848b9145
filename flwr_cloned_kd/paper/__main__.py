"""Reproduce the paper's figures, and test its claims."""

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
from .figures import FIGURES, choose, draw, full_table, usual
from .methods import Plan
from .overview import draw_overview
from .page import rewrite
from .pool import all_records
from .skew import SPLITS
from .statistics import Results
from .store import key, stored

OVERVIEW = ("digits", "cifar100")
"""The datasets whose `skew` the README's picture shows."""

NO_PICTURE = 'No picture: it needs matplotlib, pip install "flwr-cloned-kd[plots]"'
EPILOG = """\
Results go to OUT/FIGURE.json, .md (a table) and .png. Rounds are kept under OUT/runs by the hash of
what determines them: the same command resumes where it was interrupted, and figures share runs.

  python -m flwr_cloned_kd.paper fig5 --seeds 5 --out results/paper
  python -m flwr_cloned_kd.paper all --dataset npz --data-path cifar100.npz --seeds 3
  python -m flwr_cloned_kd.paper fig5 --dataset npz --data-path cifar100.npz --seeds 2 \\
      --schedule short --rows CPP IPP CEM practical      # hours on a CPU
  python -m flwr_cloned_kd.paper skew --out docs/results/digits
  python -m flwr_cloned_kd.paper attacks --rows "*/Krum" "*/median" "omitted/none"
  python -m flwr_cloned_kd.paper overview --results docs/results --out docs/figures
  python -m flwr_cloned_kd.paper page --results docs/results --page docs/results.md
"""
SHORT = {"model": "resnet-8", "core_epochs": 12, "epochs": 4}
"""--schedule short: a CPU needs hours for it on CIFAR-100, and months for the paper's schedule."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser().parse_args(arguments)
    if options.figure == "page":
        return rewrite(options.page, options.results)
    if options.figure == "overview":
        return overview(options.results, options.out)
    try:
        check_numbers(options)
        base = base_settings(options)
        load(base)  # Report missing data before hours of work.
        plans = make_plans(base, options)
    except (ValueError, OSError, ImportError) as error:
        print(str(error).replace("run-config ", "--"), file=sys.stderr)
        return 2
    for name, plan in plans.items():
        results = play_all(name, plan, options)
        write(name, base, plan, results, options.out)
    return 0


def check_numbers(options: argparse.Namespace) -> None:
    """Raise a ValueError for a number below 1."""
    for name in ("seeds", "lesser_seeds", "jobs", "threads", "epochs", "core_epochs"):
        number = getattr(options, name)
        if number is not None and number < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: expected at least 1, got {number}")


def make_plans(base: Settings, options: argparse.Namespace) -> dict[str, Plan]:
    """Plan the runs of every figure that the options name."""
    lesser = min(options.lesser_seeds, options.seeds)
    plans = {
        name: choose(name, figure.plan(base, options.seeds, lesser), options.rows, options.splits)
        for name, figure in FIGURES.items()
        if options.figure in (name, "all")
    }
    if options.stored:
        folder = options.out / "runs"
        return {name: finished(name, plan, folder) for name, plan in plans.items()}
    if options.rows:
        return plans
    return {name: usual(name, plan) for name, plan in plans.items()}


def base_settings(options: argparse.Namespace) -> Settings:
    """Make the settings that all runs share: the digits demo's, or the paper's on CIFAR-100."""
    digits = options.dataset == "digits"
    short = options.schedule == "short"
    if digits and short:
        raise ValueError("--schedule short: expected another dataset than digits, which are quick")
    defaults: dict[str, Any] = SHORT if short else {"model": "resnet-32", "epochs": 164}
    if digits:
        defaults = {"model": "digits-cnn", "epochs": 30, "core_epochs": 12}
    epochs = options.epochs or defaults["epochs"]
    return Settings(
        dataset=options.dataset,
        data_path=options.data_path,
        model=options.model or defaults["model"],
        augment="none" if digits else "crop-and-flip",
        num_edges=options.num_edges,
        guard="none",  # The rows of a guard name it.
        core_epochs=options.core_epochs or defaults.get("core_epochs", epochs),
        edge_epochs=epochs,
        distill_epochs=epochs,
        device=options.device,
        cuda_graphs=options.cuda_graphs,
        bf16=options.bf16,
        batch_clones=options.batch_clones,
        compile="auto",
    )


def finished(name: str, plan: Plan, folder: Path) -> Plan:
    """Keep the runs of a figure whose records are all on disk, and the rows with such runs.

    Raises:
        ValueError: if there is no such run, or if a run is missing in a figure that needs all rows.
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
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rounds"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, completed=done)
        by_key = all_records(
            [*runs.values()],
            folder,
            jobs=options.jobs,
            threads=options.threads,
            on_round=lambda: bar.advance(task),
        )
    return {label: [by_key[key(run)] for run in rows] for label, rows in plan.items()}


def write(name: str, base: Settings, plan: Plan, results: Results, out: Path) -> None:
    """Write FIGURE.json and FIGURE.md, and FIGURE.png if Matplotlib is installed."""
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
    write_atomically(path.with_suffix(".md"), full_table(data))
    try:
        draw(data, path.with_suffix(".png"))
    except ImportError:
        print(NO_PICTURE)
    print(f"{name}: {path}")


def played_on(results: Results) -> dict[str, int]:
    """Count the runs, each once, by the processor and the version of PyTorch that played them."""
    runs = {id(records): records[0] for rows in results.values() for records in rows}
    return dict(Counter(first.get("played-on", "unknown") for first in runs.values()))


def overview(results: Path, out: Path) -> int:
    """Draw OUT/overview.png from RESULTS/DATASET/skew.json; returns the exit status."""
    paths = {name: results / name / "skew.json" for name in OVERVIEW}
    picture = out / "overview.png"
    try:
        data = {name: json.loads(path.read_text()) for name, path in paths.items()}
        out.mkdir(parents=True, exist_ok=True)
        draw_overview(data, picture)
    except FileNotFoundError as error:
        missing = f"expected {error.filename}; run skew --out {Path(error.filename).parent} first"
        print(f"overview: {missing}", file=sys.stderr)
        return 2
    except KeyError as error:
        missing = f"expected the row {error} too; run its figure without --rows"
        print(f"overview: {missing}", file=sys.stderr)
        return 2
    except ImportError:
        print(NO_PICTURE)
    else:
        print(f"overview: {picture}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    command = argparse.ArgumentParser(
        prog="python -m flwr_cloned_kd.paper",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = command.add_argument
    add(
        "figure",
        choices=[*FIGURES, "all", "overview", "page"],
        help="the experiment; or the README's picture, or the numbers of a page",
    )
    add("--dataset", choices=["digits", "cifar100", "npz"], default="digits")
    add("--data-path", default="", help="folder of cifar100, or the archive of npz")
    add(
        "--schedule",
        choices=["full", "short"],
        default="full",
        help="short: ResNet-8, 12 epochs in Phase 0 and 4 after (default: full)",
    )
    add(
        "--rows",
        nargs="+",
        default=[],
        metavar="ROW",
        help='only these rows of a figure, by their names in its JSON; "*" stands for any text, '
        'and "*" alone for all rows, also those of attacks that are not played by default',
    )
    add(
        "--splits",
        nargs="+",
        default=[],
        choices=[*SPLITS],
        metavar="SPLIT",
        help=f"only these splits of skew: {', '.join(SPLITS)}",
    )
    add("--stored", action="store_true", help="play nothing: sum up the runs that are finished")
    add("--seeds", type=int, default=5, help="number of seeds: 0, 1, ... (default: 5)")
    add("--lesser-seeds", type=int, default=3, help="number of seeds of lesser rows (default: 3)")
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
        help="overview and page: holds DATASET/FIGURE.json (default: ./docs/results)",
    )
    add(
        "--page",
        type=Path,
        default=Path("docs/results.md"),
        metavar="FILE",
        help="page: the file with the numbers to rewrite (default: ./docs/results.md)",
    )
    add("--jobs", type=int, default=1, help="number of runs side by side (default: 1)")
    add(
        "--threads",
        type=int,
        default=1,
        help="of PyTorch in each run; more threads round differently",
    )
    return command


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted: the same command resumes after the last round", file=sys.stderr)
        sys.exit(130)
