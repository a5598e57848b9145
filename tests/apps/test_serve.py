"""The quickstart app, run whole in virtual time."""

import pytest

from flwr_cloned_kd import VARIANTS, edge_seed, take, train_edge
from flwr_cloned_kd.apps import build
from flwr_cloned_kd.apps.build import build_core, edge_recipe, split
from flwr_cloned_kd.apps.settings import Settings
from tests.apps.quickstart import play

pytestmark = pytest.mark.usefixtures("small_quickstart")

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


def test_all_strategies_run_in_turn_from_one_first_core(tmp_path):
    names = "cloned-kd,fedavg,fedprox,fedasync,fedbuff"
    config = QUICK | {"strategy": names, "max-in-flight": 2, "results": str(tmp_path)}
    run = play(config)
    rounds = {name: [r for r in run.rows if r["strategy"] == name] for name in names.split(",")}
    # 3 edges once; 2 rounds; 2 rounds of 3 edges, one answer each.
    assert [len(rows) for rows in rounds.values()] == [3, 2, 2, 6, 6]
    assert all(0 <= row["core-accuracy"] <= 1 for row in run.rows)
    # FedBuff takes three answers for a version; the two edges asked before it was made are late.
    late = [row["staleness"] for row in rounds["fedbuff"]]
    assert late[:3] == [0, 0, 0]
    assert late[3:5] == [1, 1]
    assert run.summary["runtime"]["phase-1"]["batch_clones"] is False  # convolutions
    assert {path.name for path in run.folder.glob("timeline-*.png")} == {
        f"timeline-{name}.png" for name in ("cloned-kd", "fedasync", "fedbuff")
    }


@pytest.mark.parametrize("names", ["fedavg,cloned-kd", "fedavg"])
def test_the_final_accuracy_is_that_of_the_first_strategy(tmp_path, names):
    run = play(QUICK | {"strategy": names, "results": str(tmp_path)})
    last = [row for row in run.rows if row["strategy"] == "fedavg"][-1]
    assert [*run.summary["final_accuracies"]] == names.split(",")
    assert run.summary["final_core_accuracy"] == last["core-accuracy"]


def test_the_rounds_are_those_of_the_plain_loop(tmp_path):
    settings = Settings(
        num_edges=3,
        core_epochs=2,
        edge_epochs=2,
        distill_epochs=2,
        variant="IEP",
        noisy_edges="1",
        guard="drop",
        guard_threshold=0.2,
        seed=4,
        device="cpu",
        client_device="cpu",
        results=str(tmp_path),
    )
    rows = play({name.replace("_", "-"): value for name, value in vars(settings).items()}).rows
    core = build_core(settings)
    variant = VARIANTS[settings.variant]
    train, _ = build.load(settings)
    parts = split(settings, train[1])
    state = core.state(core.pretrain())
    send = variant.init(core)
    for server_round, row in enumerate(rows, start=1):
        sent = send(state)
        edge = train_edge(
            core.model,
            sent,
            take(train, parts[server_round]),
            edge_recipe(settings, server_round - 1),
            num_clones=variant.num_clones,
            seed=edge_seed(core.seed, server_round),
        )
        state, metrics = core.distill(state, edge, sent=sent)
        assert {name: row[name] for name in metrics} == metrics
    assert len(rows) == 3


def test_a_run_resumes_from_its_checkpoint(tmp_path):
    config = QUICK | {"results": str(tmp_path), "checkpoint": str(tmp_path / "core.ckpt")}
    whole = play(QUICK | {"results": str(tmp_path)})
    assert len(play(config | {"num-rounds": 2}).rows) == 2
    resumed = play(config | {"num-rounds": 3})
    assert [row["core-accuracy"] for row in resumed.rows] == [
        row["core-accuracy"] for row in whole.rows
    ]


def test_a_resumed_run_undoes_the_edges_that_its_settings_name(tmp_path):
    config = QUICK | {"results": str(tmp_path), "checkpoint": str(tmp_path / "core.ckpt")}
    config |= {"keep-rounds": 3}
    play(config | {"num-rounds": 2})
    rows = play(config | {"num-rounds": 2, "quarantine": "0, 7"}).rows
    assert [row.get("undone") for row in rows] == [1, None]
    summary = play(config | {"num-rounds": 2, "quarantine": "0, 1"}).summary
    assert summary["final_core_accuracy"] == summary["first_core_accuracy"]


def test_a_resumed_run_reports_the_rounds_before_it_too(tmp_path):
    config = QUICK | {"results": str(tmp_path), "checkpoint": str(tmp_path / "core.ckpt")}
    config |= {"strategy": "cloned-kd,fedavg", "baseline-rounds": 1}
    once = play(config | {"num-rounds": 2}, compute=2.0)
    more = play(config | {"num-rounds": 3}, compute=2.0)
    again = play(config | {"num-rounds": 3}, compute=2.0)
    for run, num_rounds in ((once, 2), (more, 3), (again, 3)):
        assert [row["round"] for row in run.rows] == [*range(1, num_rounds + 1), 1]
        assert [row["strategy"] for row in run.rows] == ["cloned-kd"] * num_rounds + ["fedavg"]
        accuracy = run.rows[num_rounds - 1]["core-accuracy"]
        assert run.summary["final_core_accuracy"] == accuracy
    assert again.rows[2]["core-accuracy"] == more.rows[2]["core-accuracy"]
    assert again.summary["accounts"]["cloned-kd"] == more.summary["accounts"]["cloned-kd"]
    # The clock of the run was virtual: two seconds for every edge.
    assert [row["seconds"] for row in again.rows[:3]] == pytest.approx([2, 2, 2])
