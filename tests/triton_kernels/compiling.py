"""Compiles what a call would launch, for a card that is not there.

The ops are called with tensors on the ``meta`` device; the driver in use only says which target it stands for, and the
launch stops after the compiler. So tile choice, specialisation and options are those of a real call.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from dsa_rt.kernels.triton import attention, attention_fp8, pool
from dsa_rt.kernels.triton.card import Card
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CARDS = {80: Card(108, (8, 0)), 90: Card(132, (9, 0)), 120: Card(170, (12, 0))}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _Driver:
    """The questions that a launch without execution asks; every target is a device of its own."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@dataclass(frozen=True)
class Compiled:
    kernel: str
    ptx: str
    registers: int
    stack: int  # bytes of a thread that are not in registers
    local: int
    shared: int  # bytes of dynamic shared memory of a program


@contextmanager
def compiling(arch: int, cache: Path) -> Iterator[list[Compiled]]:
    """Launches inside are compiled for ``sm_<arch>`` and listed; Triton's cache is a folder of the caller's."""
    compiled: list[Compiled] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        cubin = cache / f"{len(compiled)}-{kernel.metadata.name}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([_CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
        numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
        sizes = [numbers[name] for name in ("REG", "STACK", "LOCAL")]
        compiled.append(Compiled(kernel.metadata.name, kernel.asm["ptx"], *sizes, kernel.metadata.shared))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache / "cache"))
        patch.setattr(JITFunction, "run", compile_only)
        for module in (attention, attention_fp8, pool):
            patch.setattr(module, "card_of", lambda tensor: CARDS[arch])
        triton.runtime.driver.set_active(_Driver(arch))
        try:
            yield compiled
        finally:
            triton.runtime.driver._active = None
