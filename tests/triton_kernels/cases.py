"""What the Triton kernels are tried on, the same in the interpreter and on a GPU: a :class:`Case` names an op, a dtype
and sizes, :func:`measure` runs it against ``dsa_rt.reference`` and returns one :class:`Check` for each output.

Outputs lie inside buffers of sentinels and hold NaN before the call. No module of Triton is imported here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from dsa_rt.kernels.triton.card import Card, card_of
from torch import Tensor

from dsa_rt import reference
from dsa_rt.ops.triton import function
from dsa_rt.reference import layers

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative error of one rounding."""


@dataclass(frozen=True)
class Case:
    op: str
    dtype: str
    sizes: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        sizes = "-".join(f"{name}{_short(value)}" for name, value in self.sizes.items())
        return f"{self.op}-{self.dtype}-{sizes}"


def _short(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return f"{len(value)}" if isinstance(value[0], tuple) else "x".join(map(str, value))


@dataclass(frozen=True)
class Check:
    """error: the largest difference over what is allowed at that element; passes up to 1. NaN, or a sentinel that
    changed, is infinite."""

    output: str
    error: float


class Buffers:
    """Random inputs and guarded outputs of one case, always the same for a case."""

    def __init__(self, case: Case, device: str) -> None:
        self.device, self.dtype = device, getattr(torch, case.dtype)
        self._random = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
        self._guarded: list[tuple[Tensor, Tensor]] = []

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self._random)
        return values.to(dtype or self.dtype).to(self.device)

    def wide(self, *shape: int) -> Tensor:
        return self.normal(*shape, dtype=torch.float32)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._random).to(self.device)

    def distinct(self, total: int, count: int) -> Tensor:
        return torch.randperm(total, generator=self._random)[:count].to(self.device)

    def guarded(self, value: Tensor) -> Tensor:
        """A copy of ``value`` as a slice of a larger buffer: strides of its own, sentinels around it. Where the last
        dimension is a multiple of 16, so are the strides, as kernels see them in use."""
        gaps = [1] * (value.dim() - 1) + [16]
        buffer = torch.full(
            [size + 2 * gap for size, gap in zip(value.shape, gaps, strict=True)], 77,
            dtype=value.dtype, device=value.device,
        )  # fmt: skip
        inside = tuple(slice(gap, gap + size) for size, gap in zip(value.shape, gaps, strict=True))
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[inside] = False
        self._guarded.append((buffer, outside))
        buffer[inside] = value
        return buffer[inside]

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.guarded(torch.full(shape, math.nan, dtype=dtype or self.dtype, device=self.device))

    def intact(self) -> Check:
        sentinel = torch.tensor(77, device=self.device)
        kept = (buffer[outside] == sentinel.to(buffer.dtype) for buffer, outside in self._guarded)
        changed = not all(bool(same.all()) for same in kept)
        return Check("sentinels", math.inf if changed else 0.0)


def compare(name: str, got: Tensor, expected: Tensor, rtol: float, atol: float) -> Check:
    """rtol, atol: for fp32 outputs; 16-bit ones are allowed one rounding to their type besides."""
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    rounding = ROUNDING.get(got.dtype, 0.0)
    difference = (got.double() - expected.double()).abs()
    allowed = (rtol + rounding) * expected.double().abs() + atol
    error = torch.where(difference == 0, 0.0, difference / allowed)
    return Check(name, math.inf if error.isnan().any() else float(error.max()) if error.numel() else 0.0)


def exact(name: str, got: Tensor, expected: Tensor) -> Check:
    """Equal values; a NaN is equal to a NaN."""
    assert got.shape == expected.shape and got.dtype == expected.dtype, (name, got.dtype, expected.dtype)
    same = (got == expected) | ((got != got) & (expected != expected))
    return Check(name, 0.0 if bool(same.all()) else math.inf)


def measure(case: Case, device: str) -> list[Check]:
    buffers = Buffers(case, device)
    checks = list(_OPS[case.op](buffers, **case.sizes))
    assert checks
    return [*checks, buffers.intact()]


def _norm(
    b: Buffers, batch: int, active: int, width: int, table: int, residual: bool = False, gated: bool = True,
    shared: bool = False, beyond: bool = False, in_place: bool = False,
) -> Iterator[Check]:  # fmt: skip
    """shared: one table for all of the batch; beyond: some rows out of range, whose tokens stay as they were."""
    x, y = b.normal(batch, active, width) + 1, b.normal(batch, active, width)
    gate, shift, scale = (b.wide(1 if shared else batch, table, width) for _ in range(3))
    rows = b.integers(0, table, active)
    asked, written = rows.clone(), torch.ones(active, dtype=torch.bool, device=b.device)
    if beyond:
        asked[0], asked[active // 2], asked[-1] = -1, table, 2**40
        written[0] = written[active // 2] = written[-1] = False
    out = b.poisoned(batch, active, width)
    if residual:
        total = b.guarded(x) if in_place else b.poisoned(batch, active, width)
        start = total if in_place else x
        function("residual_norm_modulate")(
            total, out, start, y, gate if gated else None, shift, scale, asked if table > 1 else None, 1e-6
        )
        want_sum, want = layers.residual_norm_modulate(x, y, gate if gated else None, shift, scale, rows, 1e-6)
        yield exact("sum", total[:, written], want_sum[:, written])
        left = x[:, ~written] if in_place else torch.full_like(x[:, ~written], math.nan)
        yield exact("sum of skipped tokens", total[:, ~written], left)
    else:
        function("norm_modulate")(out, x, shift, scale, asked if table > 1 else None, 1e-6)
        want_sum = x
    want = layers.norm_modulate(want_sum.float(), shift, scale, rows, 1e-6)
    yield compare("out", out[:, written], want[:, written], 2e-6, 4e-6)
    yield exact("out of skipped tokens", out[:, ~written], torch.full_like(out[:, ~written], math.nan))


def _rms_norm(
    b: Buffers, batch: int, active: int, width: int, weights: str = "float32", in_place: bool = False
) -> Iterator[Check]:
    x, weight = b.normal(batch, active, width) + 1, b.normal(width, dtype=getattr(torch, weights))
    out = b.guarded(x) if in_place else b.poisoned(batch, active, width)
    function("rms_norm")(out, out if in_place else x, weight, 1e-6)
    yield compare("out", out, layers.rms_norm(x.float(), weight, 1e-6), 2e-6, 4e-6)


def _rope(
    b: Buffers, batch: int, active: int, heads: int, dim: int, total: int, slots: str = "some", beyond: bool = False,
    weights: str = "float32",
) -> Iterator[Check]:  # fmt: skip
    width = heads * dim
    q, k, v = (b.normal(batch, active, width) for _ in range(3))
    q_weight, k_weight = (b.normal(width, dtype=getattr(torch, weights)) + 1 for _ in range(2))
    angles = b.wide(active, dim // 2) * 3
    q_out = b.poisoned(batch, active, heads, dim)
    k_cache, v_cache = (b.poisoned(batch, total, heads, dim) for _ in range(2))
    places = torch.arange(active, device=b.device) if slots == "none" else b.distinct(total, active)
    stored = torch.ones(active, dtype=torch.bool, device=b.device)
    asked = places.clone()
    if beyond:
        asked[0], asked[-1] = -1, total
        stored[0] = stored[-1] = False
    function("qk_norm_rope_store")(
        q_out, k_cache, v_cache, q, k, v, q_weight, k_weight, angles.cos(), angles.sin(),
        None if slots == "none" else asked, 1e-6,
    )  # fmt: skip
    want_q, want_k, want_v = layers.qk_norm_rope_store(
        q.float(), k.float(), v, q_weight, k_weight, angles.cos(), angles.sin(), heads, 1e-6
    )
    yield compare("q", q_out, want_q, 2e-6, 4e-6)
    yield compare("k", k_cache[:, places[stored]], want_k[:, stored], 2e-6, 4e-6)
    yield exact("v", v_cache[:, places[stored]], want_v[:, stored])
    others = torch.ones(total, dtype=torch.bool, device=b.device)
    others[places[stored]] = False
    for name, cache in (("k", k_cache), ("v", v_cache)):
        yield exact(f"other rows of {name}", cache[:, others], torch.full_like(cache[:, others], math.nan))


def _rows(
    b: Buffers, batch: int, active: int, total: int, shape: tuple[int, ...], scatter: bool, beyond: bool = False
) -> Iterator[Check]:
    """Rows of any dtype: values are small integers, so that every dtype holds them."""
    rows = b.distinct(total, active)
    asked, moved = rows.clone(), torch.ones(active, dtype=torch.bool, device=b.device)
    if beyond:
        asked[0], asked[-1] = -5, total
        moved[0] = moved[-1] = False

    def dense_rows(count: int, values: Tensor | None = None) -> Tensor:
        """[B, count, *shape] where batch and row lie apart and what is behind them is dense."""
        width = math.prod(shape)
        source = b.integers(0, 2, batch, count, width) if values is None else values
        return b.guarded(source.to(b.dtype)).unflatten(-1, shape)

    if scatter:
        old, src = dense_rows(total), dense_rows(active)
        x = dense_rows(total, old.flatten(2))
        function("scatter_rows")(x, asked, src)
        got, old, src = (t.contiguous().view(torch.uint8) for t in (x, old, src[:, moved]))
        yield exact("x", got, layers.scatter_rows(old, rows[moved], src))
    else:
        x = dense_rows(total)
        out = dense_rows(active, torch.full((batch, active, math.prod(shape)), 5, device=b.device))
        untouched = out.clone()
        function("gather_rows")(out, x, asked)
        yield exact("out", out[:, moved], layers.gather_rows(x, rows)[:, moved])
        yield exact("skipped rows", out[:, ~moved], untouched[:, ~moved])


def _philox(b: Buffers, batch: int, active: int, width: int, draw: int) -> Iterator[Check]:
    seeds, tokens = b.integers(-(2**63), 2**63 - 1, batch), b.integers(0, 2**40, active)
    out = b.poisoned(batch, active, width)
    function("philox_normal")(out, seeds, tokens, draw)
    want = reference.philox_normal(seeds, tokens, width, draw)
    yield exact("out", out, want.to(b.dtype))


def _renoise(
    b: Buffers, batch: int, active: int, width: int, sigma_next: float, clean: bool, velocity: str = "float32",
    in_place: str = "",
) -> Iterator[Check]:  # fmt: skip
    seeds, tokens = b.integers(-(2**63), 2**63 - 1, batch), b.integers(0, 2**40, active)
    x, change = b.normal(batch, active, width), b.normal(batch, active, width, dtype=getattr(torch, velocity))
    want, want_clean = reference.renoise(x, change, 0.83, sigma_next, seeds, tokens, 3)
    x0 = b.poisoned(batch, active, width) if clean else None
    held_x, held_change = b.guarded(x), b.guarded(change)
    out = {"": b.poisoned(batch, active, width), "x": held_x, "velocity": held_change}[in_place]
    function("renoise")(out, held_x, held_change, 0.83, sigma_next, seeds, tokens, 3, x0)
    yield exact("out", out, want)
    if x0 is not None:
        yield exact("x0", x0, want_clean)


def _cached_step(
    b: Buffers, batch: int, total: int, active: int, width: int, score: bool, velocity: str = "float32",
    beyond: bool = False,
) -> Iterator[Check]:  # fmt: skip
    dtype = getattr(torch, velocity)
    x, old = b.normal(batch, total, width), b.normal(batch, total, width, dtype=dtype)
    fresh, rows = b.normal(batch, active, width, dtype=dtype), b.distinct(total, active)
    asked, kept = rows.clone(), torch.ones(active, dtype=torch.bool, device=b.device)
    if beyond:
        asked[0], asked[-1] = -1, total
        kept[0] = kept[-1] = False
    held_x, cache = b.guarded(x), b.guarded(old)
    change = b.poisoned(batch, active, dtype=torch.float32) if score else None
    function("cached_step")(held_x, cache, asked, b.guarded(fresh), -0.07, change)
    want_x, want_cache, want_change = reference.cached_step(x, old, rows[kept], fresh[:, kept], -0.07)
    yield exact("x", held_x, want_x)
    yield exact("velocity_cache", cache, want_cache)
    if change is not None:
        yield compare("score", change[:, kept], want_change, 2e-6, 0.0)
        yield exact("score of skipped rows", change[:, ~kept], torch.full_like(change[:, ~kept], math.nan))


def _exit_decision(b: Buffers, count: int, flag: str) -> Iterator[Check]:
    special = torch.tensor([0.0, -0.0, 30.0, -30.0, 3e4, -3e4, math.inf, -math.inf, math.nan])
    logit = torch.cat((special.to(b.dtype).to(b.device), b.normal(count) * 4))
    threshold = torch.sigmoid(logit.double()).float().nan_to_num(0.5)
    threshold[1::2] += 1e-3
    refine = b.guarded(torch.full_like(logit, 9, dtype=torch.uint8))
    confidence = b.poisoned(len(logit), dtype=torch.float32)
    function("exit_decision")(refine.view(getattr(torch, flag)), confidence, logit, threshold)
    want, want_confidence = reference.exit_decision(logit, threshold)
    yield exact("refine", refine, want.to(torch.uint8))
    yield exact("confidence", confidence, want_confidence)


def _pool(
    b: Buffers, batch: int, active: int, heads: int, dim: int, weights: str = "float32", large: float = 1.0,
    multiprocessors: int = 0,
) -> Iterator[Check]:  # fmt: skip
    """multiprocessors: shares of the tokens as on a card of so many, fewer and longer ones."""
    width = heads * dim
    keys, tokens = b.guarded(b.normal(batch, active, width)), b.guarded(b.normal(batch, active, width))
    query, weight = b.wide(heads, dim) * large, b.normal(width, dtype=getattr(torch, weights)) + 1
    out = torch.full((batch, heads, width), math.nan, device=b.device)
    card = card_of(keys)._replace(multiprocessors=multiprocessors) if multiprocessors else card_of(keys)
    with mock.patch("dsa_rt.kernels.triton.pool.card_of", lambda tensor: card):
        scratch = b.poisoned(function("confidence_pool_scratch")(out, tokens), dtype=torch.float32)
        function("confidence_pool")(out, query, keys, weight, tokens, 1e-6, scratch)
    want = layers.confidence_pool(query, keys.float(), weight, tokens.float(), 1e-6)
    yield compare("out", out, want, 1e-5, 1e-5 * large)


def _attention(
    b: Buffers, batch: int, active: int, total: int, heads: int, dim: int, segments: tuple[tuple[int, ...], ...] = (),
    tile: tuple[int, int] | None = None, shares: int = 1, lse: bool = True, large: float = 1.0,
) -> Iterator[Check]:  # fmt: skip
    """Rows that no segment attends to hold NaN. tile: queries × rows, else what the kernel chooses with scratch."""
    q = b.guarded(b.normal(batch, active, heads, dim) * large)
    k, v = (b.guarded(b.normal(batch, total, heads, dim)) for _ in range(2))
    table = torch.tensor(segments, dtype=torch.int64) if segments else None
    want = layers.active_attention(q.float(), k.float(), v.float(), table)
    want_lse = layers.attention_log_sum_exp(q.float(), k.float(), table)
    attended = torch.zeros(total, dtype=torch.bool, device=b.device)
    for _, b0, e0, b1, e1 in segments or ((active, 0, total, 0, 0),):
        attended[b0:e0] = attended[b1:e1] = True
    k[:, ~attended] = v[:, ~attended] = math.nan
    out = b.poisoned(batch, active, heads, dim)
    got_lse = b.poisoned(batch, heads, active, dtype=torch.float32) if lse else None
    if tile is None:
        scratch = b.poisoned(function("active_attention_scratch")(q, k, table), dtype=torch.float32)
        function("active_attention")(out, q, k, v, got_lse, table, scratch)
    else:
        from dsa_rt.kernels.triton import attention, tiles

        choice = tiles.Choice(tiles.Tile(*tile, warps=4, stages=2, rate=1.0), shares)
        scratch = b.poisoned(attention.scratch_of(choice, q), dtype=torch.float32)
        attention.run(choice, out, q, k, v, got_lse, table, scratch)
    # The softmax's weights are rounded to 16 bits before they meet V, whose elements are about 1.
    yield compare("out", out, want, 1e-5, 1e-5 * large + 2 * ROUNDING.get(b.dtype, 0.0))
    if got_lse is not None:
        yield compare("lse", got_lse, want_lse, 2e-6, 1e-5 * large)


def _attention_fp8(
    b: Buffers, batch: int, active: int, total: int, heads: int, dim: int, segments: tuple[tuple[int, ...], ...] = (),
    capability: int = 0, lse: bool = True,
) -> Iterator[Check]:  # fmt: skip
    """Rows whose sizes differ; codes and scales of rows that no segment attends to are NaN. capability: tiles of
    another card than the one in use."""
    table = torch.tensor(segments, dtype=torch.int64) if segments else None
    attended = torch.zeros(total, dtype=torch.bool, device=b.device)
    for _, b0, e0, b1, e1 in segments or ((active, 0, total, 0, 0),):
        attended[b0:e0] = attended[b1:e1] = True
    stored, scales, wide = [], [], []
    for size in (1, 3):
        rows = b.wide(batch, total, heads, dim) * size * b.wide(batch, total, heads, 1).exp().clamp_max(2)
        values, scale = layers.quantize_rows(rows)
        wide.append(layers.dequantize_rows(values, scale))
        values.view(torch.uint8)[:, ~attended] = 0x7F
        scale[:, ~attended] = math.nan
        stored.append(b.guarded(values))
        scales.append(b.guarded(scale))
    q = b.guarded(b.normal(batch, active, heads, dim))
    out = b.poisoned(batch, active, heads, dim)
    got_lse = b.poisoned(batch, heads, active, dtype=torch.float32) if lse else None
    card = Card(132, (capability, 0)) if capability else card_of(q)
    with mock.patch("dsa_rt.kernels.triton.attention_fp8.card_of", lambda tensor: card):
        function("active_attention_fp8")(out, q, *stored, *scales, got_lse, table)
    # Weights times V's scales are rounded to 16 bits before they meet E4M3 numbers; the sum is of elements up to 30.
    want = layers.active_attention(q.float(), *wide, table)
    yield compare("out", out, want, 1e-5, 2e-5 + 6 * ROUNDING.get(b.dtype, 0.0))
    if got_lse is not None:
        yield compare("lse", got_lse, layers.attention_log_sum_exp(q.float(), wide[0], table), 2e-6, 1e-5)


def _quantize(
    b: Buffers, batch: int, active: int, total: int, heads: int, dim: int, slots: str = "some", beyond: bool = False
) -> Iterator[Check]:
    """Rows of all sizes that their dtype has, zeros, infinity and NaN among them; in fp32 also halves between numbers
    of E4M3 times a scale that is no power of two, which a product with 1 / scale would miss."""
    rows = (b.wide(batch, active, heads, dim) * torch.exp(8 * b.wide(batch, active, heads, 1))).to(b.dtype)
    rows[:, active // 3] = ((17 + 2 * b.integers(0, 8, batch, heads, dim)) * 255).to(b.dtype)
    rows[:, active // 3, :, 0] = 448 * 255 if b.dtype == torch.float32 else 448
    rows[0, 0, 0] = 0
    rows[0, active // 2, 0, dim // 2], rows[0, -1, -1, 0] = math.inf, math.nan
    places = torch.arange(active, device=b.device) if slots == "none" else b.distinct(total, active)
    stored = torch.ones(active, dtype=torch.bool, device=b.device)
    asked = places.clone()
    if beyond:
        asked[0], asked[-1] = -1, total
        stored[0] = stored[-1] = False
    out = b.poisoned(batch, total, heads, dim, dtype=torch.float8_e4m3fn)
    scale = b.poisoned(batch, total, heads, dtype=torch.float32)
    want, want_scale = layers.quantize_rows(rows)
    function("quantize_rows")(out, scale, b.guarded(rows), None if slots == "none" else asked)
    others = torch.ones(total, dtype=torch.bool, device=b.device)
    others[places[stored]] = False
    codes, want_codes = out.contiguous().view(torch.uint8), want.view(torch.uint8)
    yield exact("out", codes[:, places[stored]], want_codes[:, stored])
    yield exact("scale", scale[:, places[stored]], want_scale[:, stored])
    yield exact("other rows of out", codes[:, others], torch.full_like(codes[:, others], 0x7F))
    yield exact("other rows of scale", scale[:, others], torch.full_like(scale[:, others], math.nan))


_OPS: dict[str, Callable[..., Iterator[Check]]] = {
    "norm_modulate": _norm,
    "residual_norm_modulate": partial(_norm, residual=True),
    "rms_norm": _rms_norm,
    "qk_norm_rope_store": _rope,
    "gather_rows": partial(_rows, scatter=False),
    "scatter_rows": partial(_rows, scatter=True),
    "philox_normal": _philox,
    "renoise": _renoise,
    "cached_step": _cached_step,
    "exit_decision": _exit_decision,
    "confidence_pool": _pool,
    "active_attention": _attention,
    "active_attention_fp8": _attention_fp8,
    "quantize_rows": _quantize,
}
