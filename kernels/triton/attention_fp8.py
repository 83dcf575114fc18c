"""``active_attention_fp8``: :mod:`dsa_rt.kernels.triton.attention` of K and V in FP8 (E4M3) with an fp32 scale for each
row and head, as :mod:`dsa_rt.kernels.triton.quantize` writes them.

K's scale multiplies a column of scores, V's a column of weights before they are rounded. E4M3 values are exact in 16
bits and become such before the products (with fp32 queries, fp32 in three tf32 products): what is saved is memory and
half of the bytes read, not matrix work. E4M3 needs sm_89 or newer. One launch for each segment, no sharing of rows
among programs.
"""

import triton
import triton.language as tl
from dsa_rt.kernels.triton.card import card_of, ceil_div, power_of_two
from torch import Tensor

_LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=["first", "count", "b0", "e0", "b1", "e1", "ks_batch", "vs_batch", "lse_batch", "lse_head"]
)  # fmt: skip
def _attention_fp8(
    out, q, k, v, k_scale, v_scale, lse, scale, heads, first, count, b0, e0, b1, e1,
    out_batch, out_row, out_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    ks_batch, ks_row, vs_batch, vs_row, lse_batch, lse_head,
    DIM: tl.constexpr, DIMS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, batch = (tl.program_id(1) % heads).to(tl.int64), (tl.program_id(1) // heads).to(tl.int64)
    row, element = tl.arange(0, ROWS), tl.arange(0, DIMS)
    local = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    index = (first + local).to(tl.int64)
    inside = (local < count)[:, None] & (element < DIM)[None, :]
    query = tl.load(
        q + batch * q_batch + head * q_head + index[:, None] * q_row + element[None, :], mask=inside, other=0.0
    )
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    k_scale += batch * ks_batch + head
    v_scale += batch * vs_batch + head

    tiles = tl.cdiv(e0 - b0, ROWS)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, DIMS], tl.float32)
    k_tile, v_tile = row[:, None] * k_row + element[None, :], row[:, None] * v_row + element[None, :]
    for number in range(tiles + tl.cdiv(e1 - b1, ROWS)):
        near = number < tiles
        begin = tl.where(near, b0 + number * ROWS, b1 + (number - tiles) * ROWS)
        valid = row < tl.where(near, e0, e1) - begin
        place = tl.cast(begin, tl.int64)
        there = valid[:, None] & (element < DIM)[None, :]
        key = tl.load(k + place * k_row + k_tile, mask=there, other=0.0).to(query.dtype)
        key_scale = tl.load(k_scale + (place + row) * ks_row, mask=valid, other=0.0) * scale
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * key_scale[None, :]
        scores = tl.where(valid[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        keep = tl.exp2(highest - higher)
        total = total * keep + tl.sum(weights, 1)
        value = tl.load(v + place * v_row + v_tile, mask=there, other=0.0).to(query.dtype)
        value_scale = tl.load(v_scale + (place + row) * vs_row, mask=valid, other=0.0)
        weights = (weights * value_scale[None, :]).to(query.dtype)
        result = tl.dot(weights, value, result * keep[:, None], input_precision=PRECISION)
        highest = higher

    place = out + batch * out_batch + head * out_head + index[:, None] * out_row + element[None, :]
    tl.store(place, (result / total[:, None]).to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        log_sum = (highest + tl.log2(total)) * _LN2
        tl.store(lse + batch * lse_batch + head * lse_head + index, log_sum, mask=local < count)


def active_attention_fp8(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, lse: Tensor | None = None,
    segments: Tensor | None = None,
) -> None:  # fmt: skip
    """``out = softmax(q kᵀ / √D) v`` with k and v each its E4M3 number times the scale of its row and head.

    out, q [B, A, H, D] fp32, bf16 or fp16 alike, D at most 128; k, v [B, N, H, D] float8_e4m3fn; k_scale, v_scale
    [B, N, H] fp32; lse [B, H, A] fp32 or None; last dimensions contiguous. segments [S, 5] int64 on the CPU: queries,
    begin, end, begin, end. fp16 holds a weight times its value's scale from 2^-24 to 65504 only.
    """
    batch, active, heads, dim = q.shape
    if q.numel() == 0:
        return
    table = [[active, 0, k.shape[1], 0, 0]] if segments is None else segments.tolist()
    lse_strides = (0, 0) if lse is None else (lse.stride(0), lse.stride(1))
    queries, rows = _tile(dim, q)
    first = 0
    for count, *ranges in table:
        if count:
            _attention_fp8[(ceil_div(count, queries), batch * heads)](
                out, q, k, v, k_scale, v_scale, lse, _LOG2E / dim**0.5, heads, first, count, *ranges,
                *out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *k_scale.stride()[:2], *v_scale.stride()[:2], *lse_strides,
                DIM=dim, DIMS=max(16, power_of_two(dim)), QUERIES=queries, ROWS=rows,
                PRECISION="tf32x3" if q.element_size() == 4 else "tf32",
                num_warps=4, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
        first += count


def _tile(dim: int, q: Tensor) -> tuple[int, int]:
    """queries × rows of a program's scores. Without wgmma each warp has a whole tile of K in q's type in registers."""
    if q.element_size() == 4:
        return 32, 16
    return 64, 64 if dim <= 64 or card_of(q).capability[0] == 9 else 32
