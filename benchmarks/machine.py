"""What the machine can do, and what a training step costs."""

import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Run a function once and return its duration in seconds, the work of a GPU included."""
    _synchronise(device)
    started = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - started


def ceilings(device: torch.device) -> dict[str, float]:
    """Measure the matrix-multiply peak, in GFLOP/s, and the memory bandwidth, in GB/s."""
    cuda = device.type == "cuda"
    side = 8192 if cuda else 2048
    elements = 2**28 if cuda else 2**25
    repeats = 10 if cuda else 5
    peaks = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(side, side, device=device).to(dtype)
        multiply = partial(torch.matmul, a, a)
        times = [seconds(multiply, device) for _ in range(repeats + 1)]
        peaks[f"{name}-gflops"] = 2 * side**3 / min(times[1:]) / 1e9
    source = torch.zeros(elements, device=device)
    target = torch.ones_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(repeats + 1)]
    peaks["copy-gb-per-s"] = 2 * source.nbytes / min(times[1:]) / 1e9
    return peaks


def demand(model: nn.Module, images: Tensor, *, bf16: bool) -> dict[str, float]:
    """Count the FLOP of training on one sample, and the bytes that unfused operations move."""
    model = model.train()
    labels = torch.zeros(len(images), dtype=torch.int64)
    with FlopCounterMode(display=False) as flop, _Traffic() as traffic:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
    return {
        "flop": flop.get_total_flops() / len(images),
        "bytes": traffic.num_bytes / len(images),
    }


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Add up the bytes that each operation reads and writes; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            leaves = tree_leaves((args, kwargs, result))
            self.num_bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return result


def reset_peak(device: torch.device) -> None:
    """Start to measure the peak of memory again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the peak of memory since `reset_peak`: of the GPU, or else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
