"""Split keys of the Hopper attention kernel on emulated blocks: partial results in scratch, and their join."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from . import hopper
from .attention_oracle import HALVES, check, poison_outside, random_segments, slices_of_a_cache
from .hopper import attend

dims = pytest.mark.parametrize("dim", [64, 128])


def into_parts(length: int, whole: int = 0, blocks: int = 3) -> hopper.Splitting:
    return hopper.Splitting(blocks, whole=whole, length=length)


@dims
@pytest.mark.parametrize(
    "dtype, late", [*((torch.bfloat16, late) for late in hopper.LATE), (torch.float16, "products")]
)
def test_a_layer_of_a_cache(dim: int, dtype: torch.dtype, late: str, rng: np.random.Generator) -> None:
    """Batches and heads; parts of one key tile and more, of a last tile that is not full; tiles before them whole."""
    batch, active, rows, heads = (int(n) for n in rng.integers((1, 1, 300, 1), (3, 200, 900, 3)))
    tiles = batch * heads * -(-active // 128)
    splitting = into_parts(*(int(n) for n in rng.integers((1, 0, 1), (4, tiles, 5))))
    seed = int(rng.integers(1 << 30))
    print(f"batch {batch}, active {active}, rows {rows}, heads {heads}, length {splitting.length}, whole "
          f"{splitting.whole}, blocks {splitting.blocks}, seed {seed}")  # fmt: skip
    q = torch.randn(batch, active, heads, dim).to(dtype)
    k, v = slices_of_a_cache(batch, rows, heads, dim, dtype=dtype)
    check(*attend(q, k, v, None, splitting, seed, late), q, k, v)


@dims
@pytest.mark.parametrize("length", [1, 2, 3])
def test_segments_see_their_ranges_alone(dim: int, length: int, rng: np.random.Generator) -> None:
    """Parts that begin and end inside either range, or hold the seam; segments too short to be split, or empty."""
    batch, active, rows = 2, int(rng.integers(1, 200)), int(rng.integers(1, 800))
    segments, seed = random_segments(rng, active, rows), int(rng.integers(1 << 30))
    print(f"active {active}, rows {rows}, segments {segments}, seed {seed}")
    dtype = HALVES[(dim // 64 + length) % 2]
    q = torch.randn(batch, active, 1, dim).to(dtype)
    k, v = slices_of_a_cache(batch, rows, 1, dim, dtype=dtype)
    poison_outside(k, segments)
    poison_outside(v, segments)
    check(*attend(q, k, v, segments, into_parts(length), seed), q, k, v, segments)


@dims
def test_two_ranges_and_the_rows_between(dim: int, rng: np.random.Generator) -> None:
    """Five key tiles in parts of two: the second part holds the end of one range and the begin of the other."""
    segments = [[70, 5, 300, 400, 650]]
    q = torch.randn(1, 70, 2, dim).bfloat16()
    k, v = slices_of_a_cache(1, 700, 2, dim)
    poison_outside(k, segments)
    poison_outside(v, segments)
    plan = hopper.plan(hopper.params(q, q, k, v, None, segments), into_parts(2))
    assert sorted(np.concatenate(plan.of_block)[:, 4:6].tolist()) == [[0, 2]] * 2 + [[2, 4]] * 2 + [[4, 5]] * 2
    check(*attend(q, k, v, segments, into_parts(2)), q, k, v, segments)


@dims
def test_as_the_host_decides(dim: int, rng: np.random.Generator) -> None:
    """A tile for each of three blocks, and one for which they split the keys."""
    rows, splitting = int(rng.integers(32 * 128 - 100, 33 * 128)), hopper.Splitting(3, decided=1)
    q = torch.randn(1, int(rng.integers(129, 257)), 2, dim).bfloat16()
    k, v = slices_of_a_cache(1, rows, 2, dim)
    plan = hopper.plan(hopper.params(q, q, k, v), splitting)
    assert plan.tiles == 4 and plan.whole == 3 and len(plan.joins) == 1 and plan.joins[0][3] == 3
    check(*attend(q, k, v, None, splitting), q, k, v)


@dims
@pytest.mark.parametrize("dtype", HALVES)
def test_scores_of_one_part_outweigh_the_others(dim: int, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """The largest score in the last part, or the first; parts whose weights vanish beside it."""
    q = 8 * torch.randn(1, 70, 1, dim).to(dtype)
    k, v = slices_of_a_cache(1, 600, 1, dim, dtype=dtype)
    k[:, 590] = q[:, 0]
    k[:, 0] = q[:, 1]
    check(*attend(q, k, v, None, into_parts(1)), q, k, v)


@dims
def test_parts_without_weight(dim: int, rng: np.random.Generator) -> None:
    """Scores of -infinity all over a part leave what the others say; all over the row they leave NaN; one of infinity
    leaves NaN: as in the definition."""
    q = torch.zeros(1, 3, 1, dim)
    q[..., 0] = 1
    q[:, 1, :, 0], q[:, 2, :, 1] = -1, 1
    k, v = (x.contiguous() for x in slices_of_a_cache(1, 400, 1, dim))
    k[:, :256, :, 0] = float("-inf")  # row 0: two of the four parts, row 1: infinity
    k[..., 1] = 0
    out, lse = attend(q.bfloat16(), k, v, None, into_parts(1))
    alone = q[:, :1].bfloat16()
    check(out[:, :1], lse[..., :1], alone, k[:, 256:], v[:, 256:])
    assert out[:, 1].isnan().all() and lse[..., 1].isnan().all()
    k[..., 0] = float("-inf")
    out, lse = attend(alone, k, v, None, into_parts(1))
    assert out.isnan().all() and (lse == float("-inf")).all()


@dims
def test_nan_stays_where_it_belongs(dim: int, rng: np.random.Generator) -> None:
    """A NaN query: its row. A NaN in a row of V: its column, in all rows. A NaN in a row of K: everything."""
    q = torch.randn(1, 90, 1, dim).bfloat16()
    k, v = slices_of_a_cache(1, 500, 1, dim)
    clean = attend(q, k, v, None, into_parts(2))
    hit, column, row = (int(rng.integers(n)) for n in (90, dim, 500))

    def with_nan(x: Tensor, *at: int) -> Tensor:
        x = x.clone()
        x[:, at[0], :, at[1]] = float("nan")
        return x

    out, lse = attend(with_nan(q, hit, column), k, v, None, into_parts(2))
    others = torch.arange(90) != hit
    assert out[:, hit].isnan().all() and lse[..., hit].isnan().all()
    assert torch.equal(out[:, others], clean[0][:, others])
    assert torch.equal(lse[..., others], clean[1][..., others])
    out, lse = attend(q, k, with_nan(v, row, column), None, into_parts(2))
    columns = torch.arange(dim) != column
    assert out[..., column].isnan().all() and torch.equal(out[..., columns], clean[0][..., columns])
    assert torch.equal(lse, clean[1])
    out, lse = attend(q, with_nan(k, row, column), v, None, into_parts(2))
    assert out.isnan().all() and lse.isnan().all()


def test_the_same_bits_on_any_number_of_blocks_in_any_order(rng: np.random.Generator) -> None:
    """For the same parts; and, but for rounding, as without parts."""
    q = torch.randn(1, 200, 1, 64).bfloat16()
    k, v = slices_of_a_cache(1, 777, 1, 64)
    first = attend(q, k, v, None, into_parts(2, blocks=1), 1)
    for blocks, seed in ((2, 7), (5, int(rng.integers(1 << 30)))):
        again = attend(q, k, v, None, into_parts(2, blocks=blocks), seed, hopper.LATE[blocks % 3])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    whole = attend(q, k, v)
    assert not torch.equal(whole[1], first[1])
    torch.testing.assert_close(first[1], whole[1], rtol=1e-5, atol=1e-5)


def test_log_sum_exp_is_optional(rng: np.random.Generator) -> None:
    q = torch.randn(1, 9, 2, 64).bfloat16()
    k, v = slices_of_a_cache(1, 300, 2, 64)
    out = torch.full_like(q, float("nan"))
    p = hopper.params(out, q, k, v)
    scratch = torch.full((hopper.scratch_floats(p, into_parts(1)),), float("nan"))
    hopper.run(p, into_parts(1), scratch)
    check(out, None, q, k, v)
