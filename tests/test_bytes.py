"""The benchmark of bytes: what it compresses, and how it compares the forms."""

import json
import sys
import zlib

import numpy as np
import pytest
import torch

from benchmarks import bytes as benchmark
from flwr_cloned_kd import CoreState
from flwr_cloned_kd.paper.run_state import RunState

ACCURACY = {"float32": 0.75, "int8": 0.5}


def state(server_round, value):
    """A core of a thousand equal weights, and an edge that has moved one of them."""
    core = {"w": torch.full((10, 100), float(value)), "n": torch.tensor(3)}
    edge = {"w": core["w"].clone()[None], "n": torch.tensor([4])}
    edge["w"][0, 0, 0] += 1
    return RunState(server_round, CoreState(core, memory=(edge,)), (), torch.zeros(0))


@pytest.fixture
def two_runs(monkeypatch):
    def play(run):
        assert run.settings.preset == "practical"
        for server_round in range(2):
            accuracy = ACCURACY[run.wire_dtype] + run.settings.seed / 8
            record = {"core-accuracy": accuracy, "bytes-down": 100, "bytes-up": 200}
            yield record, state(server_round, value=1)

    monkeypatch.setattr(benchmark, "play", play)


def test_forms_are_compared_with_float32_seed_by_seed(two_runs, tmp_path, capsys):
    path = tmp_path / "bytes.json"
    results = benchmark.main(["--seeds", "2", "--forms", "float32", "int8", "--json", str(path)])
    assert results["forms"]["int8"] == {
        "accuracy": [0.5, 0.625],
        "down": [200] * 2,
        "up": [400] * 2,
    }
    assert json.loads(path.read_text()) == results
    row = next(line for line in capsys.readouterr().out.splitlines() if " int8 " in line)
    # Mean, standard deviation, mean difference and its standard error: 0 for equal differences.
    assert [cell.strip() for cell in row.split("│")[1:6]] == [
        *("int8", "0.5625", "0.0884", "-0.2500", "0.0000")
    ]


def test_the_replies_of_a_run_are_compressed_as_clones_and_as_differences():
    sizes = benchmark.compressed([state(0, 1), state(1, 1)], lambda data: zlib.compress(data, 6))
    clones = np.ones(1000, np.float32)
    clones[0] = 2
    counter = np.int64(4).tobytes()
    expected = len(zlib.compress(clones.tobytes() + counter, 6))
    assert sizes["clones, float32"] == [4008, expected]
    difference = (clones - 1).astype(np.float16)
    expected = len(zlib.compress(difference.tobytes() + counter, 6))
    assert sizes["differences, float16"] == [2008, expected]
    assert sizes["differences, int8"][0] == 1000 + 8 + 4


def test_a_missing_zstandard_is_replaced_by_zlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    name, compress = benchmark.compression()
    assert name == "zlib, level 6"
    assert zlib.decompress(compress(b"bytes")) == b"bytes"
