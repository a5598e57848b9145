"""The study of bad edges: what is planned, what a bad edge does in a run, hand-computed scores."""

from dataclasses import replace

import pytest
import torch

from flwr_cloned_kd import edge_seed, fold_in, take, train_edge
from flwr_cloned_kd.apps.build import build_core, load, recipe, split
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.attacks import ATTACKS, Backdoor, ScaleMovement, attack_model
from flwr_cloned_kd.paper import attacks
from flwr_cloned_kd.paper.rounds import play
from flwr_cloned_kd.paper.runs import Run
from flwr_cloned_kd.paper.tables import markdown


def core_after(run):
    *_, (record, state) = play(run)
    return record, state.core.params


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_every_attack_and_every_guard_is_in_the_study():
    assert {*attacks.STRENGTHS, *attacks.REVISITS} == ATTACKS.keys()
    plan = attacks.plan(Settings(), 3, 2)
    assert len(plan["noise, 10/drop"]) == 3
    assert len(plan["noise, 3/drop"]) == 2
    run = plan["noise, 3/drop"][0]
    assert (run.attack, run.strength, run.bad_edges) == ("noise", 3.0, (3, 6))
    assert run.settings.guard == "drop"
    assert plan["slow poison, 0.3, 2 visits/none"][0].num_rounds == 18
    assert plan["omitted/none"][0].oracle
    unselective = plan["two collude, 10, unselective/drop"][0].settings
    assert (unselective.preset, run.settings.preset) == ("unselective", "practical")
    assert not plan["clean/jump/Dirichlet 0.1"][0].attack
    assert plan["clean/jump/Dirichlet 0.1"][0].settings.dirichlet_alpha == 0.1


def test_a_bad_edge_of_a_run_sends_what_the_plain_loop_would(tiny):
    run = Run(settings=tiny, attack="movement reversed", strength=2.0, bad_edges=(1,))
    core = build_core(tiny)
    train, _ = load(tiny)
    state = core.state(core.pretrain())
    for i, rows in enumerate(split(tiny, train[1])[1:], start=1):
        edge = train_edge(
            core.model,
            state.params,
            take(train, rows),
            recipe(tiny, 1),
            num_clones=3,
            seed=edge_seed(core.seed, i),
        )
        if i == 2:
            edge, _ = attack_model(
                ScaleMovement(-2.0), state.params, edge, seed=fold_in(tiny.seed, "bad edge", 1)
            )
        state, _ = core.distill(state, edge)
    record, params = core_after(run)
    assert same(params, state.params)
    assert [one["bad"] for one, _ in [*play(run)][1:]] == [0.0, 1.0, 0.0]
    assert 0 <= record["backdoor"] <= 1
    assert not same(params, core_after(Run(settings=tiny))[1])


def test_a_bad_edge_of_a_run_trains_on_attacked_data(tiny):
    options = {"attack": "labels all 0", "bad_edges": (0, 1, 2)}
    _, honest = core_after(Run(settings=tiny, strength=0.0, **options))
    assert same(honest, core_after(Run(settings=tiny))[1])
    _, bad = core_after(Run(settings=tiny, strength=1.0, **options))
    assert not same(honest, bad)


def test_the_oracle_omits_bad_edges_whatever_they_do(tiny):
    options = {"bad_edges": (2,), "oracle": True}
    cores = [
        core_after(Run(settings=tiny, attack=attack, strength=1.0, **options))[1]
        for attack in ("free rider", "labels y + 1")
    ]
    assert same(*cores)
    assert same(cores[0], core_after(Run(settings=tiny, order=((0, 0), (1, 0))))[1])


def test_the_attacker_has_its_own_data_and_neither_guard_nor_held_out_data(tiny, monkeypatch):
    copies = []

    def spy(strength, core, num_classes):
        copies.append((core, num_classes))
        return attacks_of_noise(strength, core, num_classes)

    attacks_of_noise = ATTACKS["noise"]
    monkeypatch.setitem(ATTACKS, "noise", spy)
    run = Run(settings=replace(tiny, guard="drop"), attack="noise", strength=1.0, bad_edges=(1,))
    core_after(run)
    ((core, num_classes),) = copies
    train, _ = load(tiny)
    rows = split(tiny, train[1])[2]
    assert torch.equal(core.dataset[1], train[1][rows])
    assert core.guard is None
    assert core.held_out is None
    assert num_classes == 2


def test_every_attack_is_compared_with_the_row_omitted_of_its_preset_and_visits():
    plan = attacks.plan(Settings(), 1, 1)
    for name, row in attacks.ROWS.items():
        (run,), (reference,) = plan[name], plan[row.reference]
        assert reference.oracle
        assert reference.num_rounds == run.num_rounds
        assert reference.settings.preset == run.settings.preset


def records(*rounds):
    """Make the records of a run from (accuracy, accepted, bad) of each round after Phase 0."""
    first = {"core-accuracy": 0.5, "accepted": 1.0}
    return [
        first,
        *(
            {"core-accuracy": accuracy, "accepted": accepted, "bad": bad, "backdoor": 0.25}
            for accuracy, accepted, bad in rounds
        ),
    ]


RESULTS = {
    "clean/drop": [records((0.6, 1, 0), (0.6, 0, 0), (0.8, 1, 0), (0.9, 1, 0))],
    "omitted/none": [records((0.6, 1, 0), (0.6, 0, 1), (0.7, 1, 0), (0.8, 1, 0))],
    "noise, 10/none": [records((0.6, 1, 0), (0.3, 1, 1), (0.5, 1, 1), (0.7, 1, 0))],
    "noise, 10/drop": [records((0.6, 0, 0), (0.6, 0, 1), (0.5, 1, 1), (0.75, 1, 0))],
}


def test_scores_by_hand():
    summary = attacks.reduce(RESULTS)
    unguarded, guarded = summary["noise, 10/none"], summary["noise, 10/drop"]
    assert unguarded["right after"]["mean"] == 0.3
    assert unguarded["minus omitted"]["mean"] == pytest.approx(-0.1)
    assert unguarded["precision"] is None
    assert guarded["bad refused"]["mean"] == 0.5
    assert guarded["honest refused"]["mean"] == 0.5
    assert guarded["precision"] == 0.5
    assert guarded["backdoor"]["mean"] == 0.25
    assert summary["clean/drop"]["honest refused"]["mean"] == 0.25
    assert "minus omitted" not in summary["clean/drop"]


def test_tables_have_a_column_for_each_guard():
    summary = attacks.reduce(RESULTS)
    assert markdown(attacks.TABLES["final"], summary).splitlines()[2:] == [
        "| noise, 10 | -0.100 | -0.050 |"
    ]
    assert markdown(attacks.TABLES["precision"], summary).splitlines()[2:] == [
        "| noise, 10 | - | 0.50 |"
    ]
    alarms = markdown(attacks.TABLES["false alarms"], summary)
    assert alarms.splitlines() == ["| split | guard: drop |", "| --- | --- |", "| IID | 0.25 |"]
    line = markdown(attacks.TABLES["all"], summary, ["noise, 10"]).splitlines()[3]
    assert line == "| noise, 10 | drop | 0.750 | -0.050 | 0.50 | 0.50 | 0.50 | 0.50 | 0.25 | 1 |"


def test_the_trigger_of_the_record_is_that_of_the_backdoor(tiny):
    record, params = core_after(
        Run(settings=tiny, attack="backdoor", strength=1.0, bad_edges=(0, 1, 2))
    )
    core = build_core(tiny)
    images, labels = Backdoor().test_set(load(tiny)[1])
    core = replace(core, held_out=(images, labels))
    assert record["backdoor"] == pytest.approx(core.held_out_accuracy(params))
