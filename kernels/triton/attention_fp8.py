"""``active_attention_fp8``: :mod:`dsa_rt.kernels.triton.attention` of K and V in FP8 (E4M3), as
:class:`dsa_rt.kv_rows.Float8Rows` keeps them: an fp32 scale for each head of each 64 rows.

A tile of rows lies in one block, so its scales are two numbers: K's multiplies the scores, V's the weighted sum. E4M3
values are exact in 16 bits and become such before the products: what is saved is memory and half of the bytes read, not
matrix work. E4M3 needs sm_89 or newer. One launch for each segment, no sharing of rows among programs.
"""

import triton
import triton.language as tl
from dsa_rt.kernels.triton.card import card_of, ceil_div, power_of_two
from torch import Tensor

from dsa_rt.kv_rows import BLOCK

_LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
_QUERIES = 64


@triton.jit(
    do_not_specialize=["first", "count", "b0", "e0", "s0", "b1", "e1", "s1", "lse_batch", "lse_head"]
)  # fmt: skip
def _attention_fp8(
    out, q, k, v, k_scale, v_scale, lse, scale, heads, first, count, b0, e0, s0, b1, e1, s1,
    out_batch, out_row, out_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    ks_batch, ks_block, ks_head, vs_batch, vs_block, vs_head, lse_batch, lse_head,
    DIM: tl.constexpr, DIMS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr,
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
    k_scale += batch * ks_batch + head * ks_head
    v_scale += batch * vs_batch + head * vs_head

    tiles = tl.cdiv(e0 - b0, ROWS)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, DIMS], tl.float32)
    k_tile, v_tile = row[:, None] * k_row + element[None, :], row[:, None] * v_row + element[None, :]
    for number in range(tiles + tl.cdiv(e1 - b1, ROWS)):
        near = number < tiles
        begin = tl.where(near, b0 + number * ROWS, b1 + (number - tiles) * ROWS)
        left = tl.where(near, e0, e1) - begin
        block = tl.cast(tl.where(near, s0 + number // BLOCK_TILES, s1 + (number - tiles) // BLOCK_TILES), tl.int64)
        place = tl.cast(begin, tl.int64)
        there = (row < left)[:, None] & (element < DIM)[None, :]
        key = tl.load(k + place * k_row + k_tile, mask=there, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key)) * (tl.load(k_scale + block * ks_block) * scale)
        scores = tl.where((row < left)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        keep = tl.exp2(highest - higher)
        total = total * keep + tl.sum(weights, 1)
        value = tl.load(v + place * v_row + v_tile, mask=there, other=0.0).to(query.dtype)
        product = tl.dot(weights.to(query.dtype), value)
        result = result * keep[:, None] + product * tl.load(v_scale + block * vs_block)
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
    """``out = softmax(q kᵀ / √D) v`` with k and v each its E4M3 number times the scale of its head and block.

    out, q [B, A, H, D] bf16 or fp16 alike, D at most 128; k, v [B, N, H, D] float8_e4m3fn; k_scale, v_scale
    [B, blocks, H] fp32; lse [B, H, A] fp32 or None; last dimensions contiguous but for the scales. segments [S, 7]
    int64 on the CPU: queries, then begin, end and the first row's block for two ranges, which begin where a block
    does; None is one range of all rows from block 0.
    """
    batch, active, heads, dim = q.shape
    if q.numel() == 0:
        return
    table = [[active, 0, k.shape[1], 0, 0, 0, 0]] if segments is None else segments.tolist()
    lse_strides = (0, 0) if lse is None else (lse.stride(0), lse.stride(1))
    # Without wgmma each warp holds a whole tile of K in 16 bits in its registers.
    rows = BLOCK if dim <= 64 or card_of(q).capability[0] == 9 else BLOCK // 2
    first = 0
    for count, *ranges in table:
        if count:
            _attention_fp8[(ceil_div(count, _QUERIES), batch * heads)](
                out, q, k, v, k_scale, v_scale, lse, _LOG2E / dim**0.5, heads, first, count, *ranges,
                *out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *k_scale.stride(), *v_scale.stride(), *lse_strides,
                DIM=dim, DIMS=max(16, power_of_two(dim)), QUERIES=_QUERIES, ROWS=rows, BLOCK_TILES=BLOCK // rows,
                num_warps=4, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
        first += count
