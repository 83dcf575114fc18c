"""LayerNorm with modulation, alone and after a residual, and RMSNorm, destination passing.

Rows are [B, A, C], fp32, bf16 or fp16 alike; tables of modulation [B or 1, R or 1, C] fp32, of which each token takes
the row ``rows`` says. The last dimension is contiguous, other strides are free. Arithmetic is fp32 and each stored
value is rounded once. Natively a row has the same bits in every active set, for every number of threads and on every
instruction set of a processor; it may differ in the last place between devices.

Every function raises :class:`dsa_rt.errors.ShapeError` for a wrong shape, dtype, device, stride or overlap, or a row
outside the tables, before anything is written (on CUDA, where reading ``rows`` would stall the queue, those are the
caller's to keep inside), and :class:`dsa_rt.errors.OptionError` for a ``backend`` that cannot serve the call or where a
gradient is wanted.
"""

from __future__ import annotations

from torch import Tensor

from dsa_rt.ops.dispatch import register, served
from dsa_rt.reference import layers as reference

register("norm_modulate(Tensor(a!) out, Tensor x, Tensor shift, Tensor scale, Tensor? rows, float eps) -> ()")
register(
    "residual_norm_modulate(Tensor(a!) sum, Tensor(b!) out, Tensor x, Tensor y, Tensor? gate, Tensor shift, "
    "Tensor scale, Tensor? rows, float eps) -> ()"
)
register("rms_norm(Tensor(a!) out, Tensor x, Tensor weight, float eps) -> ()")


def norm_modulate(
    out: Tensor, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, *, backend: str | None = None
) -> None:
    """``out = (x - mean) / √(variance + eps) · (1 + scale[r]) + shift[r]``, r = rows[token].

    out, x [B, A, C]; rows [A] int64 in [0, R), None where both tables have one row.
    """
    if served("norm_modulate", backend, x, (out, x, shift, scale, rows), (eps,)):
        return
    out.copy_(reference.norm_modulate(x, shift, scale, rows, eps))


def residual_norm_modulate(
    sum: Tensor, out: Tensor, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor,
    rows: Tensor | None, eps: float, *, backend: str | None = None,
) -> None:  # fmt: skip
    """``sum = x + gate[r] · y``, and :func:`norm_modulate` of that sum, as it was rounded, to ``out``.

    sum, out, x, y [B, A, C]; ``sum`` may be ``x`` itself. gate: a table like the others, or None for 1. rows [A] int64
    in [0, R), None where all tables have one row. Wan's affine norm is this with shift = bias and scale = weight - 1.
    """
    if served("residual_norm_modulate", backend, x, (sum, out, x, y, gate, shift, scale, rows), (eps,)):
        return
    total, normed = reference.residual_norm_modulate(x, y, gate, shift, scale, rows, eps)
    sum.copy_(total)
    out.copy_(normed)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> None:
    """``out = x / √(mean(x²) + eps) · weight``, the mean over C.

    out, x [B, A, C]; ``out`` may be ``x`` itself; weight [C] fp32, bf16 or fp16.
    """
    if served("rms_norm", backend, x, (out, x, weight), (eps,)):
        return
    out.copy_(reference.rms_norm(x, weight, eps))
