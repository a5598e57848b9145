"""Replays: without an edge, the bits are those of distillations that have refused its answers."""

import random
from functools import cache

import pytest
import torch

from flwr_cloned_kd import Recipe, initialise
from flwr_cloned_kd.method.results import EdgeResult
from flwr_cloned_kd.method.rollback import KeptAnswer, KeptRound, contradiction, replay
from tests.helpers.cores import make_core, start_of
from tests.helpers.reference import images, mlp, same_bits

RECIPE = Recipe(epochs=1, batch_size=6, lr=0.05)
GROUPS = (("a",), ("b", "c"), ("d",), ("e", "a", "f"), ("g",), ("h",))
NUMBERS = ((1,), (3, 2), (4,), (5, 6, 7), (8,), (9,))
EDGES = "abcdefgh"
SENT_AT = {1: 0, 3: 0, 2: 0, 4: 1, 5: 3, 6: 1, 7: 2, 8: 2, 9: 5}
"""Number of a request -> index of the group before which the edge was sent the core."""


def weight_of(staleness):
    return 1 / (1 + staleness)


@cache
def tiny_core(**options):
    distillation = {"memory_size": 3, "student_start": 0.5}
    return make_core(images(12), RECIPE, distillation=distillation, **options)


@cache
def ensemble(number, num_clones=2):
    """Return an edge with models of its own, the same in every run."""
    models = [initialise(mlp(), 10 * number + index) for index in range(num_clones)]
    return {name: torch.stack([model[name] for model in models]) for name in models[0]}


def distil(core, sent=None, refused=()):
    """Distil the groups in turn, as the loop of a run does, and refuse answers by name.

    This is the slow twin of a replay: it starts at the first round, and it counts the staleness of
    an answer from the versions that it has seen.

    Args:
        sent: number -> the model that an edge was sent; None takes the core of this very run.

    Returns:
        The kept rounds, what the edges were sent, and the last state.
    """
    state = start_of(core)
    rounds, seen = [], []
    sent_now = {}
    for edges, numbers in zip(GROUPS, NUMBERS):
        seen.append(state)
        answers = []
        for edge, number in zip(edges, numbers):
            origin = seen[SENT_AT[number]]
            sent_now[number] = origin.params
            if edge not in refused:
                staleness = state.version - origin.version
                model = origin.params if sent is None else sent[number]
                versions = {"sent_version": origin.version, "used_version": state.version}
                answers.append(
                    KeptAnswer(
                        edge,
                        number,
                        ensemble(number),
                        model,
                        **versions,
                        weight=weight_of(staleness),
                    )
                )
        if answers:
            rounds.append(KeptRound(state, tuple(answers)))
            results = [EdgeResult(a.ensemble, a.sent, a.weight) for a in answers]
            state, metrics = core.distill_all(state, results)
            assert all(row["accepted"] for row in metrics)
    return rounds, sent_now, state


@cache
def played():
    return distil(tiny_core())


def same_state(left, right):
    assert left.version == right.version
    assert left.train_accuracy == right.train_accuracy
    assert left.memory_weights == right.memory_weights
    assert len(left.memory) == len(right.memory)
    pairs = zip((left.params, *left.memory), (right.params, *right.memory))
    return all(same_bits(*pair) for pair in pairs)


def first_of(rounds, edges):
    return next(i for i, kept in enumerate(rounds) if {a.edge for a in kept.answers} & {*edges})


def pairs():
    """Twenty random pairs of a first kept round and an edge that answers in it or later."""
    draw = random.Random(14)
    choices = [
        (first, edge)
        for first in range(len(GROUPS))
        for edge in EDGES
        if any(edge in group for group in GROUPS[first:])
        and not any(edge in group for group in GROUPS[:first])
    ]
    return draw.sample(choices, 20)


@pytest.mark.parametrize(("first", "edge"), pairs())
def test_without_an_edge_the_bits_are_those_of_a_run_that_refused_it(first, edge):
    rounds, sent, _ = played()
    *_, last = replay(tiny_core(), rounds[first:], {edge}, weight_of)
    twin_rounds, _, twin = distil(tiny_core(), sent, refused={edge})
    assert same_state(last.after, twin)
    assert last.refused == {}
    # The rounds that are kept from now on are those of the twin, too.
    kept = [
        made for one in replay(tiny_core(), rounds[first:], {edge}, weight_of) for made in one[0]
    ]
    for made, expected in zip(reversed(kept), reversed(twin_rounds)):
        assert same_state(made.before, expected.before)
        for answer, other in zip(made.answers, expected.answers, strict=True):
            assert answer._replace(ensemble={}, sent={}) == other._replace(ensemble={}, sent={})
            assert same_bits(answer.sent, other.sent)


def test_the_order_of_undoing_edges_does_not_matter():
    rounds, sent, _ = played()
    kept = [made for one in replay(tiny_core(), rounds, {"b"}, weight_of) for made in one.rounds]
    *_, last = replay(tiny_core(), kept, {"e", "g"}, weight_of)
    assert same_state(last.after, distil(tiny_core(), sent, refused={"b", "e", "g"})[2])


def test_without_any_edge_left_the_core_is_that_before_the_first_round():
    rounds, _, _ = played()
    *_, last = replay(tiny_core(), rounds[3:], EDGES)
    assert last.after is rounds[3].before


def test_the_staleness_does_not_count_what_was_left_out():
    rounds, _, _ = played()
    for rule, weight in ((weight_of, weight_of(3)), (None, weight_of(4))):
        replayed = list(replay(tiny_core(), rounds, {"e"}, rule))[4]
        (answer,) = replayed.rounds[0].answers
        assert (answer.edge, answer.sent_version, answer.used_version) == ("g", 3, 6)
        assert answer.weight == weight


def test_an_answer_that_the_guard_refuses_now_is_named_and_left_out():
    rounds, sent, _ = played()
    core = tiny_core(guard=lambda evidence: "late" if evidence.history else None)
    replays = list(replay(core, rounds, {"a"}, weight_of))
    causes = [{}, {}, {4: "late"}, {5: "late", 7: "late"}, {8: "late"}, {9: "late"}]
    assert [one.refused for one in replays] == causes
    twin = distil(tiny_core(), sent, refused=set("adefgh"))[2]
    assert same_state(replays[-1].after, twin)


class RefusesGroups:
    """Refuses every distillation of more than one answer, after it was made."""

    def __init__(self):
        self.num_asked = 0

    def __call__(self, evidence):
        if evidence.after is None:
            self.num_asked += 1
            return None
        refuse, self.num_asked = self.num_asked > 1, 0
        return "together" if refuse else None


def test_answers_that_are_refused_together_are_repeated_one_by_one():
    rounds, _, _ = played()
    core = tiny_core(guard=RefusesGroups())
    replays = list(replay(core, rounds[:2], {"a"}, weight_of))
    assert [len(one.rounds) for one in replays] == [0, 2]
    assert [a.edge for kept in replays[1].rounds for a in kept.answers] == ["b", "c"]
    assert replays[1].after.version == 2


def test_an_ensemble_whose_predictions_are_not_finite_now_is_refused():
    rounds, _, _ = played()
    (answer,) = rounds[2].answers
    huge = {n: t * 1e38 if t.is_floating_point() else t for n, t in answer.ensemble.items()}
    spoiled = rounds[2]._replace(answers=(answer._replace(ensemble=huge),))
    (only,) = replay(tiny_core(), [spoiled], {"x"})
    assert "expected finite values" in only.refused[4]
    assert only.after is spoiled.before


@pytest.mark.parametrize("with_memory", [True, False])
def test_a_round_is_the_same_after_it_was_written(with_memory):
    for kept in played()[0]:
        tensors, header = kept.state_dict(with_memory=with_memory)
        read = KeptRound.from_state_dict(tensors, header, kept.before.params)
        assert same_bits(read.before.params, kept.before.params)
        assert len(read.before.memory) == (len(kept.before.memory) if with_memory else 0)
        for ours, theirs in zip(read.answers, kept.answers, strict=True):
            assert ours._replace(ensemble={}, sent={}) == theirs._replace(ensemble={}, sent={})
            assert same_bits(ours.ensemble, theirs.ensemble)
            assert same_bits(ours.sent, theirs.sent)


def test_the_core_that_was_sent_and_used_is_written_once():
    kept = played()[0][-1]
    assert not any(name.startswith("sent-") for name in kept.state_dict(with_memory=True)[0])
    late = played()[0][1]
    assert any(name.startswith("sent-0/") for name in late.state_dict(with_memory=True)[0])


def test_an_ensemble_disagrees_where_only_one_of_the_two_is_right():
    core = tiny_core()
    params = start_of(core).params
    same = {name: torch.stack([tensor] * 2) for name, tensor in params.items()}
    assert contradiction(core, params, same) == 0
    other = dict(same)
    name, bias = list(other.items())[-1]
    other[name] = bias + torch.tensor([0.0, 0.0, 1e6])  # always the last class
    labels = core.dataset[1]
    inputs = core.dataset[0]
    core.model.load_state_dict(params)
    right = core.model.eval()(inputs).argmax(1) == labels
    expected = (right != (labels == 2)).double().mean()
    assert contradiction(core, params, other) == pytest.approx(float(expected))


def test_the_rule_of_trust_is_asked_again_and_kept_with_the_answer():
    """The second half of the weights in the memory is a trust that depends on the core."""
    rounds, sent, _ = played()

    def trust(evidence):
        return 0.5 if len(evidence.history) > 1 else 1.0

    core = tiny_core(trust=trust)
    replays = list(replay(core, rounds, {"a"}, weight_of))
    twin_rounds, _, twin = distil(core, sent, refused={"a"})
    assert same_state(replays[-1].after, twin)
    (made,) = replays[-1].rounds
    assert [answer.trust for answer in made.answers] == [0.5]
    assert len(twin_rounds) == len(replays) - 1


def test_the_guard_gets_the_metrics_of_the_repetition_for_earlier_rounds():
    rounds, _, _ = played()
    seen = []

    def guard(evidence):
        seen.extend(row["train-accuracy"] for row in evidence.earlier)

    (answer,) = rounds[4].answers
    earlier = [{"number": 4, "train-accuracy": -1.0}, {"number": 0, "train-accuracy": -2.0}]
    later = rounds[4]._replace(answers=(answer._replace(earlier=earlier),))
    replays = list(replay(tiny_core(guard=guard), [*rounds[2:4], later], {"f"}, weight_of))
    measured = replays[0].metrics[4]["train-accuracy"]
    assert seen == [measured, -2.0] * 2
