"""``active_attention``: A queries × the valid rows of a cache, like FlashAttention-2 (Dao, arXiv 2307.08691).

A program has a tile of queries of one head and walks over the rows it attends to: scores, softmax online in powers of
two (fp32), weighted sum of V (fp32 accumulators). No mask inside: only the last tile of a range of rows is cut, so rows
beyond it may hold anything. 4·A·N·D·H operations, 2·s·(A + N)·D·H bytes and more where K and V do not stay in L2: bound
by the matrix units above about 200 queries on an H100.

Queries come in segments, each with its own one or two ranges of rows; a launch serves up to four segments, whose table
travels in the kernel's arguments. fp32 products are three tf32 products each ("tf32x3"), 16-bit ones are exact in the
fp32 accumulators, and the softmax's weights are rounded to the 16-bit type before they meet V.

A row's result depends on the tile that :mod:`dsa_rt.kernels.triton.tiles` chooses, so calls of other sizes may differ
in the last places; calls of the same sizes on the same card have the same bits.
"""

import triton
import triton.language as tl
from dsa_rt.kernels.triton.card import card_of, ceil_div, power_of_two
from dsa_rt.kernels.triton.tiles import Choice, choose
from torch import Tensor

_LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
_LAUNCH = 4  # segments of a launch
_MERGED = 16  # queries of a program that merges


@triton.jit
def _next(tile, first, count, b0, e0, b1, e1, next_count, next_b0, next_e0, next_b1, next_e1, QUERIES: tl.constexpr):
    """The next segment where the tile lies beyond this one: (tile within it, its first query, the segment)."""
    tiles = tl.cdiv(count, QUERIES)
    beyond = tile >= tiles
    return (
        tl.where(beyond, tile - tiles, tile), tl.where(beyond, first + count, first),
        tl.where(beyond, next_count, count), tl.where(beyond, next_b0, b0), tl.where(beyond, next_e0, e0),
        tl.where(beyond, next_b1, b1), tl.where(beyond, next_e1, e1),
    )  # fmt: skip


@triton.jit
def _attend(
    query, keys, values, left, scale, highest, total, result, CUT: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows: (row maxima, sums and weighted sums) after it. CUT: only the first ``left`` rows are valid."""
    row, element = tl.arange(0, ROWS), tl.arange(0, DIMS)
    if CUT:
        inside = (row < left)[:, None] & (element < DIM)[None, :]
        key = tl.load(keys, mask=inside, other=0.0)
    elif DIM < DIMS:
        inside = (element < DIM)[None, :]
        key = tl.load(keys, mask=inside, other=0.0)
    else:
        key = tl.load(keys)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if CUT:
        scores = tl.where((row < left)[None, :], scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    keep = tl.exp2(highest - higher)
    total = total * keep + tl.sum(weights, 1)
    result = result * keep[:, None]
    if CUT or DIM < DIMS:
        value = tl.load(values, mask=inside, other=0.0)
    else:
        value = tl.load(values)
    result = tl.dot(weights.to(value.dtype), value, result, input_precision=PRECISION)
    return higher, total, result


@triton.jit(
    do_not_specialize=[
        "active", "first", "lse_batch", "lse_head", "lse_share",
        "n0", "b00", "e00", "b01", "e01", "n1", "b10", "e10", "b11", "e11",
        "n2", "b20", "e20", "b21", "e21", "n3", "b30", "e30", "b31", "e31",
    ]
)  # fmt: skip
def _attention(
    out, q, k, v, lse, scale, active, heads, first,
    out_batch, out_row, out_head, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    lse_batch, lse_head, lse_share,
    n0, b00, e00, b01, e01, n1, b10, e10, b11, e11, n2, b20, e20, b21, e21, n3, b30, e30, b31, e31,
    SEGMENTS: tl.constexpr, SHARED: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, share = tl.program_id(0), tl.program_id(2)
    head, batch = (tl.program_id(1) % heads).to(tl.int64), (tl.program_id(1) // heads).to(tl.int64)
    count, b0, e0, b1, e1 = n0, b00, e00, b01, e01
    if SEGMENTS > 1:
        tile, first, count, b0, e0, b1, e1 = _next(
            tile, first, count, b0, e0, b1, e1, n1, b10, e10, b11, e11, QUERIES
        )
        tile, first, count, b0, e0, b1, e1 = _next(
            tile, first, count, b0, e0, b1, e1, n2, b20, e20, b21, e21, QUERIES
        )
        tile, first, count, b0, e0, b1, e1 = _next(
            tile, first, count, b0, e0, b1, e1, n3, b30, e30, b31, e31, QUERIES
        )

    row, element = tl.arange(0, ROWS), tl.arange(0, DIMS)
    local = tile * QUERIES + tl.arange(0, QUERIES)
    index = (first + local).to(tl.int64)
    inside = (local < count)[:, None] & (element < DIM)[None, :]
    query = tl.load(
        q + batch * q_batch + head * q_head + index[:, None] * q_row + element[None, :], mask=inside, other=0.0
    )
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head

    # Tiles of rows are counted: first those that lie whole in a range, then what is left at the end of each.
    whole0, whole1 = (e0 - b0) // ROWS, (e1 - b1) // ROWS
    whole = whole0 + whole1
    start, stop = 0, whole + 2
    if SHARED:
        each = tl.cdiv(stop, tl.num_programs(2))
        start = share * each
        stop = tl.minimum(start + each, stop)

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, DIMS], tl.float32)
    k_tile, v_tile = row[:, None] * k_row + element[None, :], row[:, None] * v_row + element[None, :]
    for number in range(start, tl.minimum(stop, whole)):
        begin = tl.where(number < whole0, b0 + number * ROWS, b1 + (number - whole0) * ROWS)
        place = tl.cast(begin, tl.int64)
        highest, total, result = _attend(
            query, k + place * k_row + k_tile, v + place * v_row + v_tile, ROWS, scale, highest, total, result,
            False, DIM, DIMS, ROWS, PRECISION,
        )  # fmt: skip
    for part in tl.range(0, 2, num_stages=1):
        begin = tl.where(part == 0, b0 + whole0 * ROWS, b1 + whole1 * ROWS)
        left = tl.where(part == 0, e0, e1) - begin
        if (left > 0) & (start <= whole + part) & (whole + part < stop):
            place = tl.cast(begin, tl.int64)
            highest, total, result = _attend(
                query, k + place * k_row + k_tile, v + place * v_row + v_tile, left, scale, highest, total, result,
                True, DIM, DIMS, ROWS, PRECISION,
            )  # fmt: skip

    if SHARED:  # a share may be without a tile of rows: its sum is 0
        log_sum = highest + tl.log2(total)
        result = result / tl.where(total > 0, total, 1.0)[:, None]
        out += share.to(tl.int64) * active * out_row
        lse += share.to(tl.int64) * lse_share
    else:
        log_sum = (highest + tl.log2(total)) * _LN2
        result = result / total[:, None]
    place = out + batch * out_batch + head * out_head + index[:, None] * out_row + element[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        tl.store(lse + batch * lse_batch + head * lse_head + index, log_sum, mask=local < count)


@triton.jit(do_not_specialize=["active", "shares", "lse_batch", "lse_head"])
def _merge(
    out, lse, partial, sums, active, heads, shares, out_batch, out_row, out_head, lse_batch, lse_head,
    DIM: tl.constexpr, DIMS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Joins shares: partial [B, shares, A, H, D] means, sums [B, shares, H, A] their log2-sum-exp2, both fp32."""
    head, batch = (tl.program_id(1) % heads).to(tl.int64), (tl.program_id(1) // heads).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    element = tl.arange(0, DIMS)
    there = index < active
    inside = there[:, None] & (element < DIM)[None, :]
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, DIMS], tl.float32)
    for share in range(shares):
        part = batch * shares + share
        log_sum = tl.load(sums + (part * heads + head) * active + index, mask=there, other=0.0)
        place = partial + ((part * active + index)[:, None] * heads + head) * DIM + element[None, :]
        mean = tl.load(place, mask=inside, other=0.0)
        higher = tl.maximum(highest, log_sum)
        reference = tl.where(higher == float("-inf"), 0.0, higher)  # so far no share with a row
        keep, weight = tl.exp2(highest - reference), tl.exp2(log_sum - reference)
        total = total * keep + weight
        result = result * keep[:, None] + mean * weight[:, None]
        highest = higher
    result = result / total[:, None]
    place = out + batch * out_batch + head * out_head + index[:, None] * out_row + element[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        tl.store(
            lse + batch * lse_batch + head * lse_head + index, (highest + tl.log2(total)) * _LN2, mask=there
        )  # fmt: skip


def chosen(q: Tensor, k: Tensor, segments: Tensor | None = None, *, may_share: bool = True) -> Choice:
    """What :func:`active_attention` takes for these arguments."""
    batch, active, heads, dim = q.shape
    rows = k.shape[1]
    if segments is not None:  # the mean of what a query attends to
        rows = ceil_div(sum(n * (e0 - b0 + e1 - b1) for n, b0, e0, b1, e1 in segments.tolist()), active)
    return choose(active, rows, heads, batch, dim, q.element_size(), card_of(q), may_share)


def scratch_of(choice: Choice, q: Tensor) -> int:
    """fp32 numbers of scratch that a choice needs."""
    batch, active, heads, dim = q.shape
    return choice.shares * batch * active * heads * (dim + 1) if choice.shares > 1 else 0


def active_attention_scratch(q: Tensor, k: Tensor, segments: Tensor | None = None) -> int:
    """How many fp32 numbers of scratch make :func:`active_attention` faster; 0 where they would not."""
    return scratch_of(chosen(q, k, segments), q) if q.numel() else 0


def active_attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None = None, segments: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:  # fmt: skip
    """``out = softmax(q kᵀ / √D) v`` for each head.

    out, q [B, A, H, D]; k, v [B, N, H, D], fp32, bf16 or fp16 alike, D at most 256, last dimension contiguous; lse
    [B, H, A] fp32, last dimension contiguous, receives the natural log-sum-exp of the scaled scores; segments [S, 5]
    int64 on the CPU: queries, begin, end, begin, end. scratch: fp32, contiguous, of :func:`active_attention_scratch`
    numbers or more; with None the rows are not shared among programs.
    """
    if q.numel():
        run(chosen(q, k, segments, may_share=scratch is not None), out, q, k, v, lse, segments, scratch)


def run(
    choice: Choice, out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, segments: Tensor | None,
    scratch: Tensor | None,
) -> None:  # fmt: skip
    """:func:`active_attention` with a given tile and number of shares, for tests and benchmarks; A at least 1."""
    batch, active, heads, dim = q.shape
    table = [[active, 0, k.shape[1], 0, 0]] if segments is None else segments.tolist()
    scale = _LOG2E / dim**0.5
    shares = choice.shares
    if shares == 1:
        _launch(out, q, k, v, lse, (*out.stride()[:3], *_lse_strides(lse), 0), scale, table, choice)
        return
    assert scratch is not None
    rows = batch * shares * active * heads
    partial, sums = scratch[: rows * dim], scratch[rows * dim :]  # [B, shares, A, H, D] and [B, shares, H, A]
    strides = (shares * active * heads * dim, heads * dim, dim, shares * heads * active, active, heads * active)
    _launch(partial, q, k, v, sums, strides, scale, table, choice)
    _merge[(ceil_div(active, _MERGED), batch * heads)](
        out, lse, partial, sums, active, heads, shares, *out.stride()[:3], *_lse_strides(lse),
        DIM=dim, DIMS=max(16, power_of_two(dim)), QUERIES=_MERGED, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _launch(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, strides: tuple[int, ...], scale: float,
    table: list[list[int]], choice: Choice,
) -> None:  # fmt: skip
    """One launch for each four segments; strides of out (batch, row, head) and lse (batch, head, share)."""
    batch, active, heads, dim = q.shape
    tile, first = choice.tile, 0
    for start in range(0, len(table), _LAUNCH):
        part = table[start : start + _LAUNCH]
        tiles = sum(ceil_div(queries, tile.queries) for queries, *_ in part)
        entries = [number for segment in part for number in segment] + [0] * (5 * (_LAUNCH - len(part)))
        if tiles:
            _attention[(tiles, batch * heads, choice.shares)](
                out, q, k, v, lse, scale, active, heads, first, *strides[:3],
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides[3:], *entries,
                SEGMENTS=1 if len(part) == 1 else _LAUNCH, SHARED=choice.shares > 1,
                DIM=dim, DIMS=max(16, power_of_two(dim)), QUERIES=tile.queries, ROWS=tile.rows,
                PRECISION="tf32x3" if q.element_size() == 4 else "tf32",
                num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
            )  # fmt: skip
        first += sum(queries for queries, *_ in part)


def _lse_strides(lse: Tensor | None) -> tuple[int, int]:
    return (0, 0) if lse is None else (lse.stride(0), lse.stride(1))
