"""The benchmark of answers that are distilled together: its arithmetic and its resumption."""

import json
import logging

import pytest

from benchmarks import together
from benchmarks.asynchrony import Study


def test_the_cost_of_a_further_answer_by_hand():
    assert together.further_share({1: 2.0, 8: 9.0}) == pytest.approx(0.5)
    assert together.further_share({1: 2.0, 8: 1.0}) == 0


@pytest.fixture
def scripted(monkeypatch):
    played = []

    def cloned_kd(study, in_flight, *, num_clones, together, further):
        played.append((together, further))
        return [(0.0, 0.5), (1800.0 / together, 0.75), (3600.0 / together, 0.9)]

    monkeypatch.setattr(Study, "__init__", lambda study, edges, seed, epochs: None)
    monkeypatch.setattr(Study, "cloned_kd", cloned_kd)
    monkeypatch.setattr(together, "seconds_of", lambda *args: {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.7})
    logger = logging.getLogger("flwr")
    level = logger.level
    yield played
    logger.setLevel(level)


def test_a_finished_run_is_not_played_again(scripted, tmp_path, capsys):
    path = tmp_path / "together.json"
    options = ["--seeds", "1", "--json", str(path)]
    together.main(options)
    assert scripted == [(count, pytest.approx(2.0)) for count in together.TOGETHER]
    together.main(options)
    assert len(scripted) == len(together.TOGETHER)
    assert json.loads(path.read_text())["further-share"] == pytest.approx(0.1)
    row = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("│        8")
    )
    assert [cell.strip() for cell in row.strip("│").split("│")][1] == "16"


def test_results_of_other_options_are_not_mixed(scripted, tmp_path):
    path = tmp_path / "together.json"
    together.main(["--seeds", "1", "--json", str(path)])
    with pytest.raises(SystemExit):
        together.main(["--seeds", "1", "--edges", "5", "--json", str(path)])
