"""Definitions of the transformer ops: plain fp32 PyTorch, pure functions, differentiable.

Shapes: B batch, A active tokens, N attended cache rows, C channels, H heads, D = C / H, R modulation rows.
Every function computes in fp32 and returns the dtype of its first argument.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_token(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a modulation table ``[B, R, C]`` for each token; one row for all tokens broadcasts."""
    return table if table.shape[1] == 1 else table.index_select(1, rows)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine, then ``y * (1 + scale[r]) + shift[r]`` with r the token's modulation row.

    x [B, A, C]; shift, scale [B or 1, R, C] fp32; rows [A] int64.
    """
    normed = F.layer_norm(x.float(), (x.shape[-1],), None, None, eps)
    return (normed * (1 + _per_token(scale, rows)) + _per_token(shift, rows)).to(x.dtype)


def residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, rows: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``x + gate[r] * y`` and :func:`norm_modulate` of that sum; gate None means 1. Returns (sum, normed)."""
    x = residual(x, y, gate, rows)
    return x, norm_modulate(x, shift, scale, rows, eps)


def residual(x: Tensor, y: Tensor, gate: Tensor | None, rows: Tensor) -> Tensor:
    """``x + gate[r] * y``, summed in fp32; x, y [B, A, C], gate [B, R, C] fp32 or None for 1."""
    if gate is None:
        return x + y
    return (x.float() + y.float() * _per_token(gate, rows)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension with a learned weight."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs: x [B, A, H, D]; cos, sin [A, D / 2] fp32 (Wan's complex multiplication)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and k over C, then RoPE per head. q, k [B, A, C] -> [B, A, H, D]."""
    q = rms_norm(q, q_weight, eps).unflatten(-1, (heads, -1))
    k = rms_norm(k, k_weight, eps).unflatten(-1, (heads, -1))
    return rope(q, cos, sin), rope(k, cos, sin)


def active_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of the active queries to all given rows, no mask.

    q [B, A, H, D]; k, v [B, N, H, D] -> [B, A, H, D].
    """
    return torch.einsum("bhan,bnhd->bahd", _scores(q, k).softmax(-1), v.float()).to(q.dtype)


def attention_log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    """Natural logarithm of the softmax's denominator in :func:`active_attention`: [B, H, A] fp32."""
    return _scores(q, k).logsumexp(-1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q [B, A, H, D], k [B, N, H, D] -> [B, H, A, N] fp32, scaled by 1/√D."""
    return torch.einsum("bahd,bnhd->bhan", q.float(), k.float()) * q.shape[-1] ** -0.5


def confidence_pool(query: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
    """One query over all tokens: per head, softmax scores and the weighted sum of the *inputs*.

    query [H, D]; keys [B, A, H, D]; tokens [B, A, C] -> [B, H, C] fp32. Projecting the sum by W_v afterwards
    equals attention over projected values, since the weights sum to one.
    """
    scores = torch.einsum("hd,bahd->bha", query.float(), keys.float()) * query.shape[-1] ** -0.5
    return torch.einsum("bha,bac->bhc", scores.softmax(-1), tokens.float())
