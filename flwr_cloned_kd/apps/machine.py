"""What a run ran on: versions of the packages, processor and GPU."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("flwr-cloned-kd", "flwr", "ray", "torch", "torchvision", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of those packages of `PACKAGES` that are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def hardware(device: torch.device) -> dict[str, Any]:
    """Name the processor, the number of its cores, and the GPU if `device` is one."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": model, "cores": os.cpu_count(), "gpu": gpu}


def capability(device: torch.device) -> str:
    """Name the GPU, or else the processor's kind, its vector instructions and the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    count = f"{threads} thread{'s' * (threads != 1)}"
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {count}"
