"""Attention of compact active queries to the rows of a K/V cache, destination passing; the cache may be in FP8.

The models call :func:`dsa_rt.ops.layers.active_attention`, which is differentiable and uses this where it is faster.
"""

from __future__ import annotations

from torch import Tensor

from dsa_rt.ops.backend import native
from dsa_rt.ops.dispatch import register, served
from dsa_rt.reference import layers as reference

register(
    "active_attention(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k, Tensor v, Tensor? segments=None) -> ()",
    native.active_attention_scratch,
)
register(
    "active_attention_fp8(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k, Tensor v, Tensor k_scale, "
    "Tensor v_scale, Tensor? segments=None) -> ()",
    native.active_attention_fp8_scratch,
)


def active_attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None = None, segments: Tensor | None = None, *,
    backend: str | None = None,
) -> None:  # fmt: skip
    """``out = softmax(q kᵀ / √D) v`` for each head; no mask: all rows of k and v are attended, so pass the valid ones,
    or say in ``segments`` which queries attend to which.

    out, q [B, A, H, D]; k, v [B, N, H, D], N and D at least 1: fp32, bf16 or fp16 alike, the last dimension contiguous,
    other strides free (a slice of a larger cache is fine). ``lse`` [B, H, A] fp32 receives the natural log-sum-exp of
    each row's scaled scores. ``segments`` [S, 5] int64 on the CPU: for each the number of its queries, which are the
    next ones, then begin, end, begin, end of the rows they attend to. The numbers sum to A; ranges lie in [0, N] and do
    not overlap, and one of the two may be empty. Products, softmax and sums are fp32; in bf16, with its dot products,
    the softmax's weights are rounded to bf16. Natively on the CPU a row's result has the same bits in every active set,
    at every position in it, beside whatever segments, for every number of threads and in every run; it may differ in
    the last place between processors. Natively on CUDA equal calls on equal devices have the same bits; a row whose
    keys were split, for want of tiles to fill the device, differs in the last places from the same row in a call of
    other sizes or segments, or at another position. Where keys are split the call takes up to 2 · 128 · (D + 2) fp32
    numbers of scratch for each multiprocessor from the framework's allocator.

    Raises :class:`dsa_rt.errors.ShapeError` for a wrong shape, dtype, device, stride, segment or overlap of an output
    with another argument, before anything is written, and :class:`dsa_rt.errors.OptionError` for a ``backend`` that
    cannot serve the call or where a gradient is wanted.
    """
    if ran(out, q, k, v, lse, segments, backend):
        return
    out.copy_(reference.active_attention(q, k, v, segments))
    if lse is not None:
        lse.copy_(reference.attention_log_sum_exp(q, k, segments))


def ran(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None = None, segments: Tensor | None = None,
    backend: str | None = None,
) -> bool:  # fmt: skip
    """:func:`active_attention` where a kernel takes the call; False where the definition would have to, and nothing is
    run."""
    return served("active_attention", backend, out, (out, lse, q, k, v), (segments,))


def active_attention_fp8(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, lse: Tensor | None = None,
    segments: Tensor | None = None, *, backend: str | None = None,
) -> None:  # fmt: skip
    """:func:`active_attention` with k and v [B, N, H, D] in ``float8_e4m3fn``, as
    :func:`dsa_rt.ops.rows.quantize_rows` writes them, and their scales k_scale, v_scale [B, N, H] fp32, finite or NaN.

    ``softmax(q (k·k_scale)ᵀ / √D) (v·v_scale)``; out, q, lse and segments as there, q and out fp32, bf16 or fp16.
    What is rounded: scales meet scores and weights in fp32, and E4M3 is exact in 16 bits, so on the CPU and in Triton
    nothing but a weight times its value's scale, to the type of 16-bit products where those are used. Natively on CUDA,
    where the products are of E4M3, each row and head of q too, as quantize_rows does it (so infinity becomes NaN), and
    that weight to E4M3: an error beside the result about as large as the one of K and V in E4M3. What is said there of
    bits and of scratch, and the errors, hold here too.
    """
    if served("active_attention_fp8", backend, out, (out, lse, q, k, v, k_scale, v_scale), (segments,)):
        return
    out.copy_(reference.active_attention_fp8(q, k, v, k_scale, v_scale, segments))
    if lse is not None:
        lse.copy_(reference.attention_log_sum_exp(q, reference.dequantize_rows(k, k_scale), segments))
