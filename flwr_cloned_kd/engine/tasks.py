"""Prediction tasks: how the outputs of a model become a loss, a target, and a correct prediction.

Every divergence of Eq. (1) has the form `A(s) - A(k) - m(k) (s - k)` for outputs s of the student
and k of a teacher: A is a convex function of the outputs and m its gradient, the mean that the
outputs stand for. Its gradient with respect to s, `m(s) - m(k)`, is linear in m(k). The sum
`sum_k w_k KL_k` therefore depends on the teachers only through the two sums `sum_k w_k m(k)` and
`sum_k w_k`. A target is a tensor from which these two sums can be read, and which adds up as they
do: the target of several teachers is the weighted sum of the targets of each of them.

| task | A(s) | target of one teacher |
| --- | --- | --- |
| `Classification` | log sum_c exp(s_c) | softmax(k), which sums to 1 |
| `SeveralLabels` | log(1 + exp(s)) | (1 - sigmoid(k), sigmoid(k)), which sums to 1 |
| `Regression` | s^2 | (k, 1) |
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Task(Protocol):
    """What the outputs of a model mean; every prediction task is one small value.

    Outputs are `[..., B, *]`, labels `[B, *]`. An element is one entry of the labels: a sample, a
    pixel, a token or one of several labels.

    Examples:
        >>> from flwr_cloned_kd import Classification, Task
        >>> task: Task = Classification()  # docs/your_model.md writes a task of its own
    """

    @property
    def ignore_index(self) -> int | None:
        """The label of elements that do not count; None if every element counts."""
        ...

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """Check that labels and model fit the task.

        Args:
            outputs: `[B, *]` of one or two samples.
            labels: `[N, *]` of all samples.

        Raises:
            ValueError: naming what was expected and what was found.
        """
        ...

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over the elements that count, for outputs `[B, *]`; a scalar."""
        ...

    def target(self, outputs: Tensor, temperature: float) -> Tensor:
        """Return the target `[..., B, *]` of a teacher with these outputs.

        The target of several teachers is the weighted sum of the targets of each.
        """
        ...

    def divergence(
        self, outputs: Tensor, target: Tensor, labels: Tensor, temperature: float
    ) -> Tensor:
        """Return the divergence of the student from a sum of targets, up to a constant; a scalar.

        It is a mean over the elements that count. The loss of Phase 2 multiplies it by t^2.

        Args:
            outputs: `[B, *]` of the student.
            target: `sum_k w_k target_k`. Where all weights are 0 the divergence must be 0.
            temperature: divides the outputs of the student.
        """
        ...

    def prediction(self, target: Tensor) -> Tensor:
        """Return outputs that `correct` judges as it would judge a model with this target."""
        ...

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return which elements are predicted correctly: bool, `[..., *labels.shape]`."""
        ...


def counting(values: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return the elements that count, `[..., M]`, of values `[..., *labels.shape]`."""
    if task.ignore_index is None:
        return values.flatten(values.dim() - labels.dim())
    return values[..., labels != task.ignore_index]


def mean_of_counting(values: Tensor, labels: Tensor, ignore_index: int | None) -> Tensor:
    """Average values `[*labels.shape]` over the elements that count; 0 if no element counts."""
    if ignore_index is None:
        return values.mean()
    counts = labels != ignore_index
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One class per element: a sample, a token of a text or a pixel of an image.

    Args:
        class_axis: axis of the classes in the outputs, counted from the end: -1 for samples
            `[B, C]` and tokens `[B, T, C]`, -3 for pixels `[B, C, H, W]`.
        ignore_index: label of elements that do not count, such as -100 for padding tokens.

    Raises:
        ValueError: if `class_axis` is not negative.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Classification
        >>> tokens = Classification(ignore_index=-100)
        >>> logits, labels = torch.zeros(2, 5, 30), torch.full((2, 5), -100)
        >>> labels[:, 0] = 7
        >>> tokens.check(logits, labels)
        >>> round(tokens.loss(logits, labels).item(), 2)  # the logarithm of 30 classes
        3.4
    """

    class_axis: int = -1
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        if self.class_axis >= 0:
            raise ValueError(
                f"class_axis: expected an axis counted from the end, below 0, got {self.class_axis}"
            )

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        _check_dtype(labels, torch.int64, "integers")
        rank = labels.dim() + 1
        if rank + self.class_axis < 1:
            raise ValueError(
                f"class_axis: expected -1 to {1 - rank} for labels "
                f"{_shape('N', *labels.shape[1:])}, got {self.class_axis}"
            )
        sizes = list(outputs.shape[1:])
        expected: list[int | str] = list(labels.shape[1:])
        place = rank + self.class_axis - 1
        expected.insert(place, sizes[place] if len(sizes) == rank - 1 else "classes")
        if sizes != expected:
            raise ValueError(
                f"model: expected outputs {_shape('B', *expected)} for labels "
                f"{_shape('N', *labels.shape[1:])}, got {_shape('B', *sizes)}"
            )
        counted = counting(labels, labels, self)
        if not len(counted):
            raise ValueError(f"labels: expected some other than {self.ignore_index}, got none")
        low, high = (int(extreme) for extreme in torch.aminmax(counted))
        num_classes = outputs.shape[self.class_axis]
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"labels: expected 0 to {num_classes - 1}, as the model has {num_classes} outputs, "
                f"got {low if low < 0 else high}"
            )

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        logits = self._classes_last(outputs)
        if self.ignore_index is None:
            return F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        clean = torch.where(labels == self.ignore_index, 0, labels)
        losses = F.cross_entropy(logits.flatten(0, -2), clean.flatten(), reduction="none")
        return mean_of_counting(losses.view(labels.shape), labels, self.ignore_index)

    def target(self, outputs: Tensor, temperature: float) -> Tensor:
        return (self._classes_last(outputs) / temperature).softmax(-1)

    def divergence(
        self, outputs: Tensor, target: Tensor, labels: Tensor, temperature: float
    ) -> Tensor:
        log_probabilities = (self._classes_last(outputs) / temperature).log_softmax(-1)
        return -mean_of_counting((target * log_probabilities).sum(-1), labels, self.ignore_index)

    def prediction(self, target: Tensor) -> Tensor:
        return target.movedim(-1, self.class_axis)

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.argmax(self.class_axis) == labels

    def _classes_last(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(self.class_axis, -1)


@dataclass(frozen=True, kw_only=True)
class SeveralLabels:
    """Yes or no for each of several labels: sigmoid outputs `[B, L]`, labels `[B, L]` of 0 and 1.

    Args:
        ignore_index: label of elements that do not count, such as -1 for unknown.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import SeveralLabels
        >>> task = SeveralLabels()
        >>> task.correct(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1, 0, 0]]))
        tensor([[ True,  True, False]])
    """

    ignore_index: int | None = None

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        _check_same_shape(outputs, labels)
        counted = counting(labels, labels, self)
        wrong = counted[(counted != 0) & (counted != 1)]
        if len(wrong):
            raise ValueError(f"labels: expected 0 or 1, got {wrong[0].item():g}")
        if not len(counted):
            raise ValueError(f"labels: expected some other than {self.ignore_index}, got none")

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        # An ignored label may lie outside 0 to 1, where its loss would be negative: but it is
        # finite, and it does not count.
        losses = F.binary_cross_entropy_with_logits(
            outputs, labels.to(outputs.dtype), reduction="none"
        )
        return mean_of_counting(losses, labels, self.ignore_index)

    def target(self, outputs: Tensor, temperature: float) -> Tensor:
        scaled = outputs / temperature
        return torch.stack([(-scaled).sigmoid(), scaled.sigmoid()], -1)

    def divergence(
        self, outputs: Tensor, target: Tensor, labels: Tensor, temperature: float
    ) -> Tensor:
        scaled = outputs / temperature
        log_probabilities = torch.stack([F.logsigmoid(-scaled), F.logsigmoid(scaled)], -1)
        return -mean_of_counting((target * log_probabilities).sum(-1), labels, self.ignore_index)

    def prediction(self, target: Tensor) -> Tensor:
        return target[..., 1] - target[..., 0]

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs > 0) == (labels > 0)


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Numbers, with the squared error: outputs and labels `[B]` or `[B, D]`.

    The squared error is twice the negative logarithm of a normal density of variance 1, and twice
    the divergence of two such densities with the means s and k is `(s - k)^2`. The KD term of a
    teacher is therefore its squared difference from the student, on the scale of the loss. The
    temperature cancels: `t^2 (s / t - k / t)^2 = (s - k)^2`.

    Args:
        tolerance: largest difference from the label of a correct prediction, at least 0; in the
            unit of the labels.

    Raises:
        ValueError: if `tolerance` is negative.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Regression
        >>> task = Regression(tolerance=0.5)
        >>> task.correct(torch.tensor([1.0, 2.0]), torch.tensor([1.4, 3.0]))
        tensor([ True, False])
    """

    tolerance: float

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance: expected at least 0, got {self.tolerance}")

    @property
    def ignore_index(self) -> None:
        return None

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        _check_dtype(labels, torch.float32, "floating-point numbers")
        _check_same_shape(outputs, labels)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs, labels)

    def target(self, outputs: Tensor, temperature: float) -> Tensor:
        return torch.stack([outputs, torch.ones_like(outputs)], -1)

    def divergence(
        self, outputs: Tensor, target: Tensor, labels: Tensor, temperature: float
    ) -> Tensor:
        # sum_k w_k (s - k)^2 = W (s - m)^2 + a constant, with W = sum_k w_k and W m = sum_k w_k k.
        total, weight = target.unbind(-1)
        mean = total / torch.where(weight > 0, weight, 1)
        return (weight * ((outputs - mean) / temperature).square()).mean()

    def prediction(self, target: Tensor) -> Tensor:
        return target[..., 0] / target[..., 1]

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - labels).abs() <= self.tolerance


classification = Classification()


def _check_dtype(labels: Tensor, dtype: torch.dtype, kind: str) -> None:
    if labels.dtype != dtype:
        raise ValueError(f"labels: expected {kind}, got {labels.dtype}")


def _check_same_shape(outputs: Tensor, labels: Tensor) -> None:
    if outputs.shape[1:] != labels.shape[1:]:
        raise ValueError(
            f"model: expected outputs {_shape('B', *labels.shape[1:])}, shaped as the labels, "
            f"got {_shape('B', *outputs.shape[1:])}"
        )


def _shape(*sizes: int | str) -> str:
    return f"[{', '.join(map(str, sizes))}]"
