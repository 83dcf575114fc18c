"""RMSNorm of q and k, rotation, and K and V straight into their cache rows, destination passing."""

from __future__ import annotations

from torch import Tensor

from dsa_rt.ops.dispatch import register, served
from dsa_rt.reference import layers as reference

register(
    "qk_norm_rope_store(Tensor(a!) q_out, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor q, Tensor k, Tensor v, "
    "Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? slots, float eps) -> ()"
)


def qk_norm_rope_store(
    q_out: Tensor, k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor,
    k_weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor | None, eps: float, *, backend: str | None = None,
) -> None:  # fmt: skip
    """RMSNorm of q and k over C, then RoPE per head: q to ``q_out``, k to rows ``slots`` of ``k_cache``; v as it is to
    those of ``v_cache``. Other rows stay as they are.

    q, k, v [B, A, C], C = H·D, D even; q_out [B, A, H, D]; k_cache, v_cache [B, N, H, D], such as a layer of a larger
    cache: fp32, bf16 or fp16 alike, the last dimension contiguous, other strides free. slots [A] int64, distinct, in
    [0, N), or None for rows 0 to A - 1. q_weight, k_weight [C], one of those alike. cos, sin [A, D / 2] fp32,
    contiguous, for interleaved pairs of channels. fp32 throughout, each stored value rounded once; natively the bits of
    a row do not depend on the active set, the number of threads or the instruction set.

    Raises :class:`dsa_rt.errors.ShapeError` for a wrong shape, dtype, device, stride or overlap, and a slot outside the
    cache or given twice, before anything is written (on CUDA, where reading them would stall the queue, a slot outside
    stops the kernel and duplicates are the caller's to avoid), and :class:`dsa_rt.errors.OptionError` for a
    ``backend`` that cannot serve the call or where a gradient is wanted.
    """
    tensors = (q_out, k_cache, v_cache, q, k, v, q_weight, k_weight, cos, sin, slots)
    if served("qk_norm_rope_store", backend, q, tensors, (eps,)):
        return
    q, k, v = reference.qk_norm_rope_store(q, k, v, q_weight, k_weight, cos, sin, q_out.shape[2], eps)
    q_out.copy_(q)
    store(k_cache, slots, k)
    store(v_cache, slots, v)


def store(cache: Tensor, slots: Tensor | None, rows: Tensor) -> None:
    """rows [B, A, H, D] into those ``slots`` of the cache [B, N, H, D]; None: into the first A."""
    if slots is None:
        cache[:, : rows.shape[1]] = rows
    else:
        cache.index_copy_(1, slots, rows.to(cache.dtype))
