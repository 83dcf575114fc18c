"""``gather_rows`` and ``scatter_rows``: rows moved as integers of their element's size, 16 bytes at a time where base
address, strides and width allow (Triton sees their divisibility by 16).

Bytes: each row is read and written once. Bound by memory, no arithmetic.
"""

import math

import torch
import triton
import triton.language as tl
from dsa_rt.kernels.triton.card import ceil_div, power_of_two
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TILE = 2048  # elements of a program


@triton.jit(do_not_specialize=["active", "all_rows"])
def _move_rows(
    out, source, rows, active, all_rows, width, out_batch, out_row, source_batch, source_row,
    SCATTER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + index, mask=index < active, other=-1)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = ((row >= 0) & (row < all_rows))[:, None] & (cols < width)[None, :]
    if SCATTER:
        place, origin = row, index
    else:
        place, origin = index, row
    value = tl.load(source + batch * source_batch + origin[:, None] * source_row + cols[None, :], mask=inside)
    tl.store(out + batch * out_batch + place[:, None] * out_row + cols[None, :], value, mask=inside)


def gather_rows(out: Tensor, x: Tensor, rows: Tensor) -> None:
    """``out = x[:, rows]``: out [B, A, ...], x [B, N, ...] of any dtype alike, what is behind the second dimension
    contiguous; rows [A] int64. A row of out whose number is out of range is left as it was."""
    _launch(out, x, rows, x.shape[1], scatter=False)


def scatter_rows(x: Tensor, rows: Tensor, src: Tensor) -> None:
    """``x[:, rows] = src``, shapes as in :func:`gather_rows`, rows distinct. Rows out of range are not written."""
    _launch(x, src, rows, x.shape[1], scatter=True)


def _launch(out: Tensor, source: Tensor, rows: Tensor, all_rows: int, *, scatter: bool) -> None:
    if out.numel() == 0 or source.numel() == 0:
        return
    integer = _INTEGERS[min(out.element_size(), 8)]
    out, source = out.view(integer), source.view(integer)
    width = math.prod(out.shape[2:])
    cols = min(power_of_two(width), _TILE)
    tile = _TILE // cols
    _move_rows[(ceil_div(len(rows), tile), ceil_div(width, cols), len(out))](
        out, source, rows, len(rows), all_rows, width,
        out.stride(0), out.stride(1), source.stride(0), source.stride(1),
        SCATTER=scatter, ROWS=tile, COLS=cols, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
