"""Outputs that are larger than the last cache go past it: the same bits as of calls over a few rows, which do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsa_rt import _native

from .conftest import KERNELS, call, same_bits

CACHE = _native.build_info()["last_cache"]
if CACHE > 1 << 27:
    pytest.skip("the last cache is too large to write more than it holds in a test", allow_module_level=True)

# Channels whose rows all start at a multiple of 64 bytes, and such where few do and the last block is not whole.
WIDTHS = [(1496, torch.float32), (1504, torch.bfloat16), (1508, torch.bfloat16), (1504, torch.float16)]


def rows_for(width: int, dtype: torch.dtype) -> int:
    """As many as fill three quarters of the cache, and some."""
    return CACHE * 3 // 4 // (width * dtype.itemsize) + 7


def made(count: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, count, width).normal_().to(dtype)


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize(("width", "dtype"), WIDTHS)
def test_norm_modulate(path: str, width: int, dtype: torch.dtype) -> None:
    x = made(rows_for(width, dtype), width, dtype)
    shift, scale, out, expected = torch.randn(1, 1, width), torch.randn(1, 1, width), poisoned(x), poisoned(x)
    call(path, "norm_modulate", out, x, shift, scale, None, 1e-6, threads=2)
    for first in range(0, x.shape[1], 1000):
        piece = slice(first, first + 1000)
        call(path, "norm_modulate", expected[:, piece], x[:, piece], shift, scale, None, 1e-6)
    assert same_bits(out, expected) and not out.isnan().any()


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("in_place", [False, True])
def test_residual_norm_modulate(path: str, in_place: bool) -> None:
    width, dtype = 1504, torch.float16 if in_place else torch.bfloat16
    x, y = (made(rows_for(width, dtype), width, dtype) for _ in range(2))
    tables = [torch.randn(1, 1, width) for _ in range(3)]
    given, out, expected, sums = x.clone(), poisoned(x), poisoned(x), poisoned(x)
    total = given if in_place else poisoned(x)
    call(path, "residual_norm_modulate", total, out, given, y, *tables, None, 1e-6, threads=2)
    for first in range(0, x.shape[1], 1000):
        piece = (slice(None), slice(first, first + 1000))
        call(path, "residual_norm_modulate", sums[piece], expected[piece], x[piece], y[piece], *tables, None, 1e-6)
    assert same_bits(out, expected) and same_bits(total, sums) and not out.isnan().any()


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("width", "dtype"), WIDTHS)
def test_rms_norm(path: str, width: int, dtype: torch.dtype, in_place: bool) -> None:
    x = made(rows_for(width, dtype), width, dtype)
    weight, given, expected = torch.rand(width), x.clone(), poisoned(x)
    out = given if in_place else poisoned(x)
    call(path, "rms_norm", out, given, weight, 1e-6, threads=2)
    for first in range(0, x.shape[1], 1000):
        piece = slice(first, first + 1000)
        call(path, "rms_norm", expected[:, piece], x[:, piece], weight, 1e-6)
    assert same_bits(out, expected) and not out.isnan().any()


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize(
    ("heads", "dim", "gap", "dtype"),
    [(12, 128, 0, torch.bfloat16), (12, 128, 8, torch.float16), (7, 68, 0, torch.bfloat16), (5, 288, 0, torch.float16)],
)
def test_qk_norm_rope_store(path: str, heads: int, dim: int, gap: int, dtype: torch.dtype) -> None:
    """Also where heads lie apart, and where they do not begin at multiples of 64 bytes."""
    width = heads * dim
    count = rows_for(3 * width, dtype)
    q, k, v = (made(count, width, dtype) for _ in range(3))
    q_weight, k_weight, cos, sin = torch.rand(width), torch.rand(width), *torch.randn(2, count, dim // 2)
    slots = torch.randperm(count + 50)[:count]
    outs, expected = (
        [torch.full((1, count + 50 * (i > 0), heads, dim + gap), 77, dtype=dtype) for i in range(3)] for _ in range(2)
    )
    call(path, "qk_norm_rope_store", *(o[..., :dim] for o in outs), q, k, v, q_weight, k_weight, cos, sin, slots, 1e-6,
         threads=2)  # fmt: skip
    for first in range(0, count, 500):
        piece = slice(first, first + 500)
        q_out, *caches = (o[..., :dim] for o in expected)
        call(path, "qk_norm_rope_store", q_out[:, piece], *caches, q[:, piece], k[:, piece], v[:, piece], q_weight,
             k_weight, cos[piece], sin[piece], slots[piece], 1e-6)  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip(outs, expected, strict=True))
    assert not any((o[..., :dim] == 77).all(-1).all(-1).sum() > 50 for o in outs)


@pytest.mark.parametrize("width", [3072, 3079, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows(width: int, threads: int) -> None:
    count = CACHE // width // 2
    x = torch.randint(0, 256, (1, count + 9, width), dtype=torch.uint8)
    numbers = torch.randperm(count + 9)[:count]
    for shift in (0, 1):  # where rows begin in a line of the cache
        out = torch.zeros(count * width + shift, dtype=torch.uint8)[shift:].view(1, count, width)
        _native.gather_rows(out, x, numbers, threads=threads)
        assert torch.equal(out, x[:, numbers])
        back = torch.zeros((count + 9) * width + shift, dtype=torch.uint8)[shift:].view(1, count + 9, width)
        _native.scatter_rows(back, numbers, out, threads=threads)
        assert torch.equal(back[:, numbers], x[:, numbers]) and back.sum() == out.sum()
