import pytest
from hypothesis import given
from hypothesis import strategies as st

from flwr_cloned_kd import TrainAccuracyDrop, TrainAccuracyJump
from tests.helpers.reference import few

# The mean of these is 0.6, so the default threshold of 0.1 lies at 0.7.
HISTORY = (0.5, 0.6, 0.7)


@pytest.mark.parametrize(("accuracy", "refused"), [(0.69, False), (0.71, True), (1.0, True)])
def test_a_jump_above_the_mean_of_the_history_is_refused(accuracy, refused):
    assert TrainAccuracyJump()(HISTORY, accuracy) is refused


def test_the_threshold_is_the_users_to_set():
    assert TrainAccuracyJump(0.05)(HISTORY, 0.66)
    assert not TrainAccuracyJump(0.25)(HISTORY, 0.84)


def test_without_a_history_nothing_is_suspicious():
    assert TrainAccuracyJump()((), 1.0) is False


fractions = st.floats(0, 1)


@few
@given(history=st.lists(fractions, min_size=1, max_size=9), share=fractions, rule=fractions)
def test_a_falling_training_accuracy_is_never_refused(history, share, rule):
    assert not TrainAccuracyJump(rule)(history, share * min(history))


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
    assert TrainAccuracyDrop(0.1)(history, accuracy) is refused
