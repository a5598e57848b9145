"""The results page holds the numbers of the committed JSON files, and no others."""

import json
from pathlib import Path

import pytest

from flwr_cloned_kd.paper.__main__ import main
from flwr_cloned_kd.paper.figures import FIGURES, full_table, table_part
from flwr_cloned_kd.paper.page import render
from flwr_cloned_kd.paper.statistics import spread

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    "path", [DOCS / "results.md", DOCS / "choosing.md", ROOT / "README.md"], ids=str
)
def test_a_page_holds_the_numbers_of_the_committed_json(path):
    page = path.read_text()
    written = render(page, DOCS / "results")
    assert written == page, f"run `python -m flwr_cloned_kd.paper page --page {path.name}`"


def entry(method, split, values, drop=0.0):
    return {
        "method": method,
        "split": split,
        "final": spread(values),
        "mean of rounds": spread([value / 2 for value in values]),
        "worst drop": drop,
        "core": {"rounds": [0, 1], "mean": [0.25, values[0]], "sd": [0.0, 0.0]},
        "bytes": 2_780_000,
        "images": 157_000,
    }


ENTRIES = [
    entry("ours", "IID", [0.9, 0.8], -0.01),
    entry("ours", "one class", [0.7, 0.6], 0.604),
    entry("CEM, paper", "IID", [0.7, 0.7]),
    entry("CEM, paper", "one class", [0.75, 0.55]),
    entry("start at the clones' mean", "IID", [0.5]),
]
DATA = {
    "figure": "skew",
    "title": "Even and skewed edges",
    "dataset": "digits",
    "settings": {"model": "digits-cnn"},
    "seeds": {f"{row['method']} | {row['split']}": row["final"]["n"] for row in ENTRIES},
    "result": {f"{row['method']} | {row['split']}": row for row in ENTRIES},
}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    (folder / "digits").mkdir(parents=True)
    (folder / "digits" / "skew.json").write_text(json.dumps(DATA))
    return folder


def number(results, words):
    before = f"It is <!-- number: {words} -->"
    after = "<!-- end -->."
    page = render(f"{before}stale{after}", results)
    assert page.startswith(before)
    assert page.endswith(after)
    return page.removeprefix(before).removesuffix(after)


def test_only_what_stands_between_the_markers_changes(results):
    page = "Before\n\n<!-- table: digits/skew part=falls rows=ours -->{}<!-- end -->\nAfter  \n"
    rows = "| largest fall in a round, 2 seeds | IID | one class |\n| --- | --- | --- |\n"
    expected = page.format(f"\n\n{rows}| ours | none | 0.604 |\n\n")
    assert render(page.format("\n\nstale\n"), results) == expected
    assert render(expected, results) == expected


def test_the_marker_orders_the_rows_and_the_table_the_columns():
    lines = table_part(DATA, rows=["CEM, paper", "ours"], columns=["MB", "IID"]).splitlines()
    assert lines == [
        "| last core, 2 seeds | IID | MB |",
        "| --- | --- | --- |",
        "| CEM, paper | 0.700 ± 0.000 | 2.78 |",
        "| ours | 0.850 ± 0.071 | 2.78 |",
    ]


def test_rows_of_different_seeds_say_how_many_each_has():
    lines = table_part(DATA, "rounds").splitlines()
    assert lines[0] == "| mean over rounds | IID | one class | seeds |"
    assert lines[2] == "| ours | 0.425 ± 0.035 | 0.325 ± 0.035 | 2 |"
    assert lines[-1] == "| start at the clones' mean | 0.250 | - | 1 |"


def test_splits_of_different_seeds_say_so_one_by_one():
    more = {"ours | IID": entry("ours", "IID", [0.9, 0.8, 0.7])}
    data = DATA | {"result": DATA["result"] | more}
    assert table_part(data, rows=["ours"]).splitlines()[2].split(" | ")[3] == "3, 2"
    assert "seeds |" not in table_part(data, rows=["ours"], columns=["one class"]).splitlines()[2]


def test_a_table_with_a_title_has_every_part():
    text = full_table(DATA)
    assert text.startswith("Even and skewed edges: digits, digits-cnn, mean ± sample standard")
    for part in FIGURES["skew"].tables:
        assert table_part(DATA, part) in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ('digits/skew "ours | IID" final.mean', "0.850"),
        ('digits/skew "ours | IID" final.mean .1%', "85.0%"),
        ('digits/skew "ours | IID" final', "0.850 ± 0.071"),
        ('digits/skew "ours | IID" final points', "85.0 ± 7.1 points"),
        ('digits/skew "ours \\| IID" "mean of rounds.values.-1"', "0.400"),
        ('digits/skew "ours | IID" core.mean.0 .2f', "0.25"),
        ('digits/skew "ours | IID" bytes MB', "2.78 MB"),
        ('digits/skew "ours | IID" images k', "157k"),
        ('digits/skew "ours | IID" final.n d', "2"),
        ('digits/skew "start at the clones\' mean | IID" final', "0.500"),
        # Seed by seed 0.9 - 0.7 and 0.8 - 0.7: the deviation is 0.1 / sqrt(2).
        (
            'digits/skew "ours | IID" - "CEM, paper | IID" final',
            "+0.150 ± 0.071, up in 2 of 2",
        ),
        (
            'digits/skew "CEM, paper | IID" - "ours | IID" final points',
            "-15.0 ± 7.1 points, up in 0 of 2",
        ),
        ('digits/skew "ours | IID" - "CEM, paper | IID" final.mean', "+0.150"),
    ],
)
def test_a_number_in_prose(results, words, expected):
    assert number(results, words) == expected


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<!-- table: digits/skew -->", "expected <!-- end --> behind the marker"),
        (
            "<!-- table: digits/skew -->\n<!-- table: digits/skew -->\n<!-- end -->",
            "line 1, <!-- table: digits/skew -->: expected <!-- end -->",
        ),
        ("<!-- tabel: digits/skew -->\n<!-- end -->", "the last <!-- end --> closes no marker"),
        (
            "<!-- end --> <!-- table: digits/skew --><!-- end -->",
            "an <!-- end --> before this marker closes none",
        ),
        ("\n<!-- table: digits/fig3 --><!-- end -->", "line 2, <!-- table: digits/fig3 -->: "),
        ("<!-- table: digits/fig3 --><!-- end -->", "fig3.json; there is digits/skew"),
        (
            '<!-- table: digits/skew rows="ours; CPQ" --><!-- end -->',
            "row: expected one of ours; CEM, paper; start at the clones' mean; got 'CPQ'",
        ),
        (
            "<!-- table: digits/skew columns=GB --><!-- end -->",
            "column: expected one of IID; one class; seeds; MB; thousands of images; got 'GB'",
        ),
        (
            "<!-- table: digits/skew part=all --><!-- end -->",
            "part: expected one of final; rounds; falls; got 'all'",
        ),
        (
            "<!-- table: digits/skew columns='one class' "
            'rows="ours; start at the clones\' mean" --><!-- end -->',
            'row with one class: expected one of ours; got "start at the clones\' mean"',
        ),
        ("<!-- table: digits/skew row=ours --><!-- end -->", "expected <!-- table: DATASET/FIGURE"),
        ('<!-- table: digits/skew rows="ours --><!-- end -->', "No closing quotation"),
        ("A <!-- number: digits/skew ours --><!-- end -->", "expected <!-- number: DATASET/FIGURE"),
        (
            "A <!-- number: digits/skew ours final --><!-- end -->",
            "row: expected one of ours | IID; ours | one class; ",
        ),
        (
            'A <!-- number: digits/skew "ours | IID" final.median --><!-- end -->',
            "value 'final.median', step: expected one of mean; sd; n; values; got 'median'",
        ),
        (
            'A <!-- number: digits/skew "ours | IID" core --><!-- end -->',
            "value 'core': expected the path to a number or to a spread",
        ),
        (
            'A <!-- number: digits/skew "ours | IID" bytes GB --><!-- end -->',
            "Invalid format specifier",
        ),
        (
            '- <!-- number: digits/skew "ours | IID" bytes --><!-- end -->',
            "a line that a number begins is HTML to Markdown",
        ),
    ],
)
def test_what_cannot_be_written_is_one_line_and_changes_nothing(
    results, tmp_path, capsys, page, expected
):
    path = tmp_path / "page.md"
    path.write_text(page)
    assert main(["page", "--results", str(results), "--page", str(path)]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert path.read_text() == page


def test_a_damaged_json_is_named(results):
    path = results / "digits" / "skew.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"skew\.json: expected JSON, found"):
        render("<!-- table: digits/skew --><!-- end -->", results)


def test_the_command_rewrites_a_page_once(results, tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text('A <!-- number: digits/skew "ours | IID" bytes MB --><!-- end -->.\n')
    command = ["page", "--results", str(results), "--page", str(path)]
    assert main(command) == 0
    assert path.read_text().startswith("A <!-- number: ")
    assert "-->2.78 MB<!--" in path.read_text()
    assert "has new numbers" in capsys.readouterr().out
    assert main(command) == 0
    assert "is up to date" in capsys.readouterr().out
    assert [*tmp_path.glob("*.part")] == []
