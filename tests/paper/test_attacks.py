"""The study of bad edges: what is planned, what a bad edge does in a run, hand-computed scores."""

from dataclasses import replace

import pytest
import torch

from flwr_cloned_kd import edge_seed, fold_in, take, train_edge
from flwr_cloned_kd.apps.build import build_core, load, recipe, split
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.attacks import ATTACKS, Backdoor, ScaleMovement, attack_model
from flwr_cloned_kd.paper import attack_scores, attack_tables, attacks
from flwr_cloned_kd.paper.combining import FLOWER
from flwr_cloned_kd.paper.fig8 import roc
from flwr_cloned_kd.paper.figures import choose, usual
from flwr_cloned_kd.paper.rounds import play
from flwr_cloned_kd.paper.runs import Run
from flwr_cloned_kd.paper.tables import markdown
from tests.helpers.reference import same_bits


def core_after(run):
    *_, (record, state) = play(run)
    return record, state.core.params


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
    assert same_bits(params, state.params)
    assert [one["bad"] for one, _ in [*play(run)][1:]] == [0.0, 1.0, 0.0]
    assert 0 <= record["backdoor"] <= 1
    assert not same_bits(params, core_after(Run(settings=tiny))[1])


def test_a_bad_edge_of_a_run_trains_on_attacked_data(tiny):
    options = {"attack": "labels all 0", "bad_edges": (0, 1, 2)}
    _, honest = core_after(Run(settings=tiny, strength=0.0, **options))
    assert same_bits(honest, core_after(Run(settings=tiny))[1])
    _, bad = core_after(Run(settings=tiny, strength=1.0, **options))
    assert not same_bits(honest, bad)


def test_the_oracle_omits_bad_edges_whatever_they_do(tiny):
    options = {"bad_edges": (2,), "oracle": True}
    cores = [
        core_after(Run(settings=tiny, attack=attack, strength=1.0, **options))[1]
        for attack in ("free rider", "labels y + 1")
    ]
    assert same_bits(*cores)
    assert same_bits(cores[0], core_after(Run(settings=tiny, order=((0, 0), (1, 0))))[1])


def test_the_attacker_has_its_own_data_and_no_guard(tiny, monkeypatch):
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


def test_every_attack_is_compared_with_its_row_omitted():
    plan = attacks.plan(Settings(), 1, 1)
    for name, row in attacks.ROWS.items():
        (run,), (reference,) = plan[name], plan[row.reference]
        assert reference.oracle
        if row.one_edge_a_round:
            assert reference.num_rounds == run.num_rounds
        if row.defence in attacks.GUARDS:
            assert reference.settings.preset == run.settings.preset


def records(*rounds):
    """Make the records of a run from (accuracy, accepted, bad) of each round after Phase 0."""
    cost = {"bytes-down": 1_000, "bytes-up": 3_000, "images": 500}
    first = {"core-accuracy": 0.5, "accepted": 1.0, "images": 0, "bytes-down": 0, "bytes-up": 0}
    return [
        first,
        *(
            {"core-accuracy": accuracy, "accepted": accepted, "bad": bad, "backdoor": 0.25} | cost
            for accuracy, accepted, bad in rounds
        ),
    ]


RESULTS = {
    "clean/validation": [records((0.6, 1, 0), (0.6, 0, 0), (0.8, 1, 0), (0.9, 1, 0))],
    "omitted/none": [records((0.6, 1, 0), (0.6, 0, 1), (0.7, 1, 0), (0.8, 1, 0))],
    "noise, 10/none": [records((0.6, 1, 0), (0.3, 1, 1), (0.5, 1, 1), (0.7, 1, 0))],
    "noise, 10/validation": [records((0.6, 0, 0), (0.6, 0, 1), (0.5, 1, 1), (0.75, 1, 0))],
}


def test_scores_by_hand():
    summary = attack_scores.reduce(RESULTS)
    unguarded, guarded = summary["noise, 10/none"], summary["noise, 10/validation"]
    assert unguarded["right after"]["mean"] == 0.3
    assert unguarded["minus omitted"]["mean"] == pytest.approx(-0.1)
    assert unguarded["precision"] is None
    assert guarded["bad refused"]["mean"] == 0.5
    assert guarded["honest refused"]["mean"] == 0.5
    assert guarded["precision"] == 0.5
    assert guarded["backdoor"]["mean"] == 0.25
    assert summary["clean/validation"]["honest refused"]["mean"] == 0.25
    assert "minus omitted" not in summary["clean/validation"]


def test_a_table_shows_what_the_default_guard_does_to_honest_edges():
    falling = [records((0.6, 1, 0), (0.3, 1, 0), (0.5, 1, 0), (0.7, 1, 0))]
    summary = attack_scores.reduce(RESULTS | {"clean/none/Dirichlet 0.1": falling})
    assert markdown(attack_tables.TABLES["honest"], summary).splitlines()[2:] == [
        "| IID | validation | 0.900 | 0.725 | - | 0.25 | 1 |",
        "| Dirichlet 0.1 | none | 0.700 | 0.525 | 0.300 | 0.00 | 1 |",
    ]


def test_tables_have_a_column_for_each_guard():
    summary = attack_scores.reduce(RESULTS)
    assert markdown(attack_tables.TABLES["final"], summary).splitlines()[2:] == [
        "| noise, 10 | -0.100 | -0.050 |"
    ]
    assert markdown(attack_tables.TABLES["precision"], summary).splitlines()[2:] == [
        "| noise, 10 | - | 0.50 |"
    ]
    alarms = markdown(attack_tables.TABLES["false alarms"], summary)
    assert alarms.splitlines() == [
        "| honest edges refused | validation |",
        "| --- | --- |",
        "| IID | **0.25** |",
    ]
    cost = markdown(attack_tables.TABLES["cost"], summary).splitlines()[2:]
    assert cost == ["| none | 0.02 | 2 |", "| validation | 0.02 | 2 |"]


def with_final(accuracy, edges="noise, 10/validation"):
    """Return the results with another last core of one row."""
    (first, *others, last), *_ = RESULTS[edges]
    return RESULTS | {edges: [[first, *others, last | {"core-accuracy": accuracy}]]}


# Omitted ends at 0.8, and the attack without a guard at 0.7.
@pytest.mark.parametrize(("guarded", "is_bold"), [(0.75, True), (0.785, True), (0.795, False)])
def test_a_row_is_bold_if_the_default_guard_loses_more_than_a_point(guarded, is_bold):
    summary = attack_scores.reduce(with_final(guarded))
    lines = markdown(attack_tables.TABLES["all"], summary, ["noise, 10"]).splitlines()[2:]
    assert [line.startswith("| **noise, 10** | **validation** |") for line in lines] == [
        False,
        is_bold,
    ]
    assert lines[0].startswith("| noise, 10 | none | 0.700 | -0.100 | 0.30 | 0.00 |")


def test_a_row_is_not_bold_if_the_attack_costs_little_without_a_guard():
    summary = attack_scores.reduce(with_final(0.785, "noise, 10/none"))
    assert "**" not in markdown(attack_tables.TABLES["all"], summary)


@pytest.mark.parametrize(
    ("split", "refused", "is_bold"),
    [
        ("IID", 1 / 50, False),
        ("IID", 0.03, True),
        ("Dirichlet 0.3", 0.05, False),
        ("Dirichlet 0.3", 0.06, True),
        ("Dirichlet 0.1", 1.0, False),
    ],
)
def test_false_alarms_above_the_limit_of_their_split_are_bold(split, refused, is_bold):
    summary = attack_scores.reduce({"clean/validation": RESULTS["clean/validation"]})
    row = summary["clean/validation"] | {"split": split, "honest refused": {"mean": refused}}
    table = markdown(attack_tables.TABLES["false alarms"], {"row": row})
    assert ("**" in table) == is_bold


def scored(bad, **scores):
    return {"bad": bad, "scores": scores}


def test_the_area_under_the_roc_is_that_of_figure_8():
    bad = [scored(1, movement=value, class_drop=0.0) for value in (0.9, 0.4, 0.4)]
    honest = [scored(0, movement=value) for value in (0.1, 0.4, 0.5)]
    areas = attack_scores.areas([*bad, {"bad": 1}], honest)
    # Of nine pairs five are in order and two are ties; no honest round has a class drop.
    assert areas == {"movement": pytest.approx(6 / 9)}
    assert areas["movement"] == pytest.approx(roc([0.9, 0.4, 0.4], [0.1, 0.4, 0.5])["area"])


def test_the_second_roc_counts_skewed_edges_as_honest():
    def with_movement(name, values):
        return [
            [first, *(one | {"scores": {"movement": v}} for one, v in zip(rounds, values))]
            for first, *rounds in RESULTS[name]
        ]

    name = "noise, 10/none"  # Its rounds 2 and 3 are bad.
    skewed = with_movement("clean/validation", (0.3, 0.5, 0.9, 0.1))
    summary = attack_scores.reduce(
        {name: with_movement(name, (0.1, 0.2, 0.4, 0.3)), "clean/none/Dirichlet 0.3": skewed}
    )
    # Of the pairs of 0.2 and 0.4 with 0.1 and 0.3, three are in order; with 0.3, 0.5, 0.9 and 0.1
    # these are (0.2, 0.1), (0.4, 0.3) and (0.4, 0.1).
    assert summary[name]["roc"] == {"movement": 3 / 4}
    assert summary[name]["roc skewed"] == {"movement": 3 / 8}
    assert "roc" not in summary["clean/none/Dirichlet 0.3"]
    table = markdown(attack_tables.TABLES["roc"], summary, columns=["movement"]).splitlines()
    assert table[2:] == ["| noise, 10 | 0.75 |"]


def test_a_run_without_a_guard_records_the_scores_of_each_edge(tiny):
    bad = {"attack": "noise", "strength": 10.0, "bad_edges": (1,)}
    *_, second, third = (record for record, _ in play(Run(settings=tiny, **bad)))
    # The preset has a memory of one ensemble, which is empty only in the first round.
    assert second["scores"].keys() == third["scores"].keys() == attack_scores.SCORES.keys()
    assert second["scores"]["movement"] > third["scores"]["movement"]
    assert third["scores"]["train_accuracy_drop"] == pytest.approx(
        second["train-accuracy"] - third["train-accuracy"]
    )


def test_the_scores_of_a_second_visit_know_the_first(tiny):
    bad = {"attack": "movement scaled", "strength": -50.0, "bad_edges": (0,)}
    run = Run(settings=tiny, order=((0, 0), (1, 0), (0, 0)), **bad)
    first, other, second = (record["scores"] for record, _ in [*play(run)][1:])
    assert first["edge_drop"] == first["validation_drop"]
    assert other["edge_drop"] == other["validation_drop"]
    assert first["validation_drop"] != 0
    assert second["edge_drop"] == first["validation_drop"] + second["validation_drop"]


def test_a_guard_that_only_watches_leaves_the_core_as_it_is(tiny, monkeypatch):
    _, watched = core_after(Run(settings=tiny))
    monkeypatch.setattr("flwr_cloned_kd.paper.rounds._watch", lambda scores: None)
    record, plain = core_after(Run(settings=tiny))
    assert same_bits(watched, plain)
    assert "scores" not in record


def test_an_edge_that_is_refused_before_phase_2_costs_no_phase_2(tiny, monkeypatch):
    refuse_all = lambda evidence: "refused"  # noqa: E731
    build = build_core
    monkeypatch.setattr(
        "flwr_cloned_kd.paper.rounds.build_core",
        lambda settings: replace(build(settings), guard=refuse_all),
    )
    records_of = [record for record, _ in play(Run(settings=tiny))]
    assert [record["accepted"] for record in records_of] == [1, 0, 0, 0]
    assert [record["images"] for record in records_of[1:]] == [15 * 3] * 3
    assert records_of[-1]["core-accuracy"] == records_of[0]["core-accuracy"]
    assert "tried-accuracy" not in records_of[-1]


@pytest.mark.parametrize("guard", attacks.GUARDS)
def test_a_run_with_each_guard_records_what_it_measured(tiny, guard):
    settings = replace(tiny, **attacks.GUARDS[guard])
    bad = {"attack": "random weights", "bad_edges": (2,)}
    *_, second, third = (record for record, _ in play(Run(settings=settings, **bad)))
    assert {"validation-before", "movement", "accepted"} <= second.keys()
    assert ("trust" in second) == (guard == "trust")
    assert ("scores" in second) == (guard in ("none", "trust"))
    assert third["bad"] == 1


def test_an_attack_whose_predictions_are_not_finite_is_refused(tiny):
    bad = {"attack": "movement scaled", "strength": 1e38, "bad_edges": (1,)}
    records_of = [record for record, _ in play(Run(settings=tiny, **bad))]
    assert [record["accepted"] for record in records_of] == [1, 1, 0, 1]
    assert "finite" in records_of[2]["cause"]


def test_the_usual_rows_compare_the_default_guard_with_none():
    plan = attacks.plan(Settings(), 5, 3)
    played = usual("attacks", plan)
    rows = [attacks.ROWS[name] for name in played]
    assert {row.defence for row in rows} == {"none", attacks.DEFAULT_GUARD}
    assert {row.preset for row in rows} == {"practical"}
    assert {row.attack for row in rows} == {"clean", "omitted", *ATTACKS}
    assert {row.split for row in rows if row.attack == "clean"} == {*attacks.HONEST_SPLITS}
    assert len(played) < len(plan) / 3
    assert usual("skew", plan) == plan


def test_a_pattern_names_several_rows():
    plan = attacks.plan(Settings(), 1, 1)
    medians = choose("attacks", plan, ["*/median", "omitted/none"])
    assert {attacks.ROWS[name].defence for name in medians} == {"median", "none"}
    assert len(medians) == 1 + len([name for name in plan if name.endswith("/median")])
    with pytest.raises(ValueError, match=r"--rows: expected some of clean/none; .* got 'x/"):
        choose("attacks", plan, ["clean/none", "x/*"])


def test_every_other_defence_faces_every_attack_at_its_first_strength():
    plan = attacks.plan(Settings(), 1, 1)
    first = {**attacks.STRENGTHS, **attacks.REVISITS}
    for defence in attacks.OTHER_DEFENCES:
        rows = [row for row in attacks.ROWS.values() if row.defence == defence]
        assert {row.attack: row.strength or 0.0 for row in rows if row.attack in ATTACKS} == {
            attack: strengths[0] for attack, strengths in first.items()
        }
    for rule in FLOWER:
        run, again = (
            plan[f"{name}/{rule}"][0] for name in ("noise, 10", "slow poison, 0.3, 2 visits")
        )
        assert (run.combine, run.edges_per_round, run.num_rounds) == (rule, 9, 2)
        assert (run.bad_edges, again.num_rounds) == ((3, 6), 4)


def test_two_rounds_of_flowers_strategies_cost_the_bytes_of_our_run(tiny):
    def bytes_of(**options):
        records_of = [record for record, _ in play(Run(**options))]
        return sum(record["bytes-down"] + record["bytes-up"] for record in records_of)

    ours = bytes_of(settings=tiny)
    two_rounds = replace(tiny, variant="CPP", num_rounds=2)
    assert bytes_of(settings=two_rounds, combine="Krum", edges_per_round=3) == ours


def test_a_row_with_all_edges_in_a_round_has_no_refusals():
    name = "noise, 10/median"
    summary = attack_scores.reduce(RESULTS | {name: [records((0.6, 1, 1), (0.7, 1, 1))]})
    assert summary[name]["minus omitted"]["mean"] == pytest.approx(-0.1)
    assert not {"right after", "honest refused", "precision", "roc"} & summary[name].keys()
    cores = markdown(attack_tables.TABLES["cores"], summary).splitlines()
    assert cores[0] == "| last core | none | validation | median |"
    assert cores[-1] == "| noise, 10 | 0.700 | 0.750 | 0.700 |"


def test_the_trigger_of_the_record_is_that_of_the_backdoor(tiny):
    record, params = core_after(
        Run(settings=tiny, attack="backdoor", strength=1.0, bad_edges=(0, 1, 2))
    )
    core = build_core(tiny)
    images, labels = Backdoor().test_set(load(tiny)[1])
    core = replace(core, held_out=(images, labels))
    assert record["backdoor"] == pytest.approx(core.held_out_accuracy(params))
