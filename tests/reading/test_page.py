"""The page is complete in itself, and what a run says cannot change it."""

import json
from html.parser import HTMLParser

import pytest

from flwr_cloned_kd import load_run, load_runs
from flwr_cloned_kd.asynchronous.timeline import Event
from flwr_cloned_kd.reading import figures
from flwr_cloned_kd.reading import page as page_module
from flwr_cloned_kd.reading.events import write_events
from flwr_cloned_kd.reading.figures import accuracy_figures, consensus_figures, timeline_figures
from flwr_cloned_kd.reading.groups import group_runs
from flwr_cloned_kd.reading.page import page, write_page
from tests.helpers.results import round_row, write_run

VENN = {"student-only": 0.25, "both": 0.5, "teacher-only": 0.05, "consensus": 0.625}
HOSTILE = '</script><script>alert("x")</script><img src="http://example.org/x" onerror=y>'


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and the texts inside each kind of tag."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.texts = {}
        self._open = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    @property
    def figures(self):
        """The figures of the page's JSON."""
        return json.loads(next(text for text in self.texts["script"] if text.startswith("{")))


def events_of(edges):
    for number, edge in enumerate(edges, 1):
        yield Event(number, "ask", edge, number, 0)
        yield Event(number + 1, "answer", edge, number, 0)
        yield Event(number + 1, "learn", edge, number, 0)
        yield Event(number + 2, "refuse" if number == 1 else "absorb", edge, number, 1)


@pytest.fixture
def runs(tmp_path):
    refused = round_row(3, 0.1, accepted=0.0, edge="7", cause="staleness: expected 2, got 3")
    rows = [round_row(1, 0.6, **VENN), round_row(2, 0.7, **VENN), refused]
    for seed in (0, 1):
        folder = write_run(tmp_path / f"run-{seed}", rows, seed=seed)
        write_events(folder, "cloned-kd", list(events_of(["a", "b"])))
    write_run(tmp_path / "other", [round_row(1, 0.9)], preset="paper")
    return load_runs([tmp_path])


@pytest.fixture
def parsed(runs):
    return Parsed(page(runs))


def test_it_loads_nothing_from_elsewhere(parsed):
    sources = [
        value
        for _, attributes in parsed.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster", "background")
    ]
    assert sources == []
    assert parsed.count("link") == parsed.count("img") == parsed.count("iframe") == 0
    assert not any("@import" in text or "url(" in text for text in parsed.texts["style"])


def test_its_policy_forbids_every_connection(parsed):
    policies = [
        attributes["content"]
        for tag, attributes in parsed.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    (policy,) = policies
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "http" not in policy


def test_it_has_a_section_for_every_subject(parsed):
    assert parsed.texts["h2"] == [
        "Summary",
        "Accuracy",
        "Consensus of core and edge",
        "Timeline",
        "Refused answers",
        "Configs",
    ]
    assert parsed.texts["h1"] == ["Comparison of 3 runs"]
    cells = parsed.texts["td"]
    assert "staleness: expected 2, got 3" in cells
    assert "paper" in cells


def test_figures_can_be_chosen_by_buttons_and_lists(parsed):
    assert list(parsed.figures) == ["accuracy", "consensus", "timeline"]
    assert [choice for choice, _ in parsed.figures["accuracy"]] == ["rounds", "bytes", "seconds"]
    assert [choice for choice, _ in parsed.figures["consensus"]] == ["cloned-kd, preset=practical"]
    assert [choice for choice, _ in parsed.figures["timeline"]] == [
        "run-0: cloned-kd",
        "run-1: cloned-kd",
    ]
    assert parsed.count("option") == 3
    radios = [attributes for _, attributes in parsed.tags if attributes.get("type") == "radio"]
    assert [radio["value"] for radio in radios] == ["0", "1", "2"]


def hostile_run(folder):
    rows = [
        round_row(1, 0.6, strategy=HOSTILE, **VENN),
        round_row(2, 0.6, strategy=HOSTILE, edge=HOSTILE, cause=HOSTILE, accepted=0.0),
    ]
    return load_run(write_run(folder, rows, preset=HOSTILE, **{HOSTILE: HOSTILE}))


def test_no_text_of_a_run_becomes_markup(tmp_path, monkeypatch):
    honest = load_run(write_run(tmp_path / "honest", [round_row(1, 0.6, **VENN)]))
    hostile = hostile_run(tmp_path / "hostile")
    bars = list(events_of([HOSTILE]))
    monkeypatch.setattr("flwr_cloned_kd.reading.runs.read_events", lambda *of: bars)
    parsed = Parsed(page([honest, hostile]))
    assert parsed.count("script") == 3
    assert parsed.count("img") == 0
    assert HOSTILE in parsed.texts["td"]  # as a text it is shown whole
    figures_json = next(text for text in parsed.texts["script"] if text.startswith("{"))
    assert "<" not in figures_json
    # Plotly reads markup in names of curves and of ticks, so these are escaped once more.
    _, figure = parsed.figures["accuracy"][0]
    names = [trace.get("name", "") for trace in figure["data"]]
    ticks = parsed.figures["timeline"][-1][1]["layout"]["yaxis"]["ticktext"]
    assert any("&lt;script&gt;" in name for name in names)
    assert not any("<script" in text or "<img" in text for text in [*names, *ticks])


def test_a_band_is_one_deviation_wide_and_a_curve_is_the_mean(tmp_path):
    for seed, accuracies in enumerate(([0.6, 0.7, 0.8], [0.8, 0.7])):
        rows = [round_row(number, value) for number, value in enumerate(accuracies, 1)]
        write_run(tmp_path / f"{seed}", rows, seed=seed)
    groups = group_runs(load_runs([tmp_path]))
    by_choice = dict(accuracy_figures(groups))
    band, mean = by_choice["rounds"]["data"]
    assert list(mean["x"]) == [0, 1, 2]  # as far as both runs go
    assert list(mean["y"]) == pytest.approx([0.5, 0.7, 0.7])
    # sd of 0.6 and 0.8: 0.1 * sqrt(2)
    assert band["y"][1] == pytest.approx(0.7 + 0.1 * 2**0.5)
    assert band["y"][-2] == pytest.approx(0.7 - 0.1 * 2**0.5)
    assert list(by_choice["bytes"]["data"][1]["x"]) == [0, 3, 6]
    assert list(by_choice["seconds"]["data"][1]["x"]) == [0, 1.5, 3]


def test_the_consensus_is_the_mean_over_the_runs_that_measured_a_round(tmp_path):
    other = VENN | {"consensus": 0.875}
    write_run(tmp_path / "a", [round_row(1, 0.6, **VENN), round_row(2, 0.6, **VENN)])
    write_run(tmp_path / "b", [round_row(1, 0.6, **other), round_row(2, 0.6)], seed=1)
    ((label, figure),) = consensus_figures(group_runs(load_runs([tmp_path])))
    assert label == "cloned-kd"
    *shares, consensus = figure["data"]
    assert [list(share["y"]) for share in shares] == [[0.25] * 2, [0.5] * 2, [0.05] * 2]
    assert list(consensus["y"]) == [0.75, 0.625]


def test_the_shares_of_many_rounds_are_areas(tmp_path):
    """A browser needs half a minute for a bar per round and share of ten thousand rounds."""
    rows = [round_row(number, 0.6, **VENN) for number in range(1, 102)]
    short = load_run(write_run(tmp_path / "short", rows[:100]))
    data = consensus_figures(group_runs([short]))[0][1]["data"]
    assert [trace["type"] for trace in data] == ["bar", "bar", "bar", "scatter"]
    long = load_run(write_run(tmp_path / "long", rows))
    data = consensus_figures(group_runs([long]))[0][1]["data"]
    assert {trace["type"] for trace in data} == {"scatter"}
    assert [trace.get("stackgroup") for trace in data] == ["shares"] * 3 + [None]
    assert list(data[1]["y"]) == [0.5] * 101


def test_the_timeline_has_a_bar_for_every_span(runs):
    _, figure = timeline_figures(runs)[0]
    assert list(figure["layout"]["yaxis"]["ticktext"]) == ["core", "a", "b"]
    bars = {trace["name"]: trace for trace in figure["data"]}
    assert set(bars) == {"core learns", "core refuses", "edge busy"}
    busy = bars["edge busy"]
    assert [list(busy[name]) for name in ("base", "x", "y")] == [[1, 2], [1, 1], [1, 2]]


def test_of_many_edges_and_bars_the_timeline_shows_the_first_and_says_so(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    write_events(folder, "cloned-kd", list(events_of(f"{number}" for number in range(70))))
    monkeypatch.setattr(figures, "MAX_SPANS", 20)
    ((_, figure),) = timeline_figures([load_run(folder)])
    assert len(figure["layout"]["yaxis"]["ticktext"]) == 61
    assert sum(len(trace["x"]) for trace in figure["data"]) == 20
    title = figure["layout"]["xaxis"]["title"]["text"]
    assert "the first 60 of 70 edges" in title
    assert "the first 20 of 130 bars" in title


def test_many_refusals_are_cut_and_counted(tmp_path, monkeypatch):
    rows = [round_row(number, 0.1, accepted=0.0, cause=f"c{number}") for number in range(1, 8)]
    run = load_run(write_run(tmp_path / "run", rows))
    monkeypatch.setattr(page_module, "MAX_REFUSALS", 5)
    parsed = Parsed(page([run]))
    assert "The first 5 of 7 refused answers." in parsed.texts["p"]
    assert "c5" in parsed.texts["td"]
    assert "c6" not in parsed.texts["td"]


def test_a_run_without_anything_still_makes_a_page(tmp_path):
    parsed = Parsed(page([load_run(write_run(tmp_path / "run", [], finished=False))]))
    assert "run: no round has ended yet." in parsed.texts["p"]
    assert "No answer was refused." in parsed.texts["p"]


def test_a_page_of_ten_thousand_rounds_is_a_few_megabytes(tmp_path):
    rows = [round_row(number, 0.5, **VENN) for number in range(1, 10_001)]
    run = load_run(write_run(tmp_path / "run", rows))
    write_page([run], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 9e6


def test_the_same_runs_give_the_same_page(runs):
    assert page(runs) == page(runs)
