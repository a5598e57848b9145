"""Results folders of runs, written by hand."""

import json

CONFIG = {"seed": 0, "strategy": "cloned-kd", "preset": "practical", "lr": 0.1, "results": "/a"}


def round_row(server_round, accuracy, strategy="cloned-kd", **others):
    """One line of metrics.jsonl."""
    row = {
        "strategy": strategy,
        "round": server_round,
        "edge": str(server_round),
        "accepted": 1.0,
        "core-accuracy": accuracy,
        "bytes-down": 1_000_000,
        "bytes-up": 2_000_000,
        "seconds": 1.5,
    }
    return row | others


def write_run(folder, rows=None, *, first=0.5, finished=True, cut="", **config):
    """Write the results folder of a run as `apps.Report` does.

    Args:
        rows: by default two rounds.
        finished: whether there is a summary.json.
        cut: the beginning of a line at the end of metrics.jsonl.
        config: entries that differ from `CONFIG`; "_" stands for "-".
    """
    folder.mkdir(parents=True)
    rows = [round_row(1, 0.6), round_row(2, 0.7)] if rows is None else rows
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metrics.jsonl").write_text("".join(lines) + cut)
    own_config = CONFIG | {key.replace("_", "-"): value for key, value in config.items()}
    start = {"config": own_config, "first_core_accuracy": first}
    (folder / "config.json").write_text(json.dumps(start))
    if finished:
        (folder / "summary.json").write_text(json.dumps(start | {"seconds": 3.0}))
    return folder
