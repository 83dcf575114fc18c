"""``quantize_rows``: rows of K or V in E4M3 with an fp32 scale for each row and head.

Bytes per element of s: s read, 1 written; bound by memory. Codes are made with integers and stored as bytes, so that
it runs on cards without E4M3 too, and divisions are rounded exactly: the bits of :mod:`dsa_rt.reference.layers`.
"""

import torch
import triton
import triton.language as tl
from dsa_rt.kernels.triton.card import ceil_div, power_of_two
from torch import Tensor

_TILE = 2048  # elements of a program
_SMALLEST = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32 number


@triton.jit
def _codes(value):
    """The nearest E4M3 number, to even; NaN (0x7F) for infinity and NaN. A finite quotient is at most 448, up to its
    rounding, so none has to be cut."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960  # another bias of the exponent, 120 less
    rounded = magnitude.to(tl.float32, bitcast=True) + 16384.0  # to multiples of 2^-9
    subnormal = rounded.to(tl.int32, bitcast=True) - 0x46800000
    nearest = tl.where(magnitude < 0x3C800000, subnormal, normal)  # 2^-6
    return tl.where(magnitude >= 0x7F800000, 0x7F, nearest | ((bits >> 24) & 0x80))


@triton.jit(do_not_specialize=["active", "all_rows", "scale_batch", "scale_row"])
def _quantize_rows(
    out, scale, rows, slots, active, all_rows, heads, out_batch, out_row, out_head, scale_batch, scale_row,
    rows_batch, rows_row, rows_head, DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # of a row and head
    token, head = index // heads, index % heads
    place = token if slots is None else tl.load(slots + token, mask=token < active, other=-1)
    there = (token < active) & (place >= 0) & (place < all_rows)
    element = tl.arange(0, DIMS)[None, :]
    inside = there[:, None] & (element < DIM)
    origin = rows + batch * rows_batch + (token * rows_row + head * rows_head)[:, None] + element
    value = tl.load(origin, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(value)
    most = tl.max(tl.where(size < float("inf"), size, 0.0), 1)
    factor = tl.maximum(tl.div_rn(most, tl.full([ROWS], 448.0, tl.float32)), _SMALLEST)
    tl.store(scale + batch * scale_batch + place * scale_row + head, factor, mask=there)
    codes = _codes(tl.div_rn(value, tl.broadcast_to(factor[:, None], value.shape)))
    target = out + batch * out_batch + (place * out_row + head * out_head)[:, None] + element
    tl.store(target, codes.to(tl.uint8), mask=inside)


def quantize_rows(out: Tensor, scale: Tensor, rows: Tensor, slots: Tensor | None = None) -> None:
    """out [B, N, H, D] float8_e4m3fn and scale [B, N, H] fp32 at ``slots`` become rows [B, A, H, D] of any float, last
    dimensions contiguous; slots [A] int64, distinct, or None for rows 0 to A - 1. Slots out of range are skipped."""
    if rows.numel() == 0:
        return
    batch, active, heads, dim = rows.shape
    dims = power_of_two(dim)
    tile = max(_TILE // dims, 1)
    _quantize_rows[(ceil_div(active * heads, tile), batch)](
        out.view(torch.uint8), scale, rows, slots, active, out.shape[1], heads, *out.stride()[:3],
        *scale.stride()[:2], *rows.stride()[:3],
        DIM=dim, DIMS=dims, ROWS=tile, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
