"""One training loop for every phase and baseline; the only module that knows the hardware."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .data import Dataset
from .ensemble import Ensemble, StateDict, member, size
from .losses import Batch, Loss, cross_entropy
from .recipe import Epoch, Recipe, fold_in


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how fast to train: nothing here changes the result beyond rounding.

    Args:
        device: "auto" (a GPU if PyTorch sees one, else the CPU), "cpu", "cuda", "cuda:1", ...
        bf16: run the models in bfloat16 autocast; weights and losses stay float32.
        compile: compile the forward pass of clones that train one by one; it takes a minute, which
            only long training of large models earns back.
        batch_clones: train all clones in one pass (True), one by one (False), or choose by the
            measured rule (None): batched for a tiny model, below 50,000 parameters.
    """

    device: str = "auto"
    bf16: bool = False
    compile: bool = False
    batch_clones: bool | None = None

    def __post_init__(self) -> None:
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise ValueError(
                f"device: expected auto, cpu, cuda, ..., got {self.device!r}"
            ) from error

    @property
    def target(self) -> torch.device:
        """The device that `device` stands for in this process."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


MOST_BATCHED_PARAMETERS = 50_000


class _Lane(NamedTuple):
    """Clones that share a forward pass: all of them, or a single one."""

    leaves: list[Tensor]
    forward: Callable[[Tensor], Tensor]
    """`[k, B, ...]` -> logits `[k, B, C]`, float32, for the k clones of this lane."""
    read: Callable[[], Ensemble]


def fit(
    model: nn.Module,
    ensemble: Ensemble,
    dataset: Dataset,
    recipe: Recipe,
    *,
    loss: Loss = cross_entropy,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> Ensemble:
    """Train every clone of an ensemble on one dataset, each with batches of its own.

    Clone e draws its shuffles and augmentations from `fold_in(seed, e)` alone, so that it ends
    the same whether it trains beside others or by itself; but dropout draws for all clones
    in turn, and `Recipe.stop` ends them together.

    Args:
        model: the architecture; its own weights are neither read nor written.
        ensemble: `[E, ...]` starts; E = 1 trains a single model.
        dataset: inputs `[N, ...]` and labels `[N]`.
        loss: (logits, batch) -> scalar.

    Returns:
        The trained ensemble, `[E, ...]`, on the CPU.

    Raises:
        ValueError: if the dataset is empty, its tensors differ in length, or no parameter of the
            model requires a gradient.
    """
    inputs, labels = (tensor.to(runtime.target) for tensor in dataset)
    if not len(inputs) or len(inputs) != len(labels):
        raise ValueError(f"dataset: expected inputs and labels of one length above 0, "
                         f"got {len(inputs)} and {len(labels)}")  # fmt: skip
    num_clones = size(ensemble)
    generators = [torch.Generator().manual_seed(fold_in(seed, e)) for e in range(num_clones)]
    with _settings(runtime, seed):
        lanes = _lanes(model, ensemble, runtime, inputs, training=True)
        starts = [[leaf.detach().clone() for leaf in lane.leaves] for lane in lanes]
        if not lanes[0].leaves:
            raise ValueError("model: expected a parameter that requires a gradient, got none")
        optimisers = [_sgd(lane.leaves, recipe) for lane in lanes]
        width = num_clones // len(lanes)
        num_steps = recipe.epochs * len(_split(len(inputs), recipe.batch_size))
        step, history = 0, list[Epoch]()
        for _ in range(recipe.epochs):
            meter = _Meter(recipe.stop is not None)
            for batches in zip(*(_epoch(inputs, labels, recipe, g) for g in generators)):
                lr = recipe.lr * recipe.schedule(step / num_steps)
                for index, (lane, optimiser) in enumerate(zip(lanes, optimisers)):
                    mine = batches[index * width : (index + 1) * width]
                    logits = lane.forward(torch.stack([batch.inputs for batch in mine]))
                    values = [loss(*pair) for pair in zip(logits, mine)]
                    optimiser.zero_grad()
                    torch.stack(values).sum().backward()  # type: ignore[no-untyped-call]
                    if recipe.proximal_mu:
                        _pull(lane.leaves, starts[index], recipe.proximal_mu)
                    optimiser.param_groups[0]["lr"] = lr
                    optimiser.step()
                    meter.add(logits, values, mine)
                step += 1
            if recipe.stop is not None:
                history.append(meter.epoch())
                if recipe.stop(history):
                    break
        parts = [lane.read() for lane in lanes]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in ensemble}


def forward(
    model: nn.Module, ensemble: Ensemble, runtime: Runtime = Runtime()
) -> Callable[[Tensor], Tensor]:
    """Return inputs `[B, ...]` -> logits `[E, B, C]` of the whole ensemble in evaluation mode."""
    lanes: list[_Lane] = []

    @torch.no_grad()
    def call(inputs: Tensor) -> Tensor:
        inputs = inputs.to(runtime.target)
        if not lanes:
            lanes.extend(_lanes(model, ensemble, runtime, inputs, training=False))
        views = inputs.expand(size(ensemble) // len(lanes), *inputs.shape)
        return torch.cat([lane.forward(views) for lane in lanes])

    return call


def predict(
    model: nn.Module,
    ensemble: Ensemble,
    inputs: Tensor,
    *,
    runtime: Runtime = Runtime(),
    batch_size: int = 500,
) -> Tensor:
    """Compute the logits `[E, N, C]` of every clone for inputs `[N, ...]`, on the CPU."""
    with _settings(runtime, 0):
        call = forward(model, ensemble, runtime)
        return torch.cat([call(part).cpu() for part in torch.split(inputs, batch_size)], dim=1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction of correct predictions, `[...]` for logits `[..., N, C]`."""
    return (logits.argmax(-1) == labels).float().mean(-1)


def _split(num_samples: int, batch_size: int) -> list[int]:
    sizes = [batch_size] * (num_samples // batch_size)
    rest = num_samples % batch_size
    return [*sizes, rest] if rest > 1 or not sizes else sizes


def _epoch(
    inputs: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator
) -> Iterator[Batch]:
    order = torch.randperm(len(inputs), generator=generator)
    sizes = _split(len(inputs), recipe.batch_size)
    for rows in order[: sum(sizes)].to(inputs.device).split(sizes):  # type: ignore[no-untyped-call]
        x, y = inputs[rows], labels[rows]
        if recipe.augment is not None:
            x = recipe.augment(x, generator)
        if recipe.label_noise is not None:
            y = recipe.label_noise(y, generator)
        yield Batch(x, y, rows)


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


class _Meter:
    """Sums of one epoch, kept on the device and only where somebody will read them."""

    def __init__(self, wanted: bool) -> None:
        self._wanted, self._sums, self._count = wanted, list[Tensor](), 0

    def add(self, logits: Tensor, values: list[Tensor], batches: Sequence[Batch]) -> None:
        if self._wanted:
            labels = torch.stack([batch.labels for batch in batches])
            loss = torch.stack(values).detach().sum() * labels.shape[1]
            self._sums.append(torch.stack([loss, (logits.argmax(-1) == labels).sum()]))
            self._count += labels.numel()

    def epoch(self) -> Epoch:
        return Epoch(*(torch.stack(self._sums).sum(0) / self._count).tolist())


@contextmanager
def _settings(runtime: Runtime, seed: int) -> Iterator[None]:
    """Make a device deterministic, and modules that draw (dropout) too, then restore both."""
    cuda = runtime.target.type == "cuda"
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[runtime.target] * cuda))
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
            flags = torch.backends.cudnn.flags(deterministic=True, benchmark=False)
            stack.enter_context(flags)
        yield


def _lanes(
    model: nn.Module, ensemble: Ensemble, runtime: Runtime, inputs: Tensor, *, training: bool
) -> list[_Lane]:
    if _batch_clones(model, ensemble, runtime, inputs, training):
        return [_together(model, ensemble, runtime, training)]
    return [
        _alone(model, member(ensemble, index), runtime, training) for index in range(size(ensemble))
    ]


def _batch_clones(
    model: nn.Module, ensemble: Ensemble, runtime: Runtime, inputs: Tensor, training: bool
) -> bool:
    num_clones = size(ensemble)
    if runtime.batch_clones is not None or num_clones == 1:
        return bool(runtime.batch_clones) and num_clones > 1
    # vmap becomes a grouped convolution. It saves the overhead of many small operations, which
    # is what a tiny model's time goes to, and loses by a slower kernel on a larger one.
    tied = len(list(model.parameters())) != len(
        list(model.named_parameters(remove_duplicate=False))
    )
    if tied or sum(p.numel() for p in model.parameters()) >= MOST_BATCHED_PARAMETERS:
        return False
    # What vmap cannot do (an LSTM, dropout) it says at the first call: try, on a copy.
    trial = _together(model, ensemble, runtime, training)
    try:
        with torch.no_grad():
            trial.forward(inputs[:2].expand(num_clones, *inputs[:2].shape))
    except RuntimeError:
        return False
    return True


def _alone(model: nn.Module, params: StateDict, runtime: Runtime, training: bool) -> _Lane:
    module = _template(model, runtime, training)
    module.load_state_dict(params)
    module.to(memory_format=torch.channels_last)
    call = torch.compile(module) if runtime.compile else module

    def run(inputs: Tensor) -> Tensor:
        x = inputs[0]
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=runtime.bf16):
            logits: Tensor = call(x)
        return logits.float().unsqueeze(0)

    def read() -> Ensemble:
        return {n: t.detach().contiguous().unsqueeze(0) for n, t in module.state_dict().items()}

    return _Lane([p for p in module.parameters() if p.requires_grad], run, read)


def _together(model: nn.Module, ensemble: Ensemble, runtime: Runtime, training: bool) -> _Lane:
    module = _template(model, runtime, training)
    state = {name: tensor.to(runtime.target, copy=True) for name, tensor in ensemble.items()}
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    leaves = [state[name].requires_grad_(training) for name in trained]

    def one(params: StateDict, x: Tensor) -> Tensor:
        logits: Tensor = functional_call(module, params, (x,))
        return logits

    call = vmap(one)

    def run(inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=runtime.bf16):
            logits: Tensor = call(state, inputs)
        return logits.float()

    return _Lane(leaves, run, lambda: {name: tensor.detach() for name, tensor in state.items()})


def _template(model: nn.Module, runtime: Runtime, training: bool) -> nn.Module:
    return copy.deepcopy(model).to(runtime.target).train(training)
