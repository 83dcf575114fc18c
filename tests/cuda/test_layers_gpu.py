"""The CUDA kernels of the memory-bound ops on a card, against fp64: the checks of the emulator, and larger ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from . import card, layer_checks
from .layer_checks import FLOATS, LAYOUTS, nothing, random, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(card.missing()), reason=card.missing() or "runs")]
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", FLOATS)
machine = card.Card()


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"random seed {seed}")
    return np.random.default_rng(seed)


@layouts
@dtypes
@pytest.mark.parametrize("shape", [*layer_checks.NORM_SHAPES, (1, 4680, 1536), (2, 390, 5120)])
def test_norm_modulate(
    rng: np.random.Generator, shape: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    for residual in ("none", "gate", "no gate", "in place"):
        layer_checks.norm_modulate(machine, rng, shape, dtype, layout, residual)


@layouts
@dtypes
@pytest.mark.parametrize("shape", [*layer_checks.NORM_SHAPES, (1, 4680, 1536), (2, 390, 5120)])
def test_rms_norm(
    rng: np.random.Generator, shape: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    for weights in FLOATS:
        layer_checks.rms_norm(machine, rng, shape, dtype, layout, weights)


@layouts
@dtypes
@pytest.mark.parametrize("shape", [*layer_checks.QK_SHAPES, (1, 1408, 12, 128, 1600), (2, 97, 40, 128, 100)])
def test_qk_norm_rope_store(
    rng: np.random.Generator, shape: tuple[int, int, int, int, int], dtype: torch.dtype, layout: str
) -> None:
    for weights in FLOATS:
        for with_slots in (True, False):
            layer_checks.qk_norm_rope_store(machine, rng, shape, dtype, layout, weights, with_slots)


@layouts
@pytest.mark.parametrize(("row", "dtype"), layer_checks.MOVES)
def test_move_rows(rng: np.random.Generator, row: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    layer_checks.move_rows(machine, rng, row, dtype, layout)


@layouts
@dtypes
@pytest.mark.parametrize("shape", [*layer_checks.QUANTIZE_SHAPES, (1, 4680, 5000, 12, 128), (2, 97, 100, 40, 64)])
def test_quantize_rows(
    rng: np.random.Generator, shape: tuple[int, int, int, int, int], dtype: torch.dtype, layout: str
) -> None:
    for with_slots in (True, False):
        layer_checks.quantize_rows(machine, rng, shape, dtype, layout, with_slots)


@layouts
@dtypes
@pytest.mark.parametrize("shape", [*layer_checks.POOL_SHAPES, (1, 1408, 12, 128), (1, 4680, 12, 128), (2, 97, 64, 128)])
def test_confidence_pool(
    rng: np.random.Generator, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str
) -> None:
    for weights in FLOATS:
        layer_checks.confidence_pool(machine, rng, shape, dtype, layout, weights)


@dtypes
@pytest.mark.parametrize("velocity_dtype", FLOATS)
@pytest.mark.parametrize("shape", [*layer_checks.STEP_SHAPES, (1, 32760, 64)])
def test_step_family(
    rng: np.random.Generator, shape: tuple[int, int, int], dtype: torch.dtype, velocity_dtype: torch.dtype
) -> None:
    layer_checks.step_family(machine, rng, shape, dtype, velocity_dtype)


@dtypes
def test_exit_decision(rng: np.random.Generator, dtype: torch.dtype) -> None:
    layer_checks.exit_decision(machine, rng, dtype)


def calls(rng: np.random.Generator, dtype: torch.dtype) -> dict[str, tuple[list[Tensor], tuple[Any, ...]]]:
    """Every op: its outputs, and its arguments on the card."""
    batch, active, heads, dim, cached = 2, 37, 3, 64, 50
    width = heads * dim

    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return random(rng, *shape, dtype=dtype).cuda()

    def rows(total: int) -> Tensor:
        return torch.from_numpy(rng.permutation(total)[:active]).cuda()

    x, y, q, k, v = (made(batch, active, width) for _ in range(5))
    gate, shift, scale = (made(batch, 40, width, dtype=torch.float32) for _ in range(3))
    out, total, q_out, normed = (torch.empty_like(x) for _ in range(4))
    k_cache, v_cache = (torch.zeros(batch, cached, heads, dim, dtype=x.dtype, device="cuda") for _ in range(2))
    weight = made(width, dtype=torch.float32)
    cos, sin = (made(active, dim // 2, dtype=torch.float32) for _ in range(2))
    pooled, query = torch.empty(batch, heads, width, device="cuda"), made(heads, dim, dtype=torch.float32)
    wide, gathered = made(batch, cached, width), torch.empty_like(x)
    codes, scales = (torch.zeros(shape, device="cuda") for shape in (k_cache.shape, k_cache.shape[:3]))
    codes = codes.to(torch.float8_e4m3fn)
    return {
        "norm_modulate": ([out], (out, x, shift, scale, rows(40), 1e-6)),
        "residual_norm_modulate": ([total, out], (total, out, x, y, gate, shift, scale, rows(40), 1e-6)),
        "rms_norm": ([normed], (normed, x, weight, 1e-6)),
        "qk_norm_rope_store": (
            [q_out, k_cache, v_cache],
            (q_out.unflatten(-1, (heads, dim)), k_cache, v_cache, q, k, v, weight, weight, cos, sin, rows(cached),
             1e-6),
        ),
        "gather_rows": ([gathered], (gathered, wide, rows(cached))),
        "scatter_rows": ([wide], (wide, rows(cached), x)),
        "quantize_rows": (
            [codes.view(torch.uint8), scales], (codes, scales, x.unflatten(-1, (heads, dim)), rows(cached)),
        ),
        "confidence_pool": ([pooled], (pooled, query, q, weight, x, 1e-6)),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "op",
    ["norm_modulate", "residual_norm_modulate", "rms_norm", "qk_norm_rope_store", "gather_rows", "scatter_rows",
     "quantize_rows", "confidence_pool"],
)
def test_graph_capture(rng: np.random.Generator, op: str, dtype: torch.dtype) -> None:
    """A captured call replayed on other numbers has the bits of a plain one."""
    outputs, arguments = calls(rng, dtype)[op]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        machine.run(op, *arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        machine.run(op, *arguments)
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.is_floating_point() and argument.itemsize > 1:
            argument.mul_(1.5).add_(0.25)
    before = [output.clone() for output in outputs]
    machine.run(op, *arguments)
    expected = [output.clone() for output in outputs]
    assert not all(same_bits(a, b) for a, b in zip(before, expected, strict=True))
    for output, start in zip(outputs, before, strict=True):
        output.copy_(start)
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(output, value) for output, value in zip(outputs, expected, strict=True))


def test_pooling_has_the_same_bits_in_every_run(rng: np.random.Generator) -> None:
    keys, tokens = (random(rng, 1, 4680, 1536, dtype=torch.bfloat16).cuda() for _ in range(2))
    query, weight = random(rng, 12, 128).cuda(), torch.ones(1536, device="cuda")
    results = []
    for _ in range(5):
        results.append(nothing(1, 12, 1536).cuda())
        machine.run("confidence_pool", results[-1], query, keys, weight, tokens, 1e-6)
    assert results[0].isfinite().all() and all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bad", [-1, 6])
@pytest.mark.parametrize("op", layer_checks.OUT_OF_RANGE)
def test_out_of_range(op: str, bad: int) -> None:
    """In a process of its own: the trap leaves no CUDA context behind."""
    tests = Path(__file__).resolve().parents[1]
    ran = subprocess.run(
        [sys.executable, "-m", "cuda.card", op, str(bad)], cwd=tests, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0 and "nothing outside was touched" in ran.stdout, ran.stdout + ran.stderr
