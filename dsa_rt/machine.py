"""The machine a result was made on: versions, processor, memory. Cheap, and without importing torch."""

from __future__ import annotations

import functools
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def peak_memory(device: str | torch.device = "cpu") -> int | None:
    """Peak memory in bytes, None where it is not known.

    On CUDA what torch's allocator handed out at most since its last reset; on CPU the largest resident size
    of the whole process so far (interpreter, torch and weights included).
    """
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:  # ru_maxrss of a process also remembers the process that started it, VmHWM does not
        with open("/proc/self/status", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    from importlib import metadata

    import dsa_rt

    found = {"dsa_rt": dsa_rt.__version__, "python": platform.python_version()}
    for name in ("torch", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """CPU model, usable cores, torch's threads, and the GPU if torch has one in use."""
    affinity = getattr(os, "sched_getaffinity", None)
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            found["gpu"] = torch.cuda.get_device_name()
    return found


@functools.cache
def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
