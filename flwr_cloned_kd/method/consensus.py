"""Agreement of two models on the samples that they classify correctly (Sec. 4.1, Fig. 4 and 6)."""

from dataclasses import dataclass

from torch import Tensor

from ..engine.fit import accuracy
from ..engine.tasks import Task, counting


@dataclass(frozen=True)
class Venn:
    """Shares of a held-out set that only one model, or both, classify correctly.

    Fractions in [0, 1]; the remaining share is what neither model classifies correctly.

    Args:
        student_only: share that only the student classifies correctly.
        both: share that both classify correctly.
        teacher_only: share that only the teacher classifies correctly.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Venn
        >>> student = torch.tensor([True, True, False, False])
        >>> teacher = torch.tensor([True, False, True, False])
        >>> venn = Venn.of(student, teacher)
        >>> venn
        Venn(student_only=0.25, both=0.25, teacher_only=0.25)
        >>> round(venn.consensus, 3)
        0.333
    """

    student_only: float
    both: float
    teacher_only: float

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor) -> "Venn":
        """Count from two boolean masks `[N]`: which samples each model classifies correctly.

        Raises:
            ValueError: if the masks are empty or differ in shape.
        """
        if student.shape != teacher.shape or not student.numel():
            raise ValueError(
                f"masks: expected two of one size above 0, got {tuple(student.shape)} "
                f"and {tuple(teacher.shape)}"
            )
        student, teacher = student.bool(), teacher.bool()
        regions = (student & ~teacher, student & teacher, ~student & teacher)
        return cls(*(int(region.sum()) / student.numel() for region in regions))

    @property
    def consensus(self) -> float:
        """Prediction consensus: intersection over union, in [0, 1]; 0 for an empty union."""
        union = self.student_only + self.both + self.teacher_only
        return self.both / union if union else 0.0


def compare(core: Tensor, edge: Tensor, labels: Tensor, task: Task) -> dict[str, float]:
    """Score outputs of the core `[N, ...]` and of an edge `[E, N, ...]` against the labels."""
    ensemble = task.prediction(task.target(edge, 1.0).mean(0))
    venn = Venn.of(
        *(counting(task.correct(outputs, labels), labels, task) for outputs in (core, ensemble))
    )
    return {
        "core-accuracy": venn.student_only + venn.both,
        "edge-accuracy": float(accuracy(edge, labels, task).mean()),
        "ensemble-accuracy": venn.both + venn.teacher_only,
        "student-only": venn.student_only,
        "both": venn.both,
        "teacher-only": venn.teacher_only,
        "consensus": venn.consensus,
    }
