"""Time of a call on a device: medians with percentiles, from cold caches and from warm ones.

A case brings several sets of tensors. Cold: the calls on all sets follow each other, and the sets together are much
larger than the last-level cache. Warm: as many calls on one set. On CUDA they are one graph, so that launches from
Python are no part of the figure; where a call cannot be captured, events around plain calls, and the result says so.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import common

Call = Callable[[], object]
WARM_UP_SECONDS, SAMPLES = 0.2, 30
SAMPLE_MICROSECONDS = 2000  # calls are repeated up to there, so that a graph's own start is little of it
CACHES = 4  # the sets of a cold measurement are so many times as large as the last-level cache


def sets_for(nbytes: int, device: torch.device) -> int:
    """How many sets of tensors of so many bytes a cold measurement takes."""
    if device.type != "cuda":
        return 2
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(1, min(64, -(-CACHES * cache // max(nbytes, 1))))


def measure(calls: Sequence[Call], device: torch.device) -> dict[str, Any]:
    """Microseconds of a call: median, p20, p80, n, and how it was timed ("graph", "events" or "clock")."""
    for call in calls:  # compiles what compiles at first use
        call()
    if device.type != "cuda":
        taken = [_clock(calls) for _ in range(3)]
        return {**_spread(taken), "timed": "clock"}
    once = _between_events(lambda: _all(calls))
    calls = [call for _ in range(max(1, min(20, round(SAMPLE_MICROSECONDS / once)))) for call in calls]
    run, timed = _captured(calls)
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS:
        run()
        torch.cuda.synchronize()
    return {**_spread([_between_events(run) / len(calls) for _ in range(SAMPLES)]), "timed": timed}


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _between_events(run: Call) -> float:
    """Microseconds on the device."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) * 1e3


def _captured(calls: Sequence[Call]) -> tuple[Callable[[], None], str]:
    """All calls as one graph; in a loop where one of them cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _all(calls)
    except RuntimeError as error:
        if torch.cuda.is_current_stream_capturing():
            raise
        torch.cuda.synchronize()  # raises where the context is broken
        print(f"not captured, timed in a loop: {str(error).splitlines()[0]}")
    else:
        return graph.replay, "graph"
    return lambda: _all(calls), "events"


def _clock(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    _all(calls)
    return (time.perf_counter() - start) * 1e6 / len(calls)


def _spread(taken: Sequence[float]) -> dict[str, float]:
    found = common.spread(taken)
    assert found is not None
    return found


def rates(device: torch.device, *, small: bool = False) -> dict[str, float]:
    """What this machine does at best, measured now: copy_gb_s (bytes read and written) and matmul_tflop_s (bf16)."""
    nbytes, size = (1 << 20, 64) if small else (1 << 30, 8192)
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device)["median"]
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    matmul = measure([lambda: torch.matmul(a, b, out=product)], device)["median"]
    return {"copy_gb_s": 2 * nbytes / copy / 1e3, "matmul_tflop_s": 2 * size**3 / matmul / 1e6}


def card() -> dict[str, str] | None:
    """What nvidia-smi says of the first card at this moment; None where there is none."""
    asked = ("name", "driver_version", "compute_cap", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm",
             "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu", "pstate")  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(asked, (part.strip() for part in answer.splitlines()[0].split(",")), strict=True))


def fingerprint(program: str, settings: Any, commit: str | None, included: Sequence[str]) -> dict[str, Any]:
    """:func:`bench.common.fingerprint` with the card, and versions of what runs on it."""
    made = common.fingerprint(
        program, settings, included=included,
        warm_up=f"every call once, then {WARM_UP_SECONDS} s of them; {SAMPLES} samples after that",
    )  # fmt: skip
    made["commit"] = commit or made["commit"]
    made["card"] = card()
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    made["versions"] |= {"cuda": torch.version.cuda, "cudnn": cudnn, "triton": _version("triton")}
    return made


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
