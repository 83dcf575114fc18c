"""The confidence head's attention: one query per head over all tokens of a chunk, destination passing."""

from __future__ import annotations

from torch import Tensor

from dsa_rt.ops.dispatch import register, served
from dsa_rt.reference import layers as reference

register(
    "confidence_pool(Tensor(a!) out, Tensor query, Tensor keys, Tensor key_weight, Tensor tokens, float eps) -> ()"
)


def confidence_pool(
    out: Tensor, query: Tensor, keys: Tensor, key_weight: Tensor, tokens: Tensor, eps: float, *,
    backend: str | None = None,
) -> None:  # fmt: skip
    """``out = softmax(query kᵀ / √D) tokens`` for each head, with k the RMSNorm of ``keys`` over C.

    out [B, H, C] and query [H, D] fp32, contiguous; keys, tokens [B, A, C], fp32, bf16 or fp16 alike, A at least 1, the
    last dimension contiguous; key_weight [C] of one of those. fp32 throughout; natively the bits depend neither on the
    number of threads nor on other samples of the batch, but may differ in the last place between instruction sets.

    Raises :class:`dsa_rt.errors.ShapeError` for a wrong shape, dtype, device, stride or overlap of the output with
    another argument, before anything is written, and :class:`dsa_rt.errors.OptionError` for a ``backend`` that cannot
    serve the call or where a gradient is wanted.
    """
    if served("confidence_pool", backend, tokens, (out, query, keys, key_weight, tokens), (eps,)):
        return
    out.copy_(reference.confidence_pool(query, keys, key_weight, tokens, eps))
