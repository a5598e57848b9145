"""Guards: scores by hand, reasons, and what composes them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flwr_cloned_kd import (
    AllOf,
    AnyOf,
    Evidence,
    Limit,
    TrainAccuracyDrop,
    TrainAccuracyJump,
    class_drop,
    disagreement,
    drop_confidence,
    edge_drop,
    ensemble_gap,
    loss_rise,
    movement,
    relative_accuracy,
    validation_drop,
)
from tests.helpers.reference import few

# The mean of these is 0.6, so the default threshold of 0.1 lies at 0.7.
HISTORY = (0.5, 0.6, 0.7)
LABELS = torch.tensor([0, 0, 0, 0, 1, 1])


def mask(text):
    return torch.tensor([letter == "1" for letter in text])


def evidence_of(accuracy=None, history=(), *, before="111100", after=None, ensemble="110011"):
    return Evidence(
        labels=LABELS,
        before=mask(before),
        clones=torch.stack([mask(ensemble)] * 2),
        ensemble=mask(ensemble),
        movement=0.25,
        direction=None,
        history=tuple(history),
        after=None if after is None else mask(after),
        train_accuracy=accuracy,
    )


def evidence_with(*, before, after):
    labels = torch.zeros(len(before), dtype=torch.int64)
    return replace(evidence_of(), labels=labels, before=before, after=after)


@pytest.mark.parametrize(("accuracy", "refused"), [(0.69, False), (0.71, True), (1.0, True)])
def test_a_jump_above_the_mean_of_the_history_is_refused(accuracy, refused):
    assert (TrainAccuracyJump()(evidence_of(accuracy, HISTORY)) is not None) is refused


def test_a_reason_names_what_was_expected():
    reason = TrainAccuracyJump()(evidence_of(0.85, HISTORY))
    assert reason == "train accuracy jump: expected at most 0.100, got 0.250"


def test_the_threshold_is_the_users_to_set():
    assert TrainAccuracyJump(0.05)(evidence_of(0.66, HISTORY))
    assert not TrainAccuracyJump(0.25)(evidence_of(0.84, HISTORY))


@pytest.mark.parametrize("guard", [TrainAccuracyJump(), TrainAccuracyDrop()])
def test_without_a_history_or_before_the_distillation_nothing_is_refused(guard):
    assert guard(evidence_of(1.0)) is None
    assert guard(evidence_of(None, HISTORY)) is None


fractions = st.floats(0, 1)


@few
@given(history=st.lists(fractions, min_size=1, max_size=9), share=fractions, rule=fractions)
def test_a_falling_training_accuracy_is_no_jump(history, share, rule):
    assert not TrainAccuracyJump(rule)(evidence_of(share * min(history), history))


@pytest.mark.parametrize(
    ("history", "accuracy", "refused"),
    [
        ((), 0.0, False),  # without a history there is no fall
        ((0.5, 0.9), 0.81, False),
        ((0.5, 0.9), 0.79, True),  # a fall from the last round, not from the mean of 0.7
        ((0.9, 0.5), 0.45, False),
        ((0.5,), 1.0, False),  # a rise
    ],
)
def test_a_drop_is_measured_from_the_last_accepted_round(history, accuracy, refused):
    assert (TrainAccuracyDrop(0.1)(evidence_of(accuracy, history)) is not None) is refused


def test_scores_by_hand():
    """Four of six are correct before; the ensemble has four too, and after it one of each class."""
    before = evidence_of()
    assert ensemble_gap(before) == 0
    assert movement(before) == 0.25
    assert validation_drop(before) is None
    assert class_drop(before) is None
    after = evidence_of(0.5, after="100001")
    assert validation_drop(after) == pytest.approx(4 / 6 - 2 / 6)
    assert class_drop(after) == pytest.approx(1 - 1 / 4)
    assert after.recall(after.after) == {0: 0.25, 1: 0.5}


def test_the_metrics_hold_what_is_known():
    before = {"validation-before": 4 / 6, "validation-ensemble": 4 / 6, "movement": 0.25}
    assert evidence_of().metrics() == pytest.approx(before)
    after = evidence_of(0.5, after="100001").metrics()
    assert after == pytest.approx(before | {"validation-after": 2 / 6, "class-drop": 0.75})


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    [
        (0, 0, 1.0),
        (0, 3, 1.0),
        (1, 0, 1 / 2),
        (5, 0, 1 / 32),
        (4, 1, 6 / 32),  # of five elements at least four: 5 + 1 of 32 ways
        (3, 3, 42 / 64),
    ],
)
def test_the_confidence_of_a_drop_is_that_of_mcnemars_test(lost, gained, p_value):
    before = "1" * lost + "0" * gained + "11"
    after = "0" * lost + "1" * gained + "11"
    evidence = evidence_with(before=mask(before), after=mask(after))
    assert drop_confidence(evidence) == pytest.approx(1 - p_value, abs=1e-12)


def test_the_tokens_of_one_text_are_one_sample_of_mcnemars_test():
    # The first text loses five tokens and gains one, and the second loses one: both become worse.
    evidence = evidence_with(before=mask("1111101"), after=mask("0000010"))
    of_texts = replace(evidence, samples=torch.tensor([0, 0, 0, 0, 0, 0, 1]))
    assert drop_confidence(of_texts) == pytest.approx(1 - 1 / 4, abs=1e-12)
    assert drop_confidence(evidence) == pytest.approx(1 - 8 / 128, abs=1e-12)


def test_a_drop_of_many_elements_has_a_finite_confidence():
    before = torch.arange(200_000) % 2 == 0
    assert drop_confidence(evidence_with(before=before, after=before.flip(0))) < 0.6
    assert drop_confidence(evidence_with(before=before, after=torch.zeros_like(before))) == 1


def test_scores_before_the_distillation_that_need_it_are_none():
    for score in (drop_confidence, edge_drop, loss_rise, class_drop, validation_drop):
        assert score(evidence_of()) is None
    assert disagreement(evidence_of()) is None


def test_the_rise_of_the_loss_is_reported():
    evidence = replace(evidence_of(after="100001"), loss_before=0.5, loss_after=0.75)
    assert loss_rise(evidence) == 0.25
    assert evidence.metrics()["loss-rise"] == 0.25


def test_the_memory_disagrees_where_it_knows_better():
    evidence = replace(evidence_of(ensemble="110011"), memory=mask("101110"))
    assert disagreement(evidence) == pytest.approx(2 / 6)
    assert evidence.metrics()["memory-agreement"] == pytest.approx(2 / 6)


def test_the_drop_of_an_edge_is_summed_over_its_accepted_rounds():
    accepted = {"accepted": 1.0, "validation-before": 0.9, "validation-after": 0.8}
    refused = {"accepted": 0.0, "validation-before": 0.8, "validation-after": 0.1}
    unmeasured = {"accepted": 1.0}
    evidence = replace(evidence_of(after="110000"), earlier=(accepted, refused, unmeasured))
    assert edge_drop(evidence) == pytest.approx(0.1 + 2 / 6)


def test_labels_that_are_no_classes_have_no_class_drop():
    evidence = replace(evidence_of(after="110000"), labels=torch.linspace(0, 1, 6))
    assert class_drop(evidence) is None


def test_relative_accuracy_by_hand():
    assert relative_accuracy(evidence_of(before="111100", ensemble="100000")) == pytest.approx(
        1 / 4
    )
    assert relative_accuracy(evidence_of(before="100000", ensemble="110000")) == 1
    assert relative_accuracy(evidence_of(before="000000", ensemble="000000")) == 1


def refuses(reason):
    return lambda evidence: reason


def test_any_of_gives_the_first_reason_and_all_of_gives_every_reason():
    passes, first, second = refuses(None), refuses("first"), refuses("second")
    assert AnyOf([passes, first, second])(evidence_of()) == "first"
    assert AnyOf([passes, passes])(evidence_of()) is None
    assert AllOf([first, second])(evidence_of()) == "first; second"
    assert AllOf([first, passes])(evidence_of()) is None
    assert AllOf([])(evidence_of()) is None


def test_a_limit_takes_a_score_of_ones_own():
    guard = Limit(lambda evidence: 1 - evidence.clones.double().mean().item(), 0.1)
    assert guard(evidence_of()) == "<lambda>: expected at most 0.100, got 0.333"
