"""Quarantine and rollback in a run: files, restarts, a running server, and what is refused."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from flwr_cloned_kd import (
    ClonedKD,
    Core,
    FedAsync,
    PolynomialStaleness,
    Recipe,
    VirtualGrid,
    digits_cnn,
    edge_app,
    load_digits,
    partition,
    take,
    train_edge,
    unselective,
)
from flwr_cloned_kd.asynchronous import resume
from flwr_cloned_kd.asynchronous import strategy as strategy_module
from flwr_cloned_kd.flower import kept_rounds
from flwr_cloned_kd.io import checkpoint as file
from flwr_cloned_kd.io.messages import ensemble_of
from tests.helpers import victim
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import apps, small_core
from tests.helpers.reference import same_bits
from tests.helpers.scripted import by_edge

LATE = {"max_in_flight": 3, "staleness_weight": PolynomialStaleness()}
TOGETHER = {"max_in_flight": 4, "max_together": 3}
HONEST = edge_app(victim.client)
METRICS = MetricRecord({"num-examples": 1})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "core.ckpt"


def edges(replies=None, *, replayed=None, spoiled=()):
    """Return honest apps that record their replies, or apps that repeat recorded ones.

    Args:
        replies: a dict that receives edge -> content of its reply.
        replayed: what was recorded; these edges do not train.
        spoiled: edges whose reply lacks its metrics, which the core refuses.
    """

    def answer(message, context):
        if message.metadata.message_type != "train":
            return HONEST(message, context)
        edge = str(context.node_config["partition-id"])
        content = HONEST(message, context).content if replayed is None else replayed[edge]
        if replies is not None:
            replies[edge] = content
        if edge in spoiled:
            content = RecordDict({"arrays": content["arrays"]})
        return Message(content, reply_to=message)

    return [answer] * victim.NUM_EDGES


def play(path=None, *, rounds=5, nodes=None, **options):
    """Run a federation of five edges in virtual time; the later edges answer first."""
    core = options.pop("core", victim.make().core)
    nodes = edges() if nodes is None else nodes
    grid = VirtualGrid(nodes, compute=by_edge(2, 3, 4, 1, 1), core=5.0)
    strategy = ClonedKD(core, num_clones=2, checkpoint=path, **options)
    first = ArrayRecord(core.model.state_dict())
    strategy.start(grid, first, num_rounds=rounds, timeout=50)
    return strategy


def same_core(left, right):
    left, right = left.state, right.state
    assert left.version == right.version
    assert left.train_accuracy == right.train_accuracy
    assert left.memory_weights == right.memory_weights
    assert len(left.memory) == len(right.memory)
    pairs = zip((left.params, *left.memory), (right.params, *right.memory))
    return all(same_bits(*pair) for pair in pairs)


def measured(strategy):
    """Return what the core has measured of each edge that it contains."""
    names = ("known", "train-accuracy", "loss-rise")
    return {
        row["edge"]: [row[name] for name in names]
        for row in strategy.history
        if row["accepted"] and not row.get("undone")
    }


def files(path):
    return sorted(file.name for file in Path(f"{path}.rounds").iterdir())


@pytest.mark.parametrize("options", [{}, LATE, TOGETHER], ids=["alone", "late", "together"])
@pytest.mark.parametrize("edge", ["0", "1", "3"])
def test_a_resumed_run_is_one_that_has_refused_the_quarantined_edge(
    path, options, edge, flower_log
):
    """The core of this test does not use what an edge was sent (`student_start` is 0)."""
    replies = {}
    before = play(path, nodes=edges(replies), keep_rounds=9, **options)
    after = play(path, keep_rounds=9, quarantine=[edge], **options)
    twin = play(nodes=edges(replayed=replies, spoiled=[edge]), **options)
    assert not same_bits(before.state.params, twin.state.params)
    assert same_core(after, twin)
    undone = [row["edge"] for row in after.history if row.get("undone")]
    assert undone == [edge]
    assert measured(after) == measured(twin)
    # It is on disk: a run that resumes from this one has nothing to undo.
    again = play(path, keep_rounds=9, quarantine=[edge], **options)
    assert same_core(again, twin)
    assert [row["edge"] for row in again.history if row.get("undone")] == [edge]
    assert sum(line.startswith("Undid") for line in flower_log) == 1


@pytest.mark.parametrize("options", [{}, LATE, TOGETHER], ids=["alone", "late", "together"])
def test_a_running_server_undoes_an_edge_between_two_rounds(path, options, flower_log):
    replies, strategies = {}, []

    def operate(row):
        if row["round"] == 3:
            strategy = strategies[0]
            thread = threading.Thread(target=strategy.quarantine, args=["1"])
            thread.start()
            thread.join()

    core = victim.make().core
    grid = VirtualGrid(edges(replies), compute=by_edge(2, 3, 4, 1, 1), core=5.0)
    options = {**options, "num_clones": 2}
    strategy = ClonedKD(core, checkpoint=path, keep_rounds=9, on_round=operate, **options)
    strategies.append(strategy)
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=5, timeout=50)
    del options["num_clones"]
    twin = play(nodes=edges(replayed=replies, spoiled=["1"]), **options)
    assert same_core(strategy, twin)
    (line,) = [line for line in flower_log if line.startswith("Undid")]
    assert "of edges ['1']: repeated rounds [" in line
    if options == LATE:  # the staleness of an edge that was away does not count the undone round
        ours = [row["staleness"] for row in strategy.history if row["round"] > 3]
        assert ours == [row["staleness"] for row in twin.history if row["round"] > 3]


def test_an_edge_is_undone_after_another_restart(path):
    replies = {}
    play(path, rounds=3, nodes=edges(replies), keep_rounds=9)
    play(path, rounds=4, nodes=edges(replies), keep_rounds=9, quarantine=["0"])
    last = play(path, nodes=edges(replies), keep_rounds=9, quarantine=["0", "2"])
    twin = play(nodes=edges(replayed=replies, spoiled=["0", "2"]))
    assert same_core(last, twin)
    assert [bool(row.get("undone")) for row in last.history] == [1, 0, 1, 0, 0]


def test_a_server_that_resumed_after_an_undo_undoes_another(path):
    """Versions are still counted as in one run: a late edge has the staleness of the twin."""
    replies, strategies = {}, []
    play(path, rounds=2, nodes=edges(replies), keep_rounds=9, **LATE)
    first = play(path, rounds=2, keep_rounds=9, quarantine=["1"], **LATE)
    assert (first.version, first.state.version) == (2, 1)

    def operate(row):
        if row["round"] == 3:
            strategies[0].quarantine(row["edge"])

    core = victim.make().core
    strategy = ClonedKD(
        core, num_clones=2, checkpoint=path, keep_rounds=9, on_round=operate, **LATE
    )
    strategies.append(strategy)
    grid = VirtualGrid(edges(replies), compute=by_edge(2, 3, 4, 1, 1), core=5.0)
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=5, timeout=50)
    assert (strategy.version, strategy.state.version) == (5, 3)
    assert [bool(row.get("undone")) for row in strategy.history] == [0, 1, 1, 0, 0]
    assert [row["staleness"] for row in strategy.history[3:]] == [0, 1]


def test_a_quarantined_edge_is_never_asked_even_after_a_restart(path):
    core = small_core()
    strategy = ClonedKD(core, num_clones=1, checkpoint=path)
    strategy.quarantine("0")
    grid = FakeGrid(apps(3))
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=1)
    assert grid.trained() == [101]
    strategy = ClonedKD(core, num_clones=1, checkpoint=path, quarantine=["2"], revisit=True)
    grid = FakeGrid(apps(3))
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=3, timeout=30)
    assert grid.trained() == [101, 101]
    assert strategy.quarantined == {"0", "2"}


def test_flowers_own_loop_does_not_ask_a_quarantined_edge():
    core = small_core()
    strategy = ClonedKD(core, num_clones=1, quarantine=["0"])
    grid = FakeGrid(apps(2))
    Strategy.start(strategy, grid, ArrayRecord(core.model.state_dict()), num_rounds=1)
    assert grid.trained() == [101]
    assert strategy.version == 1


def test_an_answer_on_its_way_is_refused_with_the_cause(path):
    strategies = []

    def operate(row):
        if row["round"] == 1:
            strategies[0].quarantine("0")

    core = victim.make().core
    grid = VirtualGrid(edges(), compute=by_edge(2, 3, 4, 1, 1), core=5.0)
    strategy = ClonedKD(core, num_clones=2, max_in_flight=5, on_round=operate)
    strategies.append(strategy)
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=5, timeout=50)
    (row,) = [row for row in strategy.history if row["edge"] == "0"]
    assert row["accepted"] == 0
    assert row["cause"] == "quarantine: expected another edge, got '0'"
    assert strategy.version == 4


def test_keeping_rounds_does_not_change_a_run(path, tmp_path):
    plain = play(tmp_path / "plain.ckpt", **LATE)
    assert same_core(play(path, keep_rounds=2, **LATE), plain)
    assert "rounds" not in plain.state_dict()[1]
    assert not (tmp_path / "plain.ckpt.rounds").exists()


def test_the_kept_rounds_are_bounded(path):
    """Two rounds, and the last three ensembles before them: the memory has three."""
    core = victim.make().core
    strategy = ClonedKD(core, num_clones=2, checkpoint=path, keep_rounds=2, revisit=True)
    seen = []

    def count(row):
        if row["round"] > 1:
            seen.append(len(files(path)))

    strategy.on_round = count
    grid = VirtualGrid(edges(), compute=1.0)
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=12)
    # Those of the newest checkpoint, one that the round has just written, and one of the previous.
    assert max(seen) <= 2 + 3 + 2
    assert len(files(path)) <= 2 + 3 + 1


def test_an_edge_that_is_older_than_the_kept_rounds_is_refused(path):
    core = victim.make().core
    core = replace(core, distillation=replace(core.distillation, memory_size=1))
    play(path, keep_rounds=2, core=core)
    expected = r"quarantine: edge '0': expected edges of the rounds kept since round 4, got round 1"
    with pytest.raises(ValueError, match=expected):
        play(path, keep_rounds=2, core=core, quarantine=["0"])
    assert play(path, keep_rounds=2, core=core, quarantine=["3"]).state.version == 4


def test_without_kept_rounds_an_edge_cannot_be_undone(path):
    play(path, rounds=2)
    expected = r"expected edges of the rounds kept \(there are none\), got round 1"
    with pytest.raises(ValueError, match=expected):
        play(path, rounds=2, quarantine=["0"])


def test_a_running_server_goes_on_if_an_edge_cannot_be_undone(path, flower_log):
    strategies = []
    core = victim.make().core
    strategy = ClonedKD(
        core, num_clones=2, checkpoint=path, on_round=lambda row: strategies[0].quarantine("0")
    )
    strategies.append(strategy)
    grid = VirtualGrid(edges(), compute=1.0)
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=3)
    assert strategy.version == 3
    assert any("goes on with what it learned from quarantined" in line for line in flower_log)
    # The same after a restart, because the name is in the checkpoint and not asked for.
    assert play(path, rounds=4).version == 4


def test_an_edge_that_cannot_be_undone_does_not_keep_another(path, flower_log):
    """The file of edge 1 is damaged; its name is not asked for, but in the checkpoint."""
    replies, strategies = {}, []
    core = victim.make().core
    core = replace(core, distillation=replace(core.distillation, memory_size=1))
    play(path, rounds=4, nodes=edges(replies), core=core, keep_rounds=9)
    damaged = Path(f"{path}.rounds") / "00000001.round"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    strategy = ClonedKD(
        core,
        num_clones=2,
        checkpoint=path,
        keep_rounds=9,
        on_round=lambda row: strategies[0].quarantine("1"),
    )
    strategies.append(strategy)
    grid = VirtualGrid(edges(replies), compute=1.0)
    strategy.start(grid, ArrayRecord(core.model.state_dict()), num_rounds=5)
    assert any("quarantined edge 1: " in line and damaged.name in line for line in flower_log)
    last = play(path, core=core, keep_rounds=9, quarantine=["3"])
    assert same_core(last, play(core=core, nodes=edges(replayed=replies, spoiled=["3"])))


def test_the_checkpoint_before_the_newest_finds_its_rounds_too(path):
    core = victim.make().core
    core = replace(core, distillation=replace(core.distillation, memory_size=1))
    replies = {}
    play(path, nodes=edges(replies), core=core, keep_rounds=1)
    path.write_bytes(path.read_bytes()[:-1])
    last = play(path, rounds=4, core=core, keep_rounds=1, quarantine=["3"])
    twin = play(rounds=4, core=core, nodes=edges(replayed=replies, spoiled=["3"]))
    assert same_core(last, twin)


def test_a_run_that_ends_right_after_an_undo_does_not_ask_an_edge_twice(path):
    """What ends it comes between the undo and the checkpoint of the round."""
    core = victim.make().core
    strategy = ClonedKD(core, num_clones=2, checkpoint=path, keep_rounds=9)
    strategy.on_round = lambda row: strategy.quarantine("0") if row["round"] == 2 else None

    def evaluate(server_round, arrays):
        if server_round == 2:
            raise KeyboardInterrupt

    grid = VirtualGrid(edges(), compute=1.0)
    first = ArrayRecord(core.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        strategy.start(grid, first, num_rounds=5, evaluate_fn=evaluate)
    assert strategy.state.version == 1
    resumed = play(path, keep_rounds=9, quarantine=["0"])
    assert [row["edge"] for row in resumed.history] == ["0", "1", "2", "3", "4"]
    assert [bool(row.get("undone")) for row in resumed.history] == [1, 0, 0, 0, 0]


def test_names_that_no_edge_has_change_nothing(path):
    straight = play(path, keep_rounds=9)
    again = play(path, keep_rounds=9, quarantine=["nobody"])
    assert same_core(again, straight)
    with pytest.raises(ValueError, match="quarantine: expected a list of names, got 'clinic'"):
        play(path, quarantine="clinic")


def test_an_edge_that_the_core_has_not_learned_from_needs_no_undoing(path):
    strategy = play(path, rounds=2, keep_rounds=9)
    state = strategy.state
    assert strategy.undo({"no such edge"}) == set()
    assert strategy.state is state


def test_an_undone_round_counts_as_refused_when_its_edge_returns():
    core = replace(victim.make().core, guard=lambda evidence: None)
    strategy = ClonedKD(core, revisit=True)
    rows = [{"edge": edge, "accepted": 1.0} for edge in "aab"]
    strategy.history = [{**rows[0], "undone": 1.0}, *rows[1:]]
    assert [row["accepted"] for row in strategy._earlier("a")] == [0.0, 1.0]
    assert strategy.history[0]["accepted"] == 1.0


def test_a_quarantine_in_the_instant_of_the_start_is_not_lost(monkeypatch):
    """Another thread calls it while the session of the new run is being made."""
    core = small_core()
    strategy = ClonedKD(core, num_clones=1)
    original = strategy_module.Session
    threads = []

    def session(*arguments):
        made = original(*arguments)
        threads.append(threading.Thread(target=strategy.quarantine, args=["0"]))
        threads[-1].start()
        threads[-1].join(0.3)
        return made

    monkeypatch.setattr(strategy_module, "Session", session)
    strategy._reset(FakeGrid(apps(1)))
    threads[0].join()
    assert strategy.quarantined == {"0"}
    assert strategy._must_undo


def test_the_kept_rounds_are_bounded_in_flowers_own_loop_too(path):
    core = victim.make().core
    core = replace(core, distillation=replace(core.distillation, memory_size=1))
    strategy = ClonedKD(core, num_clones=1, checkpoint=path, keep_rounds=1, revisit=True)
    first = ArrayRecord(core.model.state_dict())
    Strategy.start(strategy, VirtualGrid(edges(), compute=1.0), first, num_rounds=6)
    assert strategy.version == 6
    assert len(files(path)) <= 1 + 1 + 1


def test_a_file_number_is_not_used_again_after_an_undo(path):
    """The checkpoint before the undo lists the file of the undone round."""
    play(path, rounds=3, keep_rounds=9)
    last = Path(f"{path}.rounds") / "00000002.round"
    content = last.read_bytes()
    play(path, rounds=3, keep_rounds=9, quarantine=["2"])
    strategy = ClonedKD(victim.make().core, num_clones=2, checkpoint=path, keep_rounds=9)
    strategy._reset(VirtualGrid(edges()))
    tensors, header = file.read(path)
    strategy.load_state_dict(tensors, header["state"])
    assert strategy._kept.next_file == 3
    assert last.read_bytes() == content


def test_a_round_whose_memory_is_not_kept_is_named_by_its_file(path):
    kept = kept_rounds.KeptRounds(path, 9, 3)
    kept.resume([kept_rounds.Entry(4, "", False, (7,))])
    with pytest.raises(ValueError, match=r"00000004\.round: expected files with the memory"):
        kept.read(0, {})


def test_kept_rounds_need_a_checkpoint():
    with pytest.raises(ValueError, match="checkpoint: expected a file for keep_rounds=3, got None"):
        play(keep_rounds=3)
    with pytest.raises(ValueError, match="keep_rounds: expected at least 0, got -1"):
        play(keep_rounds=-1)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "expected a flwr-cloned-kd"),
        (lambda path: path.unlink(), "expected a kept round, got No such file"),
        (lambda path: file.write(path, *file.read(path)[:1], {}), "expected the content"),
    ],
    ids=["cut", "missing", "another"],
)
def test_a_damaged_file_is_refused_by_name(path, damage, expected):
    straight = play(path, keep_rounds=9)
    damage(Path(f"{path}.rounds") / "00000002.round")
    with pytest.raises(ValueError, match=rf"quarantine: .*00000002\.round: {expected}"):
        play(path, keep_rounds=9, quarantine=["1"])
    # Nothing was changed: the run resumes, and edges of later rounds can be undone.
    assert same_core(play(path, keep_rounds=9), straight)


def test_a_checkpoint_with_a_list_of_rounds_that_is_none_is_refused(path):
    play(path, rounds=1, keep_rounds=9)
    tensors, header = file.read(path)
    header["state"]["rounds"] = [[0]]
    file.write(path, tensors, header)
    with pytest.raises(ValueError, match=r"core\.ckpt: not enough values"):
        play(path, rounds=1, keep_rounds=9)


def failing_once(write, count):
    """Return a function that writes, and fails at one call as a full disk does."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    return call


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_a_checkpoint_that_is_missing_costs_no_kept_round(path, monkeypatch, count):
    """The file of the round is there and the checkpoint is not, as after a kill in between."""
    replies = {}
    with monkeypatch.context() as patch:
        patch.setattr(resume, "write", failing_once(file.write, count))
        play(path, rounds=count, nodes=edges(replies), keep_rounds=9)
    last = play(path, nodes=edges(replies), keep_rounds=9, quarantine=["0"])
    assert same_core(last, play(nodes=edges(replayed=replies, spoiled=["0"])))
    tracked = {f"{entry.file:08d}.round" for entry in last._kept.entries}
    assert tracked <= set(files(path))


def test_a_round_that_is_not_written_ends_what_can_be_undone(path, monkeypatch, flower_log):
    replies = {}
    with monkeypatch.context() as patch:
        patch.setattr(kept_rounds, "write", failing_once(file.write, 3))
        play(path, nodes=edges(replies), keep_rounds=9)
    assert any("rounds up to this one cannot be undone" in line for line in flower_log)
    with pytest.raises(ValueError, match="kept since round 4, got round 3"):
        play(path, keep_rounds=9, quarantine=["2"])
    last = play(path, keep_rounds=9, quarantine=["3"])
    assert same_core(last, play(nodes=edges(replayed=replies, spoiled=["3"])))


def test_keep_rounds_may_change_in_the_middle_of_a_run(path):
    replies = {}
    play(path, rounds=2, nodes=edges(replies))
    play(path, rounds=4, nodes=edges(replies), keep_rounds=9)
    # Nothing more is kept, and what was kept is still used.
    last = play(path, nodes=edges(replies), quarantine=["2"])
    assert same_core(last, play(nodes=edges(replayed=replies, spoiled=["2"])))
    assert files(path) == []


def test_a_new_run_in_the_place_of_an_old_one_deletes_its_rounds(path):
    play(path, keep_rounds=9)
    path.unlink()
    file.previous(path).unlink()
    assert len(files(path)) == 5
    play(path, rounds=1, keep_rounds=9)
    assert files(path) == ["00000000.round"]


def test_a_strategy_that_cannot_undo_says_so(path):
    strategy = FedAsync(checkpoint=path)
    first = ArrayRecord({"w": victim.model().weight.detach()})

    def answer(message, context):
        if message.metadata.message_type != "train":
            return HONEST(message, context)
        content = RecordDict({"arrays": first, "metrics": METRICS})
        return Message(content, reply_to=message)

    strategy.start(VirtualGrid([answer] * 2, compute=1.0), first, num_rounds=1)
    strategy = FedAsync(checkpoint=path, quarantine=["0"])
    with pytest.raises(ValueError, match="expected edges that FedAsync has not learned from"):
        strategy.start(VirtualGrid([answer] * 2, compute=1.0), first, num_rounds=2)


def test_an_edge_with_wrong_labels_has_the_highest_disagreement(path):
    train, _ = load_digits()
    parts = partition(len(train[1]), 5, seed=1)
    recipe = Recipe(epochs=8)
    core = Core(
        model=digits_cnn(),
        dataset=take(train, parts[0]),
        recipe=recipe,
        distillation=unselective(recipe),
        guard=None,
    )
    scores = []

    def train_bad(context):
        return int(context.node_config["partition-id"]) == 0

    def answer(message, context):
        if message.metadata.message_type != "train":
            return HONEST(message, context)
        inputs, labels = take(train, parts[1 + int(context.node_config["partition-id"])])
        labels = (labels + 1) % 10 if train_bad(context) else labels
        like = core.model.state_dict()
        params = ensemble_of(message.content["arrays"], like)
        params = {name: tensor[0] for name, tensor in params.items()}
        edge = train_edge(core.model, params, (inputs, labels), recipe, num_clones=2)
        content = RecordDict({"arrays": ArrayRecord(edge), "metrics": METRICS})
        return Message(content, reply_to=message)

    strategy = ClonedKD(core, num_clones=2, checkpoint=path, keep_rounds=9)
    strategy.on_round = lambda row: scores.append(strategy.contradiction())
    first = ArrayRecord(core.pretrain())
    strategy.start(VirtualGrid([answer] * 4, compute=1.0), first, num_rounds=4)
    assert all(row["accepted"] for row in strategy.history)
    assert list(scores[0]) == ["0"]
    last = scores[-1]
    assert max(last, key=last.get) == "0"
    assert last["0"] > 0.5 > 2 * max(last[edge] for edge in "123")


def test_a_run_killed_while_it_keeps_rounds_ends_with_the_same_bits(tmp_path):
    """At eight instants of the writing of rounds and checkpoints."""
    with victim.killer(keep_rounds=1) as order:
        straight = order(tmp_path / "straight.ckpt", kill_at=0)
        writes = list(zip(straight["writing"][::2], straight["writing"][1::2]))
        assert len(writes) == 8
        for number, (began, ended) in enumerate(writes):
            path = tmp_path / f"{number}.ckpt"
            kill_at = began + (ended - began) * (number + 1) // 9
            assert order(path, kill_at)["status"] == -9
            resumed = order(path)
            for what in ("status", "digest", "history", "rounds"):
                assert resumed[what] == straight[what], (kill_at, what)
            # The last edge can be undone from what is there.
            strategy = victim.make(path, keep_rounds=1, quarantine=["3"])
            victim.run(strategy, victim.NUM_ROUNDS)
            assert strategy.state.version == 3
