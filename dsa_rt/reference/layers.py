"""Definitions of the transformer ops: plain fp32 PyTorch, pure functions, differentiable.

Shapes: B batch, A active tokens, N attended cache rows, C channels, H heads, D = C / H, R modulation rows.
Every function computes in fp32 throughout, rounds each value it returns once, and returns the dtype of its first
argument unless it says otherwise. An op of :mod:`dsa_rt.ops` writes into its outputs, the function of its name here
returns new tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_token(table: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of a modulation table ``[B, R, C]`` for each token; one row for all tokens broadcasts."""
    if table.shape[1] == 1:
        return table
    assert rows is not None
    return table.index_select(1, rows)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float) -> Tensor:
    """LayerNorm without affine, then ``y * (1 + scale[r]) + shift[r]`` with r the token's modulation row.

    x [B, A, C]; shift, scale [B or 1, R or 1, C] fp32; rows [A] int64, not read where both tables have one row.
    """
    normed = F.layer_norm(x.float(), (x.shape[-1],), None, None, eps)
    return (normed * (1 + _per_token(scale, rows)) + _per_token(shift, rows)).to(x.dtype)


def residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`residual`, and :func:`norm_modulate` of that sum as it was rounded. Returns (sum, normed).

    An affine LayerNorm is the same with ``shift = bias`` and ``scale = weight - 1``, both [1, 1, C].
    """
    x = residual(x, y, gate, rows)
    return x, norm_modulate(x, shift, scale, rows, eps)


def residual(x: Tensor, y: Tensor, gate: Tensor | None, rows: Tensor | None) -> Tensor:
    """``x + gate[r] * y``; x, y [B, A, C], gate [B or 1, R or 1, C] fp32 or None for 1."""
    if gate is None:
        return x + y
    return (x.float() + y.float() * _per_token(gate, rows)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension with a learned weight."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """``act(x Wᵀ + bias)`` in fp32, unrounded: x [..., K], rounded to the dtype of ``weight`` [N, K] first; bias [N] or
    None; activation "none", "gelu" (its tanh form), "gelu_erf" or "silu"."""
    y = F.linear(x.to(weight.dtype).float(), weight.float(), None if bias is None else bias.float())
    return activate(y, activation)


def activate(y: Tensor, activation: str) -> Tensor:
    """The activation of :func:`linear`."""
    if activation == "none":
        return y
    if activation == "silu":
        return F.silu(y)
    return F.gelu(y, approximate={"gelu": "tanh", "gelu_erf": "none"}[activation])


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs: x [B, A, H, D]; cos, sin [A, D / 2] fp32 (Wan's complex multiplication)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def qk_norm_rope_store(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """RMSNorm of q and k over C, then RoPE per head; v as it is. q, k, v [B, A, C] -> [B, A, H, D] each.

    The rows to be stored: in a cache [B, N, H, D] they replace those at ``slots``, see :func:`scatter_rows`.
    """
    q_rows, k_rows = (
        rope(rms_norm(x.float(), weight, eps).unflatten(-1, (heads, -1)), cos, sin).to(x.dtype)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return q_rows, k_rows, v.unflatten(-1, (heads, -1))


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[:, rows]``: x [B, N, ...], rows [A] int64 in [0, N) -> [B, A, ...]."""
    return x.index_select(1, rows)


def scatter_rows(x: Tensor, rows: Tensor, src: Tensor) -> Tensor:
    """x [B, N, ...] with ``x[:, rows] = src``; src [B, A, ...], rows [A] int64 in [0, N), distinct."""
    return x.index_copy(1, rows, src)


FLOAT8_MAX = 448.0
"""The largest number of ``float8_e4m3fn``, which has no infinity."""


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [B, A, H, D] as E4M3 (``float8_e4m3fn``) and the scale [B, A, H] fp32 that :func:`dequantize_rows` takes.

    ``scale = largest |element| / 448`` of each row and head, at least the smallest normal fp32 number; ``row / scale``,
    which is at most 448 up to its own rounding, is rounded to the nearest E4M3 number, to even. Infinity becomes NaN,
    NaN stays NaN, and neither counts for the largest: the rest of their row is what it would be without them.
    """
    finite = torch.where(rows.isfinite(), rows.float(), torch.nan)
    scale = finite.abs().nan_to_num(0.0).amax(-1) / FLOAT8_MAX
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return (finite / scale[..., None]).to(torch.float8_e4m3fn), scale


def dequantize_rows(values: Tensor, scale: Tensor) -> Tensor:
    """values [B, N, H, D] in E4M3 times scale [B, N, H] fp32 -> fp32."""
    return values.float() * scale[..., None]


def active_attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None) -> Tensor:
    """Softmax attention of the active queries to all given rows, no mask.

    q [B, A, H, D]; k, v [B, N, H, D] -> [B, A, H, D]. segments [S, 5] int64 on the CPU: how many queries a segment
    has, then begin, end, begin, end of the one or two ranges of rows that they attend to; the segments take the queries
    in order.
    """
    if segments is not None:
        return torch.cat([active_attention(*part) for part in split_segments(q, k, v, segments)], 1)
    return torch.einsum("bhan,bnhd->bahd", _scores(q, k).softmax(-1), v.float()).to(q.dtype)


def active_attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, segments: Tensor | None = None
) -> Tensor:
    """:func:`active_attention` of what :func:`dequantize_rows` makes of k and v [B, N, H, D] in E4M3 with their scales
    [B, N, H]."""
    return active_attention(q, dequantize_rows(k, k_scale), dequantize_rows(v, v_scale), segments)


def attention_log_sum_exp(q: Tensor, k: Tensor, segments: Tensor | None = None) -> Tensor:
    """Natural logarithm of the softmax's denominator in :func:`active_attention`: [B, H, A] fp32."""
    if segments is not None:
        return torch.cat([attention_log_sum_exp(q, k) for q, k, _ in split_segments(q, k, k, segments)], 2)
    return _scores(q, k).logsumexp(-1)


def split_segments(q: Tensor, k: Tensor, v: Tensor, segments: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The queries, keys and values of each segment."""
    parts, start = [], 0
    for count, begin, end, begin2, end2 in segments.tolist():
        ranges = [slice(b, e) for b, e in ((begin, end), (begin2, end2)) if e > b]
        keys, values = (
            rows[:, ranges[0]] if len(ranges) == 1 else torch.cat([rows[:, r] for r in ranges], 1) for rows in (k, v)
        )
        parts.append((q[:, start : start + count], keys, values))
        start += count
    return parts


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q [B, A, H, D], k [B, N, H, D] -> [B, H, A, N] fp32, scaled by 1/√D."""
    return torch.einsum("bahd,bnhd->bhan", q.float(), k.float()) * q.shape[-1] ** -0.5


def confidence_pool(query: Tensor, keys: Tensor, key_weight: Tensor, tokens: Tensor, eps: float) -> Tensor:
    """One query over all tokens: per head, softmax scores and the weighted sum of the *inputs*.

    query [H, D] fp32, normalised; keys [B, A, C], of which the RMSNorm over C with ``key_weight`` [C] is taken first;
    tokens [B, A, C] -> [B, H, C] fp32. Projecting the sum by W_v afterwards equals attention over projected values,
    since the weights sum to one.
    """
    normed = rms_norm(keys.float(), key_weight, eps).unflatten(-1, (len(query), -1))
    scores = torch.einsum("hd,bahd->bha", query.float(), normed) * query.shape[-1] ** -0.5
    return torch.einsum("bha,bac->bhc", scores.softmax(-1), tokens.float())
