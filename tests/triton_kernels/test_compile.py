"""Every kernel compiled for cards that are not there: matrix instructions where they belong, nothing spilled.

A kernel that compiles has not run: what it computes is proven in ``test_interpreter.py`` and, on a GPU, in
``test_gpu.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from dsa_rt.kernels.triton import attention, tiles

from dsa_rt.ops.triton import FAMILIES, function

from .compiling import CARDS, Compiled, compiling

ARCHS = sorted(CARDS)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # bytes a program can have
SEGMENTS = torch.tensor([[500, 0, 1000, 3000, 4096], [670, 0, 2000, 5000, 6000]])


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def matrix_instructions(kernel: Compiled) -> dict[str, int]:
    return {name: len(re.findall(name, kernel.ptx)) for name in (r"wgmma\.mma_async", r"mma\.sync")}


def check(kernels: list[Compiled], arch: int, names: set[str]) -> None:
    assert {kernel.kernel for kernel in kernels} == names
    for kernel in kernels:
        assert f".target sm_{arch}" in kernel.ptx
        assert (kernel.stack, kernel.local) == (0, 0), f"{kernel.kernel} spills with {kernel.registers} registers"
        assert kernel.shared <= SHARED_MEMORY[arch]


def call_all_but_attention(dtype: torch.dtype) -> set[str]:
    """Each op at Wan 1.3B's sizes, 480p; the names of the ops."""
    batch, active, total, heads, dim = 1, 4680, 32760, 12, 128
    width, fp32, index = heads * dim, torch.float32, torch.int64
    x, rows = empty(batch, active, width, dtype=dtype), empty(active, dtype=index)
    table, flag, number = empty(batch, 3, width, dtype=fp32), empty(batch, dtype=torch.bool), empty(batch, dtype=fp32)
    cache, angles = empty(batch, total, heads, dim, dtype=dtype), empty(active, dim // 2, dtype=fp32)
    weight, pooled = empty(width, dtype=dtype), empty(batch, heads, width, dtype=fp32)
    latents, fresh = empty(batch, total, 64, dtype=fp32), empty(batch, active, 64, dtype=dtype)
    velocity, seeds, tokens = empty(batch, total, 64, dtype=dtype), empty(batch, dtype=index), empty(total, dtype=index)
    scratch = empty(function("confidence_pool_scratch")(pooled, x), dtype=fp32)
    calls = {
        "norm_modulate": (x, x, table, table, rows, 1e-6),
        "residual_norm_modulate": (x, x, x, x, table, table, table, rows, 1e-6),
        "rms_norm": (x, x, weight, 1e-6),
        "qk_norm_rope_store": (cache[:, :active], cache, cache, x, x, x, weight, weight, angles, angles, rows, 1e-6),
        "gather_rows": (x, cache.flatten(2), rows),
        "scatter_rows": (cache.flatten(2), rows, x),
        "quantize_rows": (cache.to(torch.float8_e4m3fn), cache[..., 0].float(), x.unflatten(2, (heads, dim)), rows),
        "confidence_pool": (pooled, empty(heads, dim, dtype=fp32), x, weight, x, 1e-6, scratch),
        "philox_normal": (latents, seeds, tokens, 3),
        "renoise": (latents, latents, velocity, 0.9, 0.5, seeds, tokens, 3, latents),
        "cached_step": (latents, velocity, rows, fresh, 0.1, empty(batch, active, dtype=fp32)),
        "exit_decision": (flag, number, empty(batch, dtype=dtype), number),
    }
    for name, arguments in calls.items():
        function(name)(*arguments)
    return set(calls)


@pytest.mark.parametrize(("arch", "dtype"), [*((arch, torch.bfloat16) for arch in ARCHS), (90, torch.float32)])
def test_all_but_attention(arch: int, dtype: torch.dtype, tmp_path: Path) -> None:
    with compiling(arch, tmp_path) as kernels:
        ops = call_all_but_attention(dtype)
    assert ops == {name for name in FAMILIES if "attention" not in name and not name.endswith("_scratch")}
    check(kernels, arch, {
        "_norm_modulate", "_rms_norm", "_qk_norm_rope_store", "_move_rows", "_quantize_rows", "_scores", "_partial",
        "_merge", "_philox_normal", "_renoise", "_store_fresh", "_advance", "_exit_decision",
    })  # fmt: skip
    for kernel in kernels:
        contracted = "fma.rn" in kernel.ptx
        if kernel.kernel in ("_philox_normal", "_renoise", "_store_fresh", "_advance", "_quantize_rows"):
            assert not contracted, f"{kernel.kernel} has fused multiply-adds, which change bits"
            assert "approx" not in kernel.ptx and ".ftz" not in kernel.ptx
        if kernel.kernel in (
            "_norm_modulate", "_rms_norm", "_qk_norm_rope_store", "_move_rows", "_renoise", "_advance"
        ):  # fmt: skip
            assert re.search(r"ld\.global\S*\.v4", kernel.ptx) and re.search(r"st\.global\S*\.v4", kernel.ptx)
        if kernel.kernel == "_partial":
            assert matrix_instructions(kernel)[r"mma\.sync"] > 0


def check_attention(kernels: list[Compiled], arch: int) -> None:
    for kernel in kernels:
        if kernel.kernel == "_attention":
            used = matrix_instructions(kernel)
            assert (used[r"wgmma\.mma_async"] > 0) == (arch == 90) and (used[r"mma\.sync"] > 0) == (arch != 90), used
            assert "cp.async" in kernel.ptx  # K and V are on their way while a tile is computed


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_in_every_tile(arch: int, dim: int, tmp_path: Path) -> None:
    """The most demanding form: segments of two ranges, rows shared among programs, log-sum-exp."""
    q, cache = empty(1, 1170, 12, dim), empty(2, 1, 8192, 12, dim)
    for tile in tiles.tiles_for(dim, 2, CARDS[arch]):
        choice = tiles.Choice(tile, shares=2)
        scratch = empty(attention.scratch_of(choice, q), dtype=torch.float32)
        with compiling(arch, tmp_path) as kernels:
            attention.run(choice, q, q, cache[0], cache[1], empty(1, 12, 1170, dtype=torch.float32), SEGMENTS, scratch)
        check(kernels, arch, {"_attention", "_merge"})
        check_attention(kernels, arch)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 128), (torch.bfloat16, 96), (torch.float32, 64)])
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_as_chosen(arch: int, dtype: torch.dtype, dim: int, tmp_path: Path) -> None:
    q, k = empty(1, 1170, 12, dim, dtype=dtype), empty(1, 32760, 12, dim, dtype=dtype)
    with compiling(arch, tmp_path) as kernels:
        function("active_attention")(q, q, k, k)
    check(kernels, arch, {"_attention"})
    check_attention(kernels, arch)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)])
@pytest.mark.parametrize("arch", [90, 120])
def test_attention_of_fp8(arch: int, dtype: torch.dtype, dim: int, tmp_path: Path) -> None:
    q, k = empty(1, 1170, 12, dim, dtype=dtype), empty(1, 8192, 12, dim, dtype=torch.float8_e4m3fn)
    scale = empty(1, 8192, 12, dtype=torch.float32)
    with compiling(arch, tmp_path) as kernels:
        function("active_attention_fp8")(q, q, k, k, scale, scale, empty(1, 12, 1170, dtype=torch.float32), SEGMENTS)
    check(kernels, arch, {"_attention_fp8"})
    assert sum(matrix_instructions(kernels[0]).values()) > 0
