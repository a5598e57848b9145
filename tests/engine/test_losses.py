from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from flwr_cloned_kd.engine.losses import Batch, cross_entropy, distillation, soft_target
from tests.helpers.reference import divergences, few

pytestmark = pytest.mark.usefixtures("one_thread")

# Softmax at temperature 2 turns these logits into (1/4, 3/4) and (3/4, 1/4), for 2 ln 3 / 2 = ln 3.
QUARTER, THREE_QUARTERS = [0.0, 2 * log(3)], [2 * log(3), 0.0]


def batch_of(labels):
    labels = torch.as_tensor(labels)
    return Batch(torch.zeros(len(labels), 1), labels, torch.arange(len(labels)))


def distilled(teachers, weights, temperature, student_temperature=None):
    """Make the loss of a student for teachers with the logits `[K, B, C]`."""
    logits = torch.as_tensor(teachers, dtype=torch.float64)
    target = soft_target(logits, torch.tensor(weights, dtype=torch.float64), temperature)
    loss = distillation(temperature, student_temperature)
    return lambda student, batch: loss(student, batch._replace(targets=target))


def gradient(loss, logits):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits), logits)[0]


def draw(num_teachers, num_samples=4, num_classes=5, *, seed):
    """Draw a student's logits, labels and teachers' logits, in float64, spread over about 6."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    student = 3 * torch.randn(num_samples, num_classes, **options)
    teachers = 3 * torch.randn(num_teachers, num_samples, num_classes, **options)
    return student, torch.randint(num_classes, (num_samples,), generator=generator), teachers


@few
@given(
    seed=st.integers(0, 10**6),
    num_ensembles=st.integers(1, 3),
    num_clones=st.integers(1, 3),
    temperature=st.sampled_from([0.5, 1.0, 4.0, 10.0]),
    student_temperature=st.sampled_from([None, 1.0]),
)
def test_one_target_has_the_gradient_of_separate_divergences(
    seed, num_ensembles, num_clones, temperature, student_temperature
):
    student, labels, logits = draw(num_ensembles * num_clones, seed=seed)
    per_ensemble = [1.0, 0.5, 0.25][:num_ensembles]
    weights = [weight / num_clones for weight in per_ensemble for _ in range(num_clones)]
    fast = distilled(logits, weights, temperature, student_temperature)

    actual = gradient(lambda f: fast(f, batch_of(labels)), student)
    ensembles = logits.split(num_clones)
    expected = gradient(
        lambda f: divergences(f, labels, ensembles, per_ensemble, temperature, student_temperature),
        student,
    )

    # Float64 rounds at 1e-16; the largest factor is t^2 / 1 = 100 over a handful of sums.
    assert (actual - expected).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_differs_from_eq_2_by_the_teachers_entropy(seed):
    student, labels, logits = draw(2, seed=seed)
    t = 4.0
    value = distilled(logits, [0.5, 0.5], t)(student, batch_of(labels))
    printed = divergences(student, labels, [logits], [1.0], t)
    p = F.softmax(logits / t, -1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert value.item() == pytest.approx((printed + t**2 * entropy).item(), rel=1e-12)


def test_cross_entropy_of_two_samples_by_hand():
    # Softmax of (0, ln 3) is (1/4, 3/4): the mean of ln 4 and ln(4/3).
    logits = torch.tensor([[0.0, log(3)], [0.0, log(3)]], dtype=torch.float64)
    value = cross_entropy(logits, batch_of([0, 1]))
    assert value.item() == pytest.approx((log(4) + log(4 / 3)) / 2, abs=1e-12)


def test_the_target_is_a_weighted_sum_by_hand():
    # 1/2 (1/4, 3/4) + 2 (3/4, 1/4) = (13/8, 7/8).
    logits = torch.tensor([[QUARTER], [THREE_QUARTERS]], dtype=torch.float64)
    target = soft_target(logits, torch.tensor([0.5, 2.0], dtype=torch.float64), temperature=2.0)
    assert target.squeeze().tolist() == pytest.approx([13 / 8, 7 / 8], abs=1e-12)


def test_a_target_needs_no_tensor_of_python_numbers(monkeypatch):
    # On a GPU such a tensor is a copy for which the processor waits, in every step.
    logits, weights = torch.zeros(2, 3, 4), torch.tensor([0.5, 0.5])
    monkeypatch.setattr(torch, "tensor", None)
    assert soft_target(logits, weights, 2.0).shape == (3, 4)


STUDENT = torch.tensor([[0.0, 2 * log(7)]], dtype=torch.float64)


def test_the_distillation_loss_of_two_classes_by_hand():
    # The student at t = 2 is (1/8, 7/8), and (1/50, 49/50) at 1. Cross entropy with label 1 is
    # ln(50/49). With the teacher (1/4, 3/4) the soft part is 1/4 ln 8 + 3/4 ln(8/7), times t^2 = 4.
    loss = distilled([[QUARTER]], [1.0], 2.0)
    expected = log(50 / 49) + 4 * (log(8) / 4 + 3 / 4 * log(8 / 7))
    assert loss(STUDENT, batch_of([1])).item() == pytest.approx(expected, abs=1e-12)


def test_the_distillation_loss_as_printed_by_hand():
    # As above with the student at 1, (1/50, 49/50), in the soft part; t^2 = 4 stays.
    loss = distilled([[QUARTER]], [1.0], 2.0, student_temperature=1.0)
    expected = log(50 / 49) + 4 * (log(50) / 4 + 3 / 4 * log(50 / 49))
    assert loss(STUDENT, batch_of([1])).item() == pytest.approx(expected, abs=1e-12)


def test_the_target_of_an_ensemble_is_the_mean_by_hand():
    # The mean of (1/4, 3/4) and (3/4, 1/4) is (1/2, 1/2). For an even student at t = 2 the soft
    # part is 4 ln 2 and the cross entropy is ln 2.
    loss = distilled([[QUARTER], [THREE_QUARTERS]], [0.5, 0.5], 2.0)
    even = torch.zeros(1, 2, dtype=torch.float64)
    assert loss(even, batch_of([0])).item() == pytest.approx(5 * log(2), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_student_equal_to_its_teacher_has_no_kd_gradient(seed):
    student, labels, _ = draw(1, seed=seed)
    loss = distilled(student[None], [1.0], 4.0)
    total = gradient(lambda f: loss(f, batch_of(labels)), student)
    hard = gradient(lambda f: F.cross_entropy(f, labels), student)
    # Both softmaxes are the same numbers; the sums differ by rounding.
    assert (total - hard).abs().max() < 1e-14


def test_as_printed_a_student_leaves_its_equal_teacher_by_hand():
    # d/df of t^2 KL(softmax(f/t) || softmax(f)) is t^2 (softmax(f) - softmax(f/t)). For
    # f = (0, 2 ln 3) and t = 2 that is 4 ((1/10, 9/10) - (1/4, 3/4)) = (-0.6, 0.6).
    student = torch.tensor([QUARTER], dtype=torch.float64)
    loss = distilled(student[None], [1.0], 2.0, student_temperature=1.0)
    total = gradient(lambda f: loss(f, batch_of([0])), student)
    hard = gradient(lambda f: F.cross_entropy(f, torch.tensor([0])), student)
    assert (total - hard).squeeze().tolist() == pytest.approx([-0.6, 0.6], abs=1e-12)


def test_teachers_of_weight_zero_leave_cross_entropy():
    student, labels, logits = draw(2, seed=0)
    loss = distilled(logits, [0.0, 0.0], 4.0)
    assert loss(student, batch_of(labels)) == F.cross_entropy(student, labels)


def test_a_batch_without_targets_is_refused():
    with pytest.raises(ValueError, match="distillation: expected batches with targets, got none"):
        distillation(4.0)(STUDENT, batch_of([1]))
