"""The paper's experiments: runs that go on where they stopped, figures that come out."""

import itertools
import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from flwr_cloned_kd import FedAsync, edge_seed, take, train_edge
from flwr_cloned_kd.apps.build import build_core, load, recipe, split
from flwr_cloned_kd.apps.settings import Settings
from flwr_cloned_kd.io.checkpoint import previous
from flwr_cloned_kd.paper import cache, runs
from flwr_cloned_kd.paper.__main__ import _parser, base_settings, main
from flwr_cloned_kd.paper.cache import all_records, key, records, stored
from flwr_cloned_kd.paper.runs import Run, play, weighted_mean


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Sixty images of two classes, a bright half each: small enough for every figure."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "tiny.npz"
    parts = {}
    for part, count in (("train", 60), ("test", 20)):
        labels = rng.integers(0, 2, count)
        images = rng.normal(size=(count, 8, 8, 1)).astype(np.float32)
        images[labels == 1, :4] += 1
        parts |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(path, **parts)
    return path


@pytest.fixture(scope="module")
def tiny(archive):
    return Settings(
        dataset="npz",
        data_path=str(archive),
        num_edges=3,
        core_epochs=1,
        edge_epochs=1,
        distill_epochs=1,
        batch_size=16,
        preset="paper",
    )


class Killed(Exception):
    pass


def kill_after(rounds):
    left = iter(range(1, rounds))

    def tick():
        if next(left, None) is None:
            raise Killed

    return tick


def test_a_run_is_algorithm_1(tiny):
    core, (train, _) = build_core(tiny), load(tiny)
    parts = split(tiny, train[1])
    state = core.state(core.pretrain())
    expected = [core.held_out_accuracy(state.params)]
    for i, rows in enumerate(parts[1:], start=1):
        seed, sent = edge_seed(core.seed, i), state.params
        how = recipe(tiny, 1)
        edge = train_edge(core.model, sent, take(train, rows), how, num_clones=3, seed=seed)
        state, metrics = core.distill(state, edge)
        expected.append(metrics["core-accuracy"])
    *_, (_, progress) = played = list(play(Run(settings=tiny)))
    assert [record["core-accuracy"] for record, _ in played] == pytest.approx(expected)
    assert all((progress.state.params[name] == state.params[name]).all() for name in state.params)


# Memory, a second model, a late edge and a refused one: all that has to outlive a kill.
HARD = {
    "memory": {"variant": "IPM"},
    "late": {"order": ((0, 0), (1, 1), (2, 2))},
    "refused": {"noisy_edges": "1", "oracle": True},
}


def hard(tiny, name):
    own = {k: v for k, v in HARD[name].items() if k in ("order", "oracle")}
    rest = {k: v for k, v in HARD[name].items() if k not in own}
    return Run(settings=replace(tiny, **rest), **own)


@pytest.mark.parametrize("case", HARD)
def test_a_run_killed_after_any_round_ends_as_if_never_stopped(tiny, tmp_path, case):
    run = hard(tiny, case)
    whole = records(run, tmp_path / "whole")
    for rounds in (1, 2, 3):
        folder = tmp_path / str(rounds)
        with pytest.raises(Killed):
            records(run, folder, on_round=kill_after(rounds))
        assert len(stored(run, folder)) == rounds
        played = []
        assert records(run, folder, on_round=lambda: played.append(1)) == whole  # noqa: B023
        assert len(played) == 4 - rounds
        assert [path.name for path in folder.iterdir()] == [f"{key(run)}.jsonl"]


def test_a_kill_between_the_records_and_the_core_costs_that_round_only(tiny, tmp_path, monkeypatch):
    run, save, saved = Run(settings=tiny), cache._save, itertools.count()

    def killed(path, progress):
        if next(saved) == 2:
            raise Killed
        save(path, progress)

    monkeypatch.setattr(cache, "_save", killed)
    with pytest.raises(Killed):
        records(run, tmp_path)
    monkeypatch.setattr(cache, "_save", save)
    assert len(stored(run, tmp_path)) == 3  # rounds 0, 1, 2; the core is that of round 1
    played = []
    found = records(run, tmp_path, on_round=lambda: played.append(1))
    assert len(played) == 2
    assert found == records(run, tmp_path / "whole")


def test_a_finished_run_is_read_not_played(tiny, tmp_path, monkeypatch):
    run = Run(settings=tiny)
    found = records(run, tmp_path)
    monkeypatch.setattr(cache, "play", None)
    assert records(run, tmp_path) == found


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "",
        lambda text: text.replace('"round": 1', '"round": 2'),
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text.replace('"round": 0, ', ""),
    ],
    ids=["cut", "empty", "wrong round", "another run", "no round"],
)
def test_a_damaged_file_is_named_and_computed_again(tiny, tmp_path, flower_log, damage):
    run = Run(settings=tiny)
    found = records(run, tmp_path)
    path = tmp_path / f"{key(run)}.jsonl"
    path.write_text(damage(path.read_text()))
    assert records(run, tmp_path) == found
    assert any(path.name in line and "damaged" in line for line in flower_log)


@pytest.mark.parametrize(("damaged", "played"), [(1, 3), (2, 4)])
def test_a_damaged_core_costs_one_round_and_two_start_the_run_again(
    tiny, tmp_path, flower_log, damaged, played
):
    run = Run(settings=tiny)
    with pytest.raises(Killed):
        records(run, tmp_path, on_round=kill_after(2))
    checkpoint = tmp_path / f"{key(run)}.safetensors"
    for path in (checkpoint, previous(checkpoint))[:damaged]:
        path.write_bytes(path.read_bytes()[:-9])
    ticks = []
    assert records(run, tmp_path, on_round=lambda: ticks.append(1)) == records(run, tmp_path / "w")
    assert len(ticks) == played
    assert any(f"{key(run)}.safetensors" in line for line in flower_log)


def test_records_are_of_the_data_and_not_of_its_path(tiny, archive, tmp_path):
    run, other = Run(settings=tiny), tmp_path / "other.npz"
    other.write_bytes(archive.read_bytes())
    there = Run(settings=replace(tiny, data_path=str(other)))
    assert key(there) == key(run)
    with np.load(archive) as found:
        np.savez(tmp_path / "changed.npz", **dict(found) | {"y_test": 1 - found["y_test"]})
    changed = Run(settings=replace(tiny, data_path=str(tmp_path / "changed.npz")))
    assert key(changed) != key(run)


def test_two_that_want_one_run_play_it_once(tiny, tmp_path):
    run, played = Run(settings=tiny), []
    with ThreadPoolExecutor(2) as pool:
        wanted = [pool.submit(records, run, tmp_path, on_round=lambda: played.append(1))
                  for _ in range(2)]  # fmt: skip
    first, second = (future.result() for future in wanted)
    assert first == second
    assert len(played) == 4


def test_the_hash_is_of_what_determines_a_run(tiny):
    run = Run(settings=tiny)
    assert key(run) == key(Run(settings=replace(tiny, device="cpu", compile="on", results="x")))
    others = [
        replace(run, settings=replace(tiny, seed=1)),
        replace(run, settings=replace(tiny, lr=0.2)),
        replace(run, kd_weight=2.0),
        replace(run, mix=0.5),
        replace(run, distillation={"student_start": 1.0}),
        replace(run, order=((0, 0),)),
    ]
    assert len({key(run), *map(key, others)}) == 7


@pytest.mark.slow
def test_two_processes_find_what_one_does(tiny, tmp_path):
    wanted = [Run(settings=replace(tiny, seed=seed)) for seed in (0, 1, 0)]
    played = []
    found = all_records(wanted, tmp_path / "two", jobs=2, on_round=lambda: played.append(1))
    assert found == all_records(wanted, tmp_path / "one", on_round=lambda: None)
    assert len(played) == 8  # two runs of four rounds, Phase 0 included


@pytest.mark.slow
def test_when_one_run_fails_the_others_end_at_once(tiny, tmp_path, archive):
    away = tmp_path / "away.npz"
    away.write_bytes(archive.read_bytes())
    long = Run(settings=replace(tiny, edge_epochs=10**6))
    lost = Run(settings=replace(tiny, data_path=str(away), seed=1))
    key(lost)  # the parent has read the data; the child will not find it
    away.unlink()
    with pytest.raises(FileNotFoundError, match="away"):
        all_records([long, lost], tmp_path, jobs=2, on_round=lambda: None)
    assert not multiprocessing.active_children()


def test_a_late_edge_was_sent_the_core_of_before(tiny, monkeypatch):
    sent = []

    def spy(model, params, *rest, **options):
        sent.append(params)
        return train_edge(model, params, *rest, **options)

    monkeypatch.setattr(runs, "train_edge", spy)
    played = list(play(Run(settings=tiny, order=((0, 0), (1, 1), (2, 2), (0, 1)))))
    cores = [progress.state.params for _, progress in played]
    assert [next(i for i, core in enumerate(cores) if core is one) for one in sent] == [0, 0, 0, 2]
    assert [record["late"] for record, _ in played[1:]] == [0, 1, 2, 1]


def test_an_oracle_leaves_the_core_as_if_the_edge_had_not_come(tiny):
    noisy = replace(tiny, noisy_edges="2")
    tried = [r for r, _ in play(Run(settings=noisy, oracle=True))]
    never = [r for r, _ in play(Run(settings=tiny, order=((0, 0), (1, 0))))]
    assert [r["core-accuracy"] for r in tried[:3]] == [r["core-accuracy"] for r in never]
    assert tried[3]["core-accuracy"] == tried[2]["core-accuracy"]
    assert [r["accepted"] for r in tried] == [1, 1, 1, 0]


def test_keeping_the_clone_costs_no_distillation_and_fedavg_asks_everybody(tiny):
    one = replace(tiny, variant="CPP")
    kept = [r for r, _ in play(Run(settings=one, combine="average"))]
    everybody = replace(one, num_rounds=2)
    fedavg = [r for r, _ in play(Run(settings=everybody, combine="average", edges_per_round=3))]
    # 60 images in 4 parts; a phase of one epoch passes over 15.
    assert [r["images"] for r in kept] == [15, 15, 15, 15]
    assert [r["images"] for r in fedavg] == [15, 45, 45]
    assert fedavg[1]["bytes-down"] == fedavg[1]["bytes-up"] == 3 * kept[1]["bytes-up"]
    assert kept[1]["tried-accuracy"] == kept[1]["edge-accuracy"]


def test_a_share_of_the_clone_is_what_fedasync_makes_of_it(tiny):
    one = replace(tiny, variant="CPP", num_rounds=1)
    kept = [p.state for _, p in play(Run(settings=one, combine="average"))]
    mixed = [p.state for _, p in play(Run(settings=one, combine="average", mix=0.3))]
    strategy = FedAsync(alpha=0.3)
    strategy.begin(ArrayRecord(kept[0].params))
    strategy._learn(kept[1].params, kept[0].params, 1.0)
    expected = strategy.arrays.to_torch_state_dict(keep_input=True)
    assert all((mixed[1].params[name] == expected[name]).all() for name in expected)


def test_weights_of_an_average_are_the_images_of_each_edge():
    ensemble = {"w": torch.tensor([[0.0], [4.0]]), "count": torch.tensor([3, 9])}
    found = weighted_mean(ensemble, [1, 3])
    assert found["w"].tolist() == [3.0]  # (1 * 0 + 3 * 4) / 4
    assert found["count"] == 3


def test_edges_that_do_nothing_cost_nothing(tiny):
    alone = [r for r, _ in play(Run(settings=tiny, edge_data="none", kd_weight=0.0))]
    itself = [r for r, _ in play(Run(settings=tiny, edge_data="core"))]
    assert [r["images"] for r in alone] == [15] * 4  # the core's restarts alone
    assert [r["images"] for r in itself] == [15] + [15 * 3 + 15] * 3
    assert not sum(r["bytes-up"] + r["bytes-down"] for r in alone + itself)


def test_central_data_is_one_phase(tiny):
    found = [r for r, _ in play(Run(settings=tiny, central=True))]
    assert [r["images"] for r in found] == [60]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fig3"], "invalid choice: 'fig3'"),
        (["fig5", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["fig5", "--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["fig5", "--core-epochs", "-1"], "--core-epochs: expected at least 1, got -1"),
        (["fig8", "--num-edges", "1"], "--num-edges: expected at least 2, an honest and a noisy"),
        (["fig5", "--dataset", "npz"], "--data-path: expected where the npz data is, got ''"),
        (["fig5", "--model", "resnet-9"], "--model: expected digits-cnn or resnet-DEPTH"),
        (["fig5", "--epochs", "x"], "argument --epochs: invalid int value: 'x'"),
        (["fig5", "--dataset", "npz", "--data-path", "no.npz"], "no.npz"),
        (["fig5", "--schedule", "short"], "--schedule short: expected another dataset than digits"),
        (["fig5", "--rows", "CPQ"], "--rows: expected some of IsPP; IPP; "),
        (["fig8", "--rows", "CPP/clean"], "--rows: fig8 needs all its rows"),
        (["all", "--rows", "CPP"], "--rows: fig7 needs all its rows"),
    ],
)
def test_a_bad_option_is_named(arguments, expected, capsys, tmp_path):
    try:
        status = main([*arguments, "--out", str(tmp_path)])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_a_short_schedule_is_a_name_for_settings_that_can_be_overruled():
    options = ["fig5", "--dataset", "npz", "--data-path", "x", "--schedule", "short"]
    found = base_settings(_parser().parse_args(options))
    assert (found.model, found.core_epochs, found.edge_epochs) == ("resnet-8", 12, 4)
    found = base_settings(_parser().parse_args([*options, "--epochs", "6", "--model", "resnet-14"]))
    assert (found.model, found.core_epochs, found.edge_epochs) == ("resnet-14", 12, 6)
    full = base_settings(_parser().parse_args(options[:5]))
    assert (full.model, full.core_epochs, full.distill_epochs) == ("resnet-32", 164, 164)


def test_some_rows_are_the_same_rows(archive, tmp_path):
    arguments = ["fig9", "--dataset", "npz", "--data-path", str(archive), "--model", "digits-cnn",
                 "--num-edges", "2", "--epochs", "1", "--seeds", "1",
                 "--out", str(tmp_path)]  # fmt: skip
    assert main([*arguments, "--rows", "CPP"]) == 0
    some = json.loads((tmp_path / "fig9.json").read_text())["result"]
    assert main(arguments) == 0
    every = json.loads((tmp_path / "fig9.json").read_text())["result"]
    assert [*some] == ["CPP"]
    assert len(every) == 3
    assert some["CPP"] == every["CPP"]


def test_stored_runs_are_summed_up_and_none_is_played(archive, tmp_path, capsys, monkeypatch):
    arguments = ["fig9", "--dataset", "npz", "--data-path", str(archive), "--model", "digits-cnn",
                 "--num-edges", "2", "--epochs", "1", "--out", str(tmp_path)]  # fmt: skip
    assert main([*arguments, "--seeds", "2", "--stored"]) == 2
    assert "--stored: expected finished runs of fig9 in " in capsys.readouterr().err
    assert main([*arguments, "--seeds", "1", "--rows", "CPP"]) == 0
    monkeypatch.setattr(cache, "play", None)
    assert main([*arguments, "--seeds", "2", "--stored"]) == 0
    data = json.loads((tmp_path / "fig9.json").read_text())
    assert data["seeds"] == {"CPP": 1}


def test_help_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "goes on where it was interrupted" in " ".join(capsys.readouterr().out.split())


def test_a_figure_killed_on_the_way_is_the_same_in_the_end(archive, tmp_path, monkeypatch):
    arguments = ["fig4", "--dataset", "npz", "--data-path", str(archive), "--model", "digits-cnn",
                 "--num-edges", "2", "--epochs", "1", "--seeds", "1", "--out"]  # fmt: skip
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    save, saved = cache._save, itertools.count()

    def killed(path, progress):
        save(path, progress)
        if next(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, str(tmp_path / "killed")])
    assert main([*arguments, str(tmp_path / "killed")]) == 0
    whole, killed = (tmp_path / name / "fig4.json" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    assert json.loads(whole.read_text())["seeds"] == {"IPP": 1, "CPP": 1}
