"""Cloned knowledge distillation as a strategy for Flower's Message API."""

from collections.abc import Callable
from logging import INFO
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common import log
from torch import Tensor

from ..asynchronous.session import Dispatch
from ..asynchronous.strategy import AsyncStrategy
from ..engine.ensemble import Ensemble, StateDict, as_ensemble, member, size
from ..io.messages import ensemble_of, metrics_of, only
from ..method.core import Core, CoreState, edge_seed
from ..method.variants import Send, cloned

NUMBERS = (bool, int, float)


class ClonedKD(AsyncStrategy):
    """Asynchronous edge learning by cloned knowledge distillation (Lee, Yoo and Kwak 2020).

    Each answer is an ensemble of clones; the core distils it, and those of its temporal memory,
    into itself (Algorithm 1). Whatever does not fit the core is refused and leaves it as it was.

    Args:
        core: the service; its dataset, recipes and seed.
        num_clones: E, how many clones each edge trains; 1 is no ensemble.
        max_in_flight: edges asked at the same time; 1 is Algorithm 1.
        max_staleness: refuse answers to a core older than this many versions; None takes all.
        staleness_weight: staleness -> weight of that edge's KD term; None is always 1.
        revisit: ask edges again once every edge was asked.
        max_failures: end the run after so many edges in a row that crashed or stayed silent.
        send: what an edge starts from; `cloned` sends the core, see `variants` for others.
        on_round, checkpoint: see `AsyncStrategy`; a resumed run must have the same core seed,
            core data, number of clones, `send` and distillation.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        core: Core,
        *,
        num_clones: int = 3,
        max_in_flight: int = 1,
        max_staleness: int | None = None,
        staleness_weight: Callable[[int], float] | None = None,
        revisit: bool = False,
        max_failures: int = 30,
        send: Send = cloned,
        on_round: Callable[[dict[str, Any]], None] | None = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        super().__init__(
            max_in_flight=max_in_flight,
            revisit=revisit,
            max_failures=max_failures,
            on_round=on_round,
            checkpoint=checkpoint,
        )
        if num_clones < 1:
            raise ValueError(f"num_clones: expected at least 1, got {num_clones}")
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(f"max_staleness: expected at least 0, got {max_staleness}")
        self.core, self.num_clones, self.send = core, num_clones, send
        self.max_staleness, self.staleness_weight = max_staleness, staleness_weight
        self.state: CoreState | None = None
        self._sent: StateDict = {}

    def begin(self, arrays: ArrayRecord) -> None:
        """Start from a core that has met no edge yet."""
        like = self.core.model.state_dict()
        self._publish(self.core.state(member(ensemble_of(arrays, like), 0)))

    @property
    def arrays(self) -> ArrayRecord:
        """The core's model as it is now."""
        return ArrayRecord(self._current.params)

    def request(self, server_round: int, config: ConfigRecord) -> tuple[RecordDict, StateDict]:
        """Send the core, how many clones to train of it, and a seed."""
        sent = self._sent
        config["num-clones"] = self.num_clones
        config["seed"] = edge_seed(self.core.seed, server_round)
        return RecordDict({"arrays": ArrayRecord(sent), "config": config}), sent

    def absorb(self, dispatch: Dispatch[Any], content: RecordDict) -> dict[str, float]:
        """Distil the ensemble that came back (Phase 2)."""
        staleness = self.version - dispatch.version
        if self.max_staleness is not None and staleness > self.max_staleness:
            raise ValueError(f"staleness: expected at most {self.max_staleness}, got {staleness}")
        found = metrics_of(content)
        edge = ensemble_of(only(content.array_records, "ArrayRecord"), self._current.params)
        if size(edge) > self.num_clones:
            raise ValueError(f"clones: expected at most {self.num_clones}, got {size(edge)}")
        weight = 1.0 if self.staleness_weight is None else self.staleness_weight(staleness)
        state, metrics = self.core.distill(self._current, edge, sent=dispatch.sent, weight=weight)
        if state is not self._current:
            self._publish(state)
        return {**found, **metrics, "num-clones": size(edge)}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the core, its temporal memory and what it needs to go on."""
        state = self._current
        ensembles = {"core": state.params} | {str(i): e for i, e in enumerate(state.memory)}
        tensors = {f"{i}/{name}": t for i, e in ensembles.items() for name, t in e.items()}
        return tensors, {
            "memory": len(state.memory),
            "memory_weights": state.memory_weights,
            "train_accuracy": state.train_accuracy,
            "settings": self._settings,
        }

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; ValueError if this core cannot."""
        for name, value in self._settings.items():
            if (found := state["settings"].get(name)) != value:
                raise ValueError(f"{name}: expected {value}, got {found}")
        like = self.core.model.state_dict()

        def ensemble(prefix: str) -> Ensemble:
            named = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            return as_ensemble(named, like)

        self._publish(
            CoreState(
                params=member(ensemble("core/"), 0),
                memory=tuple(ensemble(f"{i}/") for i in range(state["memory"])),
                version=self.version,
                train_accuracy=tuple(state["train_accuracy"]),
                memory_weights=tuple(state["memory_weights"]),
            )
        )

    def _publish(self, state: CoreState) -> None:
        # Not in request: that runs beside absorb, and both would use the core's one model.
        sent = self.send(state)
        with self.publishing:
            self.state, self.version, self._sent = state, state.version, sent

    @property
    def _settings(self) -> dict[str, Any]:
        """What a resumed run must share with the run before it; functions by their names."""
        how = self.core.distillation
        options = {**vars(how), **vars(how.recipe)}
        numbers = {name: v for name, v in options.items() if v is None or type(v) in NUMBERS}
        rules = {"selection": how.selection, "student_start": how.student_start}
        functions = {name: _name(rule) for name, rule in rules.items() if callable(rule)}
        return {
            "num_clones": self.num_clones,
            "seed": self.core.seed,
            "core_samples": len(self.core.dataset[1]),
            "send": _name(self.send),
            **numbers,
            **functions,
        }

    def summary(self) -> None:
        """Log the configuration."""
        super().summary()
        how = self.core.distillation
        log(INFO, "\t├── Clones per edge: %d", self.num_clones)
        log(INFO, "\t├── Temporal memory: %d", how.memory_size)
        log(INFO, "\t├── Temperature: %g", how.temperature)
        log(INFO, "\t├── Student starts at: %s of the clones' movement", _name(how.student_start))
        log(INFO, "\t├── A teacher teaches: %s samples", _name(how.selection or "all"))
        log(INFO, "\t└── Core data: %d samples, seed %d", len(self.core.dataset[1]), self.core.seed)

    @property
    def _current(self) -> CoreState:
        if self.state is None:
            raise RuntimeError("ClonedKD: expected start() first")
        return self.state


def _name(rule: object) -> str:
    """Name a function, or write out a number."""
    return str(getattr(rule, "__qualname__", type(rule).__name__ if callable(rule) else rule))
