"""Records on disk: a run that was killed is resumed, and a finished run is not played again."""

import hashlib
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flwr_cloned_kd.io.checkpoint import newest, previous, write
from flwr_cloned_kd.paper import store
from flwr_cloned_kd.paper.runs import NEWER, NEWER_SETTINGS, Run, describe
from flwr_cloned_kd.paper.store import key, records, stored


class Killed(Exception):
    pass


def kill_after(rounds):
    played = itertools.count(1)

    def on_round():
        if next(played) == rounds:
            raise Killed

    return on_round


# A resumed run needs from the disk: a memory, a second model, a late edge, a refused edge, and what
# a bad edge remembers of its first visit.
HARD_RUNS = {
    "memory": ({"variant": "IPM"}, {}),
    "late": ({}, {"order": ((0, 0), (1, 1), (2, 2))}),
    "refused": ({"noisy_edges": "1"}, {"oracle": True}),
    "clipped": ({}, {"clip": True}),
    "replay": (
        {"num_rounds": 3},
        {"order": ((0, 0), (1, 0), (0, 0)), "attack": "first answer again", "bad_edges": (0,)},
    ),
}


@pytest.mark.parametrize("case", HARD_RUNS)
def test_a_run_killed_after_any_round_ends_as_if_never_stopped(tiny, tmp_path, case):
    settings, options = HARD_RUNS[case]
    run = Run(settings=replace(tiny, **settings), **options)
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
    run = Run(settings=tiny)
    writes = itertools.count()

    def killed_at_the_third(path, tensors, header):
        if next(writes) == 2:
            raise Killed
        write(path, tensors, header)

    monkeypatch.setattr(store, "write", killed_at_the_third)
    with pytest.raises(Killed):
        records(run, tmp_path)
    monkeypatch.setattr(store, "write", write)
    assert len(stored(run, tmp_path)) == 3  # rounds 0, 1, 2; the core is that of round 1
    played = []
    resumed = records(run, tmp_path, on_round=lambda: played.append(1))
    assert len(played) == 2
    assert resumed == records(run, tmp_path / "whole")


def test_a_finished_run_is_read_not_played(tiny, tmp_path, monkeypatch):
    run = Run(settings=tiny)
    played = records(run, tmp_path)
    monkeypatch.setattr(store, "play", None)
    assert records(run, tmp_path) == played


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
    played = records(run, tmp_path)
    path = tmp_path / f"{key(run)}.jsonl"
    path.write_text(damage(path.read_text()))
    assert records(run, tmp_path) == played
    assert any(path.name in line and "damaged" in line for line in flower_log)


@pytest.mark.parametrize(("damaged", "rounds"), [(1, 3), (2, 4)])
def test_a_damaged_core_costs_one_round_and_two_start_the_run_again(
    tiny, tmp_path, flower_log, damaged, rounds
):
    run = Run(settings=tiny)
    with pytest.raises(Killed):
        records(run, tmp_path, on_round=kill_after(2))
    checkpoint = tmp_path / f"{key(run)}.safetensors"
    for path in (checkpoint, previous(checkpoint))[:damaged]:
        path.write_bytes(path.read_bytes()[:-9])
    played = []
    resumed = records(run, tmp_path, on_round=lambda: played.append(1))
    assert resumed == records(run, tmp_path / "whole")
    assert len(played) == rounds
    assert any(checkpoint.name in line for line in flower_log)


def without_the_memory(tensors, header):
    return tensors, {name: value for name, value in header.items() if name != "memory"}


def in_the_old_form(tensors, header):
    """Name the ensembles of the memory as an earlier form of the checkpoint did."""
    renamed = {f"memory-{n}" if n[0].isdigit() else n: tensor for n, tensor in tensors.items()}
    return renamed, header


def without_the_first_edge(tensors, header):
    return {name: tensor for name, tensor in tensors.items() if name != "right"}, header


@pytest.mark.parametrize(
    "change", [without_the_memory, in_the_old_form, without_the_first_edge, lambda t, h: ({}, h)]
)
def test_a_core_of_another_form_starts_the_run_again(tiny, tmp_path, flower_log, change):
    run = Run(settings=tiny)
    with pytest.raises(Killed):
        records(run, tmp_path, on_round=kill_after(2))
    checkpoint = tmp_path / f"{key(run)}.safetensors"
    tensors, header, _ = newest(checkpoint)
    write(checkpoint, *change(tensors, header))
    played = []
    again = records(run, tmp_path, on_round=lambda: played.append(1))
    assert len(played) == 4
    assert any(checkpoint.name in line and "starts again" in line for line in flower_log)
    assert again == records(run, tmp_path / "whole")


def test_records_are_of_the_data_and_not_of_its_path(tiny, archive, tmp_path):
    run = Run(settings=tiny)
    copy = tmp_path / "copy.npz"
    copy.write_bytes(archive.read_bytes())
    assert key(Run(settings=replace(tiny, data_path=str(copy)))) == key(run)
    changed = tmp_path / "changed.npz"
    with np.load(archive) as arrays:
        np.savez(changed, **dict(arrays) | {"y_test": 1 - arrays["y_test"]})
    assert key(Run(settings=replace(tiny, data_path=str(changed)))) != key(run)


def test_two_threads_that_want_one_run_play_it_once(tiny, tmp_path):
    run = Run(settings=tiny)
    played = []
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(records, run, tmp_path, on_round=lambda: played.append(1)) for _ in range(2)
        ]
    first, second = (future.result() for future in futures)
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
        replace(run, wire_dtype="int8"),
        replace(run, distillation={"student_start": 1.0}),
        replace(run, order=((0, 0),)),
    ]
    assert len({key(run), *map(key, others)}) == 8


def test_options_that_records_from_before_lack_leave_their_keys(tiny):
    run = Run(settings=tiny)
    assert not {*NEWER} & describe(run).keys()
    assert describe(replace(run, wire_dtype="int8")) == describe(run) | {"wire_dtype": "int8"}
    assert describe(replace(run, clip=True)) == describe(run) | {"clip": True}
    attack = {"attack": "noise", "strength": 3.0, "bad_edges": (1,)}
    assert describe(replace(run, **attack)) == describe(run) | attack
    assert not {*NEWER_SETTINGS} & describe(run)["settings"].keys()
    changed = replace(run, settings=replace(tiny, validation_share=0.2))
    assert describe(changed)["settings"] == describe(run)["settings"] | {"validation_share": 0.2}


def test_the_committed_records_have_the_keys_of_runs_today(tiny):
    paths = [*(Path(__file__).parents[2] / "docs" / "results").glob("*/runs/*.jsonl")]
    assert paths
    today = describe(Run(settings=tiny))
    for path in paths:
        header = path.read_text().splitlines()[0]
        assert hashlib.sha256(header.encode()).hexdigest() == path.stem
        run = json.loads(header)["run"]
        assert run.keys() == today.keys()
        assert run["settings"].keys() == today["settings"].keys()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attack": "nose", "bad_edges": (1,)}, "attack: expected one of labels shuffled, "),
        ({"attack": "noise"}, "bad_edges: expected at least one with an attack"),
        ({"bad_edges": (1,)}, "bad_edges: expected at least one with an attack and none without"),
    ],
)
def test_a_run_with_half_an_attack_is_refused(tiny, options, expected):
    with pytest.raises(ValueError, match=expected):
        Run(settings=tiny, **options)
