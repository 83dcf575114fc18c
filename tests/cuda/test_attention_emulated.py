"""The Hopper attention kernel's own source on emulated blocks (tests/cuda/hopper): loops, barriers, masks, stores.

A deadlock, a read before its wait or a stage given back too early shows as an error or as NaN.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from . import hopper
from .attention_oracle import HALVES, check, poison_outside, random_segments, slices_of_a_cache

dims = pytest.mark.parametrize("dim", [64, 128])
dtypes = pytest.mark.parametrize("dtype", HALVES)
lates = pytest.mark.parametrize("late", hopper.LATE)


def in_turn(dim: int, number: int) -> torch.dtype:
    """One of the dtypes, for what is the same in both."""
    return HALVES[(dim // 64 + number) % 2]


@dims
@pytest.mark.parametrize(
    "dtype, late", [*((torch.bfloat16, late) for late in hopper.LATE), (torch.float16, "products")]
)
def test_a_layer_of_a_cache(dim: int, dtype: torch.dtype, late: str, rng: np.random.Generator) -> None:
    """Odd sizes that divide nothing, more tiles than blocks, more key tiles than stages."""
    batch, active, rows, heads = (int(n) for n in rng.integers((1, 129, 600, 1), (3, 200, 900, 3)))
    blocks, seed = int(rng.integers(1, 4)), int(rng.integers(1 << 30))
    print(f"batch {batch}, active {active}, rows {rows}, heads {heads}, blocks {blocks}, seed {seed}")
    q = torch.randn(batch, active, heads, dim).to(dtype)
    k, v = slices_of_a_cache(batch, rows, heads, dim, dtype=dtype)
    check(*hopper.attend(q, k, v, None, hopper.Splitting(blocks), seed, late), q, k, v)


@dims
@lates
@pytest.mark.parametrize("most", [1, 8])
def test_segments_see_their_ranges_alone(dim: int, late: str, most: int, rng: np.random.Generator) -> None:
    batch, active, rows = 2, int(rng.integers(1, 200)), int(rng.integers(1, 500))
    segments, seed = random_segments(rng, active, rows, most), int(rng.integers(1 << 30))
    print(f"active {active}, rows {rows}, segments {segments}, seed {seed}")
    dtype = in_turn(dim, most)
    q = torch.randn(batch, active, 1, dim).to(dtype)
    k, v = slices_of_a_cache(batch, rows, 1, dim, dtype=dtype)
    poison_outside(k, segments)
    poison_outside(v, segments)
    check(*hopper.attend(q, k, v, segments, hopper.Splitting(3), seed, late), q, k, v, segments)


@dims
@pytest.mark.parametrize("active, rows", [(1, 1), (64, 127), (65, 128), (128, 129), (129, 256)])
def test_at_the_edges_of_tiles(dim: int, active: int, rows: int, rng: np.random.Generator) -> None:
    dtype = in_turn(dim, rows)
    q = torch.randn(1, active, 1, dim).to(dtype)
    k, v = slices_of_a_cache(1, rows, 1, dim, dtype=dtype)
    check(*hopper.attend(q, k, v, seed=int(rng.integers(1 << 30))), q, k, v)


@dims
@dtypes
def test_large_scores(dim: int, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """The largest score comes late, and weights before it vanish; or first, and the rest vanishes."""
    q = 8 * torch.randn(1, 70, 1, dim).to(dtype)
    k, v = slices_of_a_cache(1, 300, 1, dim, dtype=dtype)
    k[:, 290] = q[:, 0]
    k[:, 0] = q[:, 1]
    check(*hopper.attend(q, k, v, seed=int(rng.integers(1 << 30))), q, k, v)


def test_weights_that_fp16_hardly_holds(rng: np.random.Generator) -> None:
    """One value of 0 outweighs 300 others by 2^12 to 2^28: what becomes of those is the result. Below 2^-25 a weight is
    0 in fp16, above it a multiple of 2^-24."""
    q = torch.zeros(1, 5, 1, 64, dtype=torch.float16)
    q[..., 0] = 8  # so that a score is the key's first element
    k, v = slices_of_a_cache(1, 301, 1, 64, dtype=torch.float16)
    k[..., 0] = torch.from_numpy(-rng.uniform(12, 28, (301, 1)) * np.log(2))
    k[:, 7, :, 0], v[:, 7] = 0, 0
    v.abs_().mul_(1000)
    out, lse = hopper.attend(q, k, v)
    check(out, lse, q, k, v)
    assert (out > 0).all()


@dims
def test_nan_in_a_query_stays_in_its_row(dim: int, rng: np.random.Generator) -> None:
    dtype = in_turn(dim, 0)
    q = torch.randn(1, 90, 1, dim).to(dtype)
    k, v = slices_of_a_cache(1, 150, 1, dim, dtype=dtype)
    clean, clean_lse = hopper.attend(q, k, v)
    hit = int(rng.integers(90))
    q[:, hit, :, int(rng.integers(dim))] = float("nan")
    out, lse = hopper.attend(q, k, v)
    assert out[:, hit].isnan().all() and lse[..., hit].isnan().all()
    others = torch.arange(90) != hit
    assert torch.equal(out[:, others], clean[:, others]) and torch.equal(
        lse[..., others], clean_lse[..., others]
    )


def test_the_same_bits_on_any_number_of_blocks_in_any_order(rng: np.random.Generator) -> None:
    """And for a query at any place in any active set, where nothing is split."""
    q = torch.randn(1, 260, 1, 64).bfloat16()
    k, v = slices_of_a_cache(1, 333, 1, 64)
    first = hopper.attend(q, k, v, None, hopper.WHOLE, 1)
    for blocks, seed in ((2, 7), (3, int(rng.integers(1 << 30)))):
        again = hopper.attend(q, k, v, None, hopper.Splitting(blocks), seed, hopper.LATE[blocks - 1])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    some = torch.randperm(260)[:77]
    out, lse = hopper.attend(q[:, some], k, v)
    assert torch.equal(out, first[0][:, some]) and torch.equal(lse, first[1][..., some])


def test_without_queries_nothing_happens() -> None:
    q, k = torch.randn(1, 0, 1, 64).bfloat16(), torch.randn(1, 5, 1, 64).bfloat16()
    hopper.run(hopper.params(torch.empty_like(q), q, k, k), hopper.WHOLE)
