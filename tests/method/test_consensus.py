import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flwr_cloned_kd import Venn
from tests.helpers.reference import few


def test_regions_and_consensus_of_ten_samples():
    # The student is right on samples 0 to 5 and the teacher on 2 to 6: the student alone on 2, both
    # on 4, the teacher alone on 1. Both are right on 4 of the 7 samples of the union.
    sample = torch.arange(10)
    venn = Venn.of(sample <= 5, (sample >= 2) & (sample <= 6))
    assert (venn.student_only, venn.both, venn.teacher_only) == (0.2, 0.4, 0.1)
    assert venn.consensus == pytest.approx(4 / 7)


masks = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50)


@few
@given(pairs=masks)
def test_consensus_and_disjoint_regions_are_fractions(pairs):
    student, teacher = torch.tensor(pairs).T
    venn = Venn.of(student, teacher)
    regions = (venn.student_only, venn.both, venn.teacher_only)
    assert 0 <= venn.consensus <= 1
    assert all(0 <= region <= 1 for region in regions)
    # Three quotients round once each, by at most 2^-53.
    assert sum(regions) <= 1 + 1e-15
    assert venn.student_only + venn.both == pytest.approx(student.float().mean().item())
    assert venn.teacher_only + venn.both == pytest.approx(teacher.float().mean().item())


@few
@given(pairs=masks)
def test_swapping_student_and_teacher_swaps_the_outer_regions(pairs):
    student, teacher = torch.tensor(pairs).T
    venn, swapped = Venn.of(student, teacher), Venn.of(teacher, student)
    assert swapped == Venn(venn.teacher_only, venn.both, venn.student_only)
    assert swapped.consensus == pytest.approx(venn.consensus)


def test_a_model_fully_agrees_with_itself():
    assert Venn.of(torch.tensor([True, False]), torch.tensor([True, False])).consensus == 1


def test_two_models_that_get_nothing_right_have_no_consensus():
    assert Venn.of(torch.zeros(4), torch.zeros(4)) == Venn(0.0, 0.0, 0.0)
    assert Venn(0.0, 0.0, 0.0).consensus == 0


@pytest.mark.parametrize(("student", "teacher"), [(0, 0), (3, 2)])
def test_masks_that_are_empty_or_differ_in_size_are_refused(student, teacher):
    message = rf"expected two of one size above 0, got \({student},\) and \({teacher},\)"
    with pytest.raises(ValueError, match=message):
        Venn.of(torch.ones(student), torch.ones(teacher))
