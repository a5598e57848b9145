"""What a core measures of the answer of one edge, on data of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..engine.ensemble import Ensemble, StateDict, check_finite, clone, mean
from ..engine.fit import predict
from ..engine.inputs import Dataset
from ..engine.runtime import Runtime
from ..engine.tasks import Task, counting
from .state import CoreState


@dataclass(frozen=True, eq=False, kw_only=True)
class Evidence:
    """What a core has measured of the answer of one edge, on data of its own.

    A guard gets it twice. The first time is before the distillation: the fields from `after` on
    are None, and a refusal saves the distillation. The second time is after it.

    The masks say which elements of the validation data a model predicts correctly; that is
    `Core.validation`, or the core data without it. An element is a sample, or a token or pixel that
    counts, by the task. Losses are means over these elements, in the unit of `Task.loss`.

    Args:
        labels: of these elements, `[N]`.
        before: mask `[N]` of the core before the round.
        clones: masks `[E, N]` of the clones.
        ensemble: mask `[N]` of the mean of the clones' predictions.
        movement: L2 norm of the mean of the clones minus the model that the edge was sent, over all
            parameters that train; in units of the norm of that model, at least 0.
        direction: cosine between this movement and the mean way from the core to the ensembles of
            the memory, in [-1, 1]; None if the memory is empty or a movement is zero.
        history: the core's accuracy on its own data after Phase 0 and after each accepted round,
            oldest first; fractions in [0, 1].
        memory: mask `[N]` of the mean prediction of the ensembles in the memory; None if the memory
            is empty.
        samples: `[N]`, the number of the sample that each element belongs to; None if each element
            is a sample.
        loss_before: loss of the core before the round.
        earlier: rows of the earlier rounds of this edge, oldest first: what `Core.distill` has
            returned, and in a run the other entries of `on_round`; empty if it is unknown which
            edge this is, and in a run that asks each edge once.
        after: mask `[N]` of the core after the distillation.
        loss_after: loss of that core.
        train_accuracy: of that core on its own data.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Evidence
        >>> def refuse_long_steps(evidence: Evidence) -> str | None:  # a guard of your own
        ...     return "it moved too far" if evidence.movement > 2 else None
        >>> right = torch.ones(4, dtype=torch.bool)
        >>> evidence = Evidence(
        ...     labels=torch.arange(4),
        ...     before=right,
        ...     clones=right[None],
        ...     ensemble=right,
        ...     movement=3.0,
        ...     direction=None,
        ...     history=(0.9,),
        ... )
        >>> refuse_long_steps(evidence)
        'it moved too far'
    """

    labels: Tensor
    before: Tensor
    clones: Tensor
    ensemble: Tensor
    movement: float
    direction: float | None
    history: tuple[float, ...]
    memory: Tensor | None = None
    samples: Tensor | None = None
    loss_before: float | None = None
    earlier: tuple[Mapping[str, Any], ...] = ()
    after: Tensor | None = None
    loss_after: float | None = None
    train_accuracy: float | None = None

    def metrics(self) -> dict[str, float]:
        """Return the numbers that a round reports; accuracies are fractions in [0, 1]."""
        numbers = {
            "validation-before": share(self.before),
            "validation-ensemble": share(self.ensemble),
            "validation-after": None if self.after is None else share(self.after),
            "class-drop": self.class_drop(),
            "loss-rise": self.loss_rise(),
            "memory-agreement": self.memory_agreement(),
            "movement": self.movement,
            "direction": self.direction,
        }
        return {name: number for name, number in numbers.items() if number is not None}

    def recall(self, mask: Tensor) -> dict[int, float]:
        """Return the share of correct elements of each class that has any; class -> fraction."""
        labels = torch.unique(self.labels).tolist()  # in order
        return {label: share(mask[self.labels == label]) for label in labels}

    def class_drop(self) -> float | None:
        """Return the largest fall of the core's accuracy on one class.

        It is None before the distillation, and for labels that are no classes.
        """
        if self.after is None or self.labels.is_floating_point():
            return None
        before, after = self.recall(self.before), self.recall(self.after)
        return max(before[label] - after[label] for label in before)

    def loss_rise(self) -> float | None:
        """Return how far the loss of the core rose by the distillation; None before it."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return self.loss_after - self.loss_before

    def memory_agreement(self) -> float | None:
        """Return the share of the elements on which ensemble and memory are both right or wrong.

        It is None if the memory is empty.
        """
        return None if self.memory is None else share(self.ensemble == self.memory)


def share(mask: Tensor) -> float:
    """Return the share of True in a mask, a fraction in [0, 1]."""
    return float(mask.double().mean())


class Background(NamedTuple):
    """What is the same for all answers to one core."""

    core_outputs: Tensor
    """`[N, ...]`, of the core for the validation data."""
    memory: Tensor | None
    """Mask `[N]` of the memory, as in `Evidence`."""


@dataclass(frozen=True, eq=False)
class Examiner:
    """Measures evidence.

    Args:
        model: the architecture.
        data: the validation data.
        task: what the outputs of the model mean.
        runtime: speed only.
    """

    model: nn.Module
    data: Dataset
    task: Task
    runtime: Runtime

    def outputs(self, params: StateDict) -> Tensor:
        """Compute the outputs `[N, ...]` of a core."""
        return predict(self.model, clone(params, 1), self.data[0], runtime=self.runtime)[0]

    def background(self, state: CoreState) -> Background:
        """Measure the core and its memory, once for all answers of a round."""
        return Background(self.outputs(state.params), self._memory(state.memory))

    def before(
        self,
        state: CoreState,
        edge: Ensemble,
        sent: StateDict,
        *,
        background: Background,
        edge_outputs: Tensor,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> Evidence:
        """Measure what is known before the distillation.

        Args:
            state: the core.
            edge: `[E, ...]`, the clones.
            sent: the model that the edge was sent.
            background: of the core, as `background` returns it.
            edge_outputs: `[E, N, ...]` of the clones.
            earlier: metrics of the earlier rounds of this edge, oldest first.

        Raises:
            ValueError: if the mean of the clones is not finite.
        """
        labels = self.data[1]
        core_outputs = background.core_outputs
        length, direction = self._movement(state, edge, sent)
        return Evidence(
            labels=counting(labels, labels, self.task),
            before=self._mask(core_outputs),
            clones=self._mask(edge_outputs),
            ensemble=self._mask(self._prediction([edge_outputs])),
            movement=length,
            direction=direction,
            history=state.train_accuracy,
            memory=background.memory,
            samples=self._samples(),
            loss_before=float(self.task.loss(core_outputs, labels)),
            earlier=tuple(earlier),
        )

    def after(self, evidence: Evidence, core_outputs: Tensor, train_accuracy: float) -> Evidence:
        """Add what is known after the distillation.

        Args:
            evidence: of `before`.
            core_outputs: `[N, ...]` of the new core.
            train_accuracy: of the new core on its own data.
        """
        return replace(
            evidence,
            after=self._mask(core_outputs),
            loss_after=float(self.task.loss(core_outputs, self.data[1])),
            train_accuracy=train_accuracy,
        )

    def _samples(self) -> Tensor | None:
        """Return the number of the sample of each element, None if each element is a sample."""
        labels = self.data[1]
        if labels.dim() == 1:
            return None
        numbers = torch.arange(len(labels)).view(-1, *[1] * (labels.dim() - 1))
        return counting(numbers.expand_as(labels), labels, self.task)

    def _mask(self, outputs: Tensor) -> Tensor:
        labels = self.data[1]
        return counting(self.task.correct(outputs, labels), labels, self.task)

    def _prediction(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the mean prediction of ensembles with the outputs `[E, N, ...]`."""
        targets = [self.task.target(logits, 1.0).mean(0) for logits in outputs]
        return self.task.prediction(torch.stack(targets).mean(0))

    def _memory(self, memory: Sequence[Ensemble]) -> Tensor | None:
        if not memory:
            return None
        outputs = [
            predict(self.model, ensemble, self.data[0], runtime=self.runtime) for ensemble in memory
        ]
        return self._mask(self._prediction(outputs))

    def _movement(
        self, state: CoreState, edge: Ensemble, sent: StateDict
    ) -> tuple[float, float | None]:
        """Return length and direction of a movement, as `Evidence` describes them."""
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]

        def vector(params: StateDict) -> Tensor:
            return torch.cat([params[name].flatten() for name in trained]).double()

        origin = vector(sent)
        moved = vector(mean(edge)) - origin
        check_finite({"movement": moved}, "edge: ")  # finite clones may have an infinite mean
        length = float(moved.norm() / origin.norm().clamp(min=torch.finfo(origin.dtype).tiny))
        if not state.memory:
            return length, None
        remembered = torch.stack([vector(mean(ensemble)) for ensemble in state.memory]).mean(0)
        way = remembered - vector(state.params)
        if not moved.any() or not way.any():
            return length, None
        return length, float(cosine_similarity(moved, way, dim=0))
