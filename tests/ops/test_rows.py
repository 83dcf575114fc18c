"""gather_rows and scatter_rows against indexing, for every dtype, on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from .conftest import Guarded, call, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
SHAPES = [  # batch, rows, rows that move, trailing dimensions
    (1, 1, 1, ()), (2, 9, 4, (7,)), (3, 20, 20, (33,)), (1, 300, 120, (64,)), (2, 11, 5, (3, 4)), (2, 8, 3, (2, 3, 5)),
]  # fmt: skip


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(rng.integers(0, 2 if dtype == torch.bool else 100, shape)).to(dtype)


def apart(value: Tensor) -> tuple[Tensor, Tensor]:
    """The value with gaps between its rows and batches, in a buffer of sentinels, and the buffer."""
    batch, rows = value.shape[:2]
    buffer = torch.full((batch + 1, 2 * rows + 3, *value.shape[2:]), 1, dtype=value.dtype)
    view = buffer[:batch, 1 : 2 * rows + 1 : 2]
    view.copy_(value)
    return view, buffer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_indexing(
    path: str, dtype: torch.dtype, shape: tuple[int, int, int, tuple[int, ...]], rng: np.random.Generator
) -> None:
    batch, total, count, rest = shape
    value, fresh = (random(rng, (batch, n, *rest), dtype) for n in (total, count))
    twice = torch.from_numpy(rng.integers(0, total, count))  # a row may be read more than once
    (x, _), (out, buffer) = apart(value), apart(fresh)
    call(path, "gather_rows", out, x, twice, threads=2)
    assert same_bits(out, torch.stack([value[:, int(row)] for row in twice], 1))
    out.copy_(fresh)
    assert same_bits(buffer, apart(fresh)[1]) and same_bits(x, value)

    once = torch.from_numpy(rng.permutation(total)[:count])
    (x, buffer), (src, _) = apart(value), apart(fresh)
    call(path, "scatter_rows", x, once, src, threads=2)
    expected = value.clone()
    for index, row in enumerate(once.tolist()):
        expected[:, row] = fresh[:, index]
    assert same_bits(x, expected) and same_bits(src, fresh)
    x.copy_(value)
    assert same_bits(buffer, apart(value)[1])


def test_rows_of_odd_length_inside_a_buffer(path: str, rng: np.random.Generator) -> None:
    """Rows that are slices of longer ones: what lies beside them is left alone."""
    x, out = (Guarded(random(rng, (2, n, 13), torch.bfloat16)) for n in (9, 4))
    rows = torch.tensor([8, 0, 3, 5])
    call(path, "gather_rows", out.tensor, x.tensor, rows)
    assert same_bits(out.tensor, x.tensor[:, rows]) and out.intact() and x.intact()
    call(path, "scatter_rows", x.tensor, rows.flip(0), out.tensor)
    assert same_bits(x.tensor[:, rows.flip(0)], out.tensor) and x.intact()


def test_there_and_back(path: str, rng: np.random.Generator) -> None:
    x = torch.randn(2, 50, 17)
    order, out, back = torch.from_numpy(rng.permutation(50)), torch.empty(2, 50, 17), torch.empty(2, 50, 17)
    call(path, "gather_rows", out, x, order)
    call(path, "scatter_rows", back, order, out)
    assert same_bits(back, x) and not same_bits(out, x)


def test_nan_keeps_its_bits(path: str) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -1, 0x7FA12345], dtype=torch.int32)
    x, out = bits.view(torch.float32)[None, None], torch.zeros(1, 1, 4)
    call(path, "gather_rows", out, x, torch.tensor([0]))
    assert torch.equal(out.view(torch.int32)[0, 0], bits)


def test_nothing_to_do(path: str) -> None:
    none = torch.arange(0)
    x = torch.ones(2, 3, 4)
    call(path, "scatter_rows", x, none, torch.empty(2, 0, 4))
    call(path, "gather_rows", torch.empty(2, 0, 4), x, none)
    call(path, "gather_rows", torch.empty(0, 2, 4), torch.empty(0, 3, 4), torch.tensor([1, 0]))
    assert (x == 1).all()
