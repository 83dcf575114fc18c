"""The transformer ops the models call. One function per op; backends come in here without touching a caller.

All but attention are served by the framework today: the fp32 definitions of :mod:`dsa_rt.reference`. Attention runs
natively, or on the framework's fused kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_rt.ops import attention
from dsa_rt.ops.backend import choose
from dsa_rt.reference.layers import (
    confidence_pool,
    norm_modulate,
    qk_norm_rope,
    residual,
    residual_norm_modulate,
    rms_norm,
)

__all__ = [
    "active_attention",
    "confidence_pool",
    "norm_modulate",
    "qk_norm_rope",
    "residual",
    "residual_norm_modulate",
    "rms_norm",
]


def active_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of A active queries to N cache rows: q [B, A, H, D], k and v [B, N, H, D] -> [B, A, H, D].

    Differentiable; where no gradient is wanted, :func:`dsa_rt.ops.attention.active_attention` on the devices and dtypes
    for which its kernels are the faster ones.
    """
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    uniform = q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    if not differentiable and uniform and choose("active_attention", q.device.type, q.dtype) == "native":
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        attention.active_attention(out, q, k, v)
        return out
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= 1 << 24
    if q.device.type == "cpu" and (differentiable or (q.dtype == torch.bfloat16 and small)):
        # Two matmuls are 1.1 to 2.5 times faster here than the fused kernel (and its backward pass), as long as the
        # scores stay small.
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2).to(q.dtype))
        return torch.matmul(scores.softmax(-1, dtype=q.dtype), v.to(q.dtype)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
