"""How far two models agree on what they get right (Sec. 4.1, Fig. 4 and 6)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Venn:
    """Shares of a held-out set by who classifies it correctly; fractions, in [0, 1].

    The rest, up to 1, neither gets right.
    """

    student_only: float
    both: float
    teacher_only: float

    @classmethod
    def of(cls, student: Tensor, teacher: Tensor) -> "Venn":
        """Count from two boolean masks `[N]`: which samples each classifies correctly.

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
        """Prediction consensus: intersection over union, in [0, 1]; 0 if both get nothing right."""
        union = self.student_only + self.both + self.teacher_only
        return self.both / union if union else 0.0
