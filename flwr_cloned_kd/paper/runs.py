"""One run, described by a value and played round by round with the plain loop."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..apps.build import build_core, edge_recipe, load, phase_2, split
from ..apps.machine import hardware
from ..apps.settings import Settings, affects_result
from ..baselines.averaging import mix as mix_models
from ..data.datasets import take
from ..engine.ensemble import Ensemble, StateDict, clone
from ..engine.fit import accuracy, predict
from ..engine.inputs import Dataset
from ..engine.recipe import fold_in
from ..method.consensus import Venn
from ..method.core import Core, CoreState, edge_seed, train_edge
from ..method.variants import SELECTIONS, START_RULES, VARIANTS, Send, independent

Record = dict[str, Any]
"""What one round did, ready for JSON; round 0 is Phase 0. Accuracies are fractions in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that determines one run: the apps' settings, and what only experiments vary.

    Args:
        settings: data, model, variant, preset, recipes, noise, guard and seed.
        distillation: fields of `Distillation` that differ from the preset's; functions by the
            names that they have in `SELECTIONS` and `START_RULES`.
        combine: "distill" (Phase 2) or "average" (the clones, weighted by their images; with one
            edge a round this keeps the clone, with all it is FedAvg).
        mix: share of an average in the new core, above 0 to 1: FedAsync's alpha with one edge a
            round, FedBuff's server learning rate with K side by side.
        edges_per_round: asked side by side; their clones make one ensemble.
        order: (edge, rounds late) for each round: a late edge was sent the core of so many rounds
            before; empty is every edge in turn, none late.
        edge_data: "private", "core" (self-distillation) or "none" (edges do not train at all).
        kd_weight: of the present edge's KD term; 0 leaves cross entropy.
        proximal_mu: FedProx's mu in Phase 1 (Li et al. 2020); 0 is none.
        core_share: the core has this share of its part of the data, in (0, 1].
        central: the core has all the training data.
        oracle: refuse the rounds of noisy edges, whatever they did; they are tried and recorded.
    """

    settings: Settings
    distillation: dict[str, Any] = field(default_factory=dict)
    combine: str = "distill"
    mix: float = 1.0
    edges_per_round: int = 1
    order: tuple[tuple[int, int], ...] = ()
    edge_data: str = "private"
    kd_weight: float = 1.0
    proximal_mu: float = 0.0
    core_share: float = 1.0
    central: bool = False
    oracle: bool = False

    @property
    def num_rounds(self) -> int:
        """How many rounds follow Phase 0."""
        if self.central:
            return 0
        once = -(-self.settings.num_edges // self.edges_per_round)
        return len(self.order) or self.settings.num_rounds or once

    @property
    def num_clones(self) -> int:
        """How many clones an edge trains."""
        return self.settings.num_clones or VARIANTS[self.settings.variant].num_clones

    def visits(self, server_round: int) -> tuple[list[int], int]:
        """Return the edges, from 0, of a round, from 1, and how many rounds late they are."""
        if self.order:
            edge, late = self.order[server_round - 1]
            return [edge], late
        first = (server_round - 1) * self.edges_per_round
        return [(first + i) % self.settings.num_edges for i in range(self.edges_per_round)], 0


def describe(run: Run) -> dict[str, Any]:
    """Return what determines the records of a run, ready for JSON."""
    found = asdict(run)
    found["order"] = [list(visit) for visit in run.order]
    found["settings"] = {k: v for k, v in found["settings"].items() if k in affects_result()}
    # What Phase 2 does counts, and not the name of its preset, which may come to mean another.
    for name in ("preset", "distill_augment"):
        del found["settings"][name]
    found["distillation"] = _describe_phase_2(run)
    return found


def _describe_phase_2(run: Run) -> dict[str, Any]:
    chosen = replace(phase_2(run.settings), **_with_functions(run.distillation))
    fields = {name: value for name, value in vars(chosen).items() if name != "recipe"}
    named = {n: value.__name__ if callable(value) else value for n, value in fields.items()}
    augment = run.settings.distill_augment
    own = {"augment": augment} if augment not in ("", run.settings.augment) else {}
    return {"lr": chosen.recipe.lr, **own, **named}


@dataclass(frozen=True)
class Progress:
    """All that the next round needs.

    Args:
        server_round: rounds played.
        state: the core.
        cores: after the latest rounds, newest last, as far back as an edge may be late.
        right: `[N]`, which held-out samples the first edge's ensemble classifies correctly.
    """

    server_round: int
    state: CoreState
    cores: tuple[StateDict, ...]
    right: Tensor


class _Stage(NamedTuple):
    core: Core
    train: Dataset
    held_out: Dataset
    parts: list[Tensor]
    send: Send


def play(run: Run, progress: Progress | None = None) -> Iterator[tuple[Record, Progress]]:
    """Play the rounds of a run that are left, Phase 0 first, one record each."""
    stage = _stage(run)
    core, settings = stage.core, run.settings
    if progress is None:
        state = core.state(core.pretrain())
        images = len(core.dataset[1]) * settings.core_epochs
        if VARIANTS[settings.variant].init is independent:
            images *= 2  # the second model, which is sent, had its own Phase 0
        record = {"round": 0, "core-accuracy": core.held_out_accuracy(state.params),
                  "train-accuracy": state.train_accuracy[0], "accepted": 1.0, "images": images,
                  "bytes-down": 0, "bytes-up": 0, "played-on": _machine(core)}  # fmt: skip
        progress = Progress(0, state, (state.params,), torch.zeros(0, dtype=torch.bool))
        yield record, progress
    for server_round in range(progress.server_round + 1, run.num_rounds + 1):
        record, progress = _round(run, stage, progress)
        yield {"round": server_round} | record, progress


def _machine(core: Core) -> str:
    """Name the processor that trains, and the version of PyTorch."""
    found = hardware(core.runtime.target)
    return f"{found['gpu'] or found['cpu']}, torch {torch.__version__}"


def _stage(run: Run) -> _Stage:
    core, settings = build_core(run.settings), run.settings
    train, test = load(settings)
    parts = split(settings, train[1])
    rows = parts[0][: max(2, round(run.core_share * len(parts[0])))]
    core = replace(
        core,
        dataset=train if run.central else take(train, rows),
        distillation=replace(core.distillation, **_with_functions(run.distillation)),
        runtime=replace(core.runtime, log=None),
    )
    return _Stage(core, train, test, parts, VARIANTS[settings.variant].init(core))


def _with_functions(fields: dict[str, Any]) -> dict[str, Any]:
    """Replace the names of functions, which JSON can hold, by the functions."""
    found = dict(fields)
    if "selection" in found:
        found["selection"] = SELECTIONS[found["selection"]]
    if isinstance(found.get("student_start"), str):
        found["student_start"] = START_RULES[found["student_start"]]
    return found


def _round(run: Run, stage: _Stage, before: Progress) -> tuple[Record, Progress]:
    core, server_round = stage.core, before.server_round + 1
    edges, late = run.visits(server_round)
    origin = replace(before.state, params=before.cores[-1 - late])
    sent = stage.send(origin)
    ensemble, sizes, own = _expedition(run, stage, sent, edges, server_round)
    if run.combine == "average":
        state, metrics = _average(run, stage, before.state, ensemble, sizes)
    else:
        bad = run.oracle and any(str(edge) in run.settings.noisy for edge in edges)
        judge = replace(core, guard=lambda history, found: True) if bad else core
        weight = run.kd_weight
        state, metrics = judge.distill(before.state, ensemble, sent=sent, weight=weight)
    models = _side_by_side(before.state.params, state.params, ensemble)
    inputs, labels = stage.held_out
    logits = predict(core.model, models, inputs, runtime=core.runtime)
    student, after = logits[0].argmax(-1) == labels, logits[1].argmax(-1) == labels
    teacher = logits[2:].softmax(-1).mean(0).argmax(-1) == labels
    known = accuracy(predict(core.model, models, own[0], runtime=core.runtime), own[1])
    first = before.right if len(before.right) else teacher
    num_clones, size = run.num_clones, sum(tensor.nbytes for tensor in sent.values())
    travels = size * (run.edge_data == "private")
    trained = sum(sizes) * num_clones * run.settings.edge_epochs * (run.edge_data != "none")
    distilled = len(core.dataset[1]) * run.settings.distill_epochs * (run.combine == "distill")
    record = metrics | {
        "edges": edges,
        "late": late,
        "tried-accuracy": metrics["core-accuracy"],
        "core-accuracy": float(after.float().mean()),
        "before": asdict(Venn.of(student, teacher)),
        "after": asdict(Venn.of(after, teacher)),
        "first": asdict(Venn.of(after, first)),
        "own-before": float(known[0]),
        "own-edge": float(known[2:].mean()),
        "own-after": float(known[1]),
        "bytes-down": travels * len(edges),
        "bytes-up": travels * len(edges) * num_clones,
        "images": trained + distilled,
    }
    latest = max((late for _, late in run.order), default=0)
    cores = (*before.cores, state.params)[-1 - latest :]
    return record, Progress(server_round, state, cores, first)


def _expedition(
    run: Run, stage: _Stage, sent: StateDict, edges: list[int], server_round: int
) -> tuple[Ensemble, list[int], Dataset]:
    """Phase 1 on each edge of a round: all their clones, images of each, and all their images."""
    core, settings = stage.core, run.settings
    private = run.edge_data != "core"
    data = [take(stage.train, stage.parts[1 + e]) if private else core.dataset for e in edges]
    found = list[Ensemble]()
    for edge, dataset in zip(edges, data):
        # Side by side as Flower's FedAvg asks our client app, one by one as ClonedKD does.
        alone, side = edge_seed(core.seed, server_round), fold_in(settings.seed, "edge", edge)
        seed = alone if len(edges) == 1 else fold_in(side, server_round)
        if run.edge_data == "none":
            found.append(clone(sent, run.num_clones))
            continue
        how = edge_recipe(settings, edge, proximal_mu=run.proximal_mu)
        clones = run.num_clones
        found.append(train_edge(core.model, sent, dataset, how, num_clones=clones, seed=seed,
                                runtime=core.runtime))  # fmt: skip
    ensemble = {name: torch.cat([part[name] for part in found]) for name in sent}
    own = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    return ensemble, [len(labels) for _, labels in data], own


def weighted_mean(ensemble: Ensemble, weights: list[int]) -> StateDict:
    """Average clones `[E, ...]` by weight; integer tensors, which count, are the first one's."""
    share = torch.tensor(weights, dtype=torch.float32) / sum(weights)
    return {
        name: torch.einsum("e,e...->...", share, tensor) if tensor.is_floating_point()
        else tensor[0]
        for name, tensor in ensemble.items()
    }  # fmt: skip


def _average(
    run: Run, stage: _Stage, state: CoreState, ensemble: Ensemble, sizes: list[int]
) -> tuple[CoreState, dict[str, float]]:
    """McMahan et al. 2017: the clones' mean, each edge by its images, moves the core to it."""
    core, mix, (inputs, labels) = stage.core, run.mix, stage.held_out
    each = len(next(iter(ensemble.values()))) // len(sizes)
    params = weighted_mean(ensemble, [size for size in sizes for _ in range(each)])
    if mix < 1:
        params = mix_models(state.params, params, mix)
    trained = core.train_accuracy(params)
    found = accuracy(predict(core.model, ensemble, inputs, runtime=core.runtime), labels)
    metrics = {
        "accepted": 1.0,
        "train-accuracy": trained,
        "core-accuracy": core.held_out_accuracy(params) or 0.0,
        "edge-accuracy": float(found.mean()),
    }
    history = (*state.train_accuracy, trained)
    return CoreState(params, (), state.version + 1, history), metrics


def _side_by_side(before: StateDict, after: StateDict, ensemble: Ensemble) -> Ensemble:
    """Put two cores in front of the clones: `[2 + E, ...]`, measured in one pass."""
    pair = clone(before, 1), clone(after, 1)
    return {name: torch.cat([*(one[name] for one in pair), ensemble[name]]) for name in before}
