"""The ops under pytest-benchmark: native kernels, their definitions and torch by hand, shape by shape.

    pytest bench/test_ops_benchmark.py --benchmark-only
    pytest bench/test_ops_benchmark.py --benchmark-only -k "renoise and bf16" --benchmark-compare

No part of the test run, which collects ``tests`` alone. What is timed is what :mod:`bench.ops` times; here it comes
with pytest-benchmark's storage, comparisons and histograms. A result is compared with the definition before it is
timed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # bench/ is no part of the package
from bench import ops
from dsa_rt.ops import attention

WAYS = ("native", "definition", "torch")
CASES = [(name, shape) for name in ops.OPS for shape in ("demo chunk", "480p chunk")] + [
    (name, shape) for name in ops.LAYER_OPS for shape in ("demo chunk", "480p chunk, 1.3B")
]


@pytest.fixture(autouse=True)
def same_inputs() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_op(benchmark: Any, name: str, shape: str, dtype: str, way: str) -> None:
    makers, shapes = (ops.OPS, ops.SHAPES) if name in ops.OPS else (ops.LAYER_OPS, ops.LAYERS)
    op = makers[name](shapes[shape], ops.DTYPES[dtype])
    ops.check(op, name)
    benchmark.group = f"{name}, {shape}, {dtype}"
    benchmark.extra_info["bytes"] = op.bytes
    benchmark(getattr(op, way))


@pytest.mark.parametrize("way", ["native", "torch"])
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("shape", ["demo chunk", "192 of 768, D 128"], ids=lambda value: value.replace(" ", "-"))
def test_attention(benchmark: Any, shape: str, dtype: str, way: str) -> None:
    batch, active, rows, heads, dim = ops.ATTENTION[shape]
    q, k, v = (torch.randn(batch, n, heads, dim).to(ops.DTYPES[dtype]) for n in (active, rows, rows))
    out, turned = torch.empty_like(q), [x.transpose(1, 2) for x in (q, k, v)]
    by_torch = torch.nn.functional.scaled_dot_product_attention(*turned).transpose(1, 2)
    attention.active_attention(out, q, k, v, backend="native")
    assert (out.float() - by_torch.float()).abs().max() < (5e-2 if dtype == "bf16" else 1e-4)
    benchmark.group = f"active_attention, {shape}, {dtype}"
    benchmark.extra_info["operations"] = 4 * batch * heads * active * rows * dim
    if way == "native":
        benchmark(attention.active_attention, out, q, k, v, backend="native")
    else:
        benchmark(torch.nn.functional.scaled_dot_product_attention, *turned)
