"""The command `report`: compare runs in a table and on an HTML page."""

import argparse
import sys
import webbrowser
from pathlib import Path

from rich.console import Console

from .groups import MAX_NAMED_KEYS, group_runs, remarks
from .page import write_page
from .runs import load_runs
from .tables import difference_cells, plain, print_table, summary_cells

INSTALL = 'pip install "flwr-cloned-kd[report]"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a results folder, or a folder of results folders",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="where to write the page (default: report.html)",
    )
    parser.add_argument("--no-html", action="store_true", help="print the table only")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument(
        "--target",
        type=_fraction,
        metavar="ACCURACY",
        help="also say how many bytes and seconds it took until the core had this accuracy",
    )


def report(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status: 0, or 2 if it could not do what was asked."""
    try:
        runs = load_runs(arguments.runs)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    groups = group_runs(runs)
    console = Console()
    print_table(console, summary_cells(groups, arguments.target))
    differences = difference_cells(runs)
    if differences is not None and len(differences.rows) > MAX_NAMED_KEYS:
        print_table(console, differences, "The configs differ in")
    for remark in remarks(runs, groups):
        console.print(plain(remark))
    if arguments.no_html:
        return 0
    try:
        write_page(runs, arguments.out, target=arguments.target)
    except ImportError as error:
        print(f"No page: {error}. It needs an extra: {INSTALL}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"No page: {error}", file=sys.stderr)
        return 2
    print(f"Page: {arguments.out.absolute()}")
    if arguments.open:
        webbrowser.open(arguments.out.absolute().as_uri())
    return 0


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction, 0 to 1, got {text!r}")
    return value
