"""What the example apps assemble, run whole in virtual time."""

import json

import pytest
from flwr.app import Context, RecordDict

from flwr_cloned_kd import HingeStaleness, PolynomialStaleness, VirtualGrid, edge_app
from flwr_cloned_kd.apps.experiment import SlowEdge, build_edge, serve, staleness_weight
from flwr_cloned_kd.apps.settings import Settings

QUICK = {
    "num-edges": 3,
    "core-epochs": 1,
    "edge-epochs": 1,
    "distill-epochs": 1,
    "baseline-rounds": 2,
    "num-clones": 2,
    "device": "cpu",
    "client-device": "cpu",
}


def grid_of(config, num_edges=3, **options):
    app = edge_app(build_edge)

    def edge(message, context):
        context.run_config = config
        return app(message, context)

    return VirtualGrid([edge] * num_edges, **options)


def context_of(config):
    return Context(1, 0, {}, RecordDict(), config)


def test_all_strategies_run_in_turn_from_one_first_core(tmp_path):
    names = "cloned-kd,fedavg,fedprox,fedasync,fedbuff"
    config = QUICK | {"strategy": names, "max-in-flight": 2, "results": str(tmp_path)}
    report = serve(grid_of(config), context_of(config))
    rounds = {name: [r for r in report.rows if r["strategy"] == name] for name in names.split(",")}
    # 3 edges once; 2 rounds; 2 rounds of 3 edges, one answer each.
    assert [len(rows) for rows in rounds.values()] == [3, 2, 2, 6, 6]
    assert all(0 <= row["core-accuracy"] <= 1 for row in report.rows)
    # FedBuff takes three answers for a version; the two edges asked before it was made are late.
    late = [row["staleness"] for row in rounds["fedbuff"]]
    assert late[:3] == [0, 0, 0]
    assert late[3:5] == [1, 1]
    summary = json.loads((report.folder / "summary.json").read_text())
    assert summary["runtime"]["phase-1"]["batch_clones"] is True
    assert {path.name for path in report.folder.glob("timeline-*.png")} == {
        f"timeline-{name}.png" for name in ("cloned-kd", "fedasync", "fedbuff")
    }


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    config = QUICK | {"results": str(tmp_path), "checkpoint": str(tmp_path / "core.ckpt")}
    whole = serve(grid_of(QUICK), context_of(QUICK | {"results": str(tmp_path)}))
    assert len(serve(grid_of(config), context_of(config | {"num-rounds": 2})).rows) == 2
    rest = serve(grid_of(config), context_of(config | {"num-rounds": 3}))
    assert [row["core-accuracy"] for row in rest.rows] == [r["core-accuracy"] for r in whole.rows]


def test_a_resumed_run_reports_the_rounds_before_it_too(tmp_path):
    config = QUICK | {"results": str(tmp_path), "checkpoint": str(tmp_path / "core.ckpt")}
    config |= {"strategy": "cloned-kd,fedavg", "baseline-rounds": 1}
    once = serve(grid_of(config, compute=2.0), context_of(config | {"num-rounds": 2}))
    more = serve(grid_of(config, compute=2.0), context_of(config | {"num-rounds": 3}))
    again = serve(grid_of(config, compute=2.0), context_of(config | {"num-rounds": 3}))
    for report, num_rounds in ((once, 2), (more, 3), (again, 3)):
        lines = (report.folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert rows == report.rows
        assert [row["round"] for row in rows] == [*range(1, num_rounds + 1), 1]
        assert [row["strategy"] for row in rows] == ["cloned-kd"] * num_rounds + ["fedavg"]
    summaries = [json.loads((r.folder / "summary.json").read_text()) for r in (more, again)]
    assert summaries[0]["final_core_accuracy"] == more.rows[2]["core-accuracy"]
    assert summaries[1]["final_core_accuracy"] == more.rows[2]["core-accuracy"]
    assert summaries[1]["accounts"]["cloned-kd"] == summaries[0]["accounts"]["cloned-kd"]
    # Of the clock of the run, which was virtual: two seconds for every edge.
    assert [row["seconds"] for row in again.rows[:3]] == pytest.approx([2, 2, 2])


def test_an_edge_sleeps_as_long_as_it_was_told(monkeypatch):
    slept = []
    monkeypatch.setattr("flwr_cloned_kd.apps.experiment.time.sleep", slept.append)
    config = QUICK | {"edge-delays": "0,2.5"}
    for partition in range(3):
        edge = build_edge(Context(1, 5, {"partition-id": partition}, RecordDict(), config))
        assert isinstance(edge, SlowEdge)
        edge.fit(edge.get_parameters({}), {})
    assert slept == [0, 2.5, 0]


def test_the_staleness_weight_is_the_one_that_was_named():
    assert staleness_weight(Settings()) is None
    assert staleness_weight(Settings(staleness_weight="polynomial", staleness_a=2)) == (
        PolynomialStaleness(2)
    )
    named = Settings(staleness_weight="hinge", staleness_a=3, staleness_b=1)
    assert staleness_weight(named) == HingeStaleness(3, 1)
    assert staleness_weight(Settings(staleness_weight="constant"))(7) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"edge-delays": "1,x"}, "edge-delays: expected at most 9 numbers of seconds, got '1,x'"),
        ({"edge-delays": "1,-2"}, "edge-delays: expected at most 9 numbers"),
        ({"edge-delays": "1,2", "num-edges": 1}, "edge-delays: expected at most 1 numbers"),
        ({"max-staleness": -2}, "max-staleness: expected at least 0, or -1 for any, got -2"),
        ({"staleness-weight": "linear"}, "staleness-weight: expected one of"),
        ({"fedasync-alpha": 1.5}, "fedasync-alpha: expected a fraction"),
        ({"fedasync-alpha": 0}, "fedasync-alpha: expected above 0"),
        ({"fedbuff-size": 0}, "fedbuff-size: expected at least 1"),
    ],
)
def test_a_wrong_asynchronous_value_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        Settings.read(config)
