"""The rounds of a run, played with the plain loop, without Flower."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..apps.build import build_core, edge_recipe, load, split
from ..apps.machine import hardware
from ..attacks.data import Backdoor
from ..attacks.models import Visit, attack_model
from ..attacks.suite import ATTACKS, Attack
from ..baselines.averaging import mix as mix_models
from ..data.datasets import take
from ..engine.ensemble import Ensemble, StateDict, clone, size
from ..engine.fit import accuracy, predict
from ..engine.inputs import Dataset
from ..engine.recipe import fold_in
from ..io.wire import encode_request, received, transfer
from ..method.consensus import Venn
from ..method.core import Core, edge_seed, train_edge
from ..method.evidence import Evidence
from ..method.state import CoreState
from ..method.variants import VARIANTS, Send, independent
from .runs import Run, with_functions

Record = dict[str, Any]
"""What one round did, ready for JSON; round 0 is Phase 0. Accuracies are fractions, 0 to 1."""


@dataclass(frozen=True)
class RunState:
    """Everything that the next round of a run needs.

    Args:
        server_round: number of rounds played.
        core: the core's progress.
        past: the core models after the latest rounds, newest last, as far back as an edge of the
            run may be late.
        right: `[N]`, whether the first edge's ensemble classifies each held-out sample correctly;
            empty before the first round.
        visits: bad edge -> its latest visit.
    """

    server_round: int
    core: CoreState
    past: tuple[StateDict, ...]
    right: Tensor
    visits: dict[int, Visit] = field(default_factory=dict)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return this state as named tensors and a header that JSON can hold."""
        tensors, header = self.core.state_dict()
        for index, params in enumerate(self.past):
            tensors |= {f"past-{index}/{name}": tensor for name, tensor in params.items()}
        for edge, visit in self.visits.items():
            tensors |= {f"sent-{edge}/{name}": tensor for name, tensor in visit.sent.items()}
            tensors |= {f"edge-{edge}/{name}": tensor for name, tensor in visit.edge.items()}
        return tensors | {"right": self.right}, {
            **header,
            "server_round": self.server_round,
            "past": len(self.past),
            "visits": {str(edge): visit.number for edge, visit in self.visits.items()},
        }

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Self:
        """Make the state that `state_dict` returned.

        Raises:
            ValueError, KeyError: if a tensor or an entry of the header is missing.
        """
        model = _with_prefix("core/", tensors)
        past = range(header["past"])
        return cls(
            server_round=header["server_round"],
            core=CoreState.from_state_dict(tensors, header, like=model),
            past=tuple(_with_prefix(f"past-{index}/", tensors) for index in past),
            right=tensors["right"],
            visits={
                int(edge): Visit(
                    number,
                    _with_prefix(f"sent-{edge}/", tensors),
                    _with_prefix(f"edge-{edge}/", tensors),
                )
                for edge, number in header.get("visits", {}).items()
            },
        )


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> StateDict:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


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
    if run.central:
        dataset = train
    elif run.core_share < 1:
        dataset = take(train, parts[0][: max(2, round(run.core_share * len(parts[0])))])
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
    if run.combine == "average":
        state, metrics = _average(run, setup, before.core, trained)
    else:
        state, metrics = _distill(run, setup.core, before.core, trained.ensemble, sent, edges)
    scores, right = _measure(setup, before, state.params, trained)
    record = {
        **metrics,
        "edges": edges,
        "late": late,
        "tried-accuracy": metrics["core-accuracy"],
        **scores,
        **_cost(run, setup.core, trained),
        **_attack_scores(run, setup, state.params, edges),
    }
    latest = max((late for _, late in run.order), default=0)
    past = (*before.past, state.params)[-1 - latest :]
    return record, RunState(server_round, state, past, right, trained.visits)


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


def _after_training(evidence: Evidence) -> str | None:
    """Refuse every edge, but only after the distillation, whose metrics the records hold."""
    return None if evidence.after is None else "an oracle refuses bad edges"


def _distill(
    run: Run,
    core: Core,
    state: CoreState,
    ensemble: Ensemble,
    sent: StateDict,
    edges: list[int],
) -> tuple[CoreState, dict[str, float]]:
    """Run Phase 2; an oracle refuses the round of a noisy or bad edge."""
    bad = {*run.settings.noisy, *map(str, run.bad_edges)}
    if run.oracle and any(str(edge) in bad for edge in edges):
        core = replace(core, guard=_after_training)
    return core.distill(state, ensemble, sent=sent, weight=run.kd_weight)


def _average(
    run: Run, setup: _Setup, state: CoreState, trained: _Trained
) -> tuple[CoreState, dict[str, float]]:
    """Move the core to the clones' mean, weighted by images, or by `run.mix` of the way."""
    core = setup.core
    inputs, labels = setup.held_out
    clones_per_edge = size(trained.ensemble) // len(trained.num_images)
    weights = [images for images in trained.num_images for _ in range(clones_per_edge)]
    params = weighted_mean(trained.ensemble, weights)
    if run.mix < 1:
        params = mix_models(state.params, params, run.mix)
    train_accuracy = core.train_accuracy(params)
    logits = predict(core.model, trained.ensemble, inputs, runtime=core.runtime)
    metrics = {
        "accepted": 1.0,
        "train-accuracy": train_accuracy,
        "core-accuracy": core.held_out_accuracy(params) or 0.0,
        "edge-accuracy": float(accuracy(logits, labels).mean()),
    }
    history = (*state.train_accuracy, train_accuracy)
    return CoreState(params, (), state.version + 1, history), metrics


def weighted_mean(ensemble: Ensemble, weights: list[int]) -> StateDict:
    """Average clones `[E, ...]` by weight (McMahan et al. 2017).

    Flower's FedAvg computes the same average, but its `aggregate_train` needs Flower's messages,
    turns counters into float64, and adds in another order, which moves the last bit of float32: the
    records on disk would no longer be those that a run plays today.

    Args:
        ensemble: the clones; integer tensors, which count, are taken from the first clone.
        weights: of each clone, for example the number of its edge's images.
    """
    shares = torch.tensor(weights, dtype=torch.float32) / sum(weights)
    return {
        name: torch.einsum("e,e...->...", shares, tensor)
        if tensor.is_floating_point()
        else tensor[0]
        for name, tensor in ensemble.items()
    }


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


def _cost(run: Run, core: Core, trained: _Trained) -> dict[str, int]:
    """Return the bytes exchanged in a round and the images trained on."""
    images = 0
    if run.edge_data != "none":
        images += sum(trained.num_images) * run.num_clones * run.settings.edge_epochs
    if run.combine == "distill":
        images += len(core.dataset[1]) * run.settings.distill_epochs
    return {"bytes-down": trained.bytes_down, "bytes-up": trained.bytes_up, "images": images}
