"""Checkpoints: what is written can be read or is refused with a reason; a run resumes from it."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flwr_cloned_kd import ClonedKD, Core, Distillation, Recipe, correct, retained
from flwr_cloned_kd.io import checkpoint as file
from flwr_cloned_kd.method.variants import scratch
from tests.helpers import victim
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import NOTHING, Tally, adds
from tests.helpers.reference import same_bits

TENSORS = {
    "z/w": torch.arange(6.0).reshape(2, 3),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 4),
    "mask": torch.tensor([True, False]),
}
HEADER = {"text": "é", "numbers": [1, 0.1, 1e-300], "nested": {"k": None}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "core.ckpt"


def test_what_is_written_is_read_bit_for_bit(path):
    file.write(path, TENSORS, HEADER)
    tensors, header = file.read(path)
    assert header == HEADER
    assert list(tensors) == list(TENSORS)  # in this order
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert [p.name for p in path.parent.iterdir()] == ["core.ckpt"]


def test_tensors_that_share_their_memory_can_be_written(path):
    whole = torch.arange(6.0)
    file.write(path, {"whole": whole, "part": whole[2:4], "across": whole.view(2, 3).T}, {})
    assert torch.equal(file.read(path)[0]["across"], whole.view(2, 3).T)


def test_the_previous_file_is_kept(path):
    for number in range(3):
        file.write(path, {"n": torch.tensor(number)}, {})
    assert file.read(path)[0]["n"] == 2
    assert file.read(file.previous(path))[0]["n"] == 1


def test_without_hard_links_the_previous_file_is_kept_too(path, monkeypatch):
    def no_links(*names):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", no_links)
    for number in range(3):
        file.write(path, {"n": torch.tensor(number)}, {})
    assert file.read(path)[0]["n"] == 2
    assert file.read(file.previous(path))[0]["n"] == 1


def test_a_file_cut_anywhere_is_damaged(path):
    file.write(path, TENSORS, HEADER)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(file.Damaged, match=r"core\.ckpt: expected"):
            file.read(path)


@pytest.mark.parametrize("more", [b"\0", b"more", b"\0" * 4096], ids=["1", "4", "4096"])
def test_a_file_that_was_appended_to_is_damaged(path, more):
    file.write(path, TENSORS, HEADER)
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(file.Damaged, match=r"core\.ckpt: expected"):
        file.read(path)


def test_a_file_with_any_byte_changed_is_refused(path):
    file.write(path, TENSORS, HEADER)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            tensors, header = file.read(path)
        except ValueError:
            continue
        # The flip changed only padding of safetensors, which is not read.
        assert header == HEADER
        assert same_bits(tensors, TENSORS)


def test_a_file_that_is_not_a_checkpoint_is_refused(path):
    path.write_text("epoch,loss\n1,0.5\n" * 10)
    with pytest.raises(file.Damaged, match=r"core\.ckpt: expected a flwr-cloned-kd checkpoint"):
        file.newest(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="got another kind of safetensors file"):
        file.newest(path)


def test_a_folder_in_the_place_of_the_file_is_refused(path):
    path.mkdir()
    with pytest.raises(ValueError, match=r"core\.ckpt: expected a .* checkpoint, got a folder"):
        file.newest(path)


def test_a_newer_format_is_refused_even_with_an_older_file(path):
    file.write(path, TENSORS, HEADER)
    file.write(path, TENSORS, HEADER)
    save_file({}, path, {"kind": file.KIND, "format": "2"})
    with pytest.raises(ValueError, match=r"core\.ckpt: expected checkpoint format 1, got 2"):
        file.newest(path)


def test_a_damaged_file_is_renamed_and_the_previous_one_used(path):
    for number in range(2):
        file.write(path, {"n": torch.tensor(number)}, {})
    path.write_bytes(path.read_bytes()[:-1])
    tensors, _, cause = file.newest(path)
    assert tensors["n"] == 0
    assert "core.ckpt: expected" in cause
    # The next write does not replace the intact previous file by the damaged one.
    file.write(path, {"n": torch.tensor(5)}, {})
    assert file.read(file.previous(path))[0]["n"] == 0
    assert path.with_name("core.ckpt.damaged").exists()


def test_without_a_file_there_is_no_checkpoint(path):
    assert file.newest(path) is None


class Kept(Tally):
    """A tally with checkpoints, which stops as if killed before a given round."""

    def __init__(self, *args, stop_before=10**9, **options):
        super().__init__(*args, **options)
        self.stop_before = stop_before

    def absorb(self, dispatch, content, staleness):
        if len(self.history) + 1 == self.stop_before:
            raise KeyboardInterrupt
        return super().absorb(dispatch, content, staleness)

    def state_dict(self):
        return {"w": torch.tensor(self.w, dtype=torch.float64)}, {}

    def load_state_dict(self, tensors, state):
        self.w = float(tensors["w"])


def interrupted(path, nodes, stop_before, **options):
    grid = FakeGrid(nodes)
    with pytest.raises(KeyboardInterrupt):
        Kept(checkpoint=path, stop_before=stop_before, **options).start(grid, NOTHING, 9)
    return grid


def test_a_run_resumes_where_it_stopped(path, flower_log):
    nodes = [adds(i) for i in range(1, 10)]
    interrupted(path, nodes, stop_before=5)
    strategy, grid = Kept(checkpoint=path), FakeGrid(nodes)
    result = strategy.start(grid, NOTHING, num_rounds=9)
    assert strategy.w == 45
    assert strategy.version == 9
    assert grid.trained() == [104, 105, 106, 107, 108]
    assert sorted(result.train_metrics_clientapp) == list(range(1, 10))
    assert [row["round"] for row in strategy.history] == list(range(1, 10))
    assert [row["number"] for row in strategy.history] == list(range(1, 10))
    assert [row["time"] for row in strategy.history] == sorted(r["time"] for r in strategy.history)
    text = "\n".join(flower_log)
    assert f"Resuming from {path} after 4 rounds; the initial arrays are not used" in text


def test_edges_in_flight_are_asked_again_with_the_same_numbers(path):
    nodes = [adds(i) for i in range(1, 10)]
    before = interrupted(path, nodes, stop_before=4, max_in_flight=3)
    strategy, grid = Kept(checkpoint=path, max_in_flight=3), FakeGrid(nodes)
    strategy.start(grid, NOTHING, num_rounds=9)
    assert strategy.w == 45  # each edge counts once
    assert sorted(row["edge"] for row in strategy.history) == [str(i) for i in range(1, 10)]
    assert sorted(row["number"] for row in strategy.history) == list(range(1, 10))
    assert set(before.trained()) & set(grid.trained())  # some were asked twice


def test_a_finished_run_returns_at_once(path):
    nodes = [adds(1), adds(2)]
    Kept(checkpoint=path).start(FakeGrid(nodes), NOTHING, num_rounds=2)
    grid = FakeGrid(nodes)
    strategy = Kept(checkpoint=path)
    result = strategy.start(grid, NOTHING, num_rounds=2)
    assert grid.pushed == []
    assert float(result.arrays["w"].numpy()) == 3
    assert len(result.train_metrics_clientapp) == 2


def test_a_longer_run_continues_a_finished_one(path):
    nodes = [adds(1), adds(2), adds(4)]
    Kept(checkpoint=path).start(FakeGrid(nodes), NOTHING, num_rounds=2)
    strategy = Kept(checkpoint=path)
    strategy.start(FakeGrid(nodes), NOTHING, num_rounds=3)
    assert strategy.w == 7


def test_the_header_does_not_grow_with_the_rounds(path):
    """The format allows 100 MB, which a long run would reach at 700 bytes a round."""

    def header_bytes():
        return int.from_bytes(path.read_bytes()[:8], "little")

    options = {"checkpoint": path, "revisit": True}
    Kept(**options).start(FakeGrid([adds(1)]), NOTHING, num_rounds=10)
    before, whole = header_bytes(), path.stat().st_size
    Kept(**options).start(FakeGrid([adds(1)]), NOTHING, num_rounds=60)
    assert path.stat().st_size > whole + 50 * 200
    assert header_bytes() <= before + 32  # numbers with more digits, padding


def test_a_file_without_the_rounds_of_the_run_is_refused(path):
    Kept(checkpoint=path).start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    tensors, header = file.read(path)
    del tensors["run/rounds"]
    file.write(path, tensors, header)
    with pytest.raises(ValueError, match=r"expected a complete header, got KeyError.'run/rounds'"):
        start_from(path, Kept(checkpoint=path))


def test_evaluations_are_kept(path):
    def evaluate(server_round, arrays):
        from flwr.app import MetricRecord

        return MetricRecord({"w": float(arrays["w"].numpy())})

    nodes = [adds(1), adds(2)]
    first = Kept(checkpoint=path).start(FakeGrid(nodes), NOTHING, 2, evaluate_fn=evaluate)
    again = Kept(checkpoint=path).start(FakeGrid(nodes), NOTHING, 2, evaluate_fn=evaluate)
    assert again.evaluate_metrics_serverapp == first.evaluate_metrics_serverapp
    assert sorted(again.evaluate_metrics_serverapp) == [0, 1, 2]


def test_the_previous_file_is_used_with_a_warning(path, flower_log):
    nodes = [adds(1), adds(2), adds(4)]
    interrupted(path, nodes, stop_before=3)
    path.write_bytes(b"\0" * 50)
    strategy = Kept(checkpoint=path)
    strategy.start(FakeGrid(nodes), NOTHING, num_rounds=3)
    assert strategy.w == 7
    assert any("taking core.ckpt.previous instead" in line for line in flower_log)


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(path, monkeypatch, flower_log):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "save_file", full)
    strategy = Kept(checkpoint=path)
    strategy.start(FakeGrid([adds(1)]), NOTHING, num_rounds=1)
    assert strategy.w == 1
    assert any("No checkpoint after round 1" in line for line in flower_log)


def test_a_strategy_without_a_state_dict_is_refused_at_once(path):
    with pytest.raises(ValueError, match=r"expected Tally to have state_dict\(\)"):
        Tally(checkpoint=path)


def test_a_refused_round_is_kept_too(path):
    def nothing(message, context):
        if message.metadata.message_type == "query":
            return adds(5)(message, context)
        raise MemoryError("out of memory")

    Kept(checkpoint=path).start(FakeGrid([nothing]), NOTHING, num_rounds=1)
    strategy, grid = Kept(checkpoint=path), FakeGrid([nothing, adds(2)])
    strategy.start(grid, NOTHING, num_rounds=2)
    assert [row["accepted"] for row in strategy.history] == [0, 1]
    assert grid.trained() == [101]


def start_from(path, strategy):
    return strategy.start(FakeGrid([adds(1)]), NOTHING, num_rounds=9)


@pytest.fixture
def written(path):
    victim.run(victim.make(path), 2)
    return path


def test_cloned_kd_resumes_with_the_core_and_its_memory(written):
    strategy, straight = victim.make(written), victim.make()
    victim.run(straight, 2)
    victim.run(strategy, 2)
    assert strategy.state.version == 2
    assert strategy.state.train_accuracy == straight.state.train_accuracy
    assert strategy.state.memory_weights == straight.state.memory_weights
    for ours, theirs in zip(
        (strategy.state.params, *strategy.state.memory),
        (straight.state.params, *straight.state.memory),
        strict=True,
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_another_run_is_refused_by_name(written):
    core = victim.make().core
    bigger = replace(core, model=nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"core\.ckpt: core: weight: expected shape \(5, 4\)"):
        start_from(written, ClonedKD(bigger, num_clones=2, checkpoint=written))
    with pytest.raises(ValueError, match=r"core\.ckpt: num_clones: expected 3, got 2"):
        start_from(written, ClonedKD(core, num_clones=3, checkpoint=written))
    other = Core(model=core.model, dataset=core.dataset, seed=4)
    with pytest.raises(ValueError, match=r"core\.ckpt: seed: expected 4, got 3"):
        start_from(written, ClonedKD(other, num_clones=2, checkpoint=written))
    with pytest.raises(ValueError, match=r"core\.ckpt: strategy: expected Kept, got ClonedKD"):
        start_from(written, Kept(checkpoint=written))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"temperature": 2.0}, r"temperature: expected 2\.0, got 4\.0"),
        ({"student_temperature": 1.0}, r"student_temperature: expected 1\.0, got None"),
        ({"student_start": 0.5}, r"student_start: expected 0\.5, got 0\.0"),
        ({"student_start": retained}, r"student_start: expected retained, got 0\.0"),
        ({"selection": correct}, "selection: expected correct, got None"),
        ({"memory_size": 7}, "memory_size: expected 7, got 3"),
        ({"mean_over_memory": True}, "mean_over_memory: expected True, got False"),
        ({"core_as_teacher": True}, "core_as_teacher: expected True, got False"),
        ({"lr": 0.3}, r"lr: expected 0\.3, got"),
        ({"epochs": 77}, "epochs: expected 77, got"),
    ],
)
def test_another_distillation_is_named(written, change, expected):
    core = victim.make().core
    name = next(iter(change))
    distillation = core.distillation
    if hasattr(distillation, name):
        distillation = replace(distillation, **change)
    else:
        distillation = replace(distillation, recipe=replace(distillation.recipe, **change))
    other = ClonedKD(replace(core, distillation=distillation), num_clones=2, checkpoint=written)
    with pytest.raises(ValueError, match=rf"core\.ckpt: {expected}"):
        start_from(written, other)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"optimizer": torch.optim.AdamW}, "optimizer: expected None, got AdamW"),
        ({"steps": 3}, "steps: expected None, got 3"),
        ({"max_grad_norm": 1.0}, r"max_grad_norm: expected None, got 1\.0"),
    ],
)
def test_an_option_that_only_the_earlier_run_had_is_named(path, recipe, expected):
    core = replace(victim.make().core, distillation=Distillation(recipe=Recipe(**recipe)))
    victim.run(ClonedKD(core, num_clones=2, checkpoint=path), 1)
    plain = replace(core, distillation=Distillation(recipe=Recipe()))
    with pytest.raises(ValueError, match=rf"core\.ckpt: {expected}"):
        victim.run(ClonedKD(plain, num_clones=2, checkpoint=path), 1)


def test_another_task_of_the_earlier_run_is_named(written):
    tensors, header = file.read(written)
    header["settings"]["task"] = "SeveralLabels"
    file.write(written, tensors, header)
    with pytest.raises(ValueError, match=r"core\.ckpt: task: expected None, got SeveralLabels"):
        victim.run(victim.make(written), 2)


def test_another_start_of_the_edges_is_named(written):
    core = victim.make().core
    other = ClonedKD(core, num_clones=2, send=scratch(core), checkpoint=written)
    with pytest.raises(ValueError, match=r"core\.ckpt: send: expected scratch.*, got cloned"):
        start_from(written, other)


def test_a_longer_run_may_ask_edges_again(path):
    nodes = [adds(1), adds(2)]
    Kept(checkpoint=path).start(FakeGrid(nodes), NOTHING, num_rounds=2)
    strategy = Kept(checkpoint=path, revisit=True)
    strategy.start(FakeGrid(nodes), NOTHING, num_rounds=3)
    assert strategy.w == 4
    assert [row["edge"] for row in strategy.history] == ["1", "2", "1"]


def test_a_header_without_an_entry_is_refused(written):
    tensors, header = file.read(written)
    del header["state"]["train_accuracy"]
    file.write(written, tensors, header)
    with pytest.raises(ValueError, match=r"core\.ckpt: core state: expected .*train_accuracy"):
        start_from(written, victim.make(written))


@pytest.fixture(scope="module")
def killer():
    with victim.killer() as order:
        yield order


def test_a_run_killed_at_twenty_instants_ends_with_the_same_bits(killer, tmp_path):
    """Six of the instants lie in the writing of a checkpoint, where a file could be incomplete."""
    straight = killer(tmp_path / "straight.ckpt", kill_at=0)
    assert straight["status"] == 0
    assert len(straight["history"]) == 4
    draw = random.Random(2010)
    writes = list(zip(straight["writing"][::2], straight["writing"][1::2]))
    assert len(writes) == 4
    instants = [draw.randrange(1, straight["count"] * 99 // 100) for _ in range(14)]
    instants += [draw.randrange(*draw.choice(writes)) for _ in range(6)]
    for number, kill_at in enumerate(instants):
        path = tmp_path / f"{number}.ckpt"
        assert killer(path, kill_at)["status"] == -9
        resumed = killer(path)
        for what in ("status", "digest", "history", "rounds"):
            assert resumed[what] == straight[what], (kill_at, what)


def test_a_run_killed_three_times_in_a_row_still_ends(killer, tmp_path):
    straight = killer(tmp_path / "straight.ckpt", kill_at=0)
    path = tmp_path / "often.ckpt"
    first_write_ends = straight["writing"][1]
    for _ in range(3):
        # Each process completes one round and is killed in the next.
        assert killer(path, first_write_ends + 50)["status"] == -9
    resumed = killer(path)
    assert resumed["digest"] == straight["digest"]
    assert resumed["history"] == straight["history"]
