"""The transformer ops as the models call them: results are returned, and a gradient is to be had where one is wanted.

Where none is wanted, each runs as its op in :mod:`dsa_rt.ops`, if a backend has a kernel for the tensors; else it is
the definition in :mod:`dsa_rt.reference`, or for attention the framework's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_rt.ops import attention, norm, pool, rope
from dsa_rt.ops import linear as matmul
from dsa_rt.ops import rows as moves
from dsa_rt.ops.backend import choose, has_kernel
from dsa_rt.reference import layers as reference

__all__ = [
    "active_attention",
    "confidence_pool",
    "linear",
    "norm_modulate",
    "pack",
    "packed_bytes",
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
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _has_kernel(op: str, *alike: Tensor, others: tuple[Tensor | None, ...] = ()) -> bool:
    """Whether a kernel takes these tensors: without gradient, of one dtype and device, beside others."""
    if wants_gradient(*alike, *others):
        return False
    first, *rest = alike
    for tensor in rest:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            return False
    return has_kernel(op, first.device, first.dtype)


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """LayerNorm, then ``y * (1 + scale[r]) + shift[r]``; see :func:`dsa_rt.ops.norm.norm_modulate`."""
    if not _has_kernel("norm_modulate", x, others=(shift, scale)):
        return _given(out, reference.norm_modulate(x, shift, scale, rows, eps))
    out = _rows_like(x) if out is None else out
    norm.norm_modulate(out, x, shift, scale, rows, eps)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension; ``out`` may be ``x``. See :func:`dsa_rt.ops.norm.rms_norm`."""
    if x.ndim != 3 or not _has_kernel("rms_norm", x, others=(weight,)):
        return _given(out, reference.rms_norm(x, weight, eps))
    out = _rows_like(x) if out is None else out
    norm.rms_norm(out, x, weight, eps)
    return out


def residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, *,
    keep: bool = False, sum: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``x + gate[r] * y`` and :func:`norm_modulate` of that sum; see :func:`dsa_rt.ops.norm.residual_norm_modulate`.

    The sum may take the place of x, which the caller has no further use for, unless it says ``keep``; then it goes to
    ``sum``, where there is one.
    """
    if not _has_kernel("residual_norm_modulate", x, y, others=(gate, shift, scale)):
        total, normed = reference.residual_norm_modulate(x, y, gate, shift, scale, rows, eps)
        if out is not None and not keep:
            sum = x  # buffers stay where they are
        return _given(sum, total), _given(out, normed)
    total = x if not keep else _rows_like(x) if sum is None else sum
    out = _rows_like(x) if out is None else out
    norm.residual_norm_modulate(total, out, x, y, gate, shift, scale, rows, eps)
    return total, out


def qk_norm_rope_store(
    k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor,
    cos: Tensor, sin: Tensor, slots: Tensor | None, eps: float, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [B, A, H, D], normalised and turned; k and v go into their cache rows, so that no gradient goes through. See
    :func:`dsa_rt.ops.rope.qk_norm_rope_store`."""
    weights = (q_weight, k_weight)
    if q_weight.dtype == k_weight.dtype and _has_kernel(
        "qk_norm_rope_store", q, k, v, k_cache, v_cache, others=weights
    ):
        shape = (*q.shape[:2], *k_cache.shape[2:])
        out = torch.empty(shape, dtype=q.dtype, device=q.device) if out is None else out
        rope.qk_norm_rope_store(out, k_cache, v_cache, q, k, v, *weights, cos, sin, slots, eps)
        return out
    turned, k, v = reference.qk_norm_rope_store(q, k, v, *weights, cos, sin, k_cache.shape[2], eps)
    rope.store(k_cache, slots, k)
    rope.store(v_cache, slots, v)
    return _given(out, turned)


def active_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None = None, v_scale: Tensor | None = None, *,
    segments: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of A active queries to N cache rows: q [B, A, H, D], k and v [B, N, H, D] -> [B, A, H, D]. With scales
    [B, N, H] k and v are in FP8, and :func:`dsa_rt.ops.attention.active_attention_fp8` runs.

    Differentiable; where no gradient is wanted, :func:`dsa_rt.ops.attention.active_attention` for the tensors that its
    kernels take and for which they are the faster ones. segments: as there.
    """
    if k_scale is not None and v_scale is not None:
        if _has_kernel("active_attention_fp8", q):
            room = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
            attention.active_attention_fp8(room, q, k, v, k_scale, v_scale, segments=segments)
            return room
        k, v = (reference.dequantize_rows(*pair).to(q.dtype) for pair in ((k, k_scale), (v, v_scale)))
    if _has_kernel("active_attention", q, k, v):
        room = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
        if attention.ran(room, q, k, v, segments=segments):
            return room
    if segments is None:
        return _given(out, _framework_attention(q, k, v))
    parts = [_framework_attention(*part) for part in reference.split_segments(q, k, v, segments)]
    return _given(out, parts[0] if len(parts) == 1 else torch.cat(parts, 1))


def quantize_rows(out: Tensor, scale: Tensor, rows: Tensor, slots: Tensor | None = None) -> None:
    """Rows of K or V into FP8; see :func:`dsa_rt.ops.rows.quantize_rows`."""
    if _has_kernel("quantize_rows", rows):
        moves.quantize_rows(out, scale, rows, slots)
    else:
        moves.quantize_by_definition(out, scale, rows, slots)


def _framework_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    differentiable = wants_gradient(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= 1 << 24
    if q.device.type == "cpu" and (differentiable or (q.dtype == torch.bfloat16 and small)):
        # Two matmuls are 1.1 to 2.5 times faster here than the fused kernel (and its backward pass), as long as the
        # scores stay small.
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2).to(q.dtype))
        return torch.matmul(scores.softmax(-1, dtype=q.dtype), v.to(q.dtype)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def confidence_pool(
    query: Tensor, keys: Tensor, key_weight: Tensor, tokens: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """One query over all tokens, [B, H, C] fp32; see :func:`dsa_rt.ops.pool.confidence_pool`."""
    if not _has_kernel("confidence_pool", tokens, keys, others=(query, key_weight)):
        return _given(out, reference.confidence_pool(query, keys, key_weight, tokens, eps))
    out = torch.empty((len(tokens), len(query), tokens.shape[2]), device=tokens.device) if out is None else out
    pool.confidence_pool(out, query.float().contiguous(), keys, key_weight, tokens, eps)
    return out


def linear(layer: nn.Linear, x: Tensor, *, activation: str = "none", out: Tensor | None = None) -> Tensor:
    """The layer over the last dimension, then an activation: "none", "gelu" (its tanh form), "gelu_erf" or "silu". x is
    rounded to the dtype of the weights. With weights that :func:`pack` has packed it runs as
    :func:`dsa_rt.ops.linear.linear`."""
    packed: matmul.PackedLinear | None = getattr(layer, "packed", None)
    if packed is not None and not wants_gradient(x):
        if out is None:
            out = torch.empty((*x.shape[:-1], packed.n), dtype=packed.weight.dtype, device=x.device)
        matmul.linear(out, x, packed, activation)
        return out
    weight, bias = layer.weight, layer.bias
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    direct = x.is_cuda and x.dtype == weight.dtype == bias.dtype and not wants_gradient(x, weight, bias)
    if direct and (out is None or out.is_contiguous()):
        return in_one_product(x, weight, bias, activation, out)
    return _given(out, reference.activate(F.linear(x, weight, bias), activation))


def in_one_product(x: Tensor, weight: Tensor, bias: Tensor, activation: str, out: Tensor | None) -> Tensor:
    """Layer and tanh GELU in one product of the framework (cuBLASLt's epilogue on CUDA), straight into ``out``; other
    activations follow."""
    shape = (*x.shape[:-1], len(weight))
    out = torch.empty(shape, dtype=x.dtype, device=x.device) if out is None else out
    product, rows = (bias, x.flatten(0, -2), weight.t()), out.view(-1, len(weight))
    if activation == "gelu":
        torch._addmm_activation(*product, use_gelu=True, out=rows)
        return out
    torch.addmm(*product, out=rows)
    return out if activation == "none" else out.copy_(reference.activate(out, activation))


def pack(layer: nn.Linear, of: Sequence[nn.Linear] = ()) -> bool:
    """Pack the weights of a layer that no longer change for the kernel that will take them, where there is one that is
    worth it: on the CPU. of: layers that share their input, whose rows follow each other in this one."""
    parts = list(of) or [layer]
    weight = parts[0].weight
    if weight.device.type != "cpu" or choose("linear", "cpu", weight.dtype) != "native":
        return False
    packed = matmul.pack_linear([part.weight for part in parts], [part.bias for part in parts])
    layer.packed = packed  # type: ignore[assignment]
    return True


def packed_bytes(module: nn.Module) -> int:
    """Memory of what :func:`pack` made in a module, beside its parameters."""
    layers = (layer for part in module.modules() for layer in (part, getattr(part, "fused", None)))
    packs = (getattr(layer, "packed", None) for layer in layers)
    return sum(p.weight.nbytes + (0 if p.bias is None else p.bias.nbytes) for p in packs if p is not None)


def _given(out: Tensor | None, result: Tensor) -> Tensor:
    """The result, in the caller's buffer where there is one."""
    return result if out is None else out.copy_(result)


def _rows_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
