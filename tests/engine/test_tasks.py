"""Tasks: gradients derived by hand, and one folded target against a separate term per teacher."""

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from flwr_cloned_kd import (
    AccuracyReached,
    Classification,
    Recipe,
    Regression,
    SeveralLabels,
    accuracy,
    clone,
    cross_entropy,
    fit,
)
from flwr_cloned_kd.engine.losses import Batch, distillation, soft_target
from flwr_cloned_kd.engine.tasks import classification
from tests.helpers.reference import few

pytestmark = pytest.mark.usefixtures("one_thread")

LN3 = log(3)  # sigmoid(ln 3) = 3/4 and softmax(ln 3, 0) = (3/4, 1/4)
SIZES = {"samples": (4, 5), "tokens": (3, 4, 5), "pixels": (2, 5, 3, 2)}


def batch_of(labels):
    return Batch(torch.zeros(len(labels), 1), labels, torch.arange(len(labels)))


def gradient(loss, outputs):
    outputs = outputs.clone().requires_grad_()
    return torch.autograd.grad(loss(outputs), outputs)[0]


def kd_gradient(task, student, teachers, weights, labels, temperature, student_temperature=None):
    """Return the gradient of the KD term alone: that of the whole loss less that of the labels."""
    scale = torch.tensor(weights, dtype=teachers.dtype)
    target = soft_target(teachers, scale, temperature, task)
    loss = distillation(temperature, student_temperature, task)
    batch = batch_of(labels)._replace(targets=target)
    whole = gradient(lambda outputs: loss(outputs, batch), student)
    return whole - gradient(lambda outputs: task.loss(outputs, labels), student)


# Textbook terms, one teacher at a time, element by element.


def kl_of_classes(student, teacher, axis):
    p, q = teacher.softmax(axis), student.softmax(axis)
    return (p * (p.log() - q.log())).sum(axis)


def kl_of_bernoulli(student, teacher):
    p, q = teacher.sigmoid(), student.sigmoid()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


CASES = {
    "samples": (Classification(), (4, 5), -1),
    "tokens": (Classification(ignore_index=-100), (3, 4, 5), -1),
    "pixels": (Classification(class_axis=-3, ignore_index=255), (2, 5, 3, 2), -3),
    "pixels that all count": (Classification(class_axis=-3), (2, 5, 3, 2), -3),
    "several labels": (SeveralLabels(), (4, 3), None),
    "some labels unknown": (SeveralLabels(ignore_index=-1), (4, 3), None),
    "numbers": (Regression(tolerance=0.5), (4,), None),
    "several numbers": (Regression(tolerance=0.5), (4, 3), None),
}
cases = pytest.mark.parametrize(("task", "shape", "axis"), CASES.values(), ids=CASES)


def labels_of(task, shape, generator):
    """Draw labels for outputs of a shape; a third of them do not count if the task allows it."""
    if isinstance(task, Regression):
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if isinstance(task, SeveralLabels):
        labels = torch.randint(2, shape, generator=generator)
    else:
        num_classes = shape[task.class_axis]
        places = list(shape)
        del places[task.class_axis]
        labels = torch.randint(num_classes, places, generator=generator)
    if task.ignore_index is not None:
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = task.ignore_index
    return labels


def divergence_by_the_textbook(task, axis, student, teacher, labels, temperature, weights):
    """Compute t^2 KL of one teacher, as a mean over the elements that count."""
    if isinstance(task, Regression):
        terms = (student - teacher) ** 2
    elif isinstance(task, SeveralLabels):
        terms = temperature**2 * kl_of_bernoulli(student / temperature, teacher / temperature)
    else:
        terms = temperature**2 * kl_of_classes(student / temperature, teacher / temperature, axis)
    weights = weights.reshape(*weights.shape, *[1] * (terms.dim() - weights.dim()))
    counts = labels != task.ignore_index if task.ignore_index is not None else labels == labels
    return (weights * terms)[counts].mean()


@cases
@few
@given(
    num_teachers=st.integers(1, 4),
    temperature=st.sampled_from([1.0, 3.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_one_folded_target_equals_a_sum_of_separate_terms(
    task, shape, axis, num_teachers, temperature, seed
):
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    student, teachers = (
        torch.randn(shape, **options),
        3 * torch.randn(num_teachers, *shape, **options),
    )
    labels = labels_of(task, shape, generator)
    weights = torch.rand(num_teachers, **options).tolist()
    actual = kd_gradient(task, student, teachers, weights, labels, temperature)

    def separate(outputs):
        every = torch.ones(shape[0], dtype=torch.float64)
        terms = [
            weight
            * divergence_by_the_textbook(task, axis, outputs, teacher, labels, temperature, every)
            for weight, teacher in zip(weights, teachers)
        ]
        return sum(terms)

    # float64: 1e-16 relative, sums of some hundred terms of about 10.
    assert torch.allclose(actual, gradient(separate, student), rtol=0, atol=1e-12)


@cases
@pytest.mark.parametrize("per_element", [False, True])
def test_rows_of_a_selection_weight_the_terms_of_their_teacher(task, shape, axis, per_element):
    # Two ensembles with a selection each: the target of each is multiplied by the weights of its
    # rows, then both are added up. Some weights are 0.
    generator = torch.Generator().manual_seed(3)
    options = {"generator": generator, "dtype": torch.float64}
    student, teachers = torch.randn(shape, **options), torch.randn(2, *shape, **options)
    labels = labels_of(task, shape, generator)
    size = labels.shape if per_element else labels.shape[:1]
    weights = [torch.randint(2, size, generator=generator).double() for _ in range(2)]
    total = 0
    for rows, teacher in zip(weights, teachers):
        target = task.target(teacher, 4.0)
        total = total + target * rows.reshape(*size, *[1] * (target.dim() - len(size)))
    batch = batch_of(labels)._replace(targets=total)
    loss = distillation(4.0, None, task)
    actual = gradient(lambda outputs: loss(outputs, batch), student)

    def separate(outputs):
        terms = [
            divergence_by_the_textbook(task, axis, outputs, teacher, labels, 4.0, rows)
            for rows, teacher in zip(weights, teachers)
        ]
        return task.loss(outputs, labels) + sum(terms)

    assert torch.allclose(actual, gradient(separate, student), rtol=0, atol=1e-12)


@cases
def test_a_student_that_equals_its_teacher_has_no_gradient(task, shape, axis):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = labels_of(task, shape, generator)
    assert kd_gradient(task, student, student[None], [1.0], labels, 4.0).abs().max() < 1e-14
    nothing = torch.zeros_like(task.target(student, 4.0))
    assert task.divergence(student, nothing, labels, 4.0) == 0


@cases
def test_the_loss_ignores_what_does_not_count(task, shape, axis):
    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = labels_of(task, shape, generator)
    if isinstance(task, Regression):
        terms = (outputs - labels) ** 2
    elif isinstance(task, SeveralLabels):
        terms = -torch.where(labels > 0, outputs.sigmoid().log(), (-outputs).sigmoid().log())
    else:
        picked = labels.clamp(0, outputs.shape[axis] - 1).unsqueeze(axis)
        terms = -outputs.log_softmax(axis).gather(axis, picked).squeeze(axis)
    counted = terms if task.ignore_index is None else terms[labels != task.ignore_index]
    assert task.loss(outputs, labels).item() == pytest.approx(counted.mean().item())
    right = task.correct(outputs, labels)
    right = right if task.ignore_index is None else right[labels != task.ignore_index]
    assert accuracy(outputs, labels, task).item() == pytest.approx(right.double().mean().item())
    # Two clones beside each other are scored as each of them alone.
    both = torch.stack([outputs, -outputs])
    assert accuracy(both, labels, task).tolist() == [
        accuracy(outputs, labels, task),
        accuracy(-outputs, labels, task),
    ]


@pytest.mark.parametrize(
    "task", [Classification(ignore_index=-100), SeveralLabels(ignore_index=-1)]
)
def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient(task):
    shape = (2, 3)
    labels = torch.full(shape[:1] if isinstance(task, Classification) else shape, task.ignore_index)
    outputs = torch.randn(shape, requires_grad=True)
    loss = task.loss(outputs, labels) + task.divergence(
        outputs, task.target(torch.randn(shape), 1.0), labels, 1.0
    )
    loss.backward()
    assert loss == 0
    assert not outputs.grad.any()


def test_classification_has_the_bits_of_the_formulas_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    logits, teachers = (
        torch.randn(7, 3, generator=generator),
        torch.randn(4, 7, 3, generator=generator),
    )
    labels = torch.arange(7) % 3
    weights = torch.tensor([0.25, 0.5, 0.125, 0.7])
    target = soft_target(teachers, weights, 3.0)
    assert torch.equal(target, torch.einsum("k,kbc->bc", weights, (teachers / 3.0).softmax(-1)))

    def as_printed(outputs):
        soft = -(target * (outputs / 3.0).log_softmax(-1)).sum(-1).mean()
        return F.cross_entropy(outputs, labels) + 3.0**2 * soft

    batch = batch_of(labels)._replace(targets=target)
    loss = distillation(3.0)
    assert torch.equal(loss(logits, batch), as_printed(logits))
    assert torch.equal(gradient(lambda x: loss(x, batch), logits), gradient(as_printed, logits))
    assert torch.equal(classification.loss(logits, labels), cross_entropy(logits, batch))


def test_the_gradient_of_tokens_by_hand():
    # One sample of two tokens and two classes at t = 2. The teacher gives the first token
    # softmax(2 ln 3 / 2, 0) = (3/4, 1/4) and the student (1/2, 1/2). The gradient of
    # t^2 KL is t (q - p): 2 (1/2 - 3/4, 1/2 - 1/4) = (-1/2, 1/2). The second token is ignored, so
    # that one element counts.
    task = Classification(ignore_index=-100)
    student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[2 * LN3, 0.0], [9.0, 0.0]]])
    labels = torch.tensor([[0, -100]])
    actual = kd_gradient(task, student, teacher[None], [1.0], labels, 2.0)
    assert actual.flatten().tolist() == pytest.approx([-0.5, 0.5, 0, 0])
    # The cross entropy adds q - (1, 0) = (-1/2, 1/2) for the first token.
    assert gradient(lambda x: task.loss(x, labels), student).flatten().tolist() == [-0.5, 0.5, 0, 0]


def test_pixels_have_the_gradient_of_tokens():
    generator = torch.Generator().manual_seed(4)
    tokens, teachers = (
        torch.randn(size, generator=generator) for size in ((2, 6, 5), (3, 2, 6, 5))
    )
    labels = torch.randint(5, (2, 6), generator=generator)
    expected = kd_gradient(Classification(), tokens, teachers, [0.3] * 3, labels, 4.0)
    pixels, others = tokens.movedim(-1, 1), teachers.movedim(-1, 2)
    actual = kd_gradient(
        Classification(class_axis=-3),
        pixels.unflatten(2, (2, 3)),
        others.unflatten(3, (2, 3)),
        [0.3] * 3,
        labels.unflatten(1, (2, 3)),
        4.0,
    )
    assert torch.allclose(actual.flatten(2).movedim(1, -1), expected, atol=1e-7)


def test_the_gradient_of_several_labels_by_hand():
    # t = 2, one sample of two labels: the teacher's sigmoid(2 ln 3 / 2) = 3/4 and sigmoid(0) = 1/2,
    # the student's 1/2 and 1/2. The gradient of t^2 KL is t (q - p) = (-1/2, 0), over 2 elements.
    # With weights 1/2 and 1 of two such teachers it is 3/2 of that.
    task, student = SeveralLabels(), torch.zeros(1, 2)
    teacher = torch.tensor([[2 * LN3, 0.0]])
    labels = torch.tensor([[1, 0]])
    actual = kd_gradient(task, student, torch.stack([teacher] * 2), [0.5, 1.0], labels, 2.0)
    assert actual.flatten().tolist() == pytest.approx([1.5 * -0.25, 0])
    # Cross entropy: (q - y) / 2 = (-1/4, 1/4).
    assert gradient(lambda x: task.loss(x, labels), student).flatten().tolist() == [-0.25, 0.25]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_gradient_of_a_regression_by_hand(temperature):
    # Teachers 3 and 5 with the weights 1/2 and 1, student 1: sum_k w_k 2 (s - k) = -2 - 8 = -10 for
    # the first of two samples; the second one equals both teachers. Over 2 samples: (-5, 0). The
    # temperature cancels.
    task, student = Regression(tolerance=1), torch.tensor([1.0, 7.0])
    teachers = torch.tensor([[3.0, 7.0], [5.0, 7.0]])
    labels = torch.tensor([2.0, 7.0])
    actual = kd_gradient(task, student, teachers, [0.5, 1.0], labels, temperature)
    assert actual.tolist() == pytest.approx([-5.0, 0.0], abs=1e-5)
    # Squared error: 2 (1 - 2) / 2.
    assert gradient(lambda x: task.loss(x, labels), student).tolist() == [-1.0, 0.0]


def test_a_prediction_of_a_mean_target_by_hand():
    outputs = torch.tensor([[[LN3, -9.0]], [[-LN3 / 2, 1.0]]])  # two clones, one sample
    several = SeveralLabels()
    mean = several.target(outputs, 1.0).mean(0)
    # (3/4 + 0.366) / 2 is above 1/2, (0.0001 + 0.731) / 2 is below.
    assert (several.prediction(mean) > 0).tolist() == [[True, False]]
    numbers = Regression(tolerance=0.5)
    mean = numbers.target(outputs, 4.0).mean(0)
    assert numbers.prediction(mean).flatten().tolist() == pytest.approx([LN3 / 4, -4.0])
    pixels = Classification(class_axis=-3)
    images = torch.randn(2, 5, 3, 2)
    assert torch.allclose(pixels.prediction(pixels.target(images, 1.0)), images.softmax(1))


def test_correct_elements_by_hand():
    assert Regression(tolerance=0.5).correct(
        torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.5, 1.6, 0.5])
    ).tolist() == [True, False, True]
    assert SeveralLabels().correct(
        torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[1, 1, 0]])
    ).tolist() == [[True, False, False]]
    tokens = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    labels = torch.tensor([[1, 1, -100]])
    assert accuracy(tokens, labels, Classification(ignore_index=-100)) == 0.5


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "message"),
    [
        (
            SeveralLabels(),
            torch.zeros(2, 3),
            torch.tensor([[0, 1, 2]] * 2),
            "expected 0 or 1, got 2",
        ),
        (SeveralLabels(), torch.zeros(2, 3), torch.zeros(2, 4), r"outputs \[B, 4\], shaped as"),
        (
            SeveralLabels(ignore_index=-1),
            torch.zeros(2, 3),
            torch.full((2, 3), -1),
            "expected some other than -1, got none",
        ),
        (
            Classification(ignore_index=-1),
            torch.zeros(2, 3),
            torch.full((2,), -1),
            "expected some other than -1, got none",
        ),
        (
            Regression(tolerance=1),
            torch.zeros(2),
            torch.zeros(2, dtype=torch.int64),
            "labels: expected floating-point numbers, got torch.int64",
        ),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused(task, outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        task.check(outputs, labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regression(tolerance=-1), "tolerance: expected at least 0, got -1"),
        (lambda: Classification(class_axis=1), "class_axis: expected an axis .* below 0, got 1"),
    ],
)
def test_a_task_refuses_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_labels_are_accepted_where_the_task_ignores_them():
    SeveralLabels(ignore_index=-1).check(torch.zeros(2, 2), torch.tensor([[0, 1], [-1, 1]]))
    SeveralLabels().check(torch.zeros(2, 2), torch.tensor([[True, False]] * 2))
    Classification(ignore_index=255).check(torch.zeros(2, 3), torch.tensor([2, 255]))


def test_a_stopping_rule_gets_the_accuracy_of_the_task():
    # Every second label is ignored; the others are 0, which the bias learns at once.
    seen = []
    rule = AccuracyReached(1.0)
    recipe = Recipe(
        epochs=9, batch_size=2, stop=lambda history: seen.append(history[-1]) or rule(history)
    )
    model = nn.Linear(1, 2)
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, 0.0)
    data = torch.zeros(8, 4, 1), torch.tensor([0, -100] * 2).expand(8, 4)
    fit(model, clone(model.state_dict(), 2), data, recipe, task=Classification(ignore_index=-100))
    assert seen[0].accuracy == 1.0
    assert len(seen) == 1
    assert seen[0].loss < log(2)
