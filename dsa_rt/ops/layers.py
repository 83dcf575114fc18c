"""The transformer ops as the models call them: results are returned, and a gradient is to be had where one is wanted.

Where none is wanted, each runs as its op in :mod:`dsa_rt.ops`, if a backend has a kernel for the tensors; else it is
the definition in :mod:`dsa_rt.reference`, or for attention the framework's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_rt.ops import attention, norm, pool, rope
from dsa_rt.ops.backend import choose
from dsa_rt.reference import layers as reference

__all__ = [
    "active_attention",
    "confidence_pool",
    "linear_gelu",
    "norm_modulate",
    "qk_norm_rope",
    "qk_norm_rope_store",
    "residual_norm_modulate",
    "rms_norm",
    "wants_gradient",
]

qk_norm_rope = reference.qk_norm_rope_store
"""q, k, v [B, A, C] -> [B, A, H, D] each, differentiable; the caller stores k and v."""


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors is to carry a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _has_kernel(op: str, *alike: Tensor, others: tuple[Tensor | None, ...] = ()) -> bool:
    """Whether a kernel takes these tensors: without gradient, of one dtype and device, beside others."""
    first = alike[0]
    if wants_gradient(*alike, *others) or any(t.dtype != first.dtype or t.device != first.device for t in alike):
        return False
    return choose(op, first.device.type, first.dtype) != "torch"


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, then ``y * (1 + scale[r]) + shift[r]``; see :func:`dsa_rt.ops.norm.norm_modulate`."""
    if not _has_kernel("norm_modulate", x, others=(shift, scale)):
        return reference.norm_modulate(x, shift, scale, rows, eps)
    out = _rows_like(x)
    norm.norm_modulate(out, x, shift, scale, rows, eps)
    return out


def residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, *,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``x + gate[r] * y`` and :func:`norm_modulate` of that sum; see :func:`dsa_rt.ops.norm.residual_norm_modulate`.

    The sum may take the place of x, which the caller has no further use for, unless it says ``keep``.
    """
    if not _has_kernel("residual_norm_modulate", x, y, others=(gate, shift, scale)):
        return reference.residual_norm_modulate(x, y, gate, shift, scale, rows, eps)
    total, out = _rows_like(x) if keep else x, _rows_like(x)
    norm.residual_norm_modulate(total, out, x, y, gate, shift, scale, rows, eps)
    return total, out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension with a learned weight; see :func:`dsa_rt.ops.norm.rms_norm`."""
    if x.ndim != 3 or not _has_kernel("rms_norm", x, others=(weight,)):
        return reference.rms_norm(x, weight, eps)
    out = _rows_like(x)
    norm.rms_norm(out, x, weight, eps)
    return out


def qk_norm_rope_store(
    k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, slots: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """q [B, A, H, D], normalised and turned; k and v go into their cache rows, so that no gradient goes through. See
    :func:`dsa_rt.ops.rope.qk_norm_rope_store`."""
    weights = (q_weight, k_weight)
    if q_weight.dtype == k_weight.dtype and _has_kernel(
        "qk_norm_rope_store", q, k, v, k_cache, v_cache, others=weights
    ):
        out = torch.empty((*q.shape[:2], *k_cache.shape[2:]), dtype=q.dtype, device=q.device)
        rope.qk_norm_rope_store(out, k_cache, v_cache, q, k, v, *weights, cos, sin, slots, eps)
        return out
    out, k, v = reference.qk_norm_rope_store(q, k, v, *weights, cos, sin, k_cache.shape[2], eps)
    rope.store(k_cache, slots, k)
    rope.store(v_cache, slots, v)
    return out


def active_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of A active queries to N cache rows: q [B, A, H, D], k and v [B, N, H, D] -> [B, A, H, D].

    Differentiable; where no gradient is wanted, :func:`dsa_rt.ops.attention.active_attention` for the tensors that its
    kernels take and for which they are the faster ones.
    """
    differentiable = wants_gradient(q, k, v)
    if _has_kernel("active_attention", q, k, v):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if attention.ran(out, q, k, v):
            return out
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= 1 << 24
    if q.device.type == "cpu" and (differentiable or (q.dtype == torch.bfloat16 and small)):
        # Two matmuls are 1.1 to 2.5 times faster here than the fused kernel (and its backward pass), as long as the
        # scores stay small.
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2).to(q.dtype))
        return torch.matmul(scores.softmax(-1, dtype=q.dtype), v.to(q.dtype)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def confidence_pool(query: Tensor, keys: Tensor, key_weight: Tensor, tokens: Tensor, eps: float) -> Tensor:
    """One query over all tokens, [B, H, C] fp32; see :func:`dsa_rt.ops.pool.confidence_pool`."""
    if not _has_kernel("confidence_pool", tokens, keys, others=(query, key_weight)):
        return reference.confidence_pool(query, keys, key_weight, tokens, eps)
    out = torch.empty((len(tokens), len(query), tokens.shape[2]), device=tokens.device)
    pool.confidence_pool(out, query.float().contiguous(), keys, key_weight, tokens, eps)
    return out


def linear_gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """The layer, then GELU in its tanh form; in one matmul on CUDA, where the framework's fused one has that form."""
    weight, bias = linear.weight, linear.bias
    if x.is_cuda and x.dtype == weight.dtype == bias.dtype and not wants_gradient(x, weight, bias):
        hidden = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return hidden.unflatten(0, x.shape[:-1])
    return F.gelu(linear(x), approximate="tanh")


def _rows_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
