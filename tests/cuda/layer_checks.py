"""What the CUDA kernels of the memory-bound ops must do, on any machine that runs them: a card, or the emulator.

Expected values are computed in fp64 from the tensors as given; for the step family they are the definition's bits.
Outputs start as NaN inside guarded buffers, inputs lie between NaNs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dsa_rt import reference
from dsa_rt.reference import layers

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["dense", "aligned", "odd", "mixed"]
"""Rows without gaps; gaps of 16 bytes; gaps and a start of one element; each tensor another of the last two."""


class Machine(Protocol):
    """Where kernels run: tensors on ``device``, ops with the arguments of ``dsa_rt._native``."""

    device: torch.device

    def run(self, op: str, *arguments: Any) -> None: ...


class Placed:
    """A tensor inside a larger buffer on the machine, laid out as asked, and whether the rest of it is unchanged."""

    def __init__(self, place: Place, value: Tensor, around: float) -> None:
        step = {"dense": 0, "odd": 1, "aligned": 16 // value.element_size()}[place.layout()]
        *outer, width = value.shape
        padded = [*outer[:1], *(size + 2 * bool(step) for size in outer[1:]), width + 2 * step]
        self._buffer = torch.full(padded, around).to(value.dtype)
        rows = (slice(bool(step), size + bool(step)) for size in outer[1:])
        inside = (slice(None), *rows, slice(step, step + width))
        self._outside = torch.ones(padded, dtype=torch.bool)
        self._outside[inside] = False
        self._buffer[inside] = value
        self._before = self._buffer.clone()
        self._buffer = self._buffer.to(place.device)
        self.tensor = self._buffer[inside]

    def cpu(self) -> Tensor:
        return self.tensor.cpu()

    def intact(self) -> bool:
        """Whether nothing around the tensor changed."""
        return same_bits(self._buffer.cpu()[self._outside], self._before[self._outside])

    def unchanged(self) -> bool:
        return same_bits(self._buffer.cpu(), self._before)


class Place:
    """Brings tensors to a machine in a layout."""

    def __init__(self, machine: Machine, rng: np.random.Generator, layout: str) -> None:
        self.device, self._rng, self._layout = machine.device, rng, layout

    def layout(self) -> str:
        return str(self._rng.choice(["aligned", "aligned", "odd"])) if self._layout == "mixed" else self._layout

    def __call__(self, value: Tensor, around: float = float("nan")) -> Placed:
        return Placed(self, value, around)

    def contiguous(self, value: Tensor) -> Tensor:
        """Without gaps, which some arguments must be: a start that is or is not a multiple of 16 bytes."""
        start = int(self.layout() == "odd")
        buffer = torch.empty(start + value.numel(), dtype=value.dtype, device=self.device)
        return buffer[start:].view(value.shape).copy_(value)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN for NaN with its bits."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def random(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(scale * rng.standard_normal(shape, dtype=np.float32)).to(dtype)


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan")).to(dtype)


def close(result: Tensor, expected: Tensor, size: Tensor | float = 0.0) -> None:
    """One rounding to the result's dtype, and 32 of fp32 on terms of the given size, beyond the result's own."""
    half, least = {
        torch.bfloat16: (2.0**-8, 1e-30), torch.float16: (2.0**-11, 2.0**-25), torch.float32: (2.0**-24, 1e-30)
    }[result.dtype]  # fmt: skip
    allowed = 1.01 * (half * expected.abs() + least) + 32 * 2.0**-24 * (expected.abs() + size)
    error = (result.double() - expected).abs() / allowed
    assert bool((error <= 1).all()), f"{float(error.nan_to_num(math.inf).max())} times what is allowed"


NORM_SHAPES = [  # batch, tokens, channels: every layout of a row, warps and blocks
    (2, 5, 8), (1, 9, 192), (2, 3, 264), (1, 6, 776), (2, 5, 1536), (1, 2, 1544), (1, 3, 5120), (1, 1, 8192),
    (3, 7, 1), (1, 5, 7), (2, 3, 515), (1, 2, 3001),
]  # fmt: skip


def norm_modulate(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int], dtype: torch.dtype, layout: str,
    residual: str,
) -> None:  # fmt: skip
    """residual: "none", "gate", "no gate", or "in place" (with a gate, the sum over x)."""
    batch, active, width = shape
    table_rows = int(rng.integers(1, 4))
    tables = {  # a table may have one batch or one row, and the others more
        name: random(rng, int(rng.choice([1, batch])), int(rng.choice([1, table_rows])), width, scale=0.5)
        for name in ("gate", "shift", "scale")
    }
    rows = torch.from_numpy(rng.integers(0, table_rows, active))
    x, y = random(rng, *shape, dtype=dtype, scale=3.0) + 0.5, random(rng, *shape, dtype=dtype)
    eps = 1e-6
    place = Place(machine, rng, layout)
    places = {name: place(value) for name, value in (tables | {"x": x, "y": y}).items()}
    out, total = (place(nothing(*shape, dtype=dtype)) for _ in range(2))
    t = {name: placed.tensor for name, placed in places.items()}
    known_rows = rows.to(machine.device) if max(table.shape[1] for table in tables.values()) > 1 else None

    def per_token(table: Tensor) -> Tensor:
        return table.double() if table.shape[1] == 1 else table.double()[:, rows]

    normed = x
    if residual == "none":
        machine.run("norm_modulate", out.tensor, t["x"], t["shift"], t["scale"], known_rows, eps)
    else:
        target = places["x"] if residual == "in place" else total
        gate = None if residual == "no gate" else t["gate"]
        machine.run("residual_norm_modulate", target.tensor, out.tensor, t["x"], t["y"], gate, t["shift"], t["scale"],
                    known_rows, eps)  # fmt: skip
        added = y.float() if gate is None else y.float() * per_token(tables["gate"]).float()
        normed = (x.float() + added).to(dtype)
        assert same_bits(target.cpu(), normed)  # the sum's bits are those of the definition
        assert target.intact()
    wide = normed.double()
    deviation = wide - wide.mean(-1, keepdim=True)
    unit = deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps)
    expected = unit * (1 + per_token(tables["scale"])) + per_token(tables["shift"])
    # The error of a mean counts as many times as its deviation's inverse magnifies it.
    spread = wide.abs().amax(-1, keepdim=True) * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps) + 4
    close(out.cpu(), expected, spread * (1 + per_token(tables["scale"])).abs() + per_token(tables["shift"]).abs())
    assert out.intact()
    for name, placed in places.items():
        assert placed.unchanged() or (name == "x" and residual == "in place")
    if residual in ("none", "in place"):
        assert total.unchanged()


def rms_norm(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int], dtype: torch.dtype, layout: str,
    weights: torch.dtype,
) -> None:  # fmt: skip
    """Into another tensor, then in place."""
    x, weight = random(rng, *shape, dtype=dtype, scale=3.0), random(rng, shape[2], dtype=weights)
    place = Place(machine, rng, layout)
    source, out, scale = place(x), place(nothing(*shape, dtype=dtype)), place.contiguous(weight)
    machine.run("rms_norm", out.tensor, source.tensor, scale, 1e-6)
    wide = x.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    close(out.cpu(), expected)
    assert out.intact() and source.unchanged()
    machine.run("rms_norm", source.tensor, source.tensor, scale, 1e-6)
    close(source.cpu(), expected)
    assert source.intact()


QK_SHAPES = [  # batch, tokens, heads, head dim, cache rows
    (1, 5, 12, 128, 9), (2, 3, 3, 64, 3), (1, 2, 24, 128, 5), (2, 4, 5, 16, 8), (1, 3, 3, 12, 4), (2, 3, 5, 6, 7),
    (1, 1, 1, 2, 1), (1, 2, 40, 26, 3), (1, 1, 64, 128, 2),
]  # fmt: skip


def qk_norm_rope_store(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int, int, int], dtype: torch.dtype, layout: str,
    weights: torch.dtype, with_slots: bool,
) -> None:  # fmt: skip
    batch, active, heads, dim, cache_rows = shape
    width = heads * dim
    q, k = (random(rng, batch, active, width, dtype=dtype, scale=2.0) for _ in range(2))
    v = torch.from_numpy(rng.integers(0, 256, (batch, active, width * q.element_size()), dtype=np.uint8)).view(dtype)
    q_weight, k_weight = (random(rng, width, dtype=weights) for _ in range(2))
    angle = random(rng, active, dim // 2, scale=2.0)
    cos, sin = angle.cos(), angle.sin()
    slots = torch.from_numpy(rng.permutation(cache_rows)[:active]) if with_slots else None
    place = Place(machine, rng, layout)
    inputs = [place(value) for value in (q, k, v)]
    out = place(nothing(batch, active, heads, dim, dtype=dtype))
    old = random(rng, 2, batch, cache_rows, heads, dim, dtype=dtype)
    caches = [place(value, 77.0) for value in old]
    plain = [place.contiguous(value) for value in (q_weight, k_weight, cos, sin)]
    machine.run("qk_norm_rope_store", out.tensor, *(c.tensor for c in caches), *(x.tensor for x in inputs), *plain,
                None if slots is None else slots.to(machine.device), 1e-6)  # fmt: skip

    def turned(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The expected rows and the size of the terms in each."""
        wide = x.double()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
        even, odd = wide.unflatten(-1, (heads, dim // 2, 2)).unbind(-1)
        c, s = (value.double()[:, None] for value in (cos, sin))
        rows = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)
        return rows, (even.abs() + odd.abs()).repeat_interleave(2, -1)

    close(out.cpu(), *turned(q, q_weight))
    stored = torch.arange(active) if slots is None else slots
    close(caches[0].cpu()[:, stored], *turned(k, k_weight))
    assert same_bits(caches[1].cpu()[:, stored], v.unflatten(-1, (heads, dim)))
    others = torch.ones(cache_rows, dtype=torch.bool)
    others[stored] = False
    for cache, before in zip(caches, old, strict=True):
        assert same_bits(cache.cpu()[:, others], before[:, others]) and cache.intact()
    assert out.intact() and all(placed.unchanged() for placed in inputs)


MOVES: list[tuple[tuple[int, ...], torch.dtype]] = [  # elements of a row, their dtype
    ((1536,), torch.bfloat16), ((64,), torch.float32), ((7,), torch.float32), ((3, 5), torch.bfloat16),
    ((2, 8, 4), torch.bfloat16), ((1,), torch.int64), ((5,), torch.uint8), ((2500,), torch.bfloat16),
    ((1,), torch.bool),
]  # fmt: skip


def move_rows(
    machine: Machine, rng: np.random.Generator, row: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    """gather_rows and scatter_rows, with rows of every kind of alignment."""
    batch, total, active = (int(n) for n in rng.integers((1, 6, 1), (3, 40, 6)))
    rows = torch.from_numpy(rng.permutation(total)[:active])
    flat = math.prod(row)

    def bits(count: int) -> Tensor:
        top = 2 if dtype == torch.bool else 256
        size = torch.empty(0, dtype=dtype).element_size()
        return torch.from_numpy(rng.integers(0, top, (batch, count, flat * size), dtype=np.uint8)).view(dtype)

    def shaped(placed: Placed) -> Tensor:
        return placed.tensor.unflatten(-1, row)

    place = Place(machine, rng, layout)
    x, source, out = (place(bits(count)) for count in (total, active, active))
    before, new = x.cpu(), source.cpu()
    machine.run("gather_rows", shaped(out), shaped(x), rows.to(machine.device))
    assert same_bits(out.cpu(), before[:, rows]) and out.intact() and x.unchanged()
    machine.run("scatter_rows", shaped(x), rows.to(machine.device), shaped(source))
    before[:, rows] = new
    assert same_bits(x.cpu(), before) and x.intact() and source.unchanged()


QUANTIZE_SHAPES = [  # batch, rows, rows of the cache, heads, head dim: parts of a warp, a warp, more than it holds
    (1, 5, 9, 12, 128), (2, 3, 3, 3, 64), (1, 2, 4, 2, 256), (1, 3, 5, 2, 1032), (2, 4, 7, 5, 8), (1, 3, 4, 3, 37),
    (1, 1, 1, 1, 1), (1, 2, 2, 1, 300), (2, 3, 4, 2, 72), (1, 7, 8, 5, 12),
]  # fmt: skip


def near_midpoints(rng: np.random.Generator, shape: tuple[int, ...], exponents: tuple[int, int]) -> Tensor:
    """fp32 rows of those sizes, whose quotients lie at and beside the middle between two E4M3 numbers."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    most = np.float32(rng.uniform(1, 2, shape[:-1]) * 2.0 ** rng.integers(*exponents, shape[:-1]))[..., None]
    scale = np.maximum(most / np.float32(448), np.finfo(np.float32).tiny).astype(np.float64)
    middles = rng.choice((numbers[:-1] + numbers[1:]) / 2, shape) * rng.choice([-1, 1], shape)
    rows = (middles * scale).astype(np.float32)
    bits = rows.view(np.int32) + rng.integers(-2, 3, shape, dtype=np.int32) * (rows != 0)
    rows = np.clip(bits.view(np.float32), -most, most)
    rows[..., :1] = most
    return torch.from_numpy(rows)


def quantize_rows(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int, int, int], dtype: torch.dtype, layout: str,
    with_slots: bool,
) -> None:  # fmt: skip
    """The definition's bits: of numbers of all sizes, near ties, zeros, infinities and NaN; other rows left alone."""
    batch, active, total, heads, dim = shape
    size = torch.from_numpy(rng.uniform(-24, 10, (batch, active, heads, 1))).float().exp2()
    rows = random(rng, batch, active, heads, dim) * size
    ties = torch.from_numpy(rng.random((batch, active, heads, 1)) < 0.6)
    exponents = (-24, 15) if dtype == torch.float16 else (-130, 120)
    rows = torch.where(ties, near_midpoints(rng, (batch, active, heads, dim), exponents), rows).to(dtype)
    odd = torch.from_numpy(rng.choice([0.0, -0.0, math.inf, -math.inf, math.nan], rows.shape)).to(dtype)
    rows = torch.where(torch.from_numpy(rng.random(rows.shape) < 0.05), odd, rows)
    slots = torch.from_numpy(rng.permutation(total)[:active]) if with_slots else None
    old = torch.from_numpy(rng.integers(0, 256, (batch, total, heads, dim), dtype=np.uint8))
    old_scale = random(rng, batch, total, heads)
    place = Place(machine, rng, layout)
    given, out, scale = place(rows), place(old, 77.0), place(old_scale)
    machine.run("quantize_rows", out.tensor.view(torch.float8_e4m3fn), scale.tensor, given.tensor,
                None if slots is None else slots.to(machine.device))  # fmt: skip
    codes, scales = layers.quantize_rows(rows)
    stored = torch.arange(active) if slots is None else slots
    old[:, stored], old_scale[:, stored] = codes.view(torch.uint8), scales
    assert same_bits(scale.cpu(), old_scale) and same_bits(out.cpu(), old)
    assert out.intact() and scale.intact() and given.unchanged()


POOL_SHAPES = [(1, 100, 3, 8), (2, 37, 3, 64), (1, 70, 12, 16), (2, 9, 1, 7), (1, 1, 2, 12), (1, 40, 5, 6)]


def confidence_pool(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str,
    weight_dtype: torch.dtype, sharpness: float = 3.0,
) -> None:  # fmt: skip
    """shape: batch, tokens, heads, head dim; sharpness: scale of the query."""
    batch, active, heads, dim = shape
    width = heads * dim
    query = random(rng, heads, dim, scale=sharpness)
    keys, tokens = (random(rng, batch, active, width, dtype=dtype) for _ in range(2))
    weight = 1 + random(rng, width, dtype=weight_dtype, scale=0.3)
    place = Place(machine, rng, layout)
    placed = [place(value) for value in (keys, tokens)]
    out = nothing(batch, heads, width).to(machine.device)
    machine.run("confidence_pool", out, place.contiguous(query), placed[0].tensor, place.contiguous(weight),
                placed[1].tensor, 1e-6)  # fmt: skip
    wide = keys.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    terms = query.double() * normed.unflatten(-1, (heads, dim)) / math.sqrt(dim)
    weights = terms.sum(-1).movedim(1, 2).softmax(-1)  # [B, H, A]
    expected = torch.einsum("bha,bac->bhc", weights, tokens.double())
    # A score's error multiplies its weight.
    size = torch.einsum("bha,bac->bhc", weights, tokens.double().abs()) * (2 + terms.abs().sum(-1).amax())
    close(out.cpu(), expected, size)
    assert all(one.unchanged() for one in placed)


STEP_SHAPES = [(2, 7, 33), (1, 19, 64), (3, 2, 1)]


def step_family(
    machine: Machine, rng: np.random.Generator, shape: tuple[int, int, int], dtype: torch.dtype,
    velocity_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Noise, renoising and the cached step have the bits of the definition."""
    batch, count, width = shape

    def on(tensor: Tensor) -> Tensor:
        return tensor.clone().to(machine.device)

    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, batch))
    tokens = torch.from_numpy(rng.integers(0, 2**40, count))
    x, old = random(rng, *shape, dtype=dtype), random(rng, *shape, dtype=velocity_dtype)
    noise = on(nothing(*shape, dtype=dtype))
    machine.run("philox_normal", noise, on(seeds), on(tokens), 3)
    assert same_bits(noise.cpu(), reference.philox_normal(seeds, tokens, width, 3).to(dtype))
    for level in (0.0, 0.4):
        out, x0 = (on(nothing(*shape, dtype=dtype)) for _ in range(2))
        machine.run("renoise", out, x0, on(x), on(old), on(seeds), on(tokens), 0.75, level, 2)
        noisy, clean = reference.renoise(x, old, 0.75, level, seeds, tokens, 2)
        assert same_bits(out.cpu(), noisy) and same_bits(x0.cpu(), clean)
    rows = torch.from_numpy(rng.permutation(count)[: (count + 1) // 2])
    fresh = random(rng, batch, len(rows), width, dtype=velocity_dtype)
    stepped, cache, score = on(x), on(old), on(nothing(batch, len(rows)))
    machine.run("cached_step", stepped, cache, score, on(rows), on(fresh), -0.125)
    new_x, new_cache, change = reference.cached_step(x, old, rows, fresh, -0.125)
    assert same_bits(stepped.cpu(), new_x) and same_bits(cache.cpu(), new_cache)
    torch.testing.assert_close(score.cpu(), change, rtol=1e-5, atol=0)


def exit_decision(machine: Machine, rng: np.random.Generator, dtype: torch.dtype) -> None:
    logit, threshold = random(rng, 300, dtype=dtype, scale=5.0), torch.from_numpy(rng.random(300, dtype=np.float32))
    refine = torch.full((300,), 9, dtype=torch.uint8).to(machine.device)
    confidence = nothing(300).to(machine.device)
    machine.run("exit_decision", refine, confidence, logit.to(machine.device), threshold.to(machine.device))
    torch.testing.assert_close(confidence.cpu(), reference.exit_decision(logit, threshold)[1], rtol=1e-6, atol=0)
    assert torch.equal(refine.cpu(), (confidence.cpu() < threshold).to(torch.uint8))
    assert set(refine.tolist()) == {0, 1}


OUT_OF_RANGE = [
    "norm_modulate", "qk_norm_rope_store", "gather_rows", "scatter_rows", "quantize_rows", "cached_step",
]  # fmt: skip


def out_of_range(
    machine: Machine, op: str, bad: int, place: Callable[[Tensor], Tensor], fails: Callable[[Callable[[], None]], None]
) -> None:
    """A row outside stops the kernel; nothing is written outside, and nothing comes in from there.

    The tensors that rows point into have 64 rows more on either side than the op is told of. ``place`` brings a tensor
    to the machine and leaves the original in sight of what the kernel writes; ``fails`` runs the call and sees to it
    that it fails.
    """
    total, active, width = 6, 3, 16
    read = op in ("gather_rows", "norm_modulate")
    around = torch.full((1, total + 128, width), float("nan") if read else 77.0)
    around[:, 64 : 64 + total] = 1
    fresh, out, x = torch.ones(1, active, width), torch.zeros(1, active, width), torch.zeros(1, total, width)
    cache = torch.zeros(1, total, 2, 8)
    on = {id(t): place(t) for t in (around, fresh, out, x, cache)}
    inside, rows = on[id(around)][:, 64 : 64 + total], place(torch.tensor([1, bad, 4]))
    source, target = on[id(fresh)], on[id(out)]
    ones, angles, scales = place(torch.ones(width)), place(torch.ones(active, 4)), place(torch.ones(1, total, 2))
    arguments: dict[str, tuple[Any, ...]] = {
        "gather_rows": (target, inside, rows),
        "norm_modulate": (target, source, inside, inside, rows, 1e-6),
        "scatter_rows": (inside, rows, source),
        "quantize_rows": (
            inside.view(torch.float8_e4m3fn).unflatten(-1, (2, 32))[..., :8], scales, source.unflatten(-1, (2, 8)),
            rows,
        ),
        "cached_step": (on[id(x)], inside, None, rows, source, 0.1),
        "qk_norm_rope_store": (
            target.unflatten(-1, (2, 8)), inside.unflatten(-1, (2, 8)), on[id(cache)], source, source, source,
            ones, ones, angles, angles, rows, 1e-6,
        ),
    }  # fmt: skip
    fails(lambda: machine.run(op, *arguments[op]))
    if read:
        assert not out.isnan().any()
    else:
        assert (around[:, :64] == 77).all() and (around[:, 64 + total :] == 77).all()
