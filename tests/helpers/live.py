"""A scripted run in virtual time and its live view; as a command, the picture of docs/watching.md.

python -m tests.helpers.live docs/figures/live.svg
"""

import io
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console
from rich.terminal_theme import MONOKAI

from flwr_cloned_kd import LiveView, VirtualGrid
from tests.helpers.federation import NOTHING, Tally, adds

WIDTH = 92
ACCURACIES = [0.712, 0.781, 0.804, 0.846, 0.861, 0.879, 0.893, 0.902]
SECONDS = [61, 95, 122, 180, 128, 117, 156, 190, 134, 250, 171, 160]
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>.{unique_id}-matrix {{ font: {char_height}px/{line_height}px monospace;
white-space: pre; }} {styles}</style>
<rect fill="#0c0c0c" width="{width}" height="{height}" rx="8"/>
<g transform="translate(18, 9)"><defs>{lines}</defs>{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


class ClonedKD(Tally):
    """Reports scripted accuracies, refuses what edge 6 sends, and takes one photograph.

    Args:
        photograph: called while the model learns in round `server_round`.
    """

    def __init__(self, server_round, photograph, **options):
        super().__init__(**options)
        self.server_round = server_round
        self.photograph = photograph

    def absorb(self, dispatch, content, staleness):
        if len(self.history) + 1 == self.server_round:
            self.photograph()
        if dispatch.edge == "6":
            raise ValueError("conv1.weight: expected finite values, got nan")
        metrics = super().absorb(dispatch, content, staleness)
        return metrics | {"core-accuracy": ACCURACIES[self.version - 1]}

    def request(self, server_round, config):
        return RecordDict({"arrays": model(self.w, 230_000), "config": config}), self.w


def model(w, num_parameters):
    """A `w` for `Tally`, and parameters that only need to be sent."""
    return ArrayRecord({"w": Array(np.array(w)), "more": Array(np.zeros(num_parameters, "f4"))})


def edge(number):
    """A node that answers with three clones."""

    def answer(message, context):
        reply = adds(number)(message, context)
        if message.metadata.message_type == "train":
            reply.content["arrays"] = model(float(number), 3 * 230_000)
        return reply

    return answer


def film(server_round):
    """Run nine rounds with twelve edges; return a console with the view at the end of one round.

    Round 10 is the view after the run.
    """
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True)
    view = LiveView(Console(file=io.StringIO()))
    grid = VirtualGrid(
        [edge(number) for number in range(1, 13)],
        compute=lambda edge, visit, seed: SECONDS[int(edge)],
        core=40.0,
    )
    strategy = ClonedKD(
        server_round,
        lambda: console.print(view.picture()),
        max_in_flight=3,
        callbacks=[view],
    )
    with mock.patch("flwr_cloned_kd.loggers.live.time", SimpleNamespace(monotonic=grid.now)):
        strategy.start(grid, NOTHING, num_rounds=9)
    if server_round == 10:
        console.print(view.picture())
    return console


def picture():
    """Return the view in the middle of a run as SVG, with no font from outside."""
    theme = MONOKAI
    return film(6).export_svg(title="", code_format=SVG, unique_id="live", theme=theme)


if __name__ == "__main__":
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(picture())
