"""Algorithm 1 without a network: the core, what it knows, and how it learns from an edge."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from ..engine.ensemble import (
    Ensemble,
    StateDict,
    as_ensemble,
    check_finite,
    clone,
    mean,
    member,
    size,
)
from ..engine.fit import accuracy, fit, predict
from ..engine.inputs import Dataset
from ..engine.losses import Targets, distillation
from ..engine.recipe import Recipe, fold_in
from ..engine.runtime import Runtime
from .consensus import Venn
from .guards import Guard
from .knowledge import Knowledge, Selection, StartRule
from .targets import TargetBank, weighted


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a core learns from edges: Phase 2 (Eq. 1 and 2).

    Args:
        recipe: data passes, learning rate and augmentation of Phase 2.
        temperature: t, above 0; both sides are divided by it and the KD term times t^2.
        student_temperature: what divides the student's logits instead; None is `temperature`,
            1.0 is Eq. (1) as printed.
        memory_size: M of Eq. (2), ensembles that teach, the present one included; 1 is no memory.
        mean_over_memory: average the KD terms of the memory instead of summing them (Eq. 2).
        student_start: where the student starts, in [0, 1]: 0 at the core, 1 at the core plus the
            clones' mean movement (for an edge that was sent this core: the clones' mean). A
            function chooses in every round by what the core can measure on its own data.
        core_as_teacher: let the core, as it was before this round, teach too.
        selection: which samples a teacher teaches, and how much of each; None is all of all.

    Raises:
        ValueError: for a number out of range.
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
        if self.memory_size < 1:
            raise ValueError(f"memory_size: expected at least 1, got {self.memory_size}")
        if not callable(self.student_start) and not 0 <= self.student_start <= 1:
            raise ValueError(f"student_start: expected 0 to 1, got {self.student_start}")


@dataclass(frozen=True, eq=False)
class CoreState:
    """The core's progress; frozen, each accepted edge makes a new one. Equal to itself only.

    Args:
        params: the core model.
        memory: temporal memory, ensembles of the latest edges, newest last (Sec. 4.3).
        version: edges the core has learned from.
        train_accuracy: the core's accuracy on its own data after Phase 0, if it was measured, and
            after each accepted edge; fractions in [0, 1].
        memory_weights: the weight of each one's KD term, 1 unless it came late and was discounted;
            empty is 1 for all.
    """

    params: StateDict
    memory: tuple[Ensemble, ...] = ()
    version: int = 0
    train_accuracy: tuple[float, ...] = ()
    memory_weights: tuple[float, ...] = ()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return this state as named tensors and a header that JSON can hold.

        A tensor of the model is called "core/NAME", one of the memory "0/NAME", "1/NAME", ...,
        oldest ensemble first.
        """
        ensembles = {"core": self.params}
        ensembles |= {str(index): ensemble for index, ensemble in enumerate(self.memory)}
        tensors = {
            f"{prefix}/{name}": tensor
            for prefix, ensemble in ensembles.items()
            for name, tensor in ensemble.items()
        }
        header = {
            "memory": len(self.memory),
            "memory_weights": list(self.memory_weights),
            "train_accuracy": list(self.train_accuracy),
            "version": self.version,
        }
        return tensors, header

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], like: Mapping[str, Tensor]
    ) -> Self:
        """Make the state that `state_dict` returned, and check it with `as_ensemble`.

        Args:
            tensors: may hold other tensors too, under other prefixes.
            header: may hold other entries too.
            like: a state dict of the model; it says which names, shapes and dtypes are expected.

        Raises:
            ValueError: for a header without one of its entries, or tensors that do not fit `like`.
        """
        expected = ("memory", "memory_weights", "train_accuracy", "version")
        if missing := [name for name in expected if name not in header]:
            raise ValueError(f"core state: expected {', '.join(expected)}, missing {missing}")

        def read(prefix: str) -> Ensemble:
            start = f"{prefix}/"
            named = {
                name.removeprefix(start): tensor
                for name, tensor in tensors.items()
                if name.startswith(start)
            }
            try:
                return as_ensemble(named, like)
            except ValueError as error:
                raise ValueError(f"{prefix}: {error}") from None

        core = read("core")
        if size(core) != 1:
            raise ValueError(f"core: expected one model, got an ensemble of {size(core)}")
        return cls(
            params=member(core, 0),
            memory=tuple(read(str(index)) for index in range(header["memory"])),
            version=header["version"],
            train_accuracy=tuple(header["train_accuracy"]),
            memory_weights=tuple(header["memory_weights"]),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Core:
    """The service: a model, a small labelled dataset, and how to learn. Never changes.

    Args:
        model: the architecture; its weights are where Phase 0 starts.
        dataset: the core data, inputs `[N, ...]` and labels `[N]`.
        recipe: Phase 0.
        distillation: Phase 2.
        guard: may refuse a round by the core's training accuracy (Sec. 5.3); None accepts all.
        held_out: data on which accuracies and the consensus are measured; None measures none.
        seed: determines every draw.
        runtime: speed only.
    """

    model: nn.Module
    dataset: Dataset
    recipe: Recipe = field(default_factory=Recipe)
    distillation: Distillation = field(default_factory=Distillation)
    guard: Guard | None = None
    held_out: Dataset | None = None
    seed: int = 0
    runtime: Runtime = field(default_factory=Runtime)
    _banks: list[TargetBank] = field(default_factory=list, init=False, repr=False)

    def pretrain(self, start: StateDict | None = None) -> StateDict:
        """Phase 0: train on the core data, from `start` or else the weights the model has."""
        ensemble = clone(self.model.state_dict() if start is None else start, 1)
        seed = fold_in(self.seed, "phase-0")
        return member(self._fit(ensemble, self.recipe, seed=seed, phase="Phase 0"), 0)

    def distill(
        self, state: CoreState, edge: Ensemble, *, sent: StateDict | None = None, weight: float = 1
    ) -> tuple[CoreState, dict[str, float]]:
        """Phase 2: learn from the ensemble of one edge and from the temporal memory.

        A pure function: the same arguments give the same core, bit for bit on one device.

        Args:
            state: the core before this round.
            edge: `[E, ...]`, as `as_ensemble` returns it.
            sent: what the edge had been sent; None is `state.params`.
            weight: of this edge's KD term, at least 0; below 1 for a late edge.

        Returns:
            The new state, or `state` itself if the guard refused the round; and the metrics
            "accepted" (1 or 0), "train-accuracy" (of the core, on core data), "known" (the share of
            the core data that the ensemble classifies correctly), "student-start" (the part of the
            clones' movement) and, with held-out data, "core-accuracy", "edge-accuracy" (mean of
            the clones), "ensemble-accuracy" and the `Venn` of the new core and the edge:
            "student-only", "both", "teacher-only", "consensus". Fractions in [0, 1].

        Raises:
            ValueError: if the edge predicts, or the core would become, anything not finite; or
                for a weight that is not at least 0.
        """
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight: expected at least 0, got {weight}")
        how = self.distillation
        before = state.memory_weights or (1.0,) * len(state.memory)
        memory = (*state.memory, edge)[-how.memory_size :]
        weights = (*before, weight)[-how.memory_size :]
        knowledge = self._knowledge(state.params, edge, sent)
        answers = None if self.held_out is None else self._edge_logits(edge, self.held_out[0])
        share = self._share(knowledge)
        student = _student_start(self.model, state.params, edge, sent, share)
        targets = self._targets(state.params, memory, weights)
        params = member(
            self._fit(
                clone(student, 1),
                how.recipe,
                loss=distillation(how.temperature, how.student_temperature),
                targets=targets,
                seed=fold_in(self.seed, "phase-2", state.version),
                view_seed=fold_in(self.seed, "phase-2-views"),
                phase="Phase 2",
            ),
            0,
        )
        check_finite(params, "core after distillation: ")
        trained = self.train_accuracy(params)
        accepted = self.guard is None or not self.guard(state.train_accuracy, trained)
        metrics = {
            "accepted": float(accepted),
            "train-accuracy": trained,
            "known": knowledge.ensemble,
            "student-start": share,
        }
        if answers is not None and self.held_out is not None:
            metrics |= _compare(self.predictions(params), answers, self.held_out[1])
        if not accepted:
            return state, metrics
        history = (*state.train_accuracy, trained)
        new = CoreState(params, memory, state.version + 1, history, weights)
        return new, metrics

    def state(self, params: StateDict) -> CoreState:
        """Make the state of a core that has met no edge yet, with its Phase 0 accuracy."""
        return CoreState(params, train_accuracy=(self.train_accuracy(params),))

    def train_accuracy(self, params: StateDict) -> float:
        """Measure a core on its own data; a fraction in [0, 1]."""
        inputs, labels = self.dataset
        logits = predict(self.model, clone(params, 1), inputs, runtime=self.runtime)
        return float(accuracy(logits[0], labels))

    def held_out_accuracy(self, params: StateDict) -> float | None:
        """Measure a core on the held-out data; a fraction in [0, 1], or None if there is none."""
        if self.held_out is None:
            return None
        return float(accuracy(self.predictions(params), self.held_out[1]))

    def predictions(self, params: StateDict) -> Tensor:
        """Compute a core's logits `[N, C]` for the held-out data.

        Raises:
            ValueError: if there is none.
        """
        if self.held_out is None:
            raise ValueError("held_out: expected a dataset, got None")
        return predict(self.model, clone(params, 1), self.held_out[0], runtime=self.runtime)[0]

    def _edge_logits(self, edge: Ensemble, inputs: Tensor) -> Tensor:
        logits = predict(self.model, edge, inputs, runtime=self.runtime)
        check_finite({"logits": logits}, "edge predictions: ")
        return logits

    def _knowledge(self, core: StateDict, edge: Ensemble, sent: StateDict | None) -> Knowledge:
        inputs, labels = self.dataset
        logits = self._edge_logits(edge, inputs)
        target = (logits / self.distillation.temperature).softmax(-1).mean(0)

        def moved(share: float) -> float:
            return self.train_accuracy(_student_start(self.model, core, edge, sent, share))

        return Knowledge(float(accuracy(target, labels)), moved)

    def _share(self, knowledge: Knowledge) -> float:
        rule = self.distillation.student_start
        if not callable(rule):
            return rule
        share = rule(knowledge)
        if not 0 <= share <= 1:
            raise ValueError(f"student_start: expected 0 to 1 from the function, got {share}")
        return share

    def _targets(
        self, core: StateDict, memory: tuple[Ensemble, ...], weights: tuple[float, ...]
    ) -> Targets:
        how = self.distillation
        kept = {id(bank.ensemble): bank for bank in self._banks}
        teachers = [kept.get(id(ensemble)) or self._bank(ensemble) for ensemble in memory]
        self._banks[:] = teachers  # not read again below: another thread may set them too
        scale = 1 / len(memory) if how.mean_over_memory else 1.0
        each = [scale * weight for weight in weights]
        if how.core_as_teacher:
            teachers, each = [*teachers, self._bank(clone(core, 1))], [*each, 1.0]
        return weighted(teachers, each)

    def _bank(self, ensemble: Ensemble) -> TargetBank:
        how = self.distillation
        return TargetBank(
            self.model,
            ensemble,
            self.dataset,
            how.recipe,
            view_seed=fold_in(self.seed, "phase-2-views"),
            temperature=how.temperature,
            selection=how.selection,
            most_bytes=self.runtime.target_bytes // (how.memory_size + how.core_as_teacher),
            runtime=self.runtime,
        )

    def _fit(self, start: Ensemble, recipe: Recipe, **options: object) -> Ensemble:
        return fit(
            self.model,
            start,
            self.dataset,
            recipe,
            runtime=self.runtime,
            **options,  # type: ignore
        )


def edge_seed(seed: int, server_round: int) -> int:
    """Derive the seed of Phase 1 in one round from the core's, the same with Flower and without."""
    return fold_in(seed, "phase-1", server_round)


def train_edge(
    model: nn.Module,
    params: StateDict,
    dataset: Dataset,
    recipe: Recipe,
    *,
    num_clones: int = 3,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> Ensemble:
    """Phase 1: train clones of the core on private data, differing in batch sampling (Sec. 4.2).

    Returns:
        The ensemble `[num_clones, ...]`.
    """
    return fit(
        model,
        clone(params, num_clones),
        dataset,
        recipe,
        seed=seed,
        runtime=runtime,
        phase="Phase 1",
    )


def _student_start(
    model: nn.Module, core: StateDict, edge: Ensemble, sent: StateDict | None, share: float
) -> StateDict:
    """Move the core by a share of the clones' mean movement from what they were sent.

    Buffers are interpolated towards the clones' mean instead: a difference could make a running
    variance negative. Integer buffers, which count, stay the core's.
    """
    if not share:
        return core
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    origin, start = sent or core, dict(core)
    for name, centre in mean(edge).items():
        if core[name].is_floating_point():
            base = origin[name] if name in trained else core[name]
            start[name] = core[name] + share * (centre - base)
    return start


def _compare(core: Tensor, edge: Tensor, labels: Tensor) -> dict[str, float]:
    """Score logits of the core `[N, C]` and of an edge `[E, N, C]` against labels `[N]`."""
    ensemble = edge.softmax(-1).mean(0)
    venn = Venn.of(core.argmax(-1) == labels, ensemble.argmax(-1) == labels)
    return {
        "core-accuracy": venn.student_only + venn.both,
        "edge-accuracy": float(accuracy(edge, labels).mean()),
        "ensemble-accuracy": venn.both + venn.teacher_only,
        "student-only": venn.student_only,
        "both": venn.both,
        "teacher-only": venn.teacher_only,
        "consensus": venn.consensus,
    }
