"""One optimisation step of all clones, and its recording as a CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .lanes import Lane
from .losses import Batch, Loss
from .recipe import Recipe

WARM_UP_STEPS = 3


class Outcome(NamedTuple):
    """What a step saw."""

    logits: Tensor
    """`[E, B, C]`."""
    values: Tensor
    """`[E]`, each clone's loss."""


Run = Callable[[Sequence[Batch], float | Tensor], Outcome]
"""(one batch per clone, learning rate) -> what it saw; the weights move."""


class Step:
    """Forward, loss, backward and update of every clone."""

    def __init__(self, lanes: Sequence[Lane], recipe: Recipe, loss: Loss, num_clones: int) -> None:
        self._lanes, self._loss, self._mu = lanes, loss, recipe.proximal_mu
        self._width = num_clones // len(lanes)
        self._optimisers = [_sgd(lane.leaves, recipe) for lane in lanes]
        self._starts = [[leaf.detach().clone() for leaf in lane.leaves] for lane in lanes]
        self._streams: list[torch.cuda.Stream] = []

    def __call__(self, batches: Sequence[Batch], lr: float | Tensor) -> Outcome:
        return _joined([self._lane(index, batches, lr) for index in range(len(self._lanes))])

    def parallel(self, batches: Sequence[Batch], lr: float | Tensor) -> Outcome:
        """Do the same with every lane on a CUDA stream of its own.

        The streams are made once. cuBLAS keeps a workspace for each stream and makes it when the
        stream is first used: if that happened while a graph is recorded, the workspace would lie
        in the memory of the graph.
        """
        current, seen = torch.cuda.current_stream(), []
        if not self._streams:
            self._streams = [torch.cuda.Stream() for _ in self._lanes]  # type: ignore[no-untyped-call]
        for index, stream in enumerate(self._streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                seen.append(self._lane(index, batches, lr))
        for stream in self._streams:
            current.wait_stream(stream)
        return _joined(seen)

    def _lane(self, index: int, batches: Sequence[Batch], lr: float | Tensor) -> Outcome:
        lane, optimiser = self._lanes[index], self._optimisers[index]
        mine = batches[index * self._width : (index + 1) * self._width]
        logits = lane.forward(torch.stack([batch.inputs for batch in mine]))
        values = torch.stack([self._loss(*pair) for pair in zip(logits, mine)])
        optimiser.zero_grad()
        values.sum().backward()  # type: ignore[no-untyped-call]
        if self._mu:
            _pull(lane.leaves, self._starts[index], self._mu)
        optimiser.param_groups[0]["lr"] = lr
        optimiser.step()
        return Outcome(logits.detach(), values.detach())


class Recorded:
    """A step that is recorded once and then replayed, so that no kernel is launched by itself.

    The first steps run as they are, to warm up; the next one is recorded. Batches of another size
    (the last of an epoch) are never recorded.

    Args:
        step: what to record.
        record: (function) -> (replay, outcome); the function runs when replayed, not when
            recorded, and every replay overwrites the outcome.
        aside: a context in which to warm up.
        device: where the learning rate is kept.
    """

    def __init__(
        self,
        step: Run,
        record: Callable[[Callable[[], Outcome]], tuple[Callable[[], None], Outcome]],
        aside: Callable[[], AbstractContextManager[None]],
        device: torch.device,
    ) -> None:
        self._step, self._record, self._aside = step, record, aside
        self._lr = torch.zeros((), device=device)
        self._fixed: list[Batch] = []
        self._recorded: tuple[Callable[[], None], Outcome] | None = None
        self._num_steps = 0

    def __call__(self, batches: Sequence[Batch], lr: float | Tensor) -> Outcome:
        if not self._fixed:
            self._fixed = [_cloned(batch) for batch in batches]
        if len(batches[0].rows) != len(self._fixed[0].rows):
            return self._step(batches, lr)
        for fixed, batch in zip(self._fixed, batches):
            for kept, given in zip(fixed, batch):
                if isinstance(kept, Tensor) and isinstance(given, Tensor):
                    kept.copy_(given)
        self._lr.fill_(lr)
        self._num_steps += 1
        if self._num_steps <= WARM_UP_STEPS:
            with self._aside():
                return self._step(self._fixed, self._lr)
        if self._recorded is None:
            self._recorded = self._record(lambda: self._step(self._fixed, self._lr))
        replay, outcome = self._recorded
        replay()
        return outcome


def recorded(step: Step, device: torch.device) -> Recorded:
    """Record a step as a CUDA graph whose parallel branches are the lanes."""

    def record(run: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outcome = run()
        return graph.replay, outcome

    @contextmanager
    def aside() -> Iterator[None]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    return Recorded(step.parallel, record, aside, device)


def _cloned(batch: Batch) -> Batch:
    targets = None if batch.targets is None else batch.targets.clone()
    inputs, labels, rows = (part.clone() for part in batch[:3])
    return Batch(inputs, labels, rows, batch.epoch, targets)


def _joined(seen: Sequence[Outcome]) -> Outcome:
    return Outcome(torch.cat([s.logits for s in seen]), torch.cat([s.values for s in seen]))


def _sgd(leaves: list[Tensor], recipe: Recipe) -> torch.optim.SGD:
    return torch.optim.SGD(
        leaves,
        recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=all(leaf.is_floating_point() for leaf in leaves),
    )


def _pull(leaves: list[Tensor], starts: list[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's mu/2 |w - w_start|^2."""
    for leaf, start in zip(leaves, starts):
        if leaf.grad is not None:
            leaf.grad.add_(leaf.detach() - start, alpha=mu)
