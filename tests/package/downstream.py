"""A user's code against the public API. Type checkers read it; nothing imports it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from flwr_cloned_kd import (
    PRESETS,
    AnyOf,
    Callback,
    Classification,
    ClonedKD,
    Core,
    CoreState,
    Dataset,
    EdgeClient,
    Ensemble,
    Evidence,
    Limit,
    PolynomialStaleness,
    Recipe,
    Runtime,
    StateDict,
    Task,
    accuracy,
    clone,
    digits_cnn,
    edge_app,
    fit,
    load_digits,
    member,
    partition,
    predict,
    take,
    train_clones,
    train_edge,
    validation_drop,
)


@dataclass(frozen=True)
class Smoothed:
    """A task of the user's own: classification with smoothed labels."""

    smoothing: float = 0.1
    plain: Classification = Classification()

    @property
    def ignore_index(self) -> int | None:
        return self.plain.ignore_index

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        self.plain.check(outputs, labels)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels, label_smoothing=self.smoothing)

    def target(self, outputs: Tensor, temperature: float) -> Tensor:
        return self.plain.target(outputs, temperature)

    def divergence(
        self, outputs: Tensor, target: Tensor, labels: Tensor, temperature: float
    ) -> Tensor:
        return self.plain.divergence(outputs, target, labels, temperature)

    def prediction(self, target: Tensor) -> Tensor:
        return self.plain.prediction(target)

    def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.plain.correct(outputs, labels)


def refuses_large_steps(evidence: Evidence) -> str | None:
    """A guard of the user's own."""
    metrics: dict[str, float] = evidence.metrics()
    return "too far from the core" if metrics.get("movement", 0.0) > 100 else None


def largest_value(evidence: Evidence) -> float | None:
    """A score of the user's own."""
    return max(evidence.metrics().values(), default=None)


def flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """An augmentation of the user's own."""
    return inputs.flip(-1) if torch.rand((), generator=generator) < 0.5 else inputs


def without_flower() -> float:
    """Run the algorithm alone."""
    train, test = load_digits()
    parts: Sequence[Tensor] = partition(len(train[1]), num_parts=10)
    core_set: Dataset = take(train, parts[0])
    recipe = replace(Recipe(epochs=5, augment=flip), optimizer=torch.optim.AdamW, lr=1e-3)
    task: Task = Smoothed()
    core = Core(
        model=digits_cnn(),
        dataset=core_set,
        held_out=test,
        recipe=recipe,
        task=task,
        distillation=PRESETS["practical"](recipe),
        guard=AnyOf([refuses_large_steps, Limit(validation_drop, 0.05), Limit(largest_value, 9)]),
        runtime=Runtime(device="cpu"),
        seed=1,
    )
    state: CoreState = core.state(core.pretrain())
    edge: Ensemble = train_edge(core.model, state.params, take(train, parts[1]), recipe, seed=2)
    state, metrics = core.distill(state, edge, weight=0.5)
    params: StateDict = member(clone(state.params, 2), 0)
    trained: Ensemble = fit(core.model, clone(params, 1), core_set, recipe, seed=3)
    outputs: Tensor = predict(core.model, trained, test[0])[0]
    return float(metrics["core-accuracy"]) + float(accuracy(outputs, test[1]))


class Refusals(Callback):
    """A callback that prints why edges were refused."""

    def refused(self, row: dict[str, Any]) -> None:
        print(row["round"], row["edge"], row["cause"])


def print_round(row: dict[str, Any]) -> None:
    """A callback of the user's own."""
    print(row["round"], row["edge"])


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    train, _ = load_digits()
    core = Core(model=digits_cnn(), dataset=train, recipe=Recipe(epochs=2))
    strategy = ClonedKD(
        core,
        num_clones=2,
        max_in_flight=2,
        staleness_weight=PolynomialStaleness(),
        on_round=print_round,
        callbacks=[Refusals()],
    )
    result: Result = strategy.start(grid, ArrayRecord(core.pretrain()), num_rounds=3)
    print(result, strategy.current.version, strategy.history[-1]["cause"])


def client_fn(context: Context) -> EdgeClient:
    train, _ = load_digits()
    return EdgeClient(digits_cnn(), train, Recipe(epochs=2))


client_app: ClientApp = edge_app(client_fn)
own_app = ClientApp(mods=[train_clones()])
