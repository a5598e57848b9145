"""Options of Phase 2."""

from dataclasses import dataclass, field

from ..engine.counts import check_count
from ..engine.recipe import Recipe
from .knowledge import Selection, StartRule


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Options of Phase 2 (Eq. 1 and 2): how a core learns from edges.

    Args:
        recipe: epochs, learning rate and augmentation of Phase 2.
        temperature: t, above 0; it divides the logits of teachers and student, and the KD term is
            multiplied by t^2.
        student_temperature: another divisor for the student's logits; None is `temperature`, 1.0
            is Eq. (1) as printed.
        memory_size: M of Eq. (2), the number of ensembles that are teachers, the present one
            included; 1 is no memory.
        mean_over_memory: average the KD terms of the memory instead of summing them (Eq. 2).
        student_start: where the student starts, in [0, 1]: 0 at the core, 1 at the core plus the
            clones' mean movement, which is the clones' mean for an edge that was sent this core.
            A function chooses in every round, from accuracies measured on the core data.
        core_as_teacher: use the core before the round as a teacher too.
        selection: weight of each sample for a teacher; None is 1 for every sample.

    Raises:
        ValueError: for a number out of range.

    Examples:
        >>> from flwr_cloned_kd import Distillation, Recipe
        >>> recipe = Recipe(epochs=40, lr=0.02)
        >>> phase_2 = Distillation(recipe=recipe, memory_size=1, student_start=1.0)
        >>> Distillation(memory_size=0)
        Traceback (most recent call last):
        ValueError: memory_size: expected at least 1, got 0
    """

    recipe: Recipe = field(default_factory=Recipe)
    temperature: float = 4.0
    student_temperature: float | None = None
    memory_size: int = 3
    mean_over_memory: bool = False
    student_start: float | StartRule = 0.0
    core_as_teacher: bool = False
    selection: Selection | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "student_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected above 0, got {value}")
        check_count("memory_size", self.memory_size)
        if not callable(self.student_start) and not 0 <= self.student_start <= 1:
            raise ValueError(f"student_start: expected 0 to 1, got {self.student_start}")
