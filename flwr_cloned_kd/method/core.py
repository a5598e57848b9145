"""The core of Algorithm 1 without a network: Phase 0 and Phase 2."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.ensemble import (
    Ensemble,
    StateDict,
    check_finite,
    clone,
    member,
    trained_state,
)
from ..engine.fit import accuracy, fit, predict
from ..engine.inputs import Dataset
from ..engine.losses import distillation as distillation_loss
from ..engine.nested import on_device, tensors_of
from ..engine.recipe import Recipe, fold_in
from ..engine.runtime import Runtime
from ..engine.samples import as_dataset
from ..engine.tasks import Task, classification
from .consensus import compare
from .distillation import Distillation
from .evidence import Background, Evidence, Examiner
from .guards import DEFAULT_GUARD, Guard, Trust
from .knowledge import Knowledge, Selection, correct, label_probability
from .presets import practical
from .results import EdgeResult, check_trust, student_start
from .state import CoreState
from .targets import TargetBank, TargetCache, weighted_sum


@dataclass(eq=False)
class _Examined:
    """The result of an edge, and what was measured of it so far."""

    result: EdgeResult
    logits: Tensor
    """`[E, N, ...]`, for the core data."""
    held_out_logits: Tensor | None
    evidence: Evidence | None
    metrics: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Core:
    """The service: a model, a small labelled dataset, and the options of its training.

    A core does not change during a run; its progress is a `CoreState`. The one mutable part is
    `target_cache`, which changes the speed and never the result.

    Args:
        model: the architecture; its weights are the start of Phase 0.
        dataset: the core data, inputs `[N, ...]` and labels `[N, ...]`, or data in any form that
            `as_dataset` converts. All data are kept on the CPU, also those that come from a GPU.
        task: what the outputs of the model mean.
        recipe: Phase 0.
        distillation: Phase 2; None is the preset `practical` of `recipe`.
        guard: evidence -> why an edge is refused, or None, see `guards`. The default refuses an
            edge if the core is worse on its own data afterwards, by more than chance explains;
            None accepts every edge, as Algorithm 1 does.
        trust: evidence before the distillation -> how far the core trusts the edge, in [0, 1]: the
            number multiplies the KD term and the movement of the edge; 0 refuses the edge. None
            trusts every edge.
        validation: labelled data on which evidence is measured; None: the core data. Data that the
            core does not train on shows more.
        held_out: data on which accuracies and the consensus are measured; None measures none.
        seed: the seed of every random draw.
        runtime: speed only.
        target_cache: kept targets of the memory. A core made by `dataclasses.replace` shares it,
            and uses the kept targets unless the model, the dataset, the task, the distillation,
            the seed or the runtime was replaced.

    Raises:
        ValueError: if the data do not fit the model or the task.

    Examples:
        >>> import torch
        >>> from flwr_cloned_kd import Core, Recipe, train_edge
        >>> data = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> recipe = Recipe(epochs=50, batch_size=2)
        >>> core = Core(model=torch.nn.Linear(1, 2), dataset=data, recipe=recipe)
        >>> state = core.state(core.pretrain())
        >>> edge = train_edge(core.model, state.params, data, recipe, num_clones=3)
        >>> state, metrics = core.distill(state, edge)
        >>> state.version, len(state.memory), metrics["accepted"], metrics["train-accuracy"]
        (1, 1, 1.0, 1.0)
    """

    model: nn.Module
    dataset: Dataset
    recipe: Recipe = field(default_factory=Recipe)
    distillation: Distillation = None  # type: ignore[assignment]  # until __post_init__
    guard: Guard | None = DEFAULT_GUARD
    trust: Trust | None = None
    validation: Dataset | None = None
    held_out: Dataset | None = None
    seed: int = 0
    runtime: Runtime = field(default_factory=Runtime)
    task: Task = classification
    target_cache: TargetCache = field(default_factory=TargetCache, repr=False)

    def __post_init__(self) -> None:
        if self.distillation is None:
            object.__setattr__(self, "distillation", practical(self.recipe))
        if self.distillation.selection is label_probability and self.task != classification:
            raise ValueError(
                f"selection: expected correct, None or a function of your own for {self.task}, "
                "got label_probability"
            )
        for name in ("dataset", "held_out", "validation"):
            data = getattr(self, name)
            if data is not None:
                data = as_dataset(data, self.model, self.task, name=name)
                if any(tensor.device.type != "cpu" for tensor in tensors_of(data)):
                    data = on_device(data, torch.device("cpu"))  # where outputs are compared
                object.__setattr__(self, name, data)

    def pretrain(self, start: StateDict | None = None) -> StateDict:
        """Phase 0: train on the core data, from `start` or from the weights of the model."""
        trained = fit(
            self.model,
            clone(trained_state(self.model) if start is None else start, 1),
            self.dataset,
            self.recipe,
            task=self.task,
            seed=fold_in(self.seed, "phase-0"),
            runtime=self.runtime,
            phase="Phase 0",
        )
        return member(trained, 0)

    def distill(
        self, state: CoreState, edge: Ensemble, *, sent: StateDict | None = None, weight: float = 1
    ) -> tuple[CoreState, dict[str, Any]]:
        """Phase 2: learn from the ensemble of one edge and from the temporal memory.

        A pure function: the same arguments give the same core, bit for bit on one device.

        Args:
            state: the core before this round.
            edge: `[E, ...]`, as `as_ensemble` returns it.
            sent: the model that the edge was sent; None is `state.params`.
            weight: weight of this edge's KD term, at least 0; below 1 for a late edge.

        Returns:
            The new state, or `state` itself if the guard refused the edge; and the metrics
            "accepted" (1 or 0), "train-accuracy" (of the core, on core data), "known" (the share of
            the core data that the ensemble classifies correctly), "student-start" (the share of the
            clones' movement); with a guard or a rule of trust those of `Evidence.metrics`; "trust"
            with a rule of trust; "cause", a text, if the guard refused the edge; and, with held-out
            data, "core-accuracy", "edge-accuracy" (mean of the clones), "ensemble-accuracy" and the
            `Venn` of the new core and the edge: "student-only", "both", "teacher-only",
            "consensus". Fractions in [0, 1]. If the guard refused the edge after the distillation,
            the metrics are those of the core that it refused.

        Raises:
            ValueError: if a prediction of the edge or a weight of the new core is not finite, if
                the model cannot predict with the tensors of the edge, if the mean of the clones is
                not finite and evidence is measured, if `weight` is negative or not finite, or if
                the rule of trust returns a number outside [0, 1].
        """
        state, metrics = self.distill_all(state, [EdgeResult(edge, sent, weight)])
        return state, metrics[0]

    def distill_all(
        self, state: CoreState, results: Sequence[EdgeResult]
    ) -> tuple[CoreState, list[dict[str, Any]]]:
        """Phase 2 for several edges at once: the student is trained once for all of them.

        Every ensemble is a teacher, besides the M - 1 latest ones of the memory. The student starts
        from the mean of the movements that the edges have made, each counted from the model that
        the edge was sent. The memory then holds the last M ensembles, in the order of `results`.
        For one edge this is `distill`, bit for bit.

        The guard may refuse single edges before the distillation. If it refuses an edge after the
        distillation, all edges of this distillation are refused.

        Args:
            results: at least one; the last is the newest.

        Returns:
            The new state, or `state` itself if no edge was accepted; and for each edge the metrics
            of `distill`.

        Raises:
            ValueError: as `distill`, or without a result.
        """
        if not results:
            raise ValueError("results: expected at least one, got none")
        for result in results:
            result.check(state.params)
        background = None if self._examiner is None else self._examiner.background(state)
        answers = [self._examine(state, result, background) for result in results]
        accepted = [answer for answer in answers if answer.metrics["accepted"]]
        if accepted:
            state = self._learn(state, accepted)
        return state, [answer.metrics for answer in answers]

    def state(self, params: StateDict) -> CoreState:
        """Make the state of a core after Phase 0, with its training accuracy."""
        return CoreState(params, train_accuracy=(self.train_accuracy(params),))

    def train_accuracy(self, params: StateDict) -> float:
        """Measure a core on its own data; a fraction in [0, 1]."""
        return float(accuracy(self._outputs(params), self.dataset[1], self.task))

    def held_out_accuracy(self, params: StateDict) -> float | None:
        """Measure a core on the held-out data; a fraction in [0, 1], None without such data."""
        if self.held_out is None:
            return None
        return float(accuracy(self.predictions(params), self.held_out[1], self.task))

    def predictions(self, params: StateDict) -> Tensor:
        """Compute a core's outputs `[N, ...]` for the held-out data.

        Raises:
            ValueError: without held-out data.
        """
        if self.held_out is None:
            raise ValueError("held_out: expected a dataset, got None")
        return predict(self.model, clone(params, 1), self.held_out[0], runtime=self.runtime)[0]

    def _outputs(self, params: StateDict) -> Tensor:
        """Compute the outputs `[N, ...]` of a core for its own data."""
        return predict(self.model, clone(params, 1), self.dataset[0], runtime=self.runtime)[0]

    def _edge_logits(self, edge: Ensemble, inputs: Tensor) -> Tensor:
        """Compute the outputs `[E, N, ...]` of the clones.

        Raises:
            ValueError: if an output is not finite, or if the model cannot run with the tensors of
                this edge, such as an integer buffer that is an index and is out of range.
        """
        try:
            logits = predict(self.model, edge, inputs, runtime=self.runtime)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError) as error:
            cause = (str(error).splitlines() or [""])[0]
            raise ValueError(
                "edge predictions: expected a model that runs with the core's inputs, got "
                f"{type(error).__name__}: {cause}"
            ) from error
        check_finite({"logits": logits}, "edge predictions: ")
        return logits

    @property
    def _examiner(self) -> Examiner | None:
        """What measures evidence; None if no rule asks for evidence."""
        if self.guard is None and self.trust is None:
            return None
        return Examiner(self.model, self.validation or self.dataset, self.task, self.runtime)

    def _examine(
        self, state: CoreState, result: EdgeResult, background: Background | None
    ) -> _Examined:
        """Measure what an edge returned; the guard may refuse it before the distillation.

        Args:
            background: of the core; None without an examiner.
        """
        logits = self._edge_logits(result.edge, self.dataset[0])
        held_out_logits = (
            None if self.held_out is None else self._edge_logits(result.edge, self.held_out[0])
        )
        metrics: dict[str, Any] = {"accepted": 1.0, "known": self._known(logits)}
        answer = _Examined(result, logits, held_out_logits, None, metrics)
        if self._examiner is not None and background is not None:
            validation = self.validation
            answer.evidence = self._examiner.before(
                state,
                result.edge,
                state.params if result.sent is None else result.sent,
                background=background,
                edge_outputs=logits
                if validation is None
                else self._edge_logits(result.edge, validation[0]),
                earlier=result.earlier,
            )
            if self.trust is not None:
                # A user's function may return a number of NumPy or PyTorch: no row can hold one.
                trust = float(self.trust(answer.evidence))
                check_trust(trust)
                answer.result = result._replace(trust=result.trust * trust)
                metrics["trust"] = trust
                if trust == 0:  # It would teach nothing, and take the place of another ensemble.
                    metrics.update({"accepted": 0.0, "cause": "trust: expected above 0, got 0"})
            self._ask_guard([answer])
        return answer

    def _learn(self, state: CoreState, answers: Sequence[_Examined]) -> CoreState:
        """Distil, add to the metrics, and return the new state; `state` if the guard refused."""
        results = [answer.result for answer in answers]
        memory, weights = self._remembered(state, results)
        logits = torch.cat([answer.logits for answer in answers])
        share = self._share(self._knowledge(state.params, results, logits))
        student = student_start(self.model, state.params, results, share)
        teachers, scaled_weights = self._teachers(state.params, memory, weights, len(results))
        params = self._train_student(student, teachers, scaled_weights, state.version)
        check_finite(params, "core after distillation: ")
        outputs = self._outputs(params)
        train_accuracy = float(accuracy(outputs, self.dataset[1], self.task))
        predictions = self.predictions(params) if self.held_out is not None else Tensor()
        for answer in answers:
            answer.metrics.update({"train-accuracy": train_accuracy, "student-start": share})
            if self.held_out is not None and answer.held_out_logits is not None:
                labels = self.held_out[1]
                scores = compare(predictions, answer.held_out_logits, labels, self.task)
                answer.metrics.update(scores)
        if self._examiner is not None:
            if self.validation is not None:
                outputs = self._examiner.outputs(params)
            for answer in answers:
                if answer.evidence is not None:
                    answer.evidence = self._examiner.after(answer.evidence, outputs, train_accuracy)
            self._ask_guard(answers)
            if not answers[0].metrics["accepted"]:
                return state
        memory_size = self.distillation.memory_size
        return CoreState(
            params,
            memory[-memory_size:],
            state.version + len(results),
            (*state.train_accuracy, train_accuracy),
            weights[-memory_size:],
        )

    def _ask_guard(self, answers: Sequence[_Examined]) -> None:
        """Add the evidence to the metrics; refuse all of these answers for the first reason."""
        reasons = list[str]()
        for answer in answers:
            if answer.evidence is not None:
                answer.metrics.update(answer.evidence.metrics())
                reason = None if self.guard is None else self.guard(answer.evidence)
                reasons += [] if reason is None else [reason]
        if reasons:
            for answer in answers:
                answer.metrics.update({"accepted": 0.0, "cause": reasons[0]})

    def _remembered(
        self, state: CoreState, results: Sequence[EdgeResult]
    ) -> tuple[tuple[Ensemble, ...], tuple[float, ...]]:
        """Return the ensembles that are teachers, oldest first, and the weights of their terms."""
        num_teachers = self.distillation.memory_size - 1 + len(results)
        weights = state.memory_weights or (1.0,) * len(state.memory)
        return (
            (*state.memory, *(result.edge for result in results))[-num_teachers:],
            (*weights, *(result.weight * result.trust for result in results))[-num_teachers:],
        )

    def _known(self, logits: Tensor) -> float:
        """Return the accuracy of an ensemble from its outputs `[E, N, ...]` for the core data."""
        target = self.task.target(logits, self.distillation.temperature).mean(0)
        return float(accuracy(self.task.prediction(target), self.dataset[1], self.task))

    def _knowledge(
        self, core: StateDict, results: Sequence[EdgeResult], logits: Tensor
    ) -> Knowledge:
        def moved(share: float) -> float:
            return self.train_accuracy(student_start(self.model, core, results, share))

        return Knowledge(self._known(logits), moved)

    def _share(self, knowledge: Knowledge) -> float:
        rule = self.distillation.student_start
        # As for the trust: no row can hold a number of NumPy or PyTorch.
        share = float(rule(knowledge) if callable(rule) else rule)
        if not 0 <= share <= 1:
            raise ValueError(f"student_start: expected 0 to 1 from the function, got {share}")
        return share

    def _teachers(
        self,
        core: StateDict,
        memory: tuple[Ensemble, ...],
        weights: tuple[float, ...],
        num_new: int,
    ) -> tuple[list[TargetBank], list[float]]:
        """Return the teachers of Eq. (2) with their weights; the core is one if it teaches too.

        Args:
            num_new: number of new ensembles, which share the memory limit of one.
        """
        origin = (self.model, self.dataset, self.distillation, self.seed, self.runtime, self.task)
        make_bank = partial(self._bank, num_new=num_new)
        teachers = self.target_cache.banks(memory, make_bank, origin)
        scale = 1 / len(memory) if self.distillation.mean_over_memory else 1.0
        scaled_weights = [scale * weight for weight in weights]
        if self.distillation.core_as_teacher:
            teachers = [*teachers, self._bank(clone(core, 1))]
            scaled_weights = [*scaled_weights, 1.0]
        return teachers, scaled_weights

    def _bank(self, ensemble: Ensemble, num_new: int = 1) -> TargetBank:
        distillation = self.distillation
        max_teachers = distillation.memory_size + distillation.core_as_teacher
        return TargetBank(
            self.model,
            ensemble,
            self.dataset,
            distillation.recipe,
            view_seed=self._view_seed,
            temperature=distillation.temperature,
            selection=self._selection,
            task=self.task,
            max_bytes=self.runtime.target_bytes // (max_teachers * num_new),
            runtime=self.runtime,
        )

    def _train_student(
        self, start: StateDict, teachers: list[TargetBank], weights: list[float], version: int
    ) -> StateDict:
        distillation = self.distillation
        trained = fit(
            self.model,
            clone(start, 1),
            self.dataset,
            distillation.recipe,
            task=self.task,
            loss=distillation_loss(
                distillation.temperature, distillation.student_temperature, self.task
            ),
            targets=weighted_sum(teachers, weights),
            seed=fold_in(self.seed, "phase-2", version),
            view_seed=self._view_seed,
            runtime=self.runtime,
            phase="Phase 2",
        )
        return member(trained, 0)

    @property
    def _selection(self) -> Selection | None:
        """The selection of the distillation; `correct` stands for that of the task."""
        if self.distillation.selection is correct and self.task != classification:
            return self.task.correct
        return self.distillation.selection

    @property
    def _view_seed(self) -> int:
        return fold_in(self.seed, "phase-2-views")
