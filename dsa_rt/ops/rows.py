"""Rows of one tensor to another by number, destination passing; any dtype.

x [B, N, ...] and the other tensor [B, A, ...] have one dtype and the same trailing dimensions, which lie without gaps;
strides of the first two are free. Raises :class:`dsa_rt.errors.ShapeError` for a wrong shape, dtype, device, stride or
overlap and a row outside [0, N), before anything is written (on CUDA, where reading them would stall the queue, such a
row stops the kernel), and :class:`dsa_rt.errors.OptionError` for a ``backend`` that cannot serve the call or where a
gradient is wanted.
"""

from __future__ import annotations

from torch import Tensor

from dsa_rt.ops.backend import register, served
from dsa_rt.reference import layers as reference

register("gather_rows(Tensor(a!) out, Tensor x, Tensor rows) -> ()")
register("scatter_rows(Tensor(a!) x, Tensor rows, Tensor src) -> ()")


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
