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
@pytest.mark.parametrize("section", ["attention", "attention_fp8"])
@pytest.mark.parametrize("shape", ["demo chunk", "192 of 768, D 128"], ids=lambda value: value.replace(" ", "-"))
def test_attention(benchmark: Any, shape: str, section: str, dtype: str, way: str) -> None:
    _, shapes, case = ops.PRODUCTS[section]
    product = case(shapes[shape], ops.DTYPES[dtype])
    product.ways["native"]()
    assert product.error() <= product.tolerance
    benchmark.group = f"{section}, {shape}, {dtype}"
    benchmark.extra_info["operations"] = product.operations
    benchmark(product.ways[way])
