"""The README's picture, and what the command says if it cannot be drawn."""

import itertools
import json

from flwr_cloned_kd.paper import skew
from flwr_cloned_kd.paper.__main__ import main
from flwr_cloned_kd.paper.overview import COMPARED, OVER_ROUNDS
from flwr_cloned_kd.paper.statistics import spread


def skew_of(*methods, n=2):
    """Make a summary of `skew` as its JSON file holds it, with invented numbers."""
    result = {}
    for place, (method, split) in enumerate(itertools.product(methods, skew.SPLITS)):
        result[f"{method} | {split}"] = {
            "method": method,
            "split": split,
            "final": spread([0.7 - place / 100] * n),
            "mean of rounds": spread([0.6] * n),
            "worst drop": 0.0,
            "core": {"rounds": [0, 1], "mean": [0.5, 0.7 - place / 100], "sd": [0.0, 0.01]},
            "bytes": 1_000_000 * (1 + place % 3),
            "images": 100,
        }
    return {
        "figure": "skew",
        "seeds": dict.fromkeys(result, n),
        "settings": {"num_edges": 2, "model": "digits-cnn"},
        "result": result,
    }


def overview_of(folder, digits, cifar100):
    for name, data in (("digits", digits), ("cifar100", cifar100)):
        (folder / name).mkdir()
        (folder / name / "skew.json").write_text(json.dumps(data))
    return main(["overview", "--results", str(folder), "--out", str(folder / "pictures")])


def test_an_overview_is_drawn_of_two_datasets(tmp_path):
    digits = skew_of(*OVER_ROUNDS, "FedAvg, 1 round", "FedAvg, R rounds")
    assert overview_of(tmp_path, digits, skew_of("ours", "FedAvg, 1 round", n=1)) == 0
    assert (tmp_path / "pictures" / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_an_overview_names_the_row_it_lacks(tmp_path, capsys):
    digits = skew_of(*[method for method in OVER_ROUNDS if method != "unselective"])
    assert overview_of(tmp_path, digits, skew_of("ours")) == 2
    assert "expected the row 'unselective | IID' too" in capsys.readouterr().err


def test_an_overview_names_the_row_that_the_other_dataset_lacks(tmp_path, capsys):
    assert overview_of(tmp_path, skew_of(*OVER_ROUNDS), skew_of("unselective")) == 2
    assert "expected the row 'ours | IID' too" in capsys.readouterr().err


def test_an_overview_names_the_file_it_lacks(tmp_path, capsys):
    assert main(["overview", "--results", str(tmp_path)]) == 2
    missing = tmp_path / "digits"
    expected = f"expected {missing / 'skew.json'}; run skew --out {missing} first"
    assert expected in capsys.readouterr().err


def test_methods_of_skew_that_are_compared_exist():
    compared = {method for methods in COMPARED.values() for method in methods}
    assert compared | {*OVER_ROUNDS} <= skew.ROWS.keys()


def test_a_picture_of_skew_has_a_row_for_each_method_and_its_bytes():
    result = skew_of("first core", "ours", "CEM, paper")["result"]
    del result["CEM, paper | one class"]
    panels = skew.draw(result).axes
    assert [panel.get_title().split("\n")[0] for panel in panels] == [*skew.SPLITS]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["ours", "CEM, paper"]
    assert [text.get_text() for text in panels[-1].texts] == [" 2.00 MB", " 3.00 MB"]
