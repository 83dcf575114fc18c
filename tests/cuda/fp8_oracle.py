"""Attention with K and V in E4M3 as the Hopper kernel rounds it, in fp64: queries by a scale of each row, weights times
their values' scales by the tile; with a bound on what fp32 and the result's bf16 can add. Beside it the definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsa_rt.reference import layers as reference

from .attention_oracle import HALF_ULP, Segments
from .hopper.fp8 import Cache

TILE = 128
E4M3 = torch.float8_e4m3fn


def rounded(x: np.ndarray) -> np.ndarray:
    """To the nearest E4M3 number."""
    return torch.from_numpy(x).float().to(E4M3).double().numpy()


def rounded_queries(q: Tensor) -> np.ndarray:
    """q as the kernel rounds it, in fp64: its own fp32 operations."""
    q = q.cpu()
    scale = q.float().abs().amax(-1, keepdim=True) * torch.tensor(1 / 448, dtype=torch.float32)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    codes = (q.float() * (1 / scale)).clamp(-448, 448).to(E4M3)
    return (codes.double() * scale.double()).numpy()


def key_tiles(ranges: list[int]) -> list[np.ndarray]:
    """The rows of each key tile: ranges in the order of their rows, adjoining ones joined, 128 at a time."""
    found: list[list[int]] = []
    for begin, end in sorted((ranges[:2], ranges[2:])):
        if begin == end:
            continue
        if found and found[-1][1] == begin:
            found[-1][1] = end
        else:
            found.append([begin, end])
    return [np.arange(at, min(at + TILE, end)) for begin, end in found for at in range(begin, end, TILE)]


@dataclass
class Running:
    """What a running softmax holds: of the result, of how far it may be off, of the sum of weights; the top score."""

    total: np.ndarray
    slack: np.ndarray
    weights: np.ndarray
    top: np.ndarray

    def fade(self, top: np.ndarray) -> None:
        factor = np.exp(self.top - top)
        self.total, self.slack = self.total * factor[..., None], self.slack * factor[..., None]
        self.weights, self.top = self.weights * factor, top


def attend_tile(
    now: Running, scores: np.ndarray, near: np.ndarray, v: np.ndarray, v_scale: np.ndarray, sums: float
) -> None:
    """Takes a tile in. scores [H, A, n], how far they may be off, v [H, n, D] codes' numbers, v_scale [H, n]."""
    now.fade(np.maximum(now.top, scores.max(-1)))
    weights = np.exp(scores - now.top[..., None])
    unit = np.maximum(abs(v_scale).max(-1), 2.0**-126)[:, None, None] / 256
    factored = weights * (v_scale[:, None] / unit)
    codes, low, high = (rounded(factored * (1 + sign * near)) for sign in (0, -1, 1))
    now.total += codes @ v * unit
    now.slack += (abs(high - low) + sums * abs(codes)) @ abs(v) * unit
    now.weights += weights.sum(-1)


def expected(
    q: Tensor, cache: Cache, segments: Segments | None, part: int, sums: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Result [B, A, H, D], the bound on its error, log-sum-exp [B, H, A]. ``part``: key tiles of a part, which starts
    a running softmax of its own; ``sums``: the relative error of a product's sums."""
    k, v, k_scale, v_scale = (x.cpu().double().numpy() for x in cache)
    wide_q, dim = rounded_queries(q), q.shape[-1]
    result, bound, log_sum, start = [], [], [], 0
    for count, *ranges in segments or [[q.shape[1], 0, k.shape[1], 0, 0]]:
        queries = wide_q[:, start : start + count].swapaxes(1, 2)
        start += count
        tiles, parts = key_tiles(ranges), []
        for first in range(0, len(tiles), part):
            shape = queries.shape[:3]
            now = Running(np.zeros(queries.shape), np.zeros(queries.shape), np.zeros(shape), np.full(shape, -np.inf))
            for rows in tiles[first : first + part]:
                keys = (k[:, rows] * k_scale[:, rows, :, None]).transpose(0, 2, 3, 1)
                scores = queries @ keys / dim**0.5
                near = sums * (abs(queries) @ abs(keys) / dim**0.5) + 2.0**-20
                for b in range(len(q)):
                    one = Running(now.total[b], now.slack[b], now.weights[b], now.top[b])
                    attend_tile(one, scores[b], near[b], v[b, rows].swapaxes(0, 1), v_scale[b, rows].T, sums)
                    now.total[b], now.slack[b], now.weights[b], now.top[b] = one.total, one.slack, one.weights, one.top
            parts.append(now)
        top = np.max([p.top for p in parts], 0)
        for p in parts:
            p.fade(top)
        weights = sum(p.weights for p in parts)
        mean = sum(p.total for p in parts) / weights[..., None]
        slack = sum(p.slack for p in parts) / weights[..., None] + 1.01 * HALF_ULP[torch.bfloat16] * abs(mean) + 1e-38
        result.append(mean.swapaxes(1, 2))
        bound.append(slack.swapaxes(1, 2))
        log_sum.append(top + np.log(weights))
    return np.concatenate(result, 1), np.concatenate(bound, 1), np.concatenate(log_sum, 2)


def check(
    out: Tensor, lse: Tensor, q: Tensor, cache: Cache, segments: Segments | None = None, part: int = 1 << 30,
    definition: float = 0.2, sums: float = 2.0**-17,
) -> None:  # fmt: skip
    """Every value is as near to the modelled one as sums and bf16 allow, and the result as near to the definition's:
    root mean square, relative."""
    result, bound, log_sum = expected(q, cache, segments, part, sums)
    error = abs(out.cpu().double().numpy() - result)
    assert (error <= bound).all(), f"off by up to {np.nanmax(error / bound):.2f} of the bound"
    assert (abs(lse.cpu().double().numpy() - log_sum) <= max(1e-5, sums) * (1 + abs(log_sum))).all()
    k, v, k_scale, v_scale = cache
    table = None if segments is None else torch.tensor(segments)
    plain = reference.active_attention_fp8(q.float(), k, v, k_scale, v_scale, table).cpu().double().numpy()
    assert np.sqrt(np.mean((result - plain) ** 2)) <= definition * np.sqrt(np.mean(plain**2))


def random_cache(
    rng: np.random.Generator, batch: int, rows: int, heads: int, dim: int, spread: float = 1.0, device: str = "cpu"
) -> Cache:
    """K and V as quantize_rows writes normal rows, whose sizes differ by up to 2^±spread; slices of a cache that holds
    NaN elsewhere."""
    parts = []
    for _ in range(2):
        size = 2.0 ** rng.uniform(-spread, spread, (batch, rows, heads, 1))
        values, scale = reference.quantize_rows(torch.randn(batch, rows, heads, dim) * torch.from_numpy(size).float())
        codes = torch.full((batch, rows + 9, 2, heads, dim), 0x7F, dtype=torch.uint8, device=device)
        scales = torch.full((batch, rows + 5, heads + 3), float("nan"), device=device)
        codes[:, 4 : 4 + rows, 1] = values.view(torch.uint8).to(device)
        scales[:, 2 : 2 + rows, 1 : 1 + heads] = scale.to(device)
        parts.append((codes[:, 4 : 4 + rows, 1].view(E4M3), scales[:, 2 : 2 + rows, 1 : 1 + heads]))
    (k, k_scale), (v, v_scale) = parts
    return k, v, k_scale, v_scale


def codes_of(values: Tensor) -> Tensor:
    """The bytes, in place."""
    return values.view(torch.uint8)


def poison(cache: Cache, segments: Segments) -> None:
    """NaN in the rows of codes and scales that no segment with queries attends to."""
    outside = torch.ones(cache[0].shape[1], dtype=torch.bool)
    for count, *ranges in segments:
        if count:
            outside[slice(*ranges[:2])] = False
            outside[slice(*ranges[2:])] = False
    for values in cache[:2]:
        codes_of(values)[:, outside] = 0x7F
    for scale in cache[2:]:
        scale[:, outside] = float("nan")
