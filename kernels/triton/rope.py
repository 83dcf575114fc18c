"""``qk_norm_rope_store``: RMSNorm of q and k over C, RoPE at each token's position, k and v into their cache rows.

A program per token. Bytes of a token (s bytes an element): q, k, v in, q, k, v out, 6·s·C, and cos and sin, 4·D. Bound
by memory: about fifteen operations an element. Norm, rotation and weights are fp32 without a rounding between them.
"""

import triton
import triton.language as tl
from dsa_rt.kernels.triton.card import power_of_two
from torch import Tensor


@triton.jit
def _rotated(x, weight, cosine, sine, width, eps, COLS: tl.constexpr):
    """RMSNorm of x [COLS] (zero beyond width), each pair of neighbours turned by its angle; fp32."""
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * weight
    even, odd = tl.split(tl.reshape(normed, [COLS // 2, 2]))
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [COLS])


@triton.jit(do_not_specialize=["cache_rows"])
def _qk_norm_rope_store(
    q_out, k_cache, v_cache, q, k, v, q_weight, k_weight, cos, sin, slots, cache_rows, width, eps,
    qo_batch, qo_row, qo_head, kc_batch, kc_row, kc_head, vc_batch, vc_row, vc_head,
    q_batch, q_row, k_batch, k_row, v_batch, v_row,
    DIM: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < width
    q_in = tl.load(q + batch * q_batch + token * q_row + cols, mask=inside, other=0.0).to(tl.float32)
    k_in = tl.load(k + batch * k_batch + token * k_row + cols, mask=inside, other=0.0).to(tl.float32)
    v_in = tl.load(v + batch * v_batch + token * v_row + cols, mask=inside, other=0.0)
    q_scale = tl.load(q_weight + cols, mask=inside, other=0.0).to(tl.float32)
    k_scale = tl.load(k_weight + cols, mask=inside, other=0.0).to(tl.float32)
    pairs = tl.arange(0, COLS // 2)
    turn = token * (DIM // 2) + pairs % (DIM // 2)
    cosine = tl.load(cos + turn, mask=pairs < width // 2, other=0.0)
    sine = tl.load(sin + turn, mask=pairs < width // 2, other=0.0)
    slot = token
    if slots is not None:
        slot = tl.load(slots + token)
    everywhere = tl.broadcast_to(slot, [COLS])
    stored = inside & (everywhere >= 0) & (everywhere < cache_rows)
    head, element = cols // DIM, cols % DIM
    q_new = _rotated(q_in, q_scale, cosine, sine, width, eps, COLS)
    k_new = _rotated(k_in, k_scale, cosine, sine, width, eps, COLS)
    q_place = q_out + batch * qo_batch + token * qo_row + head * qo_head + element
    k_place = k_cache + batch * kc_batch + slot * kc_row + head * kc_head + element
    v_place = v_cache + batch * vc_batch + slot * vc_row + head * vc_head + element
    tl.store(q_place, q_new.to(q_out.dtype.element_ty), mask=inside)
    tl.store(k_place, k_new.to(k_cache.dtype.element_ty), mask=stored)
    tl.store(v_place, v_in, mask=stored)


def qk_norm_rope_store(
    q_out: Tensor, k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor,
    k_weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """``q_out = rope(RMSNorm(q)·q_weight)``, the same of k and v as it is into the cache rows ``slots``.

    q, k, v [B, A, C]; q_out [B, A, H, D]; k_cache, v_cache [B, N, H, D], last dimension contiguous; slots [A] int64,
    distinct, or None for rows 0 … A - 1; weights [C]; cos, sin [A, D / 2] fp32 contiguous, D even. The k and v of a
    token whose slot is out of range are not stored.
    """
    batch, active, width = q.shape
    if q.numel() == 0:
        return
    cols = power_of_two(width)
    _qk_norm_rope_store[(active, batch)](
        q_out, k_cache, v_cache, q, k, v, q_weight, k_weight, cos, sin, slots, k_cache.shape[1], width, eps,
        *q_out.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        DIM=q_out.shape[3], COLS=cols, num_warps=max(1, min(16, cols // 256)), enable_fp_fusion=True,
    )  # fmt: skip
