"""``norm_modulate``, ``residual_norm_modulate`` and ``rms_norm``: a program per token, one pass over its row.

Bytes of a token (s bytes an element): x in and out, 2·s·C; with the residual y in and the sum out, 4·s·C; the tables
(fp32, R rows) stay in L2. Bound by memory: about ten operations an element. A row is held in registers, so that mean
and variance are two sums over the same values, the variance around the mean. Products and sums are not contracted
(``enable_fp_fusion=False``): the sum has the bits of the definition; the norm may differ from it in the last place,
since its reductions have another order and ``rsqrt`` is the hardware's.
"""

import triton
import triton.language as tl
from dsa_rt.kernels.triton.card import power_of_two
from torch import Tensor


@triton.jit(do_not_specialize=["table_rows"])
def _norm_modulate(
    out, x, total, y, gate, shift, scale, rows, table_rows, width, eps,
    out_batch, out_row, x_batch, x_row, total_batch, total_row, y_batch, y_row,
    gate_batch, gate_row, shift_batch, shift_row, scale_batch, scale_row,
    COLS: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < width
    row = token * 0
    stored = inside
    if rows is not None:
        row = tl.load(rows + token)
        everywhere = tl.broadcast_to(row, [COLS])
        stored = inside & (everywhere >= 0) & (everywhere < table_rows)
    value = tl.load(x + batch * x_batch + token * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        change = tl.load(y + batch * y_batch + token * y_row + cols, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            change = change * tl.load(gate + batch * gate_batch + row * gate_row + cols, mask=stored, other=0.0)
        rounded = (value + change).to(total.dtype.element_ty)
        tl.store(total + batch * total_batch + token * total_row + cols, rounded, mask=stored)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    factor = tl.load(scale + batch * scale_batch + row * scale_row + cols, mask=stored, other=0.0) + 1.0
    offset = tl.load(shift + batch * shift_batch + row * shift_row + cols, mask=stored, other=0.0)
    result = centred * inverse * factor + offset
    tl.store(out + batch * out_batch + token * out_row + cols, result.to(out.dtype.element_ty), mask=stored)


def norm_modulate(out: Tensor, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float) -> None:
    """``out = LayerNorm(x)·(1 + scale[r]) + shift[r]``, r = rows[token].

    out, x [B, A, C] alike, last dimension contiguous; shift, scale [B or 1, R or 1, C] fp32; rows [A] int64, not read
    where both tables have one row. A token whose row is out of range is skipped.
    """
    _launch(out, x, None, None, None, shift, scale, rows, eps)


def residual_norm_modulate(
    sum: Tensor, out: Tensor, x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor,
    rows: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """``sum = x + gate[r]·y`` rounded to the dtype, ``out`` = :func:`norm_modulate` of it; gate None means 1.

    ``sum`` may be ``x``. gate [B or 1, R or 1, C] fp32. A token whose row is out of range is skipped.
    """
    _launch(out, x, sum, y, gate, shift, scale, rows, eps)


@triton.jit
def _rms_norm(out, x, weight, width, eps, out_batch, out_row, x_batch, x_row, COLS: tl.constexpr):
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < width
    value = tl.load(x + batch * x_batch + token * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    result = value * inverse * tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + batch * out_batch + token * out_row + cols, result.to(out.dtype.element_ty), mask=inside)


def rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """``out = x / √(mean(x²) + eps) · weight``.

    out, x [B, A, C] alike, last dimension contiguous, ``out`` may be ``x``; weight [C] of any floating dtype.
    """
    batch, active, width = x.shape
    if x.numel() == 0:
        return
    cols = power_of_two(width)
    _rms_norm[(active, batch)](
        out, x, weight, width, eps, out.stride(0), out.stride(1), x.stride(0), x.stride(1), COLS=cols,
        num_warps=max(1, min(16, cols // 512)), enable_fp_fusion=False,
    )  # fmt: skip


def _launch(
    out: Tensor, x: Tensor, total: Tensor | None, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor,
    rows: Tensor | None, eps: float,
) -> None:  # fmt: skip
    batch, active, width = x.shape
    if x.numel() == 0:
        return
    table_rows = max(table.shape[1] for table in (gate, shift, scale) if table is not None)
    cols = power_of_two(width)
    _norm_modulate[(active, batch)](
        out, x, total, y, gate, shift, scale, rows if table_rows > 1 else None, table_rows, width, eps,
        out.stride(0), out.stride(1), x.stride(0), x.stride(1), *_strides(total), *_strides(y),
        *_strides(gate), *_strides(shift), *_strides(scale),
        COLS=cols, num_warps=max(1, min(16, cols // 512)), enable_fp_fusion=False,
    )  # fmt: skip


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Batch and row stride; 0 where a table has one batch or one row for all."""
    if tensor is None:
        return 0, 0
    return tuple(0 if tensor.shape[i] == 1 else tensor.stride(i) for i in range(2))  # type: ignore[return-value]
