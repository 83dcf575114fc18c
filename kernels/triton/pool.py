"""``confidence_pool``: one query per head over all tokens, in three launches.

1. ``_scores``: a warp group per few tokens; RMSNorm of the keys, products with the query, in powers of two.
2. ``_partial``: channels × shares of the tokens; softmax weights online over blocks of tokens, their sum of the tokens
   by matrix instructions. With one share it writes the result.
3. ``_merge``: shares joined by their log-sum-exp.

Bytes: keys and tokens are read once (2·s·A·C), scores (4·A·H) and partial sums (4·S·H·C for S shares) go through L2.
Products in (2) are three tf32 products for each fp32 one ("tf32x3"): tokens in bf16 are exact in tf32, weights are cut
into three parts, so that the error stays that of fp32.
"""

import triton
import triton.language as tl
from dsa_rt.kernels.triton.card import card_of, ceil_div, power_of_two
from torch import Tensor

_LOG2E = 1.4426950408889634
_TOKENS = 64  # of a block in the online softmax
_SCORED = 8  # tokens a program scores: the product of query and weight stays in registers
_COLS = 64  # channels of a program


@triton.jit(do_not_specialize=["active"])
def _scores(
    scores, query, keys, key_weight, active, heads, eps, scale, keys_batch, keys_row,
    DIM: tl.constexpr, HEADS: tl.constexpr, DIMS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """scores [B, A, H]: scale · query · RMSNorm(keys)·weight."""
    batch = tl.program_id(1).to(tl.int64)
    head, element = tl.arange(0, HEADS)[:, None], tl.arange(0, DIMS)[None, :]
    inside = (head < heads) & (element < DIM)
    place = head * DIM + element
    weighted = tl.load(query + place, mask=inside, other=0.0)
    weighted *= tl.load(key_weight + place, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    index = tl.arange(0, HEADS)
    row = keys + batch * keys_batch + first * keys_row
    for token in range(first, tl.minimum(first + TOKENS, active)):
        key = tl.load(row + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(tl.sum(key * key, 1), 0) / (heads * DIM) + eps)
        score = tl.sum(key * weighted, 1) * (inverse * scale)
        tl.store(scores + (batch * active + token) * heads + index, score, mask=index < heads)
        row += keys_row


@triton.jit(do_not_specialize=["active", "share"])
def _partial(
    out, sums, scores, tokens, active, share, heads, width, tokens_batch, tokens_row,
    WHOLE: tl.constexpr, HEADS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Softmax over a share of the tokens: out [B, S, H, C] the weighted mean, sums [B, S, H] its log2-sum-exp2."""
    part, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head, cols = tl.arange(0, HEADS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, active)
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mean = tl.zeros([HEADS, COLS], tl.float32)
    for start in range(begin, end, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        there = token < end
        place = scores + (batch * active + token)[None, :] * heads + head[:, None]
        score = tl.load(place, mask=(head < heads)[:, None] & there[None, :], other=0.0)
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        keep = tl.exp2(highest - higher)
        total = total * keep + tl.sum(weight, 1)
        rows = tokens + batch * tokens_batch + token[:, None] * tokens_row + cols[None, :]
        value = tl.load(rows, mask=there[:, None] & (cols < width)[None, :], other=0.0).to(tl.float32)
        mean = tl.dot(weight, value, mean * keep[:, None], input_precision="tf32x3")
        highest = higher
    inside = (head < heads)[:, None] & (cols < width)[None, :]
    shares = tl.num_programs(1)
    place = ((batch * shares + part) * heads + head)[:, None] * width + cols[None, :]
    tl.store(out + place, mean / total[:, None], mask=inside)
    if not WHOLE:  # noqa: SIM102 (known when it is compiled, unlike the other condition)
        if tl.program_id(0) == 0:
            tl.store(sums + (batch * shares + part) * heads + head, highest + tl.log2(total), mask=head < heads)


@triton.jit(do_not_specialize=["shares"])
def _merge(out, means, sums, shares, heads, width, SHARES: tl.constexpr, COLS: tl.constexpr):
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols, part = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.arange(0, SHARES)
    there = part < shares
    row = (batch * shares + part) * heads + head
    log_sum = tl.load(sums + row, mask=there, other=float("-inf"))
    weight = tl.exp2(log_sum - tl.max(log_sum, 0))
    inside = there[:, None] & (cols < width)[None, :]
    mean = tl.load(means + row[:, None] * width + cols[None, :], mask=inside, other=0.0)
    result = tl.sum(mean * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (batch * heads + head) * width + cols, result, mask=cols < width)


def _shares(tokens: Tensor) -> tuple[int, int]:
    """(shares, tokens of a share): two programs for each multiprocessor, no share below a block of tokens."""
    batch, active, width = tokens.shape
    wanted = 2 * card_of(tokens).multiprocessors // (ceil_div(width, _COLS) * batch)
    blocks = ceil_div(active, _TOKENS)
    share = ceil_div(blocks, max(1, min(wanted, 64))) * _TOKENS
    return ceil_div(active, share), share


def confidence_pool_scratch(out: Tensor, tokens: Tensor) -> int:
    """How many fp32 numbers :func:`confidence_pool` needs as scratch; a pure function of shapes and card."""
    batch, heads, width = out.shape
    shares, _ = _shares(tokens)
    return batch * heads * (tokens.shape[1] + (shares * (width + 1) if shares > 1 else 0))


def confidence_pool(
    out: Tensor, query: Tensor, keys: Tensor, key_weight: Tensor, tokens: Tensor, eps: float, scratch: Tensor
) -> None:
    """``out[b, h] = Σ_a softmax_a(query[h] · k[b, a, h] / √D) · tokens[b, a]``, k = RMSNorm(keys)·key_weight.

    out [B, H, C] fp32 contiguous; query [H, D] fp32 contiguous; keys, tokens [B, A, C] alike, A at least 1, last
    dimension contiguous; key_weight [C]; scratch fp32 of :func:`confidence_pool_scratch` numbers, contiguous.
    """
    batch, heads, width = out.shape
    if out.numel() == 0:
        return
    active, dim = tokens.shape[1], query.shape[1]
    shares, share = _shares(tokens)
    scores, rest = scratch[: batch * active * heads], scratch[batch * active * heads :]
    means, sums = rest[: batch * shares * heads * width], rest[batch * shares * heads * width :]
    padded, dims = power_of_two(heads), power_of_two(dim)
    _scores[(ceil_div(active, _SCORED), batch)](
        scores, query, keys, key_weight, active, heads, eps, _LOG2E / dim**0.5, keys.stride(0), keys.stride(1),
        DIM=dim, HEADS=padded, DIMS=dims, TOKENS=_SCORED, num_warps=max(1, min(8, padded * dims // 512)),
        enable_fp_fusion=True,
    )  # fmt: skip
    padded, cols = max(16, padded), max(16, min(power_of_two(width), _COLS))
    columns = ceil_div(width, cols)
    _partial[(columns, shares, batch)](
        out if shares == 1 else means, sums, scores, tokens, active, share, heads, width,
        tokens.stride(0), tokens.stride(1),
        WHOLE=shares == 1, HEADS=padded, COLS=cols, TOKENS=_TOKENS, num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    if shares > 1:
        _merge[(columns, heads, batch)](
            out, means, sums, shares, heads, width,
            SHARES=power_of_two(shares), COLS=cols, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
