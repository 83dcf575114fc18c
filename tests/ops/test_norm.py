"""The norms against fp64 NumPy on every path: odd sizes, strided rows, strange numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from .conftest import KERNELS, Guarded, call, poison, random, rounding, same_bits

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
dtypes = pytest.mark.parametrize("dtype", FLOATS)
kernels = pytest.mark.parametrize("kernel", KERNELS)
# batch, active, channels, rows of the tables, batch of the tables
SHAPES = [(1, 1, 1, 1, 1), (2, 7, 3, 4, 2), (3, 5, 64, 2, 1), (1, 9, 97, 1, 1), (2, 4, 200, 3, 2), (1, 2, 1536, 5, 1)]


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def of_token(table: Tensor, rows: Tensor) -> np.ndarray:
    """[B or 1, A, C] in fp64."""
    return wide(table if table.shape[1] == 1 else table[:, rows])


def exact(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The result in fp64, and the size of what was added up in it."""
    with np.errstate(all="ignore"):
        centred = wide(x) - wide(x).mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)
        normed, factor, offset = centred / deviation, 1 + of_token(scale, rows), of_token(shift, rows)
        size = abs(wide(x) / deviation * factor) + abs(offset) + abs(normed)  # the mean is rounded, too
        return normed * factor + offset, abs(normed * factor) + size


def near(out: Tensor, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor) -> None:
    """One rounding to the dtype, beside those of fp32 arithmetic."""
    result, size = exact(x, shift, scale, rows)
    assert (abs(wide(out) - result) <= rounding(result, out.dtype) + 2e-6 * size + 1e-6).all()


@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, None])
def test_against_fp64(
    path: str, dtype: torch.dtype, shape: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    """Rows, sums and tables lie in larger buffers, whose other elements are neither used nor changed."""
    if shape is None:
        shape = tuple(int(n) for n in rng.integers(1, (4, 20, 500, 6)))
        shape = (*shape, shape[0])
        print(f"shape {shape}")
    batch, active, channels, table_rows, table_batch = shape
    x, y = (Guarded(random(rng, batch, active, channels, dtype=dtype)) for _ in range(2))
    gate, shift, scale = (Guarded(random(rng, table_batch, table_rows, channels)) for _ in range(3))
    rows = torch.from_numpy(rng.integers(0, table_rows, active))
    given = None if table_rows == 1 else rows
    tables = shift.tensor, scale.tensor

    out = Guarded(poison(batch, active, channels, dtype=dtype))
    call(path, "norm_modulate", out.tensor, x.tensor, *tables, given, EPS, threads=2)
    near(out.tensor, x.tensor, *tables, rows)
    assert out.intact() and x.intact()

    for gated in (True, False):
        total, out = (Guarded(poison(batch, active, channels, dtype=dtype)) for _ in range(2))
        arguments = (x.tensor, y.tensor, gate.tensor if gated else None, *tables, given, EPS)
        call(path, "residual_norm_modulate", total.tensor, out.tensor, *arguments, threads=2)
        product = y.tensor.float().numpy()
        if gated:
            product = product * of_token(gate.tensor, rows).astype(np.float32)
        added = torch.from_numpy(x.tensor.float().numpy() + product).to(dtype)
        assert same_bits(total.tensor, added)  # each operation rounded to fp32, then the sum to its dtype
        near(out.tensor, added, *tables, rows)
        in_place, again = x.tensor.clone(), poison(batch, active, channels, dtype=dtype)
        call(path, "residual_norm_modulate", in_place, again, in_place, *arguments[1:])
        assert same_bits(in_place, added) and same_bits(again, out.tensor)
        assert all(guarded.intact() for guarded in (total, out, x, y, gate, shift, scale))


@dtypes
def test_tables_of_one_row_beside_others(path: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """The gate has a row for each frame, the norm that follows is affine: one row for all, scale = weight - 1."""
    x, y = (random(rng, 2, 6, 40, dtype=dtype) for _ in range(2))
    gate, weight, bias = random(rng, 2, 3, 40), random(rng, 40), random(rng, 40)
    rows = torch.tensor([2, 0, 1, 1, 0, 2])
    total, out = (poison(2, 6, 40, dtype=dtype) for _ in range(2))
    shift, scale = bias[None, None], weight[None, None] - 1
    call(path, "residual_norm_modulate", total, out, x, y, gate, shift, scale, rows, EPS)
    added = (x.float() + gate[:, rows] * y.float()).to(dtype)
    assert same_bits(total, added)
    near(out, added, shift, scale, rows)
    affine = torch.nn.functional.layer_norm(added.double(), (40,), weight.double(), bias.double(), EPS)
    assert (out.double() - affine).abs().max() < max(5 * torch.finfo(dtype).eps, 1e-5)


def test_rows_far_from_zero(path: str, rng: np.random.Generator) -> None:
    """The variance is that of differences from the mean: squares of the elements would lose all its digits."""
    x = random(rng, 1, 8, 1000) + 3000
    zero = torch.zeros(1, 1, 1000)
    out = poison(1, 8, 1000)
    call(path, "norm_modulate", out, x, zero, zero, None, EPS)
    assert abs(wide(out) - exact(x, zero, zero, torch.zeros(8, dtype=torch.int64))[0]).max() < 2e-3


@dtypes
@pytest.mark.parametrize("channels", [5, 96, 1000])
def test_rows_whose_first_guess_of_the_mean_is_far_off(
    path: str, dtype: torch.dtype, channels: int, rng: np.random.Generator
) -> None:
    """The kernels take the mean of four elements for a guess: other ones of any size, around where it is given up."""
    away = torch.tensor([0.0, 1, 1.9, 2, 2.1, 2.5, 4, 30, 1e3, 1e5, -2, -300]) * (1 + 0.1 * random(rng, 12))
    x = random(rng, 1, 12, channels)
    for k in range(4):
        x[0, :, channels // 4 * k] += away * (1 if k < 2 else 0.99)
    x += random(rng, 1, 12, 1)
    x = x.clamp(-6e4, 6e4).to(dtype)
    shift, scale = random(rng, 1, 1, channels), random(rng, 1, 1, channels)
    out = poison(1, 12, channels, dtype=dtype)
    call(path, "norm_modulate", out, x, shift, scale, None, EPS)
    near(out, x, shift, scale, torch.zeros(12, dtype=torch.int64))
    assert not out.isnan().any()


@dtypes
def test_constant_rows(path: str, dtype: torch.dtype) -> None:
    """Without variance eps decides: nothing is divided by zero, and the shift is what is left."""
    shift, scale = torch.full((1, 1, 70), 0.375), torch.full((1, 1, 70), 2.0)
    out = poison(1, 2, 70, dtype=dtype)
    call(path, "norm_modulate", out, torch.full((1, 2, 70), 4.0, dtype=dtype), shift, scale, None, EPS)
    assert (out == 0.375).all()


@dtypes
def test_nan_and_infinity_stay_in_their_row(path: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    x, y = (random(rng, 1, 6, 77, dtype=dtype) for _ in range(2))
    x[0, 1, 76], x[0, 2, 3], y[0, 3, 40] = float("nan"), float("inf"), -float("inf")
    gate, shift, scale = (random(rng, 1, 2, 77) for _ in range(3))
    shift[0, 1, 5], scale[0, 1, 6] = float("inf"), float("nan")
    rows = torch.tensor([0, 0, 0, 0, 1, 0])
    total, out = (poison(1, 6, 77, dtype=dtype) for _ in range(2))
    call(path, "residual_norm_modulate", total, out, x, y, gate, shift, scale, rows, EPS)
    assert out[0, 1:4].isnan().all()
    assert out[0, 4, 5] == float("inf") and out[0, 4, 6].isnan() and out[0, 4].isfinite().sum() == 75
    assert out[0, [0, 5]].isfinite().all()
    assert total.isnan().sum() == 1 and total.isinf().sum() == 2


@kernels
@dtypes
def test_no_bit_depends_on_threads_neighbours_or_instruction_set(
    kernel: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    x, y = (random(rng, 2, 300, 331, dtype=dtype) for _ in range(2))
    gate, shift, scale = (random(rng, 1, 4, 331) for _ in range(3))
    rows = torch.from_numpy(rng.integers(0, 4, 300))

    def run(path: str, some: Tensor, threads: int) -> tuple[Tensor, Tensor]:
        total, out = (poison(2, len(some), 331, dtype=dtype) for _ in range(2))
        call(
            path, "residual_norm_modulate", total, out, x[:, some], y[:, some], gate, shift, scale, rows[some], EPS,
            threads=threads,
        )  # fmt: skip
        return total, out

    everything = torch.arange(300)
    expected = run("generic", everything, 1)
    for threads in (1, 2, 3, 8):
        assert all(map(same_bits, run(kernel, everything, threads), expected))
    some = torch.from_numpy(rng.permutation(300)[:37])
    assert all(same_bits(a, b[:, some]) for a, b in zip(run(kernel, some, 2), expected, strict=True))


def test_nothing_to_do(path: str) -> None:
    table = torch.zeros(1, 1, 5)
    for shape in ((0, 3, 5), (2, 0, 5)):
        out, total = torch.empty(shape), torch.empty(shape)
        call(path, "norm_modulate", out, torch.empty(shape), table, table, None, EPS)
        call(path, "residual_norm_modulate", total, out, *torch.empty(2, *shape), None, table, table, None, EPS)
        call(path, "rms_norm", out, torch.empty(shape), torch.ones(5), EPS)


# RMSNorm


@dtypes
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("shape", [*(shape[:3] for shape in SHAPES), None])
def test_rms_norm_against_fp64(
    path: str, dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    if shape is None:
        shape = tuple(int(n) for n in rng.integers(1, (4, 20, 500)))
        print(f"shape {shape}")
    x, weight = Guarded(random(rng, *shape, dtype=dtype, scale=3)), random(rng, shape[2], dtype=weight_dtype)
    out = Guarded(poison(*shape, dtype=dtype))
    call(path, "rms_norm", out.tensor, x.tensor, weight, EPS, threads=2)
    result = wide(x.tensor) / np.sqrt((wide(x.tensor) ** 2).mean(-1, keepdims=True) + EPS) * wide(weight)
    assert (abs(wide(out.tensor) - result) <= rounding(result, dtype) + 1e-6 * abs(result) + 1e-30).all()
    call(path, "rms_norm", x.tensor, x.tensor, weight, EPS, threads=2)
    assert same_bits(x.tensor, out.tensor) and x.intact() and out.intact()


@dtypes
def test_rms_norm_of_zeros_and_strange_numbers(path: str, dtype: torch.dtype) -> None:
    """eps keeps zeros from being divided by zero; NaN and infinity stay in their row."""
    x, weight = torch.zeros(1, 4, 70, dtype=dtype), torch.full((70,), 2.0)
    x[0, 1, 69], x[0, 2, 3], x[0, 3] = float("nan"), float("inf"), 0.5
    out = poison(1, 4, 70, dtype=dtype)
    call(path, "rms_norm", out, x, weight, 0.75)
    assert (out[0, 0] == 0).all() and (out[0, 3] == 1).all()
    assert out[0, 1].isnan().all() and out[0, 2, 3].isnan() and (out[0, 2].nan_to_num(0) == 0).all()


@kernels
@dtypes
def test_no_bit_of_rms_norm_depends_on_anything_else(
    kernel: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    x, weight = random(rng, 2, 300, 331, dtype=dtype), random(rng, 331)
    expected = poison(2, 300, 331, dtype=dtype)
    call("generic", "rms_norm", expected, x, weight, EPS)
    for threads in (1, 2, 3, 8):
        out = poison(2, 300, 331, dtype=dtype)
        call(kernel, "rms_norm", out, x, weight, EPS, threads=threads)
        assert same_bits(out, expected)
    some = torch.from_numpy(rng.permutation(300)[:37])
    out = poison(2, 37, 331, dtype=dtype)
    call(kernel, "rms_norm", out, x[:, some], weight, EPS)
    assert same_bits(out, expected[:, some])
