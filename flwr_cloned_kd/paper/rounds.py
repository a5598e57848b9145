"""The rounds of a run, played with the plain loop, without Flower."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..apps.build import build_core, core_rows, edge_recipe, load, recipe, split
from ..apps.machine import hardware
from ..attacks.data import Backdoor
from ..attacks.models import Visit, attack_model
from ..attacks.suite import ATTACKS, Attack
from ..baselines.averaging import mix as mix_models
from ..data.datasets import take
from ..engine.ensemble import Ensemble, StateDict, clone, mean, member, size
from ..engine.fit import accuracy, predict
from ..engine.inputs import Dataset
from ..engine.recipe import fold_in
from ..io.wire import encode_request, received, transfer
from ..method.consensus import Venn
from ..method.core import Core
from ..method.edge import edge_seed, train_edge
from ..method.evidence import Evidence
from ..method.guards import (
    Guard,
    Score,
    class_drop,
    disagreement,
    drop_confidence,
    edge_drop,
    ensemble_gap,
    loss_rise,
    movement,
    train_accuracy_drop,
    train_accuracy_jump,
    validation_drop,
)
from ..method.results import EdgeResult
from ..method.state import CoreState
from ..method.variants import VARIANTS, Send, independent
from .combining import FLOWER, clip_to_median, flower_aggregate, fltrust, weighted_mean
from .run_state import RunState
from .runs import Run, with_functions

Record = dict[str, Any]
"""What one round did, ready for JSON; round 0 is Phase 0. Accuracies are fractions, 0 to 1."""


class _Setup(NamedTuple):
    """What all rounds of a run share.

    Args:
        core: of the run.
        train: all training data; `parts` has the rows of the core and of each edge.
        held_out: data on which accuracies are measured.
        parts: the core's rows, then each edge's.
        send: returns the model that the next edge is sent.
    """

    core: Core
    train: Dataset
    held_out: Dataset
    parts: list[Tensor]
    send: Send


class _Trained(NamedTuple):
    """What the edges of one round made, and of what.

    Args:
        ensemble: `[E, ...]`, the clones of all edges.
        num_images: the number of images of each edge.
        dataset: the images of all edges.
        bytes_down: what all edges were sent.
        bytes_up: what all edges sent.
        visits: bad edge -> its latest visit.
    """

    ensemble: Ensemble
    num_images: list[int]
    dataset: Dataset
    bytes_down: int
    bytes_up: int
    visits: dict[int, Visit]


def play(run: Run, state: RunState | None = None) -> Iterator[tuple[Record, RunState]]:
    """Play the remaining rounds of a run, and yield the record and the state after each round.

    Args:
        run: what to play.
        state: after the latest round that was played; None begins with Phase 0.
    """
    setup = _set_up(run)
    if state is None:
        record, state = _phase_0(run, setup.core)
        yield record, state
    for server_round in range(state.server_round + 1, run.num_rounds + 1):
        record, state = _play_round(run, setup, state)
        yield {"round": server_round} | record, state


def _set_up(run: Run) -> _Setup:
    settings = run.settings
    core = build_core(settings)
    train, held_out = load(settings)
    parts = split(settings, train[1])
    dataset = core.dataset
    # The data for validation stay apart from those that the core trains on.
    trained, validation = core_rows(settings, parts[0])
    if run.central:
        is_trained = torch.ones(len(train[1]), dtype=torch.bool)
        is_trained[validation] = False
        dataset = take(train, is_trained.nonzero().flatten())
    elif run.core_share < 1:
        dataset = take(train, trained[: max(2, round(run.core_share * len(parts[0])))])
    core = replace(
        core,
        dataset=dataset,
        distillation=replace(core.distillation, **with_functions(run.distillation)),
        runtime=replace(core.runtime, log=None),
    )
    return _Setup(core, train, held_out, parts, VARIANTS[settings.variant].init(core))


def _phase_0(run: Run, core: Core) -> tuple[Record, RunState]:
    state = core.state(core.pretrain())
    images = len(core.dataset[1]) * run.settings.core_epochs
    if VARIANTS[run.settings.variant].init is independent:
        images *= 2  # The second model, which is sent to the edges, had a Phase 0 of its own.
    record = {
        "round": 0,
        "core-accuracy": core.held_out_accuracy(state.params),
        "train-accuracy": state.train_accuracy[0],
        "accepted": 1.0,
        "images": images,
        "bytes-down": 0,
        "bytes-up": 0,
        "played-on": _machine(core),
    }
    return record, RunState(0, state, (state.params,), torch.zeros(0, dtype=torch.bool))


def _machine(core: Core) -> str:
    """Name the processor that trains, and the version of PyTorch."""
    processor = hardware(core.runtime.target)
    return f"{processor['gpu'] or processor['cpu']}, torch {torch.__version__}"


def _play_round(run: Run, setup: _Setup, before: RunState) -> tuple[Record, RunState]:
    server_round = before.server_round + 1
    edges, late = run.visits(server_round)
    origin = setup.send(replace(before.core, params=before.past[-1 - late]))
    # Only what private edges get and return travels.
    sent = received(origin, run.wire_dtype) if run.edge_data == "private" else origin
    trained = _train_edges(run, setup, sent, edges, server_round, before.visits)
    lengths = before.lengths
    if run.combine == "distill":
        ensemble = trained.ensemble
        if run.clip:
            ensemble, lengths = clip_to_median(sent, ensemble, lengths)
        earlier = [metrics for metrics in before.metrics if metrics["edges"] == edges]
        result = EdgeResult(ensemble, sent, run.kd_weight, earlier=earlier)
        state, metrics = _distill(run, setup.core, before.core, result, edges)
    else:
        state, metrics = _aggregate(run, setup, before.core, trained, sent)
    metrics["edges"] = edges
    all_metrics = (*before.metrics, metrics.copy())
    if "core-accuracy" in metrics:  # It is absent if a guard refused the edge before Phase 2.
        metrics["tried-accuracy"] = metrics["core-accuracy"]
    scores, right = _measure(setup, before, state.params, trained)
    record = {
        **metrics,
        "late": late,
        **scores,
        **_cost(run, setup.core, trained, distilled="train-accuracy" in metrics),
        **_attack_scores(run, setup, state.params, edges),
    }
    latest = max((late for _, late in run.order), default=0)
    past = (*before.past, state.params)[-1 - latest :]
    return record, RunState(server_round, state, past, right, trained.visits, lengths, all_metrics)


def _train_edges(
    run: Run,
    setup: _Setup,
    sent: StateDict,
    edges: list[int],
    server_round: int,
    visits: dict[int, Visit],
) -> _Trained:
    """Run Phase 1 on each edge of a round; a bad edge attacks."""
    core = setup.core
    if run.edge_data == "core":
        datasets = [core.dataset] * len(edges)
    else:
        datasets = [take(setup.train, setup.parts[1 + edge]) for edge in edges]
    visits = dict(visits)
    ensembles = []
    bytes_down = 0
    bytes_up = 0
    for edge, dataset in zip(edges, datasets):
        if run.edge_data == "none":
            ensembles.append(clone(sent, run.num_clones))
            continue
        # The seeds of ClonedKD for one edge a round, of the apps' clients for edges side by side.
        if len(edges) == 1:
            seed = edge_seed(core.seed, server_round)
        else:
            seed = fold_in(fold_in(run.settings.seed, "edge", edge), server_round)
        attack = _attack(run, setup, edge, dataset)
        attack_seed = fold_in(run.settings.seed, "bad edge", edge)
        if attack.data is not None:
            dataset = attack.data(dataset, torch.Generator().manual_seed(attack_seed))
        ensemble = train_edge(
            core.model,
            sent,
            dataset,
            edge_recipe(run.settings, edge, proximal_mu=run.proximal_mu),
            num_clones=run.num_clones,
            seed=seed,
            runtime=core.runtime,
        )
        if attack.model is not None:
            ensemble, visits[edge] = attack_model(
                attack.model, sent, ensemble, last=visits.get(edge), seed=attack_seed
            )
        if run.edge_data == "private":
            ensemble, num_bytes = transfer(ensemble, sent, run.wire_dtype)
            bytes_down += sum(t.nbytes for t in encode_request(sent, run.wire_dtype).values())
            bytes_up += num_bytes
        ensembles.append(ensemble)
    return _Trained(
        {name: torch.cat([ensemble[name] for ensemble in ensembles]) for name in sent},
        [len(labels) for _, labels in datasets],
        (torch.cat([x for x, _ in datasets]), torch.cat([y for _, y in datasets])),
        bytes_down,
        bytes_up,
        visits,
    )


def _attack(run: Run, setup: _Setup, edge: int, dataset: Dataset) -> Attack:
    """Return what an edge does; the attacker's copy of the core has the data of the edge."""
    if edge not in run.bad_edges:
        return Attack()
    copy = replace(setup.core, dataset=dataset, held_out=None, guard=None)
    return ATTACKS[run.attack](run.strength, copy, int(setup.train[1].max()) + 1)


SCORES: dict[str, Score] = {
    score.__name__: score
    for score in (
        validation_drop,
        edge_drop,
        drop_confidence,
        class_drop,
        loss_rise,
        ensemble_gap,
        disagreement,
        movement,
        train_accuracy_drop,
        train_accuracy_jump,
    )
}
"""The scores that the record of a round without a guard holds, by their names."""


def _watch(scores: dict[str, float]) -> Guard:
    """Return a guard that accepts every edge, and writes its scores into a dict."""

    def watch(evidence: Evidence) -> None:
        for name, score in SCORES.items():
            value = score(evidence)
            if value is not None:
                scores[name] = value

    return watch


def _after_training(evidence: Evidence) -> str | None:
    """Refuse every edge, but only after the distillation, whose metrics the records hold."""
    return None if evidence.after is None else "an oracle refuses bad edges"


def _distill(
    run: Run,
    core: Core,
    state: CoreState,
    result: EdgeResult,
    edges: list[int],
) -> tuple[CoreState, dict[str, Any]]:
    """Run Phase 2; an oracle refuses the round of a noisy or bad edge.

    A core without a guard measures the scores of each edge instead. As in `ClonedKD`, an attack
    that leads to predictions or weights that are not finite is refused.
    """
    bad = {*run.settings.noisy, *map(str, run.bad_edges)}
    scores: dict[str, float] = {}
    if run.oracle and any(str(edge) in bad for edge in edges):
        core = replace(core, guard=_after_training)
    elif core.guard is None:
        core = replace(core, guard=_watch(scores))
    try:
        state, (metrics,) = core.distill_all(state, [result])
    except ValueError as error:
        if not run.attack:
            raise
        return state, {"accepted": 0.0, "cause": str(error)}
    return state, metrics | ({"scores": scores} if scores else {})


def _aggregate(
    run: Run, setup: _Setup, state: CoreState, trained: _Trained, sent: StateDict
) -> tuple[CoreState, dict[str, Any]]:
    """Make the next core of the clones by the rule of a run, without Phase 2."""
    core = setup.core
    trust = 1.0
    if run.combine == "FLTrust":
        seed = fold_in(core.seed, "FLTrust", state.version)
        params, trust = fltrust(
            core.model, sent, _server_trained(run, core, sent, seed), mean(trained.ensemble)
        )
    elif run.combine == "average":
        params = _average(run, state, trained)
    else:
        strategy = FLOWER[run.combine](run.edges_per_round)
        params = flower_aggregate(strategy, trained.ensemble, trained.num_images)
    inputs, labels = setup.held_out
    train_accuracy = core.train_accuracy(params)
    logits = predict(core.model, trained.ensemble, inputs, runtime=core.runtime)
    metrics = {
        "accepted": float(trust > 0),
        "train-accuracy": train_accuracy,
        "core-accuracy": core.held_out_accuracy(params) or 0.0,
        "edge-accuracy": float(accuracy(logits, labels).mean()),
    }
    if run.combine == "FLTrust":
        metrics["trust"] = trust
    history = (*state.train_accuracy, train_accuracy)
    return CoreState(params, (), state.version + 1, history), metrics


def _average(run: Run, state: CoreState, trained: _Trained) -> StateDict:
    """Move the core to the clones' mean, weighted by images, or by `run.mix` of the way."""
    clones_per_edge = size(trained.ensemble) // len(trained.num_images)
    weights = [images for images in trained.num_images for _ in range(clones_per_edge)]
    params = weighted_mean(trained.ensemble, weights)
    return params if run.mix == 1 else mix_models(state.params, params, run.mix)


def _server_trained(run: Run, core: Core, sent: StateDict, seed: int) -> StateDict:
    """Train the model that an edge was sent on the core data, as an honest edge trains."""
    trained = train_edge(
        core.model,
        sent,
        core.dataset,
        recipe(run.settings, run.settings.edge_epochs),
        num_clones=1,
        seed=seed,
        runtime=core.runtime,
    )
    return member(trained, 0)


def _measure(
    setup: _Setup, before: RunState, after: StateDict, trained: _Trained
) -> tuple[dict[str, Any], Tensor]:
    """Score the core before and after a round, and the clones.

    Returns:
        Entries of the round's record, and which held-out samples the first edge has right.
    """
    core = setup.core
    # Two cores and the clones make one ensemble `[2 + E, ...]`, which is measured in one pass.
    pair = clone(before.core.params, 1), clone(after, 1)
    models = {
        name: torch.cat([*(params[name] for params in pair), clones])
        for name, clones in trained.ensemble.items()
    }
    inputs, labels = setup.held_out
    logits = predict(core.model, models, inputs, runtime=core.runtime)
    core_before = logits[0].argmax(-1) == labels
    core_after = logits[1].argmax(-1) == labels
    teacher = logits[2:].softmax(-1).mean(0).argmax(-1) == labels
    first_teacher = before.right if len(before.right) else teacher
    inputs, labels = trained.dataset
    own = accuracy(predict(core.model, models, inputs, runtime=core.runtime), labels)
    return {
        "core-accuracy": float(core_after.float().mean()),
        "before": asdict(Venn.of(core_before, teacher)),
        "after": asdict(Venn.of(core_after, teacher)),
        "first": asdict(Venn.of(core_after, first_teacher)),
        "own-before": float(own[0]),
        "own-edge": float(own[2:].mean()),
        "own-after": float(own[1]),
    }, first_teacher


def _attack_scores(
    run: Run, setup: _Setup, params: StateDict, edges: list[int]
) -> dict[str, float]:
    """Return what the records of a run with an attack have besides those of other runs.

    These are "bad", 1 for a round of a bad edge and else 0, and "backdoor", the share of triggered
    held-out images that the core puts into the class of the attacker.
    """
    if not run.attack:
        return {}
    images, labels = Backdoor().test_set(setup.held_out)
    logits = predict(setup.core.model, clone(params, 1), images, runtime=setup.core.runtime)
    return {
        "bad": float(any(edge in run.bad_edges for edge in edges)),
        "backdoor": float(accuracy(logits[0], labels)),
    }


def _cost(run: Run, core: Core, trained: _Trained, *, distilled: bool) -> dict[str, int]:
    """Return the bytes exchanged in a round and the images trained on."""
    images = 0
    if run.edge_data != "none":
        images += sum(trained.num_images) * run.num_clones * run.settings.edge_epochs
    if run.combine == "distill" and distilled:
        images += len(core.dataset[1]) * run.settings.distill_epochs
    if run.combine == "FLTrust":
        images += len(core.dataset[1]) * run.settings.edge_epochs
    return {"bytes-down": trained.bytes_down, "bytes-up": trained.bytes_up, "images": images}
