"""Undo edges: repeat the distillations that a core has made, without the answers of these edges."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..engine.ensemble import Ensemble, StateDict, clone, member
from ..engine.fit import predict
from ..engine.tasks import counting
from .core import Core
from .evidence import share
from .results import EdgeResult
from .state import CoreState, ensemble_at, prefixed


class KeptAnswer(NamedTuple):
    """What one edge has taught the core."""

    edge: str
    number: int
    """Number of the request, which no other answer of the run has."""
    ensemble: Ensemble
    """`[E, ...]`, as `as_ensemble` returns it."""
    sent: StateDict
    """The model that the edge was sent."""
    sent_version: int = 0
    """Version of the core when the edge was asked."""
    used_version: int = 0
    """Version of the core when the answer came to be used; the staleness is the difference."""
    weight: float = 1.0
    """Weight of the KD term of this edge, at least 0."""
    trust: float = 1.0
    """How far the core trusted this edge, in [0, 1]."""
    earlier: Sequence[Mapping[str, Any]] = ()
    """Rows of the earlier rounds of this edge, see `EdgeResult`."""

    @property
    def result(self) -> EdgeResult:
        """What `Core.distill_all` gets; the core asks its rule of trust itself."""
        return EdgeResult(self.ensemble, self.sent, self.weight, earlier=self.earlier)


class KeptRound(NamedTuple):
    """One distillation of a run, with what is needed to repeat it."""

    before: CoreState
    """The core before the distillation."""
    answers: tuple[KeptAnswer, ...]
    """What the core has learned from; several if they were distilled together."""

    def state_dict(self, *, with_memory: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return this round as named tensors and a header that JSON can hold.

        A tensor of the core is called as `CoreState.state_dict` calls it, one of an ensemble
        "edge-0/NAME", "edge-1/NAME", ..., one of the model that the edge was sent "sent-0/NAME",
        .... A model that was sent and is the core before the round is left out.

        Args:
            with_memory: False leaves out the memory of the core.
        """
        before = self.before
        if not with_memory:
            before = replace(before, memory=(), memory_weights=())
        tensors, core = before.state_dict()
        answers = []
        for index, answer in enumerate(self.answers):
            tensors |= prefixed(f"edge-{index}", answer.ensemble)
            was_sent_core = _same_bits(answer.sent, before.params)
            if not was_sent_core:
                tensors |= prefixed(f"sent-{index}", answer.sent)
            numbers = answer._replace(ensemble={}, sent={})._asdict()
            answers.append({**numbers, "was_sent_core": was_sent_core})
        return tensors, {"core": core, "answers": answers}

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], like: Mapping[str, Tensor]
    ) -> Self:
        """Make the round that `state_dict` returned, and check it with `as_ensemble`.

        Args:
            like: a state dict of the model; it says which names, shapes and dtypes are expected.

        Raises:
            KeyError, TypeError: for a header that lacks an entry.
            ValueError: for tensors that do not fit `like`.
        """
        before = CoreState.from_state_dict(tensors, header["core"], like)
        answers = list[KeptAnswer]()
        for index, row in enumerate(header["answers"]):
            entries = {**row, "earlier": tuple(row["earlier"])}
            sent = before.params
            if not entries.pop("was_sent_core"):
                sent = member(ensemble_at(f"sent-{index}", tensors, like), 0)
            ensemble = ensemble_at(f"edge-{index}", tensors, like)
            answers.append(KeptAnswer(**entries | {"ensemble": ensemble, "sent": sent}))
        return cls(before, tuple(answers))


class Replayed(NamedTuple):
    """A kept round, repeated."""

    rounds: tuple[KeptRound, ...]
    """What the core has learned from now: one distillation; none if no answer is left; several if
    answers that were distilled together were refused together."""
    after: CoreState
    refused: dict[int, str]
    """Number of a request -> why its answer was refused now."""
    metrics: dict[int, dict[str, Any]]
    """Number of a request -> what the core has measured now."""


def replay(
    core: Core,
    rounds: Iterable[KeptRound],
    edges: Collection[str],
    staleness_weight: Callable[[int], float] | None = None,
) -> Iterator[Replayed]:
    """Repeat distillations from the first one on, without the answers of some edges.

    The last state is, bit for bit on one device, that of a core that has made the same
    distillations and has refused the answers of these edges. Phase 2 draws its seed from the
    version of the core, which counts the answers that it has learned from.

    The guard and the rule of trust of the core are asked again. The guard may now refuse an answer
    that it has accepted; such an answer is left out, too. Of the earlier rounds of an edge they get
    the metrics of the repetition, and those that the run has recorded where nothing is repeated.

    The staleness of a later answer does not count the answers that are left out. An edge that was
    sent a core that had learned from them is not trained again.

    Args:
        rounds: consecutive distillations of one run, oldest first; read one after the other. Of the
            states before them only the first one is used.
        edges: names of the edges to leave out.
        staleness_weight: staleness -> weight of the KD term of an edge, for answers whose
            staleness is not what it was. None leaves every weight as it is.

    Yields:
        One result for each round.
    """
    state: CoreState | None = None
    undone = list[int]()
    """Versions of the core that no longer exist, in the numbering of `rounds`."""
    measured = dict[int, dict[str, Any]]()

    def renumbered(version: int) -> int:
        return version - sum(gone <= version for gone in undone)

    def present(answer: KeptAnswer) -> KeptAnswer:
        sent, used = renumbered(answer.sent_version), renumbered(answer.used_version)
        weight = answer.weight
        has_changed = used - sent != answer.used_version - answer.sent_version
        if has_changed and staleness_weight is not None:
            weight = float(staleness_weight(used - sent))
        earlier = tuple({**row, **measured.get(row["number"], {})} for row in answer.earlier)
        return answer._replace(sent_version=sent, used_version=used, weight=weight, earlier=earlier)

    for kept in rounds:
        state = kept.before if state is None else state
        left = [present(answer) for answer in kept.answers if answer.edge not in edges]
        replayed = _learn(core, state, left) if left else Replayed((), state, {}, {})
        learned = {answer.number for made in replayed.rounds for answer in made.answers}
        first = kept.before.version + 1
        for version, answer in enumerate(kept.answers, first):
            if answer.number not in learned:
                undone.append(version)
        state = replayed.after
        measured |= replayed.metrics
        yield replayed


def _learn(core: Core, state: CoreState, answers: Sequence[KeptAnswer]) -> Replayed:
    """Distil answers together, or one by one if they are refused together."""
    try:
        after, metrics = core.distill_all(state, [answer.result for answer in answers])
    except ValueError as error:  # a prediction or a weight that is not finite
        after, metrics = state, [{"accepted": 0.0, "cause": str(error)} for _ in answers]
    if after is state and len(answers) > 1:
        rounds: tuple[KeptRound, ...] = ()
        refused = dict[int, str]()
        measured = dict[int, dict[str, Any]]()
        for answer in answers:
            alone = _learn(core, after, [answer])
            rounds += alone.rounds
            after = alone.after
            refused |= alone.refused
            measured |= alone.metrics
        return Replayed(rounds, after, refused, measured)
    of_number = {answer.number: row for answer, row in zip(answers, metrics)}
    causes = {number: str(row["cause"]) for number, row in of_number.items() if not row["accepted"]}
    accepted = accepted_of(answers, metrics)
    return Replayed(((KeptRound(state, accepted),) if accepted else ()), after, causes, of_number)


def accepted_of(
    answers: Sequence[KeptAnswer], metrics: Sequence[Mapping[str, Any]]
) -> tuple[KeptAnswer, ...]:
    """Return the answers that a core has accepted, with its trust in each.

    Args:
        metrics: what `Core.distill_all` returned, one for each answer.
    """
    return tuple(
        answer._replace(trust=row.get("trust", 1.0))
        for answer, row in zip(answers, metrics)
        if row["accepted"]
    )


def contradiction(core: Core, params: StateDict, edge: Ensemble) -> float:
    """Return the share of the core's data that exactly one of core and ensemble predicts correctly.

    The data are the validation data of the core, or its own data without them. An ensemble that
    contradicts what later edges have taught has a high share; so has one that was much weaker than
    the core is now.

    Args:
        params: the core as it is now.
        edge: `[E, ...]`; the mean of its clones' predictions counts.

    Returns:
        A fraction in [0, 1].
    """
    inputs, labels = core.validation or core.dataset

    def correct(ensemble: Ensemble) -> Tensor:
        logits = predict(core.model, ensemble, inputs, runtime=core.runtime)
        outputs = core.task.prediction(core.task.target(logits, 1.0).mean(0))
        return counting(core.task.correct(outputs, labels), labels, core.task)

    return share(correct(clone(params, 1)) != correct(edge))


def _same_bits(left: StateDict, right: StateDict) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype
        and tensor.shape == right[name].shape
        and (not tensor.numel() or torch.equal(bits(tensor), bits(right[name])))
        for name, tensor in left.items()
    )
