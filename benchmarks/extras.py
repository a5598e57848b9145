"""What does each extra of the package cost, in packages, megabytes and seconds of imports?

Reads the installed packages; nothing is downloaded. The sizes are those that the packages state of
their files, without the bytecode that Python adds.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flwr_cloned_kd.__main__ import EXTRAS

IMPORTS = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"
BEFORE = "flwr_cloned_kd"
"""The package that is imported first, so that what an extra shares with it costs nothing."""


def closure(requirements: Iterable[str], extras: Iterable[str]) -> dict[str, Distribution]:
    """Return what pip would install for these requirements with these extras, by name.

    Raises:
        PackageNotFoundError: if a requirement is not installed in the present environment.
        ValueError: if it is installed in another version than the requirement allows.
    """
    distributions: dict[str, Distribution] = {}
    visited = set()
    waiting = list(applicable(requirements, extras))
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        installed = distribution(name)
        if not requirement.specifier.contains(installed.version, prereleases=True):
            raise ValueError(f"{name}: expected {requirement.specifier}, got {installed.version}")
        distributions[name] = installed
        visit = (name, frozenset(requirement.extras))
        if visit not in visited:
            visited.add(visit)
            waiting += applicable(installed.requires or [], requirement.extras)
    return distributions


def applicable(requirements: Iterable[str], extras: Iterable[str]) -> Iterator[Requirement]:
    """Yield the requirements whose markers hold on this machine, without extras or with one."""
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def megabytes(distributions: Iterable[Distribution]) -> float:
    """Return the size of the files of these packages, in units of 10^6 bytes."""
    files = (file for package in distributions for file in package.files or ())
    return sum(file.size or 0 for file in files) / 1e6


def import_seconds(modules: Iterable[str], repeats: int) -> float:
    """Return the smallest processor time of importing these modules after the package."""
    code = f"import {BEFORE}; " * (tuple(modules) != (BEFORE,)) + IMPORTS.format(", ".join(modules))
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(repeats)
    ]
    return min(float(run.stdout) for run in runs)


def rows(repeats: int) -> Iterator[str]:
    """Yield one row of a Markdown table for the package and for each extra."""
    requirements = distribution("flwr-cloned-kd").requires or []
    base = closure(requirements, [])
    yield "| extra | packages | MB | seconds of imports |"
    yield "| --- | --- | --- | --- |"
    seconds = import_seconds([BEFORE], repeats)
    yield f"| none | {len(base)} | {megabytes(base.values()):,.0f} | {seconds:.2f} |"
    for extra, modules in EXTRAS.items():
        try:
            installed = closure(requirements, [extra])
        except PackageNotFoundError as error:
            yield f"| {extra} | not installed: {error.name} | - | - |"
            continue
        added = [package for name, package in installed.items() if name not in base]
        seconds = import_seconds(modules, repeats)
        yield f"| {extra} | +{len(added)} | +{megabytes(added):,.0f} | +{seconds:.2f} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=3, help="imports of each (default: 3)")
    repeats = parser.parse_args(arguments).repeats
    for row in rows(repeats):
        print(row, flush=True)


if __name__ == "__main__":
    main()
