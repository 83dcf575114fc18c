"""Rows of one tensor to another by number, destination passing: as they are, in any dtype, or into FP8.

Moved rows, x [B, N, ...] and the other tensor [B, A, ...], have one dtype and the same trailing dimensions, which lie
without gaps; strides of the first two are free. Raises :class:`dsa_rt.errors.ShapeError` for a wrong shape, dtype,
device, stride or overlap and a row outside [0, N), before anything is written (on CUDA, where reading them would stall
the queue, such a row stops the kernel, or Triton skips it), and :class:`dsa_rt.errors.OptionError` for a ``backend``
that cannot serve the call or where a gradient is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_rt.ops.dispatch import register, served
from dsa_rt.reference import layers as reference

register("gather_rows(Tensor(a!) out, Tensor x, Tensor rows) -> ()")
register("scatter_rows(Tensor(a!) x, Tensor rows, Tensor src) -> ()")
register("quantize_rows(Tensor(a!) out, Tensor(b!) scale, Tensor rows, Tensor? slots=None) -> ()")


def gather_rows(out: Tensor, x: Tensor, rows: Tensor, *, backend: str | None = None) -> None:
    """``out = x[:, rows]``: x [B, N, ...], rows [A] int64, out [B, A, ...]."""
    if served("gather_rows", backend, x, (out, x, rows)):
        return
    out.copy_(reference.gather_rows(x, rows))


def scatter_rows(x: Tensor, rows: Tensor, src: Tensor, *, backend: str | None = None) -> None:
    """``x[:, rows] = src``: x [B, N, ...], src [B, A, ...], rows [A] int64, distinct (on the CPU an error if not)."""
    if served("scatter_rows", backend, x, (x, rows, src)):
        return
    x.index_copy_(1, rows, src)


def quantize_rows(
    out: Tensor, scale: Tensor, rows: Tensor, slots: Tensor | None = None, *, backend: str | None = None
) -> None:
    """``out[:, slots]`` and ``scale[:, slots]`` become rows in E4M3 and what to multiply them by.

    out [B, N, H, D] ``float8_e4m3fn``; scale [B, N, H] fp32; rows [B, A, H, D] fp32, bf16 or fp16, D at least 1; slots
    [A] int64, distinct rows of out, or None for rows 0 to A - 1. Last dimensions lie without gaps, other strides are
    free. For each row and head ``scale = largest |element| / 448``, at least the smallest normal fp32 number, and out
    is ``row / scale`` rounded to the nearest E4M3 number, to even. Infinity becomes NaN, NaN stays NaN, and neither
    counts for the largest. Other rows are left alone. The bits of the definition on every backend. Errors as above.
    """
    if not served("quantize_rows", backend, rows, (out, scale, rows, slots)):
        quantize_by_definition(out, scale, rows, slots)


def quantize_by_definition(out: Tensor, scale: Tensor, rows: Tensor, slots: Tensor | None) -> None:
    """:func:`quantize_rows` of rows of any float dtype, unchecked."""
    values, of_rows = reference.quantize_rows(rows)
    places = torch.arange(rows.shape[1], device=rows.device) if slots is None else slots
    out.view(torch.uint8).index_copy_(1, places, values.view(torch.uint8))  # it has no kernel for FP8
    scale.index_copy_(1, places, of_rows)
