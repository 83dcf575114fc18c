"""Helpers of the op tests: random inputs inside guarded buffers, and every path that can serve a call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsa_rt import _native

# Every way to compute an op on this machine: each instruction set of the native module, the definition.
KERNELS = _native.build_info()["instruction_sets"]
PATHS = [*KERNELS, "torch"]


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh numbers in every run; pytest prints the seed when a test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"random seed {seed}")
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def random(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(scale * rng.standard_normal(shape, dtype=np.float32)).to(dtype)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Guarded:
    """A tensor whose rows lie apart in a larger buffer of sentinels, which must be left alone."""

    def __init__(self, value: Tensor, gap: int = 3) -> None:
        *outer, width = value.shape
        padded = [size + gap for size in outer] + [width + gap]
        self._buffer = torch.full(padded, 77, dtype=value.dtype)
        inside = tuple(slice(1, 1 + size) for size in (*outer, width))
        self._mask = torch.ones(padded, dtype=torch.bool)
        self._mask[inside] = False
        self.tensor = self._buffer[inside]
        self.tensor.copy_(value)

    def intact(self) -> bool:
        return bool((self._buffer[self._mask] == 77).all())


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output that shows where nothing was written: NaN everywhere."""
    return torch.full(shape, float("nan"), dtype=dtype)


def rounding(result: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """How far the nearest number of a dtype may be: half a unit, which is fixed below the smallest normal one."""
    numbers = torch.finfo(dtype)
    return 0.505 * numbers.eps * np.maximum(abs(result), numbers.smallest_normal)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, except that any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    equal = a.contiguous().view(integer) == b.contiguous().view(integer)
    if a.is_floating_point():
        equal |= a.float().isnan() & b.float().isnan()
    return bool(equal.all())


def call(path: str, op: str, *arguments: object, threads: int = 1) -> None:
    """Runs ``op`` with the native argument order on one path, past the dispatcher."""
    from dsa_rt.ops import norm, pool, rope, rows, step

    if path != "torch":
        getattr(_native, op)(*arguments, threads=threads, instruction_set=path)
        return
    for family in (norm, pool, rope, rows):
        if hasattr(family, op):
            getattr(family, op)(*arguments, backend="torch")
            return
    reorder: dict[str, Callable[..., None]] = {
        "philox_normal": step.philox_normal,
        "renoise": lambda out, x0, x, v, seeds, tokens, sigma, sigma_next, draw, backend: step.renoise(
            out, x, v, sigma, sigma_next, seeds, tokens, draw, x0, backend=backend
        ),
        "cached_step": lambda x, cache, score, rows, fresh, delta, backend: step.cached_step(
            x, cache, rows, fresh, delta, score, backend=backend
        ),
        "exit_decision": step.exit_decision,
    }
    reorder[op](*arguments, backend="torch")
