"""Where and how fast to train: the options, the rules that choose, and determinism."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.backends import cudnn

from .counts import check_count
from .nested import Inputs, on_device, outputs_of, rows_of, tensors_of

# The rules below come from docs/performance.md, measured on 2 cores with AVX-512 and AMX.
MIN_LARGE_PARAMETERS = 50_000
"""Smallest number of parameters of a large model; a smaller model spends its time on overhead."""
MIN_COMPILE_FLOP = 1e14
"""Operations of a phase, about 10 minutes of them, above which a compilation saves time."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that a CPU computes faster for one clone after the other."""
CPU_SAMPLES_AT_ONCE = 128
"""Larger batches exceed the cache of a CPU (docs/performance.md)."""
MAX_GPU_SAMPLES_AT_ONCE = 2048
"""With fewer samples per kernel, a GPU waits for the CPU, which starts every kernel."""
MAX_GPU_BYTES_AT_ONCE = 2**25
"""Limit for the size of these samples as float32, so that fewer large images run together."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how fast to train: no option changes the result beyond rounding.

    An option that is None is chosen by a rule for the model, the data and the machine; see `plan`.

    Args:
        device: "auto" (a GPU if PyTorch sees one, else the CPU), "cpu", "cuda", "cuda:1", ...
        bf16: run the models in bfloat16 autocast. Weights, losses and targets stay float32, but
            kept targets become float16. None: only if the hardware multiplies bfloat16 and the
            model is not small.
        compile: compile the forward and backward pass of clones that train one by one. The first
            compilation takes one to two minutes; later processes load it from disk. None: only on
            a CPU, and only for phases that are long enough for the compilation to save time.
        batch_clones: train all clones in one pass (True) or one by one (False). None: in one pass
            if the model is small, below 50,000 parameters, and on a CPU only if the model has no
            convolutions. On a GPU one pass is always in float32: with `bf16=True` the clones train
            one by one.
        workers: number of clones that train side by side on a CPU, one thread of Python each. The
            threads of PyTorch are divided among them. None: as many as there are threads, unless
            the clones train in one pass or compiled. A model that draws random numbers while it
            trains (dropout) always trains its clones in turn.
        cuda_graphs: record one step as a CUDA graph and replay it; clones that train one by one
            become parallel branches. On GPUs only, and not for a loss that reads `batch.epoch`, a
            model whose Python code acts differently from step to step, or a model that assigns a
            new tensor to a buffer in place of changing it. The result equals that of plain steps
            bit for bit. Steps of small models take a fifth of the time or less
            (docs/performance.md).
        target_bytes: memory limit for the targets of teachers that are kept from epoch to epoch
            and from round to round; other targets are computed again. 0 keeps no targets.
        log: called with one line every few seconds of a long phase; None logs nothing.

    Raises:
        ValueError: for an unknown device, a negative number of bytes or less than one worker.

    Examples:
        >>> from flwr_cloned_kd import Runtime
        >>> quick = Runtime(bf16=None, compile=None)  # let the rules choose
        >>> gpu = Runtime(device="cuda", cuda_graphs=True)
        >>> Runtime(device="cpu").target
        device(type='cpu')
    """

    device: str = "auto"
    bf16: bool | None = False
    compile: bool | None = False
    batch_clones: bool | None = None
    workers: int | None = None
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
        if self.workers is not None:
            check_count("workers", self.workers)
        if self.target_bytes < 0:
            raise ValueError(f"target_bytes: expected at least 0, got {self.target_bytes}")

    @property
    def target(self) -> torch.device:
        """The device that `device` stands for in this process."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


def samples_at_once(
    device: torch.device, inputs: Inputs, minimum: int = CPU_SAMPLES_AT_ONCE
) -> int:
    """Return how many samples to predict or to augment together on a device.

    Args:
        inputs: `[B, ...]`, at least one sample of the data.
        minimum: the number on a CPU, which is also the smallest number on a GPU.

    Returns:
        A multiple of `minimum`.
    """
    if device.type != "cuda":
        return minimum
    one = tensors_of(rows_of(inputs, slice(1)))
    sample_bytes = 4 * max(1, sum(tensor.numel() for tensor in one))
    maximum = min(MAX_GPU_SAMPLES_AT_ONCE, MAX_GPU_BYTES_AT_ONCE // sample_bytes)
    return max(1, maximum // minimum) * minimum


class Plan(NamedTuple):
    """The execution choices that a `Runtime` resolves to for one model, dataset and phase."""

    device: str
    bf16: bool
    compile: bool
    batch_clones: bool
    cuda_graphs: bool
    workers: int = 1
    """Clones that train side by side."""


def plan(
    model: nn.Module,
    inputs: Inputs,
    runtime: Runtime,
    *,
    num_clones: int = 1,
    num_samples: int = 0,
    training: bool = True,
) -> Plan:
    """Choose how to run a model; the same arguments give the same plan on the same machine.

    Args:
        inputs: `[B, ...]`, at least one sample of the data.
        num_samples: number of samples that will pass, over all clones and epochs. With 0 a model is
            compiled only if `Runtime.compile` is True.
    """
    device = runtime.target
    small = is_small(model)
    batched = num_clones > 1 and (
        runtime.batch_clones
        if runtime.batch_clones is not None
        else _is_faster_in_one_pass(model, device)
    )
    bf16 = not small and _multiplies_bf16(device) if runtime.bf16 is None else runtime.bf16
    if device.type == "cuda" and batched and bf16:
        # On a GPU `vmap` fails in batch normalisation if the inputs are bfloat16.
        if runtime.bf16:
            batched = False
        else:
            bf16 = False
    workers = 1
    if training and device.type == "cpu" and not batched and not runtime.compile:
        workers = min(num_clones, runtime.workers or available_threads())
    compiled = bool(runtime.compile) and not batched
    may_compile = runtime.compile is None and not small and not batched and workers == 1
    if may_compile and device.type == "cpu":
        passes = num_samples * (3 if training else 1)
        possible = passes > 0 and shutil.which("g++") is not None
        compiled = (
            possible and passes * count_flop(model, rows_of(inputs, slice(1))) > MIN_COMPILE_FLOP
        )
    graphs = runtime.cuda_graphs and device.type == "cuda" and training
    return Plan(str(device), bf16, compiled, batched, graphs, workers)


def available_threads() -> int:
    """Return how many threads this process should use for computing.

    This is PyTorch's number of threads, which `OMP_NUM_THREADS` and Ray set, but not more than the
    processors that the operating system or a container grants to this process.
    """
    processors = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    limits = [torch.get_num_threads(), processors or 1, container_processors()]
    return max(1, min(limits))


def is_small(model: nn.Module) -> bool:
    """Return whether a model spends most of its time on the overhead of small operations."""
    return sum(p.numel() for p in model.parameters()) < MIN_LARGE_PARAMETERS


def _is_faster_in_one_pass(model: nn.Module, device: torch.device) -> bool:
    """Return whether a pass of all clones takes less time than a pass of each.

    One pass saves the overhead of small operations. But the convolutions of all clones become one
    grouped convolution, which a CPU computes more slowly than the convolutions one by one.
    """
    convolves = any(isinstance(part, CONVOLUTIONS) for part in model.modules())
    return is_small(model) and not (convolves and device.type == "cpu")


@contextmanager
def settings(runtime: Runtime, seed: int) -> Iterator[None]:
    """Make a device and random modules such as dropout deterministic, then restore both.

    A caller's autocast is switched off meanwhile: `Runtime.bf16` alone decides.
    """
    cuda = runtime.target.type == "cuda"
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(runtime.target.type, enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[runtime.target] * cuda))
        torch.default_generator.manual_seed(seed)
        if cuda:
            stack.enter_context(torch.cuda.device(runtime.target))
            torch.cuda.manual_seed(seed)
            # `cudnn.flags` would also reset the flags that it is not given, `enabled` to False.
            for flag, value in (("deterministic", True), ("benchmark", False)):
                stack.callback(setattr, cudnn, flag, getattr(cudnn, flag))
                setattr(cudnn, flag, value)
        yield


def container_processors(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many processors the container of this process may use at the same time."""
    try:
        quota, period = path.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no container, another kind of it, or "max": no limit
        return os.cpu_count() or 1


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # A CPU without matrix units for bfloat16 only converts the numbers back and forth.
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # since PyTorch 2.10
    if get_capabilities is None:
        return False
    capabilities = get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def count_flop(model: nn.Module, sample: Inputs) -> int:
    """Count the floating-point operations of one forward pass of one sample."""
    # This module imports Triton, which takes half of the time of `import flwr_cloned_kd`.
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    probe = copy.deepcopy(model).eval()  # a copy: the buffers and modes of the model stay untouched
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs_of(probe, on_device(sample, device))
    return int(counter.get_total_flops())
