"""The Hopper kernel with K and V in E4M3 on emulated blocks: its own source, against its roundings in fp64.

A deadlock, a read before its wait or its fence, or a stage given back too early shows as an error or as NaN.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from . import hopper
from .attention_oracle import random_segments
from .fp8_oracle import E4M3, check, codes_of, poison, random_cache
from .hopper import fp8
from .hopper.fp8 import Cache, attend

dims = pytest.mark.parametrize("dim", [64, 128])
lates = pytest.mark.parametrize("late", hopper.LATE)


def queries(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def into_parts(length: int, blocks: int = 3) -> hopper.Splitting:
    return hopper.Splitting(blocks, whole=0, length=length)


@dims
@lates
def test_a_layer_of_a_cache(dim: int, late: str, rng: np.random.Generator) -> None:
    """Odd sizes that divide nothing, more tiles than blocks, more key tiles than stages."""
    batch, active, rows, heads = (int(n) for n in rng.integers((1, 129, 650, 1), (3, 180, 800, 3)))
    blocks, seed = int(rng.integers(1, 4)), int(rng.integers(1 << 30))
    print(f"batch {batch}, active {active}, rows {rows}, heads {heads}, blocks {blocks}, seed {seed}")
    q, cache = queries(batch, active, heads, dim), random_cache(rng, batch, rows, heads, dim)
    check(*attend(q, cache, None, hopper.Splitting(blocks), seed, late), q, cache)


@dims
@lates
@pytest.mark.parametrize("most", [1, 8])
def test_segments_see_their_ranges_alone(dim: int, late: str, most: int, rng: np.random.Generator) -> None:
    batch, active, rows = 2, int(rng.integers(1, 150)), int(rng.integers(1, 400))
    segments, seed = random_segments(rng, active, rows, most), int(rng.integers(1 << 30))
    print(f"active {active}, rows {rows}, segments {segments}, seed {seed}")
    q, cache = queries(batch, active, 1, dim), random_cache(rng, batch, rows, 1, dim)
    poison(cache, segments)
    got = attend(q, cache, segments, hopper.Splitting(3), seed, late)
    clean = tuple(x.nan_to_num(0) if x.dtype == torch.float32 else defused(x) for x in cache)
    check(*got, q, clean, segments)


def defused(values: Tensor) -> Tensor:
    """Codes with 0 for NaN, which the oracle's products of whole tensors cannot do with."""
    codes = values.clone().view(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    return codes.view(E4M3)


@dims
@pytest.mark.parametrize("active, rows", [(1, 1), (64, 127), (65, 128), (128, 129), (129, 256)])
def test_at_the_edges_of_tiles(dim: int, active: int, rows: int, rng: np.random.Generator) -> None:
    q, cache = queries(1, active, 1, dim), random_cache(rng, 1, rows, 1, dim)
    check(*attend(q, cache, seed=int(rng.integers(1 << 30))), q, cache)


@dims
def test_large_scores(dim: int, rng: np.random.Generator) -> None:
    """Queries six times as large: few keys have the weight, and the largest score may come at any tile."""
    q, cache = 6 * queries(1, 70, 1, dim), random_cache(rng, 1, 500, 1, dim)
    check(*attend(q, cache, seed=int(rng.integers(1 << 30))), q, cache, definition=0.5)


@dims
@pytest.mark.parametrize("row", [3, 11, 48, 63])
def test_the_maximum_of_one_row_rises(dim: int, row: int, rng: np.random.Generator) -> None:
    """In the third tile, and of no other row of its warp."""
    q, cache = queries(1, 70, 1, dim), random_cache(rng, 1, 384, 1, dim, spread=0)
    k, _, k_scale, _ = cache
    k_scale[:, 128:] /= 64  # the first tile has the largest scores, but for
    codes_of(k)[:, 300] = codes_of(q[:, row].to(E4M3))
    k_scale[:, 300] = 6 / dim**0.5
    check(*attend(q, cache), q, cache, definition=0.5)


@dims
def test_scales_of_any_size(dim: int, rng: np.random.Generator) -> None:
    """Rows and heads of 2^±100; rows and whole tiles of zeros, scales of 0 and below."""
    q, (k, v, k_scale, v_scale) = queries(1, 70, 2, dim), random_cache(rng, 1, 400, 2, dim)
    q[:, 3], q[:, 5, 0] = 0, 2.0**-120
    q[:, :, 1] *= 2.0**100
    k_scale[:, :, 1] *= 2.0**-100
    v_scale *= torch.tensor([2.0**-80, 2.0**90])
    v_scale[:, 128:256] = 0
    codes_of(v)[:, 300:310] = 0
    k_scale[:, 50:60] = 0
    k_scale[:, 60:70] *= -1
    v_scale[:, 55:65] *= -4
    cache = k, v, k_scale, v_scale
    out, lse = attend(q, cache, seed=int(rng.integers(1 << 30)))
    for head in range(2):  # the sizes of the results differ by 2^170
        one = slice(head, head + 1)
        check(out[:, :, one], lse[:, one], q[:, :, one], tuple(x[:, :, one] for x in cache))
    v_scale.zero_()
    assert (attend(q, cache)[0] == 0).all()


@dims
def test_nan_stays_where_it_belongs(dim: int, rng: np.random.Generator) -> None:
    """A query with NaN or infinity: its row. NaN in the code of a value: its channel; in its scale: all channels. NaN
    in a key or its scale: everything."""
    q, cache = queries(1, 90, 1, dim), random_cache(rng, 1, 300, 1, dim)
    clean = attend(q, cache)
    hit, column, row = (int(rng.integers(n)) for n in (90, dim, 300))
    others, columns = torch.arange(90) != hit, torch.arange(dim) != column
    for what in ("nan", "inf", "-inf"):
        spoilt = q.clone()
        spoilt[:, hit, :, column] = float(what)
        out, lse = attend(spoilt, cache)
        assert out[:, hit].isnan().all() and lse[..., hit].isnan().all()
        assert torch.equal(out[:, others], clean[0][:, others])
        assert torch.equal(lse[..., others], clean[1][..., others])

    def with_nan(which: int) -> Cache:
        spoilt = [codes_of(x).clone().view(E4M3) if x.dtype == E4M3 else x.clone() for x in cache]
        if which < 2:
            codes_of(spoilt[which])[:, row, 0, column] = 0xFF
        else:
            spoilt[which][:, row] = float("nan")
        return tuple(spoilt)

    out, lse = attend(q, with_nan(1))
    assert out[..., column].isnan().all() and torch.equal(out[..., columns], clean[0][..., columns])
    assert torch.equal(lse, clean[1])
    out, lse = attend(q, with_nan(3))
    assert out.isnan().all() and torch.equal(lse, clean[1])
    for which in (0, 2):
        out, lse = attend(q, with_nan(which))
        assert out.isnan().all() and lse.isnan().all()


@dims
@lates
def test_split_keys(dim: int, late: str, rng: np.random.Generator) -> None:
    """Parts of two key tiles of two ranges, in scratch that holds NaN before."""
    segments = [[70, 5, 300, 400, 650]]
    q, cache = queries(1, 70, 2, dim), random_cache(rng, 1, 700, 2, dim)
    poison(cache, segments)
    out, lse = attend(q, cache, segments, into_parts(2), int(rng.integers(1 << 30)), late)
    clean = tuple(x.nan_to_num(0) if x.dtype == torch.float32 else defused(x) for x in cache)
    check(out, lse, q, clean, segments, part=2)


def test_as_the_host_decides(rng: np.random.Generator) -> None:
    """One query tile of 32 key tiles, of which three blocks take equal parts."""
    q, cache = queries(1, 33, 1, 64), random_cache(rng, 1, 32 * 128 - 50, 1, 64)
    splitting = hopper.Splitting(3, decided=1)
    assert fp8.scratch_floats(fp8.scaled_params(q, q, cache), splitting) == 3 * 128 * (64 + 2)
    out, lse = attend(q, cache, None, splitting)
    whole = attend(q, cache)
    torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(out, whole[0])
    check(*whole, q, cache)


def test_sums_of_14_bits_do_not_drift(rng: np.random.Generator) -> None:
    """As the products of Hopper are said to have them. Values with a mean: one sum over the 32 tiles would lose most of
    what comes late."""
    q, (k, v, k_scale, v_scale) = queries(1, 20, 1, 64), random_cache(rng, 1, 32 * 128, 1, 64, spread=0)
    codes_of(v)[:] &= 0x7F
    cache = k, v, k_scale, v_scale
    exact = attend(q, cache)[0].float()
    hopper.library().fp8_sum_bits(14)
    try:
        narrow = attend(q, cache)[0].float()
    finally:
        hopper.library().fp8_sum_bits(0)
    error = (narrow - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 4e-3


def test_the_same_bits_on_any_number_of_blocks_in_any_order(rng: np.random.Generator) -> None:
    """And for a query at any place in any active set, where nothing is split."""
    q, cache = queries(1, 260, 1, 64), random_cache(rng, 1, 333, 1, 64)
    first = attend(q, cache, None, hopper.WHOLE, 1)
    for blocks, seed in ((2, 7), (3, int(rng.integers(1 << 30)))):
        again = attend(q, cache, None, hopper.Splitting(blocks), seed, hopper.LATE[blocks - 1])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    some = torch.randperm(260)[:77]
    out, lse = attend(q[:, some], cache)
    assert torch.equal(out, first[0][:, some]) and torch.equal(lse, first[1][..., some])


def test_without_queries_or_log_sum_exp(rng: np.random.Generator) -> None:
    cache = random_cache(rng, 1, 200, 1, 64)
    fp8.run(fp8.scaled_params(queries(1, 0, 1, 64), queries(1, 0, 1, 64), cache), hopper.WHOLE)
    q = queries(1, 9, 1, 64)
    out = torch.full_like(q, float("nan"))
    fp8.run(fp8.scaled_params(out, q, cache), hopper.WHOLE)
    check(out, attend(q, cache)[1], q, cache)


def test_what_the_kernel_takes(rng: np.random.Generator) -> None:
    def refusal(q: Tensor, *cache: Tensor, segments: list[list[int]] | None = None) -> str:
        return fp8.refusal(fp8.scaled_params(q, q, cache, None, segments))  # type: ignore[arg-type]

    k, v, k_scale, v_scale = random_cache(rng, 2, 20, 2, 64)
    q = queries(2, 9, 2, 64)
    assert refusal(q, k, v, k_scale, v_scale) == ""
    assert "bfloat16" in refusal(q.float(), k, v, k_scale, v_scale)
    narrow = random_cache(rng, 2, 20, 2, 48)
    assert "48" in refusal(queries(2, 9, 2, 48), *narrow)
    bytes_ = torch.zeros(1 << 16, dtype=torch.uint8)
    assert "k's row stride is 136 elements, expected a positive multiple of 16" in refusal(
        q, bytes_.as_strided((2, 20, 2, 64), (136 * 20, 136, 64, 1)).view(E4M3), v, k_scale, v_scale
    )
    assert "v's address" in refusal(q, k, bytes_[8 : 8 + v.numel()].view(v.shape).view(E4M3), k_scale, v_scale)
    assert "9 segments" in refusal(q, k, v, k_scale, v_scale, segments=[[1, 0, 1, 0, 0]] * 9)
