"""What the machine does at best, measured in the same run, and what its driver tells: energy, clocks, versions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

SAMPLES = 5
MATMUL = {"cpu": 1536, "cuda": 8192}  # rows, columns and depth of the square product
COPY = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes


def peaks(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> dict[str, Any]:
    """The best of :data:`SAMPLES` large matrix products in ``dtype`` [TFLOP/s] and of as many copies [GB/s, read and
    written], each after one that is not timed. What PyTorch reaches here and now, not what a data sheet says."""
    size = 64 if small else MATMUL[device.type]
    count = 1 << 16 if small else COPY[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(count, dtype=torch.uint8, device=device)  # zeros that nobody wrote may be one page of memory
    target = torch.empty_like(source)
    matmul = _best(lambda: torch.matmul(a, b, out=product), device)
    copy = _best(lambda: target.copy_(source), device)
    return {
        "device": str(device), "dtype": str(dtype).removeprefix("torch."), "tflop_s": 2 * size**3 / matmul / 1e12,
        "gb_s": 2 * count / copy / 1e9, "matmul": [size, size, size], "copy_bytes": count, "n": SAMPLES,
    }  # fmt: skip


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call."""
    taken = []
    for _ in range(SAMPLES + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - start)
    return max(min(taken[1:]), 1e-9)


def wait(device: torch.device) -> None:
    """Until all work given to a CUDA device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Energy:
    """Joules that a CUDA device has taken since its driver was loaded, by NVML; ``missing`` says why there are none."""

    def __init__(self, device: torch.device) -> None:
        self.missing: str | None = None
        self._read: Callable[[], int] | None = None
        if device.type != "cuda":
            self.missing = "a CPU has no counter that the suite reads"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._read = lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
            self._read()
        except ImportError:
            self.missing = "pynvml is not installed (pip install nvidia-ml-py)"
        except Exception as error:  # NVML's own errors have a base class of their own in every version
            self._read, self.missing = None, f"NVML: {type(error).__name__}: {error}"

    def joules(self) -> float | None:
        """The counter now, in steps of the driver's own, tens of milliseconds."""
        return None if self._read is None else self._read() / 1000


class PeakMemory:
    """The most that is allocated while it is entered.

    On CUDA what torch's allocator hands out, of this process; on a CPU the resident size of the whole process, which
    Linux can be told to forget. ``bytes`` and ``before`` are None, and ``missing`` says why, where it cannot be known.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.kind = device, "device" if device.type == "cuda" else "process"
        self.bytes: int | None = None
        self.before: int | None = None
        self.missing: str | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = int(torch.cuda.memory_allocated(self.device))
            return self
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as reset:
                reset.write("5")
            self.before = _status("VmRSS")
        except OSError as error:
            self.missing = f"the peak of this process cannot be reset ({error.strerror})"
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = int(torch.cuda.max_memory_allocated(self.device))
        elif self.missing is None:
            self.bytes = _status("VmHWM")


def _status(field: str) -> int | None:
    """A size in /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def facts(device: torch.device) -> dict[str, Any] | None:
    """A CUDA device for the fingerprint, with driver and clocks where NVML tells; None for a CPU."""
    if device.type != "cuda":
        return None
    seen = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "name": seen.name, "compute_capability": f"{seen.major}.{seen.minor}", "memory_bytes": seen.total_memory,
        "multiprocessors": seen.multi_processor_count, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "driver": None, "clock_mhz": None, "power_limit_w": None,
    }  # fmt: skip
    with contextlib.suppress(Exception):  # NVML is a convenience here
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{seen.uuid}")
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
        found["clock_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        found["power_limit_w"] = pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000
    return found
