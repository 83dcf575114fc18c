"""Ops on given shapes for :mod:`bench.ops`: the native kernel, the definition, and a composition of torch by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_rt.ops import norm, pool, rope
from dsa_rt.ops import rows as row_ops
from dsa_rt.ops import step as ops
from dsa_rt.reference import layers as reference

SIGMA, NEXT, EPS = 0.9375, 0.8333, 1e-6
NORMAL = 45  # operations of a normal: 20 of Philox on whole numbers, the others of Box-Muller over polynomials


@dataclass(frozen=True)
class Op:
    """One op on one shape. bytes: read and written, each operand once; operations: arithmetic that it cannot do
    without, a multiply-add counting as two; outputs: tensors to compare after a call."""

    bytes: int
    operations: int
    native: Callable[[], None]
    definition: Callable[[], None]
    torch: Callable[[], None]
    outputs: tuple[Tensor, ...]
    reset: Callable[[], None] = lambda: None
    tolerance: float = 0.0  # relative to 1 + the size of a value; 0: the same bits


def philox_normal(shape: tuple[int, int, int], dtype: torch.dtype) -> Op:
    out, seeds, tokens = torch.empty(shape, dtype=dtype), torch.arange(shape[0]), torch.arange(shape[1])
    return Op(
        out.nbytes, NORMAL * out.numel(), lambda: ops.philox_normal(out, seeds, tokens, 1, backend="native"),
        lambda: ops.philox_normal(out, seeds, tokens, 1, backend="torch"), lambda: _drop(out.normal_()),
        (out,),
    )  # fmt: skip


def renoise(shape: tuple[int, int, int], dtype: torch.dtype) -> Op:
    x, velocity = (torch.randn(shape).to(dtype) for _ in range(2))
    out, x0, seeds, tokens = (
        torch.empty_like(x),
        torch.empty_like(x),
        torch.arange(shape[0]),
        torch.arange(shape[1]),
    )

    def run(name: str) -> Callable[[], None]:
        return lambda: ops.renoise(out, x, velocity, SIGMA, NEXT, seeds, tokens, 1, x0=x0, backend=name)

    def by_hand() -> None:
        torch.sub(x, velocity, alpha=SIGMA, out=x0)
        out.normal_().mul_(NEXT).add_(x0, alpha=1 - NEXT)

    return Op(4 * x.nbytes, (NORMAL + 5) * x.numel(), run("native"), run("torch"), by_hand, (out, x0))


def cached_step(shape: tuple[int, int, int], dtype: torch.dtype) -> Op:
    """Half of the tokens are fresh."""
    batch, count, width = shape
    rows = torch.randperm(count)[: count // 2].sort().values
    begin, cache0 = (torch.randn(shape).to(dtype) for _ in range(2))
    fresh = torch.randn(batch, len(rows), width).to(dtype)
    x, cache, score = begin.clone(), cache0.clone(), torch.empty(batch, len(rows))
    step = -0.01

    def run(name: str) -> Callable[[], None]:
        return lambda: ops.cached_step(x, cache, rows, fresh, step, score=score, backend=name)

    def by_hand() -> None:
        old = cache.index_select(1, rows)
        torch.div(
            (fresh - old).abs().sum(-1),
            fresh.abs().sum(-1).clamp_min(1e-30),
            out=score if x.dtype == score.dtype else None,
        )
        cache.index_copy_(1, rows, fresh)
        x.add_(cache, alpha=step)

    def reset() -> None:
        x.copy_(begin)
        cache.copy_(cache0)

    # x is read and written, the cache read once (fresh rows: once to compare) and its fresh rows written.
    moved = 3 * x.nbytes + 2 * fresh.nbytes + score.nbytes
    operations = 2 * x.numel() + 3 * fresh.numel()
    return Op(moved, operations, run("native"), run("torch"), by_hand, (x, cache), reset)


def exit_decision(shape: tuple[int, int, int], dtype: torch.dtype) -> Op:
    """One logit for each sample of the batch: its cost is that of a call."""
    logit, threshold = torch.randn(shape[0]).to(dtype), torch.rand(shape[0])
    refine, confidence = torch.empty(shape[0], dtype=torch.bool), torch.empty(shape[0])

    def run(name: str) -> Callable[[], None]:
        return lambda: ops.exit_decision(refine, confidence, logit, threshold, backend=name)

    def by_hand() -> None:
        confidence.copy_(logit).sigmoid_()
        torch.lt(confidence, threshold, out=refine)

    moved = logit.nbytes + threshold.nbytes + refine.nbytes + confidence.nbytes
    return Op(moved, 10 * len(logit), run("native"), run("torch"), by_hand, (refine, confidence))


Shape = tuple[int, int, int, int]  # batch, tokens, heads, head dim
FRAMES = 3  # rows of the modulation tables; every third of the tokens has one


def _modulated(shape: Shape, dtype: torch.dtype, count: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Tables [1, FRAMES, C] fp32, the row of each token, and the tables as the way by hand has them: [1, FRAMES, 1, C]
    in ``dtype``, beside rows [B, FRAMES, tokens of a frame, C]."""
    _, tokens, heads, dim = shape
    tables = [0.1 * torch.randn(1, FRAMES, heads * dim) for _ in range(count)]
    rows = torch.arange(FRAMES).repeat_interleave(tokens // FRAMES)
    return tables, rows, [table[:, :, None].to(dtype) for table in tables]


def _rows(shape: Shape, dtype: torch.dtype) -> Tensor:
    batch, tokens, heads, dim = shape
    return torch.randn(batch, tokens, heads * dim).to(dtype)


def _tolerance(dtype: torch.dtype) -> float:
    return 2.0**-7 if dtype == torch.bfloat16 else 1e-4


def norm_modulate(shape: Shape, dtype: torch.dtype) -> Op:
    (shift, scale), rows, (by_shift, by_scale) = _modulated(shape, dtype, 2)
    x = _rows(shape, dtype)
    out, factor, width = torch.empty_like(x), 1 + by_scale, (x.shape[2],)

    def run(name: str) -> Callable[[], None]:
        return lambda: norm.norm_modulate(out, x, shift, scale, rows, EPS, backend=name)

    def by_hand() -> None:
        _drop(torch.addcmul(by_shift, F.layer_norm(x, width, eps=EPS).unflatten(1, (FRAMES, -1)), factor))

    operations = 9 * x.numel()
    return Op(2 * x.nbytes, operations, run("native"), run("torch"), by_hand, (out,), tolerance=_tolerance(dtype))


def residual_norm_modulate(shape: Shape, dtype: torch.dtype) -> Op:
    (gate, shift, scale), rows, (by_gate, by_shift, by_scale) = _modulated(shape, dtype, 3)
    x, y = _rows(shape, dtype), _rows(shape, dtype)
    total, out, factor = torch.empty_like(x), torch.empty_like(x), 1 + by_scale
    framed, added = x.unflatten(1, (FRAMES, -1)), y.unflatten(1, (FRAMES, -1))

    def run(name: str) -> Callable[[], None]:
        return lambda: norm.residual_norm_modulate(total, out, x, y, gate, shift, scale, rows, EPS, backend=name)

    def by_hand() -> None:
        summed = torch.addcmul(framed, added, by_gate)
        _drop(torch.addcmul(by_shift, F.layer_norm(summed, (x.shape[2],), eps=EPS), factor))

    operations, outputs = 13 * x.numel(), (total, out)
    return Op(4 * x.nbytes, operations, run("native"), run("torch"), by_hand, outputs, tolerance=_tolerance(dtype))


def rms_norm(shape: Shape, dtype: torch.dtype) -> Op:
    x, weight = _rows(shape, dtype), torch.rand(shape[2] * shape[3]).to(dtype)
    out = torch.empty_like(x)

    def run(name: str) -> Callable[[], None]:
        return lambda: norm.rms_norm(out, x, weight, EPS, backend=name)

    def by_hand() -> None:
        _drop(F.rms_norm(x, (x.shape[2],), weight, EPS))

    operations = 4 * x.numel()
    return Op(2 * x.nbytes, operations, run("native"), run("torch"), by_hand, (out,), tolerance=_tolerance(dtype))


def qk_norm_rope_store(shape: Shape, dtype: torch.dtype) -> Op:
    """Into consecutive rows of a cache of four times as many, as a chunk's K and V go."""
    batch, tokens, heads, dim = shape
    q, k, v = (_rows(shape, dtype) for _ in range(3))
    q_weight, k_weight = torch.rand(heads * dim).to(dtype), torch.rand(heads * dim).to(dtype)
    angles = torch.randn(tokens, dim // 2)
    cos, sin = angles.cos(), angles.sin()
    k_cache, v_cache = torch.zeros(2, batch, 4 * tokens, heads, dim, dtype=dtype)
    q_out = torch.empty(batch, tokens, heads, dim, dtype=dtype)
    k_rows, v_rows = k_cache[:, tokens : 2 * tokens], v_cache[:, tokens : 2 * tokens]
    keep = cos.repeat_interleave(2, 1)[:, None].to(dtype)
    turn = torch.stack((-sin, sin), -1).flatten(1)[:, None].to(dtype)

    def run(name: str) -> Callable[[], None]:
        return lambda: rope.qk_norm_rope_store(
            q_out, k_rows, v_rows, q, k, v, q_weight, k_weight, cos, sin, None, EPS, backend=name
        )

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(x, (heads * dim,), weight, EPS).unflatten(2, (heads, dim))
        return torch.addcmul(x * keep, x.unflatten(3, (-1, 2)).flip(-1).flatten(3), turn)

    def by_hand() -> None:
        _drop(turned(q, q_weight))
        k_rows.copy_(turned(k, k_weight))
        v_rows.copy_(v.unflatten(2, (heads, dim)))

    operations, outputs = 18 * q.numel(), (q_out, k_rows, v_rows)
    return Op(6 * q.nbytes, operations, run("native"), run("torch"), by_hand, outputs, tolerance=_tolerance(dtype))


def gather_rows(shape: Shape, dtype: torch.dtype) -> Op:
    """Half of the rows, in order."""
    x = _rows(shape, dtype)
    rows = torch.randperm(shape[1])[: shape[1] // 2].sort().values
    out = x[:, rows].clone()

    def run(name: str) -> Callable[[], None]:
        return lambda: row_ops.gather_rows(out, x, rows, backend=name)

    def by_hand() -> None:
        torch.index_select(x, 1, rows, out=out)

    return Op(2 * out.nbytes, 0, run("native"), run("torch"), by_hand, (out,))


def scatter_rows(shape: Shape, dtype: torch.dtype) -> Op:
    """Every other row."""
    x = _rows(shape, dtype)
    rows = torch.arange(0, shape[1], 2)
    src = x[:, rows].clone()

    def run(name: str) -> Callable[[], None]:
        return lambda: row_ops.scatter_rows(x, rows, src, backend=name)

    def by_hand() -> None:
        x[:, rows] = src

    return Op(2 * src.nbytes, 0, run("native"), run("torch"), by_hand, (x[:, ::2],))


def quantize_rows(shape: Shape, dtype: torch.dtype) -> Op:
    """Into consecutive rows of a cache of four times as many."""
    batch, tokens, heads, dim = shape
    rows = torch.randn(batch, tokens, heads, dim).to(dtype)
    cache = torch.empty(batch, 4 * tokens, heads, dim, dtype=torch.float8_e4m3fn)
    out, scale = cache[:, tokens : 2 * tokens], torch.empty(batch, tokens, heads)
    codes = out.view(torch.uint8)

    def run(name: str) -> Callable[[], None]:
        return lambda: row_ops.quantize_rows(out, scale, rows, backend=name)

    def by_hand() -> None:
        largest = rows.abs().amax(-1)
        torch.div(largest, reference.FLOAT8_MAX, out=scale if rows.dtype == scale.dtype else None)
        out.copy_(rows * (reference.FLOAT8_MAX / largest)[..., None])

    def reset() -> None:
        codes.fill_(0x7F)

    moved, operations = rows.nbytes + codes.nbytes + scale.nbytes, 16 * rows.numel()
    return Op(moved, operations, run("native"), run("torch"), by_hand, (codes, scale), reset)


def confidence_pool(shape: Shape, dtype: torch.dtype) -> Op:
    batch, _, heads, dim = shape
    keys, tokens = _rows(shape, dtype), _rows(shape, dtype)
    query, weight = torch.randn(heads, dim), torch.rand(heads * dim).to(dtype)
    out, near = torch.empty(batch, heads, heads * dim), (query * dim**-0.5).to(dtype)

    def run(name: str) -> Callable[[], None]:
        return lambda: pool.confidence_pool(out, query, keys, weight, tokens, EPS, backend=name)

    def by_hand() -> None:
        normed = F.rms_norm(keys, (heads * dim,), weight, EPS).unflatten(2, (heads, dim))
        weights = torch.einsum("hd,bahd->bha", near, normed).softmax(-1)
        _drop(torch.matmul(weights, tokens))

    moved, operations = keys.nbytes + tokens.nbytes + out.nbytes, (2 * heads + 4) * keys.numel()
    return Op(moved, operations, run("native"), run("torch"), by_hand, (out,), tolerance=1e-4)


def _drop(_: object) -> None:
    """For lambdas that are called for what they do."""
