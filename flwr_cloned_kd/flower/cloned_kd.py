"""Cloned knowledge distillation as a strategy for Flower's Message API."""

import time
from collections.abc import Mapping, Sequence, Set
from logging import INFO, WARNING
from numbers import Real
from typing import Any, Unpack

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common import log
from torch import Tensor

from ..asynchronous.session import Dispatch, Received
from ..asynchronous.staleness import StalenessWeight
from ..asynchronous.strategy import AsyncStrategy, LoopOptions
from ..engine.counts import check_count, plain
from ..engine.ensemble import StateDict, frozen_state, member, size, trained_state
from ..engine.optimizers import optimizer_name
from ..engine.tasks import classification
from ..io.frozen import FROZEN_KEY, frozen_digest
from ..io.messages import ensemble_of, metrics_of, only
from ..io.wire import KEY, check_wire_dtype, encode_request, received
from ..method.core import Core
from ..method.edge import edge_seed
from ..method.knowledge import rule_name
from ..method.rollback import KeptAnswer, KeptRound, accepted_of, contradiction, replay
from ..method.state import CoreState
from ..method.variants import Send, cloned
from .kept_rounds import Entry, KeptRounds


class ClonedKD(AsyncStrategy):
    """Asynchronous edge learning by cloned knowledge distillation (Lee, Yoo and Kwak 2020).

    Each answer is an ensemble of clones. The core distils it, and the ensembles of its temporal
    memory, into itself (Algorithm 1). What does not fit the core is refused and changes nothing.

    Args:
        core: the service: its model, dataset, recipes and seed.
        num_clones: E, how many clones each edge trains; 1 is no ensemble.
        staleness_weight: staleness -> weight of that edge's KD term; None is always 1.
        send: what an edge starts from; `cloned` sends the core, see `variants` for others.
        wire_dtype: "float32", "float16", "bfloat16" or "int8": the form in which an edge should
            return its clones, see docs/protocol.md. All but "float32" halve the bytes of a request
            too, and round the numbers. An edge may always reply in float32.
        max_together: how many waiting answers are distilled in one Phase 2, at most. Above 1, the
            core keeps up with answers that arrive faster than it learns (docs/scaling.md). If such
            a distillation is refused, its answers are distilled one by one. Flower's own loop and
            `max_in_flight=1` have one answer at a time.
        keep_rounds: how many of the latest accepted answers are kept on disk beside the checkpoint,
            so that their edges can be undone; see docs/checkpoints.md. 0 keeps none.
        loop: options of `AsyncStrategy`: `max_in_flight` (1 is Algorithm 1), `max_staleness`,
            `revisit`, `max_failures`, `on_round`, `callbacks`, `checkpoint`, `quarantine`. A
            resumed run must have the same core seed, core data, number of clones, `send`,
            `wire_dtype` and distillation.

    Raises:
        ValueError: for a number out of range, or `keep_rounds` without a checkpoint.
        TypeError: if `core` is no `Core`, such as a model.

    Examples:
        >>> import torch
        >>> from flwr.app import ArrayRecord
        >>> from flwr_cloned_kd import ClonedKD, Core, EdgeClient, Recipe, VirtualGrid, edge_app
        >>> data = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> model, recipe = torch.nn.Linear(1, 2), Recipe(epochs=5, batch_size=2)
        >>> edge = edge_app(lambda context: EdgeClient(model, data, recipe))
        >>> core = Core(model=model, dataset=data, recipe=recipe)
        >>> strategy = ClonedKD(core, num_clones=2)
        >>> grid = VirtualGrid([edge] * 3)  # in a server app: the grid that Flower gives to main
        >>> result = strategy.start(grid, ArrayRecord(core.pretrain()), num_rounds=3)
        >>> [row["accepted"] for row in strategy.history]
        [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        core: Core,
        *,
        num_clones: int = 3,
        staleness_weight: StalenessWeight | None = None,
        send: Send = cloned,
        wire_dtype: str = "float32",
        max_together: int = 1,
        keep_rounds: int = 0,
        **loop: Unpack[LoopOptions],
    ) -> None:
        if not isinstance(core, Core):
            name = type(core).__name__
            raise TypeError(f"core: expected a Core(model=..., dataset=...), got {name}")
        super().__init__(**loop)
        check_count("num_clones", num_clones)
        check_count("max_together", max_together)
        check_wire_dtype(wire_dtype)
        self.core = core
        self.num_clones = int(num_clones)
        self.staleness_weight = staleness_weight
        self.send = send
        self.wire_dtype = wire_dtype
        self.max_together = max_together
        self.state: CoreState | None = None
        self._kept = KeptRounds(self.checkpoint, keep_rounds, core.distillation.memory_size)
        self._frozen_digest = frozen_digest(core.model)
        self._sent: StateDict = {}
        self._encoded: StateDict = {}

    def begin(self, arrays: ArrayRecord) -> None:
        """Start from a core that has learned from no edge yet.

        Args:
            arrays: the model, or the part of it that `trained_state` returns.
        """
        frozen = frozen_state(self.core.model)
        arrays = ArrayRecord({k: array for k, array in arrays.items() if k not in frozen})
        like = trained_state(self.core.model)
        self._publish(self.core.state(member(ensemble_of(arrays, like), 0)), version=0)
        self._kept.resume([])

    @property
    def arrays(self) -> ArrayRecord:
        """The core's model as it is now."""
        return ArrayRecord(self.current.params)

    @property
    def current(self) -> CoreState:
        """The core as it is now.

        Raises:
            RuntimeError: before the start of a run.
        """
        if self.state is None:
            raise RuntimeError("ClonedKD: expected start() first")
        return self.state

    def request(self, server_round: int, config: ConfigRecord) -> tuple[RecordDict, StateDict]:
        """Send the core, the number of clones to train of it, a seed and the form of the reply."""
        config["num-clones"] = self.num_clones
        config["seed"] = edge_seed(self.core.seed, server_round)
        if self.wire_dtype != "float32":
            config[KEY] = self.wire_dtype
        if self._frozen_digest:
            config[FROZEN_KEY] = self._frozen_digest
        content = RecordDict({"arrays": ArrayRecord(self._encoded), "config": config})
        return content, self._sent

    def absorb(self, dispatch: Dispatch, content: RecordDict, staleness: int) -> dict[str, Any]:
        """Distil the ensemble that an edge returned into the core (Phase 2)."""
        return self._absorb_one(Received(dispatch, content, staleness), self.current.version)

    def absorb_all(self, answers: Sequence[Received]) -> list[dict[str, Any] | ValueError]:
        """Distil all ensembles in one Phase 2; one by one if they are refused together."""
        readings: list[tuple[dict[str, Any], KeptAnswer] | ValueError] = []
        for answer in answers:
            try:
                readings.append(self._read(answer, self.current.version))
            except ValueError as error:
                readings.append(error)
        good = [reading for reading in readings if not isinstance(reading, ValueError)]
        if len(good) < 2:
            return self._one_by_one(answers)
        try:
            state, metrics = self._distil([answer for _, answer in good])
        except ValueError as error:
            return self._one_by_one(answers, str(error))
        distilled = [row for row in metrics if "train-accuracy" in row]
        if state is self.current and len(distilled) > 1:
            return self._one_by_one(answers, distilled[0]["cause"])
        if state is not self.current:
            self._take(state, [answer for _, answer in good], metrics)
            for row in distilled:
                row["together"] = float(len(distilled))
        rows = iter(metrics)
        return [
            reading if isinstance(reading, ValueError) else reading[0] | next(rows)
            for reading in readings
        ]

    def undo(self, edges: Set[str]) -> Set[int]:
        """Repeat the kept rounds without these edges, see `method.rollback.replay`.

        The rows of the repeated rounds in `history` then hold what the core has measured now: a
        guard that looks at the earlier rounds of an edge sees what a run without these edges sees.

        Raises:
            ValueError: if a round of these edges is not kept, or a kept file is damaged.
        """
        began = time.monotonic()
        round_of = {
            row["number"]: row["round"]
            for row in self.history
            if row["accepted"] and not row.get("undone")
        }
        numbers = [
            row["number"]
            for row in self.history
            if row["number"] in round_of and row["edge"] in edges
        ]
        if not numbers:
            return set()
        undoable = self._kept.undoable()
        for number in numbers:
            if number not in undoable:
                kept = f"since round {round_of[undoable[0]]}" if undoable else "(there are none)"
                raise ValueError(
                    f"expected edges of the rounds kept {kept}, got round {round_of[number]}"
                )
        first = self._kept.index_of(numbers)
        rounds = self._kept.read(first, trained_state(self.core.model))
        repeated = replay(self.core, rounds, edges, self.staleness_weight)
        rebuilt = self._kept.rewrite(first, repeated)
        self._publish(rebuilt.state, self.version)
        for row in self.history:
            if row["number"] in rebuilt.numbers:
                row.update(rebuilt.metrics[row["number"]])
        log(
            INFO,
            "Undid rounds %s of edges %s: repeated rounds %s in %.1f s%s",
            [round_of[number] for number in numbers],
            sorted(edges),
            [round_of[number] for number in rebuilt.numbers],
            time.monotonic() - began,
            "".join(
                f"; round {round_of[number]} is refused now: {cause}"
                for number, cause in rebuilt.refused.items()
            ),
        )
        return {*numbers, *rebuilt.refused}

    def contradiction(self) -> dict[str, float]:
        """Return how much what each kept edge has sent contradicts the core as it is now.

        Call it from `on_round` or when no run is going on, because it uses the model of the core.

        Returns:
            Edge -> the score of `method.rollback.contradiction`, a fraction in [0, 1]; the highest
            one of an edge with several kept answers.

        Raises:
            ValueError: if a kept file is damaged.
        """
        scores = dict[str, float]()
        for answer in self._kept.answers(trained_state(self.core.model)):
            score = contradiction(self.core, self.current.params, answer.ensemble)
            scores[answer.edge] = max(score, scores.get(answer.edge, 0.0))
        return scores

    def saved(self) -> None:
        """Delete kept rounds that no checkpoint needs."""
        self._kept.tidy()

    def _one_by_one(
        self, answers: Sequence[Received], cause: str = ""
    ) -> list[dict[str, Any] | ValueError]:
        if cause:
            text = "Distilling %d answers one by one, because together: %s"
            log(WARNING, text, len(answers), cause)
        used_version = self.current.version
        outcomes: list[dict[str, Any] | ValueError] = []
        for answer in answers:
            try:
                outcomes.append(self._absorb_one(answer, used_version))
            except ValueError as error:
                outcomes.append(error)
        return outcomes

    def _absorb_one(self, answer: Received, used_version: int) -> dict[str, Any]:
        reported, read = self._read(answer, used_version)
        state, metrics = self._distil([read])
        if state is not self.current:
            self._take(state, [read], metrics)
        return reported | metrics[0]

    def _read(self, answer: Received, used_version: int) -> tuple[dict[str, Any], KeptAnswer]:
        """Check a reply; return what the edge reported, and what the core may learn from."""
        reported = metrics_of(answer.content)
        record = only(answer.content.array_records, "ArrayRecord")
        dispatch = answer.dispatch
        edge = ensemble_of(
            record, self.current.params, sent=dispatch.sent, wire_dtype=self.wire_dtype
        )
        if size(edge) > self.num_clones:
            raise ValueError(f"clones: expected at most {self.num_clones}, got {size(edge)}")
        weight = 1.0
        if self.staleness_weight is not None:
            # A checkpoint cannot hold a number of NumPy or PyTorch.
            weight = float(self.staleness_weight(answer.staleness))
        read = KeptAnswer(
            edge=dispatch.edge,
            number=dispatch.number,
            ensemble=edge,
            sent=dispatch.sent,
            sent_version=used_version - answer.staleness,
            used_version=used_version,
            weight=weight,
            earlier=self._earlier(dispatch.edge),
        )
        return {**reported, "num-clones": size(edge)}, read

    def _distil(self, answers: Sequence[KeptAnswer]) -> tuple[CoreState, list[dict[str, Any]]]:
        return self.core.distill_all(self.current, [answer.result for answer in answers])

    def _take(
        self, state: CoreState, answers: Sequence[KeptAnswer], metrics: Sequence[Mapping[str, Any]]
    ) -> None:
        """Take over a new state of the core; keep what it was made of."""
        accepted = accepted_of(answers, metrics)
        self._kept.add(KeptRound(self.current, accepted))
        self._publish(state, self.version + len(accepted))

    def _earlier(self, edge: str) -> list[dict[str, Any]]:
        """Return the rounds of an edge so far, for the guard; only a revisited edge has some.

        A round that was undone counts as refused, as it does when rounds are repeated.
        """
        asked = self.core.guard is not None or self.core.trust is not None
        if not asked or not self.revisit:
            return []
        rows = (row for row in self.history if row["edge"] == edge)
        return [{**row, "accepted": 0.0} if row.get("undone") else row for row in rows]

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the core and its temporal memory, and the list of the kept rounds."""
        tensors, state = self.current.state_dict()
        if self._kept.next_file:
            state |= {"rounds": self._kept.entries, "next_file": self._kept.next_file}
        return tensors, state

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; raise ValueError if it does not fit."""
        like = trained_state(self.core.model)
        core = CoreState.from_state_dict(tensors, state, like)
        rounds = [Entry.of(row) for row in state.get("rounds", ())]
        next_file = int(state.get("next_file", 0))
        self._publish(core, core.version)
        self._kept.resume(rounds, next_file)

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common; functions by their names.

        An option that is not used has the value None. An option that a checkpoint of an older
        version lacks counts as not used.
        """
        distillation = self.core.distillation
        options = {**vars(distillation), **vars(distillation.recipe)}
        numbers = {
            name: plain(value)
            for name, value in options.items()
            if value is None or isinstance(value, Real)
        }
        rules = {
            name: rule_name(value)
            for name, value in options.items()
            if name in ("selection", "student_start") and callable(value)
        }
        if distillation.recipe.optimizer is not None:
            rules["optimizer"] = optimizer_name(distillation.recipe)
        is_default_task = self.core.task == classification
        return {
            "num_clones": self.num_clones,
            "seed": int(self.core.seed),
            "task": None if is_default_task else type(self.core.task).__name__,
            "core_samples": len(self.core.dataset[1]),
            "send": rule_name(self.send),
            "wire_dtype": None if self.wire_dtype == "float32" else self.wire_dtype,
            **numbers,
            **rules,
        }

    def summary(self) -> None:
        """Log the configuration."""
        super().summary()
        distillation = self.core.distillation
        start, selection = distillation.student_start, distillation.selection
        log(INFO, "\t├── Clones per edge: %d", self.num_clones)
        log(INFO, "\t├── Clones travel as: %s", self.wire_dtype)
        log(INFO, "\t├── Answers distilled together: at most %d", self.max_together)
        log(INFO, "\t├── Temporal memory: %d", distillation.memory_size)
        log(INFO, "\t├── Temperature: %g", distillation.temperature)
        log(INFO, "\t├── Student's start, as a share of the clones' movement: %s", rule_name(start))
        log(INFO, "\t├── Samples of a teacher: %s", rule_name(selection or "all"))
        log(INFO, "\t└── Core data: %d samples, seed %d", len(self.core.dataset[1]), self.core.seed)

    def _publish(self, state: CoreState, version: int) -> None:
        """Make a state the present one.

        Args:
            version: the number of answers that the core has learned from, those undone included.
        """
        # Not in `request`, which runs beside `absorb`: both would use the core's one model.
        sent = self.send(state)
        with self.publishing:
            self.state = state
            self.version = version
            # What the edge reads: the core counts the clones' movement from there.
            self._sent = received(sent, self.wire_dtype)
            self._encoded = encode_request(sent, self.wire_dtype)
