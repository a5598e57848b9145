import math

import pytest
from flwr.app import ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from flwr_cloned_kd import (
    ClonedKD,
    ConstantStaleness,
    HingeStaleness,
    PolynomialStaleness,
)
from tests.helpers.fake_grid import FakeGrid
from tests.helpers.federation import apps, small_core
from tests.helpers.reference import few

amounts = st.floats(0, 100)
weights = st.one_of(
    st.builds(ConstantStaleness),
    st.builds(PolynomialStaleness, amounts),
    st.builds(HingeStaleness, amounts, amounts),
)


@pytest.mark.parametrize(("staleness", "expected"), [(0, 1), (3, 1 / 2), (8, 1 / 3)])
def test_the_default_polynomial_is_fedbuffs_inverse_square_root(staleness, expected):
    """1/sqrt(1 + 3) and 1/sqrt(1 + 8); without the 1 the weight of a fresh answer is 1/0."""
    assert PolynomialStaleness()(staleness) == expected


def test_the_polynomials_exponent_is_negated():
    assert PolynomialStaleness(2)(3) == 1 / 16  # (1 + 3)^-2


@pytest.mark.parametrize(
    ("staleness", "expected"), [(0, 1), (3, 1), (4, 1), (5, 1 / 11), (6, 1 / 21)]
)
def test_the_hinge_is_one_up_to_b_and_falls_from_there(staleness, expected):
    """a = 10, b = 4: 1 / (10 (5 - 4) + 1). With a bracket misplaced, 10 (5 - 4 + 1), it is 1/20."""
    assert HingeStaleness(10, 4)(staleness) == expected


@pytest.mark.parametrize("staleness", [0, 1, 1000])
def test_constant_is_one(staleness):
    assert ConstantStaleness()(staleness) == 1


@few
@given(weight=weights)
def test_a_fresh_answer_counts_in_full(weight):
    assert weight(0) == 1


@few
@given(weight=weights, staleness=st.integers(0, 1000))
def test_a_later_answer_never_weighs_more(weight, staleness):
    assert 0 <= weight(staleness + 1) <= weight(staleness) <= 1


@few
@given(a=st.floats(0.01, 100), b=st.integers(0, 50))
def test_the_hinge_has_no_jump_at_b(a, b):
    """A slope of at most a: the step from b to b + 1 is 1 - 1/(a + 1)."""
    hinge = HingeStaleness(a, b)
    assert hinge(b) == 1
    assert math.isclose(hinge(b) - hinge(b + 1), a / (a + 1), rel_tol=1e-9)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a", lambda value: PolynomialStaleness(value)),
        ("a", lambda value: HingeStaleness(value, 4)),
        ("b", lambda value: HingeStaleness(10, value)),
    ],
)
def test_a_number_out_of_range_is_named(name, make, value):
    with pytest.raises(ValueError, match=f"^{name}: expected at least 0, got {value}$"):
        make(value)


def test_a_staleness_weight_weighs_the_teachers_of_cloned_kd():
    core = small_core()
    weight = PolynomialStaleness(1)
    strategy = ClonedKD(core, num_clones=1, max_in_flight=2, staleness_weight=weight)
    first = ArrayRecord(core.model.state_dict())
    strategy.start(FakeGrid(apps(2)), first, num_rounds=2, timeout=30)
    assert sorted(strategy.state.memory_weights) == [1 / 2, 1]
