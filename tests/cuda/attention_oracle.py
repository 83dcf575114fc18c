"""Attention in fp64 on NumPy, segment by segment, with a bound on what the roundings of a bf16 or fp16 kernel can add
up to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # relative
HALF_LEAST = {torch.bfloat16: 0.0, torch.float16: 2.0**-25}  # half of the smallest number, where that is not tiny
Segments = list[list[int]]


@dataclass(frozen=True)
class Exact:
    """Result [B, A, H, D], log-sum-exp [B, H, A], and how far a kernel may be from the result."""

    result: np.ndarray
    log_sum: np.ndarray
    bound: np.ndarray


def exact(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Exact:
    """The fp64 result. The bound: weights, which are at most 1, and result rounded to q's dtype, scores and sums in
    fp32, 2^x within 2 ulp."""
    wide_q, wide_k, wide_v = (x.cpu().double().numpy() for x in (q, k, v))
    result, log_sum, bound, start = [], [], [], 0
    for count, *ranges in segments or [[q.shape[1], 0, k.shape[1], 0, 0]]:
        rows = np.r_[slice(*ranges[:2]), slice(*ranges[2:])]
        part = _exact(wide_q[:, start : start + count], wide_k[:, rows], wide_v[:, rows], q.dtype)
        result.append(part.result)
        log_sum.append(part.log_sum)
        bound.append(part.bound)
        start += count
    return Exact(np.concatenate(result, 1), np.concatenate(log_sum, 2), np.concatenate(bound, 1))


def _exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, dtype: torch.dtype) -> Exact:
    with np.errstate(invalid="ignore"):
        size = np.sqrt(q.shape[-1])
        scores = np.einsum("bahd,bnhd->bhan", q, k) / size
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        result, spread = (np.einsum("bhan,bnhd->bahd", weights / total, x) for x in (v, abs(v)))
        largest = np.einsum("bahd,bnhd->bhan", abs(q), abs(k)).max(-1) / size
        vanishing = abs(v).sum(1)[:, None] / total.swapaxes(1, 2)  # of all values, each with a weight of 1
    half, least = 1.01 * HALF_ULP[dtype], 1.01 * HALF_LEAST[dtype]
    relative = 2 * 2.0**-21 * largest.swapaxes(1, 2)[..., None] + half + 1e-5
    bound = relative * spread + half * abs(result) + (least * (1 + vanishing) if least else 0)
    return Exact(result, (top + np.log(total))[..., 0], bound)


def check(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None
) -> None:
    """Every value is as near to the exact one as its dtype allows."""
    want = exact(q, k, v, segments)
    error = abs(out.cpu().double().numpy() - want.result)
    assert (error <= want.bound).all(), f"off by up to {np.nanmax(error / want.bound):.2f} of the bound"
    if lse is not None:
        assert (abs(lse.cpu().double().numpy() - want.log_sum) <= 1e-5 * (1 + abs(want.log_sum))).all()


def random_segments(rng: np.random.Generator, active: int, rows: int, most: int = 8) -> Segments:
    """Up to `most` segments of one or two ranges that do not overlap, in either order, some without queries."""
    counts = rng.multinomial(active, rng.dirichlet(np.ones(int(rng.integers(1, most + 1)))))
    segments = []
    for count in counts:
        a, b, c, d = sorted(int(x) for x in rng.integers(0, rows + 1, 4))
        ranges = [[a, b], [c, d]] if a < b or c < d else [[0, rows], [rows, rows]]
        rng.shuffle(ranges)
        segments.append([int(count), *ranges[0], *ranges[1]])
    return segments


def slices_of_a_cache(
    batch: int, rows: int, heads: int, dim: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Random keys and values [B, N, H, D], slices of a cache [layers, B, rows, 2, H, D] that holds NaN elsewhere."""
    cache = torch.full((3, batch, rows + 9, 2, heads, dim), float("nan"), dtype=dtype, device=device)
    layer = cache[1, :, 4 : 4 + rows]
    layer.copy_(torch.randn(layer.shape, device=device))
    return layer[:, :, 0], layer[:, :, 1]


def poison_outside(x: Tensor, segments: Segments) -> None:
    """NaN in rows of x [B, N, H, D] that no segment with queries attends to."""
    outside = torch.ones(x.shape[1], dtype=torch.bool)
    for count, *ranges in segments:
        if count:
            outside[slice(*ranges[:2])] = False
            outside[slice(*ranges[2:])] = False
    x[:, outside.to(x.device)] = float("nan")
