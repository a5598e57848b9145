"""Print the knobs of the example apps: for an app's pyproject.toml, or as a table."""

import argparse
import json
import sys
import textwrap
from itertools import groupby

from .settings import Knob, knobs

WIDTH = 100
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flwr_cloned_kd.apps", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "form",
        choices=["config", "table"],
        help="config: [tool.flwr.app.config] in TOML; table: key, default, values, meaning",
    )
    form = parser.parse_args(arguments).form
    print(config_section() if form == "config" else table(), end="")
    return 0


def config_section() -> str:
    """Write the section of pyproject.toml with the default of every knob, in groups."""
    lines = ["[tool.flwr.app.config]"]
    for group, members in groupby(knobs(), key=lambda knob: knob.group):
        lines.append(f"# {group}")
        for knob in members:
            lines += _config_lines(knob)
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _config_lines(knob: Knob) -> list[str]:
    """Write a knob and its choices; its meaning comes behind, or above if the line is too long."""
    setting = f"{knob.key} = {_toml(knob.default)}"
    choices = " | ".join(_word(choice) for choice in knob.choices)
    both = f"{choices}: {knob.meaning}" if choices else knob.meaning
    if len(f"{setting}  # {both}") <= WIDTH:
        return [f"{setting}  # {both}"]
    meaning = textwrap.wrap(knob.meaning, WIDTH, initial_indent="# ", subsequent_indent="# ")
    return [*meaning, f"{setting}  # {choices}" if choices else setting]


def table() -> str:
    """Write a Markdown table of the knobs for each group."""
    lines = []
    for group, members in groupby(knobs(), key=lambda knob: knob.group):
        lines += [
            f"## {group}",
            "",
            "| key | default | values | meaning | affects |",
            "| --- | --- | --- | --- | --- |",
        ]
        for knob in members:
            values = ", ".join(f"`{_word(choice)}`" for choice in knob.choices)
            cells = (
                f"`{knob.key}`",
                f"`{_toml(knob.default)}`",
                values or knob.expected or WORDS[knob.kind],
                knob.meaning,
                knob.affects,
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _toml(value: str | int | float) -> str:
    """Write a value; JSON and TOML agree on texts, numbers and booleans."""
    return json.dumps(value)


def _word(choice: str) -> str:
    """Write a choice, which may be the empty text."""
    return choice or '""'


if __name__ == "__main__":
    sys.exit(main())
