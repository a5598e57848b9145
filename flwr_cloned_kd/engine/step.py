"""One optimisation step of all clones, and its recording as a CUDA graph."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .lanes import Lane
from .losses import Batch, Loss
from .nested import each_tensor, stack, tensors_of
from .optimizers import limit_gradients, make_optimizer, rate_ratios, set_rate
from .recipe import Recipe

WARM_UP_STEPS = 3
"""Plain steps before the recording."""

_one_recording = threading.Lock()
"""Held while a step is recorded: PyTorch allows one recording at a time in a process."""


class Outcome(NamedTuple):
    """The logits and losses of a step, from before its update."""

    logits: Tensor
    """`[E, B, C]`."""
    losses: Tensor
    """`[E]`, one loss per clone."""


StepFunction = Callable[[Sequence[Batch], float | Tensor], Outcome]
"""(one batch per clone, learning rate) -> outcome; a call updates the weights."""


class Step:
    """Forward, loss, backward and update of every clone."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        recipe: Recipe,
        loss: Loss,
        num_clones: int,
        *,
        recorded: bool = False,
    ) -> None:
        self._lanes = lanes
        self._loss = loss
        self._mu = recipe.proximal_mu
        self._clones_per_lane = num_clones // len(lanes)
        self._max_grad_norm = recipe.max_grad_norm
        self._optimizers = [
            make_optimizer(lane.leaves, recipe, recorded=recorded) for lane in lanes
        ]
        self._ratios = [rate_ratios(optimizer, recipe) for optimizer in self._optimizers]
        self._starts = [[leaf.detach().clone() for leaf in lane.leaves] for lane in lanes]
        self._streams: list[torch.cuda.Stream] = []

    def __call__(self, batches: Sequence[Batch], lr: float | Tensor) -> Outcome:
        lanes = range(len(self._lanes))
        return _joined([self.step_lane(index, self._part(batches, index), lr) for index in lanes])

    def parallel(self, batches: Sequence[Batch], lr: float | Tensor) -> Outcome:
        """Do the same step with every lane on a CUDA stream of its own.

        The streams are made once. cuBLAS allocates a workspace for a stream when the stream is
        first used. If that happened during the recording of a graph, the workspace would lie in the
        memory of the graph.
        """
        current = torch.cuda.current_stream()
        outcomes = []
        if not self._streams:
            self._streams = [torch.cuda.Stream() for _ in self._lanes]  # type: ignore[no-untyped-call]
        for index, stream in enumerate(self._streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                outcomes.append(self.step_lane(index, self._part(batches, index), lr))
        for stream in self._streams:
            current.wait_stream(stream)
        return _joined(outcomes)

    def _part(self, batches: Sequence[Batch], index: int) -> Sequence[Batch]:
        """Return the batches of the clones in one lane."""
        first = index * self._clones_per_lane
        return batches[first : first + self._clones_per_lane]

    def step_lane(self, index: int, batches: Sequence[Batch], lr: float | Tensor) -> Outcome:
        """Do the step of one lane, given the batches of its clones."""
        lane = self._lanes[index]
        optimizer = self._optimizers[index]
        logits = lane.forward(stack([batch.inputs for batch in batches]))
        losses = torch.stack([self._loss(*pair) for pair in zip(logits, batches)])
        optimizer.zero_grad()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        if self._mu:
            _add_proximal_gradient(lane.leaves, self._starts[index], self._mu)
        if self._max_grad_norm is not None:
            limit_gradients(lane.leaves, self._clones_per_lane, self._max_grad_norm)
        set_rate(optimizer, lr, self._ratios[index])
        optimizer.step()
        return Outcome(logits.detach(), losses.detach())


class RecordedStep:
    """A step that is recorded once as a CUDA graph and then replayed, which saves kernel launches.

    The first steps run as plain steps, to warm up; the next one is recorded. Batches of another
    size (the last of an epoch) always run as plain steps.

    Args:
        step: the step to record.
        device: the device that holds the learning rate.

    Raises:
        RuntimeError: in a call, if the step cannot be recorded; the cause is what it raised.
    """

    def __init__(self, step: StepFunction, device: torch.device) -> None:
        self._step = step
        self._lr = torch.zeros((), device=device)
        self._fixed: list[Batch] = []
        self._recording: tuple[Callable[[], None], Outcome] | None = None
        self._num_steps = 0

    def __call__(self, batches: Sequence[Batch], lr: float | Tensor) -> Outcome:
        if not self._fixed:
            self._fixed = [_copied(batch) for batch in batches]
        if len(batches[0].rows) != len(self._fixed[0].rows):
            return self._step(batches, lr)
        for fixed, batch in zip(self._fixed, batches):
            for old, new in zip(_tensors(fixed), _tensors(batch)):
                old.copy_(new)
        self._lr.fill_(lr)
        self._num_steps += 1
        if self._num_steps <= WARM_UP_STEPS:
            with self.warming_up():
                return self._step(self._fixed, self._lr)
        if self._recording is None:
            self._recording = self._record_or_explain()
        replay, outcome = self._recording
        replay()
        return outcome

    def _record_or_explain(self) -> tuple[Callable[[], None], Outcome]:
        """Record the step; an error says that it happened in a recording, and how to avoid it."""
        causes: list[Exception] = []

        def run() -> Outcome:
            try:
                return self._step(self._fixed, self._lr)
            except Exception as error:
                causes.append(error)
                raise

        try:
            return self.record(run)
        except Exception as error:
            # An error of the step also breaks the end of the recording, whose error hides it.
            cause = causes[0] if causes else error
            first_line = str(cause).partition("\n")[0]  # CUDA's errors have several
            raise RuntimeError(
                "cuda_graphs: expected a training step that a CUDA graph can record, got "
                f"{type(cause).__name__}: {first_line}; cuda_graphs=False trains with plain steps"
            ) from cause

    def record(self, run: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
        """Record a function as a CUDA graph, whose parallel branches are the lanes.

        The mode "thread_local" lets other threads use the GPU meanwhile: in PyTorch's default mode
        "global" a call of another thread that is not safe in a recording is an error, such as the
        query of an event. A graph contains what goes to its streams, in both modes; no other
        thread uses them. In "thread_local" CUDA does not check the calls of PyTorch's thread for
        the backward pass. PyTorch itself records compiled models in this mode.

        Returns:
            A function that replays the graph, and the outcome, which every replay overwrites. The
            recorded function takes effect when it is replayed, not when it is recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # If a recording fails, `torch.cuda.graph` leaves its stream as the current one of this
        # thread; `warming_up` restores the stream from before.
        with (
            _one_recording,
            self.warming_up(),
            torch.cuda.graph(graph, stream=self._side_stream, capture_error_mode="thread_local"),
        ):
            outcome = run()
        return graph.replay, outcome

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run the block on a side stream, as CUDA graphs require for steps before a recording."""
        self._side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side_stream):
            yield
        torch.cuda.current_stream().wait_stream(self._side_stream)

    @cached_property
    def _side_stream(self) -> torch.cuda.Stream:
        """The stream of the warm-up and of the recording.

        There is one: PyTorch has 32 streams for each device, which it hands out in turn, so that
        many streams would soon coincide with those of the lanes.
        """
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _copied(batch: Batch) -> Batch:
    targets = None if batch.targets is None else batch.targets.clone()
    inputs, labels, rows = (each_tensor(torch.clone, part) for part in batch[:3])
    return Batch(inputs, labels, rows, batch.epoch, targets)


def _tensors(batch: Batch) -> list[Tensor]:
    parts = (batch.inputs, batch.labels, batch.rows, batch.targets)
    return [tensor for part in parts if part is not None for tensor in tensors_of(part)]


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    return Outcome(
        torch.cat([outcome.logits for outcome in outcomes]),
        torch.cat([outcome.losses for outcome in outcomes]),
    )


def _add_proximal_gradient(leaves: list[Tensor], starts: list[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's mu/2 |w - w_start|^2."""
    for leaf, start in zip(leaves, starts):
        if leaf.grad is not None:
            leaf.grad.add_(leaf.detach() - start, alpha=mu)
