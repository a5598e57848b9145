"""Environments as `pip install` makes them, built from the installed packages without a network."""

import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path

SCRIPTS = f"../../../{Path(sys.executable).parent.name}/"
"""Where the commands of a distribution are, seen from its site-packages."""


def create(folder: Path, distributions: Iterable[Distribution]) -> Path:
    """Make a virtual environment that contains these distributions only; return its python.

    The packages are links into the present environment, so that PyTorch is not copied.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    python = folder / "bin" / "python"
    for source in distributions:
        names = [line.split(",")[0] for line in (source.read_text("RECORD") or "").splitlines()]
        commands = [name for name in names if name.startswith(SCRIPTS)]
        for command in commands:
            install_command(Path(source.locate_file(command)), folder / "bin", python)
        for name in {name.split("/")[0] for name in names} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(source.locate_file(name)))
    return python


def install_command(source: Path, folder: Path, python: Path) -> None:
    """Install a command of the present environment so that it runs with another python."""
    target = folder / source.name
    if source.read_bytes()[:2] == b"#!":
        _, _, text = source.read_text().partition("\n")
        target.write_text(f"#!{python}\n{text}")
        target.chmod(0o755)
    else:
        target.symlink_to(source)
