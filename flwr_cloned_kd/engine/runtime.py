"""Where and how fast to train: what may be chosen, and the rules that choose."""

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.utils.flop_counter import FlopCounterMode

# The rules below come from docs/performance.md, measured on 2 cores with AVX-512 and AMX.
SMALL_PARAMETERS = 50_000
"""Below: a model whose time goes to the overhead of many small operations."""
COMPILE_FLOP = 1e14
"""Forward and backward passes of a phase, 10 minutes of them, that earn a compilation back."""
LOG_SECONDS = 5.0
CPU_PREDICT_BATCH_SIZE = 128
"""Larger batches fall out of a CPU's cache: see docs/performance.md."""
GPU_SAMPLES_AT_ONCE = 2048
"""Fewer samples a kernel leave a GPU waiting for the CPU, which starts every kernel."""
GPU_BYTES_AT_ONCE = 2**25
"""The most that these samples may take as float32: large images come in smaller numbers."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how fast to train: nothing here changes the result beyond rounding.

    What is None is chosen by a rule for the model, the data and the machine: see `plan`.

    Args:
        device: "auto" (a GPU if PyTorch sees one, else the CPU), "cpu", "cuda", "cuda:1", ...
        bf16: run the models in bfloat16 autocast; weights, losses and targets stay float32,
            kept targets become float16. None: where the hardware multiplies it, but for small
            models.
        compile: compile the forward and backward pass of clones that train one by one. A first
            compilation takes one to two minutes, later processes find it on disk. None: for
            phases long enough to earn that back, on a CPU.
        batch_clones: train all clones in one pass (True) or one by one (False). None: batched
            for a small model, below 50,000 parameters.
        cuda_graphs: replay a recorded step, clones one by one as parallel branches; GPUs only, and
            not for a loss that reads `batch.epoch`. The bits are those of plain steps, and steps of
            small models take a fifth of the time or less (docs/performance.md).
        target_bytes: most memory for the targets of teachers, kept from epoch to epoch and round
            to round; what does not fit is computed again. 0 keeps none.
        log: called with one line every few seconds of a long phase; None is silent.

    Raises:
        ValueError: for an unknown device or a negative number of bytes.
    """

    device: str = "auto"
    bf16: bool | None = False
    compile: bool | None = False
    batch_clones: bool | None = None
    cuda_graphs: bool = False
    target_bytes: int = 2**30
    log: Callable[[str], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise ValueError(
                f"device: expected auto, cpu, cuda, ..., got {self.device!r}"
            ) from error
        if self.target_bytes < 0:
            raise ValueError(f"target_bytes: expected at least 0, got {self.target_bytes}")

    @property
    def target(self) -> torch.device:
        """The device that `device` stands for in this process."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


def samples_at_once(
    device: torch.device, inputs: Tensor, fewest: int = CPU_PREDICT_BATCH_SIZE
) -> int:
    """Return how many samples to predict or to augment together on a device.

    Args:
        inputs: `[B, ...]`, at least one sample of the data.
        fewest: the number on a CPU, which is the smallest number on a GPU.

    Returns:
        A multiple of `fewest`.
    """
    if device.type != "cuda":
        return fewest
    most = min(GPU_SAMPLES_AT_ONCE, GPU_BYTES_AT_ONCE // (4 * max(1, inputs[:1].numel())))
    return max(1, most // fewest) * fewest


class Plan(NamedTuple):
    """What a `Runtime` comes to for one model, one kind of data and one length of training."""

    device: str
    bf16: bool
    compile: bool
    batch_clones: bool
    cuda_graphs: bool


def plan(
    model: nn.Module,
    inputs: Tensor,
    runtime: Runtime,
    *,
    num_clones: int = 1,
    num_samples: int = 0,
    training: bool = True,
) -> Plan:
    """Decide how to run a model; the same arguments on the same machine decide the same.

    Args:
        inputs: `[B, ...]`, at least one sample of the data.
        num_samples: how many will pass, all clones and epochs counted; 0 compiles nothing unasked.
    """
    device = runtime.target
    small = is_small(model)
    batched = num_clones > 1 and (small if runtime.batch_clones is None else runtime.batch_clones)
    bf16 = not small and _multiplies_bf16(device) if runtime.bf16 is None else runtime.bf16
    compiled = bool(runtime.compile) and not batched
    if runtime.compile is None and not small and not batched and device.type == "cpu":
        passes = num_samples * (3 if training else 1)
        possible = passes > 0 and shutil.which("g++") is not None
        compiled = possible and passes * _flop(model, inputs[:1]) > COMPILE_FLOP
    graphs = runtime.cuda_graphs and device.type == "cuda" and training
    return Plan(str(device), bf16, compiled, batched, graphs)


def is_small(model: nn.Module) -> bool:
    """Tell whether a model's time goes to the overhead of many small operations."""
    return sum(p.numel() for p in model.parameters()) < SMALL_PARAMETERS


@contextmanager
def settings(runtime: Runtime, seed: int) -> Iterator[None]:
    """Make a device deterministic, and modules that draw (dropout) too, then restore both."""
    cuda = runtime.target.type == "cuda"
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[runtime.target] * cuda))
        torch.default_generator.manual_seed(seed)
        if cuda:
            stack.enter_context(torch.cuda.device(runtime.target))
            torch.cuda.manual_seed(seed)
            # Not by `cudnn.flags`: it also sets what it is not told, `enabled` to False.
            for flag, value in (("deterministic", True), ("benchmark", False)):
                stack.callback(setattr, cudnn, flag, getattr(cudnn, flag))
                setattr(cudnn, flag, value)
        yield


class Progress:
    """One line every few seconds: what is under way, how fast, and how long it will take.

    Args:
        log: where the lines go; None is nowhere.
        what: the phase, in words.
        num_epochs: that are planned.
        num_samples: in one epoch, over all clones.
    """

    def __init__(
        self, log: Callable[[str], None] | None, what: str, num_epochs: int, num_samples: int
    ) -> None:
        self._log, self._what = log, what
        self._num_epochs, self._num_samples = num_epochs, num_samples
        self._started = self._said = time.monotonic()

    def step(self, epoch: int, share: float) -> None:
        """Take note that `share`, in [0, 1], of epoch `epoch`, counted from 0, is done."""
        now = time.monotonic()
        if self._log is None or now - self._said < LOG_SECONDS:
            return
        self._said, done = now, epoch + share
        rate = done * self._num_samples / (now - self._started)
        left = (self._num_epochs - done) * self._num_samples / rate
        self._log(
            f"{self._what}: epoch {epoch + 1} of {self._num_epochs}, {rate:,.0f} samples/s, "
            f"{_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without matrix units for it a CPU only converts back and forth.
    read = getattr(torch.cpu, "get_capabilities", None)  # since PyTorch 2.10
    return read is not None and any(read().get(name) for name in ("amx_bf16", "avx512_bf16"))


def _flop(model: nn.Module, sample: Tensor) -> int:
    """Count the floating-point operations of one forward pass of one sample."""
    device = next(model.parameters()).device
    probe = copy.deepcopy(model).eval()  # the caller's keeps its buffers, and each part its mode
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        probe(sample.to(device))
    return int(counter.get_total_flops())
