"""The step family: noise from counters, renoising, the cached Euler step and the exit decision.

All kernels keep to the order of operations of :mod:`dsa_rt.reference.step` and are launched with
``enable_fp_fusion=False``, so that results have the bits of the definition; the sum inside the change score and the
exponential of the sigmoid are the two exceptions. Bytes per row of P elements (x of s bytes, velocity of t):
cached_step reads and writes s·P and reads t·P; fresh rows read 2·t·P and write t·P more (the score's old row is one of
the reads). renoise reads (s + t)·P and writes s·P, twice with x0.
"""

import triton
import triton.language as tl
from dsa_rt.kernels.triton.card import ceil_div, power_of_two
from dsa_rt.kernels.triton.philox import philox_normals
from torch import Tensor

_TILE = 1024  # elements of a program: short rows share one
_SMALLEST = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32 number


@triton.jit(do_not_specialize=["active", "draw"])
def _philox_normal(
    out, seeds, tokens, draw, active, width, out_batch, out_row, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.load(tokens + index, mask=index < active, other=0)
    normals = philox_normals(tl.load(seeds + batch), token, draw, tl.program_id(1) * BLOCKS, BLOCKS)
    cols = tl.program_id(1) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    inside = (index < active)[:, None] & (cols < width)[None, :]
    place = out + batch * out_batch + index[:, None] * out_row + cols[None, :]
    tl.store(place, normals.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["active", "draw"])
def _renoise(
    out, x, velocity, x0, seeds, tokens, sigma, keep, sigma_next, draw, active, width,
    out_batch, out_row, x_batch, x_row, v_batch, v_row, x0_batch, x0_row,
    NOISE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(1) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS))[None, :]
    inside = (index < active)[:, None] & (cols < width)
    rows = index[:, None]
    from_x = tl.load(x + batch * x_batch + rows * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(velocity + batch * v_batch + rows * v_row + cols, mask=inside, other=0.0).to(tl.float32)
    clean = from_x - sigma * change
    if x0 is not None:
        tl.store(x0 + batch * x0_batch + rows * x0_row + cols, clean.to(x0.dtype.element_ty), mask=inside)
    noisy = clean
    if NOISE:
        token = tl.load(tokens + index, mask=index < active, other=0)
        normals = philox_normals(tl.load(seeds + batch), token, draw, tl.program_id(1) * BLOCKS, BLOCKS)
        noisy = keep * clean + sigma_next * normals
    tl.store(out + batch * out_batch + rows * out_row + cols, noisy.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["active", "total", "score_batch"])
def _store_fresh(
    cache, fresh, rows, score, active, total, width, cache_batch, cache_row, fresh_batch, fresh_row, score_batch,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Fresh rows into the cache; before that, the relative change of each."""
    batch = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + index, mask=index < active, other=-1)
    valid = (row >= 0) & (row < total)
    change = tl.zeros([ROWS, COLS], tl.float32)
    norm = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, width, COLS):
        cols = start + tl.arange(0, COLS)[None, :]
        inside = valid[:, None] & (cols < width)
        place = cache + batch * cache_batch + row[:, None] * cache_row + cols
        value = tl.load(fresh + batch * fresh_batch + index[:, None] * fresh_row + cols, mask=inside, other=0.0)
        if score is not None:
            old = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            change += tl.abs(value.to(tl.float32) - old)
            norm += tl.abs(value.to(tl.float32))
        tl.store(place, value, mask=inside)
    if score is not None:
        norm_sum = tl.sum(norm, 1)
        norm_sum = tl.where(norm_sum < _SMALLEST, _SMALLEST, norm_sum)  # a NaN stays
        tl.store(score + batch * score_batch + index, tl.div_rn(tl.sum(change, 1), norm_sum), mask=valid)


@triton.jit(do_not_specialize=["total"])
def _advance(
    x, cache, delta, total, width, x_batch, x_row, cache_batch, cache_row, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < total) & (cols < width)
    place = x + batch * x_batch + row * x_row + cols
    velocity = tl.load(cache + batch * cache_batch + row * cache_row + cols, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32) + delta * velocity
    tl.store(place, value.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def _exit_decision(refine, confidence, logit, threshold, batch, COUNT: tl.constexpr):
    index = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = index < batch
    # fp64, then one rounding: devices whose exponentials differ in the last place still agree on the fp32 result.
    wide = tl.load(logit + index, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    value = (1.0 / (1.0 + tl.exp(-wide))).to(tl.float32)
    below = value < tl.load(threshold + index, mask=inside, other=0.0)
    tl.store(confidence + index, value, mask=inside)
    tl.store(refine + index, below.to(refine.dtype.element_ty), mask=inside)


def _tile(width: int) -> tuple[int, int]:
    """(rows, elements of a row) of a program's tile; at least one Philox block."""
    cols = max(4, min(power_of_two(width), _TILE))
    return _TILE // cols, cols


def philox_normal(out: Tensor, seeds: Tensor, tokens: Tensor, draw: int) -> None:
    """See :func:`dsa_rt.ops.step.philox_normal`."""
    batch, active, width = out.shape
    if out.numel() == 0:
        return
    rows, cols = _tile(width)
    _philox_normal[(ceil_div(active, rows), ceil_div(width, cols), batch)](
        out, seeds, tokens, draw, active, width, out.stride(0), out.stride(1),
        ROWS=rows, BLOCKS=cols // 4, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def renoise(
    out: Tensor, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, seeds: Tensor, tokens: Tensor, draw: int,
    x0: Tensor | None = None,
) -> None:  # fmt: skip
    """See :func:`dsa_rt.ops.step.renoise`; ``out`` may be ``x`` or ``velocity``: an element is read before it is
    written."""
    batch, active, width = x.shape
    if x.numel() == 0:
        return
    rows, cols = _tile(width)
    clean = (0, 0) if x0 is None else (x0.stride(0), x0.stride(1))
    _renoise[(ceil_div(active, rows), ceil_div(width, cols), batch)](
        out, x, velocity, x0, seeds, tokens, float(sigma), 1.0 - sigma_next, float(sigma_next), draw, active, width,
        out.stride(0), out.stride(1), x.stride(0), x.stride(1), velocity.stride(0), velocity.stride(1), *clean,
        NOISE=sigma_next != 0, ROWS=rows, BLOCKS=cols // 4, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def cached_step(
    x: Tensor, velocity_cache: Tensor, rows: Tensor, fresh: Tensor, delta_sigma: float, score: Tensor | None = None
) -> None:
    """See :func:`dsa_rt.ops.step.cached_step`. Two launches: fresh rows into the cache (with the score), then all rows.

    Fresh rows out of range are skipped, their score too; duplicates are the caller's to avoid.
    """
    batch, total, width = x.shape
    active = fresh.shape[1]
    if x.numel() == 0:
        return
    tile, cols = _tile(width)
    cache = velocity_cache
    if active:
        _store_fresh[(ceil_div(active, tile), batch)](
            cache, fresh, rows, score, active, total, width, cache.stride(0), cache.stride(1),
            fresh.stride(0), fresh.stride(1), 0 if score is None else score.stride(0),
            ROWS=tile, COLS=cols, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    _advance[(ceil_div(total, tile), ceil_div(width, cols), batch)](
        x, cache, float(delta_sigma), total, width, x.stride(0), x.stride(1), cache.stride(0), cache.stride(1),
        ROWS=tile, COLS=cols, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def exit_decision(refine: Tensor, confidence: Tensor, logit: Tensor, threshold: Tensor) -> None:
    """See :func:`dsa_rt.ops.step.exit_decision`."""
    batch = logit.shape[0]
    if batch:
        _exit_decision[(ceil_div(batch, 128),)](
            refine, confidence, logit, threshold, batch, COUNT=128, num_warps=4, enable_fp_fusion=False
        )
