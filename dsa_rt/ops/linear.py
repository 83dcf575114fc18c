"""Matrix products with weights that are packed once, destination passing.

    packed = pack_linear(layer.weight, layer.bias)
    linear(out, x, packed, "gelu")

A pack belongs to the kernel it was made for: on a CPU the panels of the instruction set that runs there, elsewhere the
weights as they are. It is not to be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops.backend import native
from dsa_rt.ops.dispatch import register, served
from dsa_rt.reference import layers as reference

register("linear(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, str activation, str layout) -> ()")

_WEIGHTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}  # that kernels take
ROWS = "rows"
"""The layout of weights that were left as they are, [N, K] contiguous."""


@dataclass(frozen=True)
class PackedLinear:
    """W [n, k] and bias as a kernel takes them; :func:`pack_linear` makes it.

    weight: all elements in one dimension, in the dtype they had; bias [n] fp32, or None; layout: the instruction set
    whose panels they are in, or ``rows``.
    """

    weight: Tensor
    bias: Tensor | None
    n: int
    k: int
    layout: str

    def unpacked(self) -> Tensor:
        """W [n, k] again, for the definition. OptionError for a layout that no kernel of this machine has."""
        if self.layout == ROWS:
            return self.weight.view(self.n, self.k)
        panel, lanes, group = _panels(self.weight.dtype, self.layout)
        steps, rows = -(-self.k // group), -(-self.n // lanes) * lanes
        whole = rows // panel * panel
        parts = (self.weight[: whole * steps * group], self.weight[whole * steps * group :])
        panels = [
            part.view(count, steps, width, group).transpose(1, 2).reshape(count * width, steps * group)
            for part, count, width in zip(parts, (whole // panel, 1), (panel, rows - whole), strict=True)
        ]
        return torch.cat(panels)[: self.n, : self.k]


def _panels(dtype: torch.dtype, layout: str) -> tuple[int, int, int]:
    """Rows of a panel, what the last one is rounded up to, and elements along K that lie together."""
    name, *sizes = native.linear_layout(_WEIGHTS[dtype], layout)
    if name != layout:
        raise OptionError(f"linear: no kernel has the layout {layout!r} for {dtype}; pack the weights again")
    return sizes[0], sizes[1], sizes[2]


def pack_linear(
    weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor | None] | None = None, *,
    instruction_set: str = "",
) -> PackedLinear:  # fmt: skip
    """Weights [N, K] in the layout of the kernel that will take them, as a copy without gradient.

    weight, bias: of one layer, or of several that share their input (q, k and v): their rows follow each other, and
    where some have a bias and others none, theirs is 0. bias [N], any floating dtype: it is kept in fp32.
    ``instruction_set``, for tests, asks for a kernel that is not the best one here.

    Raises :class:`dsa_rt.errors.ShapeError` for other shapes or weights that differ in dtype, device or K, and
    :class:`dsa_rt.errors.OptionError` for an instruction set that does not run here.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    biases = [bias] * len(weights) if bias is None or isinstance(bias, Tensor) else list(bias)
    _check(weights, biases)
    rows = torch.cat([part.detach() for part in weights])
    added = None
    if any(part is not None for part in biases):
        added = torch.cat([
            torch.zeros(len(of), device=of.device) if part is None else part.detach().float()
            for part, of in zip(biases, weights, strict=True)
        ])  # fmt: skip
    n, k = rows.shape
    if rows.device.type != "cpu" or rows.dtype not in _WEIGHTS:
        return PackedLinear(rows.flatten(), added, n, k, ROWS)
    layout, panel, lanes, group = native.linear_layout(_WEIGHTS[rows.dtype], instruction_set)
    rows = F.pad(rows, (0, -k % group, 0, -n % lanes))
    whole = len(rows) // panel * panel
    panels = [
        part.view(len(part) // width, width, rows.shape[1] // group, group).transpose(1, 2).flatten()
        for part, width in ((rows[:whole], panel), (rows[whole:], len(rows) - whole))
        if width
    ]
    return PackedLinear(torch.cat(panels), added, n, k, layout)


def _check(weights: list[Tensor], biases: list[Tensor | None]) -> None:
    if not weights or len(weights) != len(biases):
        raise ShapeError(f"pack_linear: {len(weights)} weights and {len(biases)} biases, expected one of each a layer")
    first = weights[0]
    for part, bias in zip(weights, biases, strict=True):
        if part.ndim != 2 or part.shape[1:] != first.shape[1:] or not part.is_floating_point():
            raise ShapeError(
                f"pack_linear: weight has shape {list(part.shape)} and dtype {part.dtype}, expected a floating dtype "
                f"and [N, K{'' if part is first else f'={first.shape[-1]} as in the first'}]"
            )
        if part.dtype != first.dtype or part.device != first.device:
            raise ShapeError(
                f"pack_linear: weight is {part.dtype} on {part.device}, expected {first.dtype} on {first.device} as "
                "the first"
            )
        if bias is not None and (bias.shape != part.shape[:1] or bias.device != part.device):
            raise ShapeError(
                f"pack_linear: bias has shape {list(bias.shape)} on {bias.device}, expected [N={len(part)}] on "
                f"{part.device} as weight"
            )


def linear(
    out: Tensor, x: Tensor, weight: PackedLinear, activation: str = "none", *, backend: str | None = None
) -> None:
    """``out = act(x Wᵀ + bias)``, activation "none", "gelu" (its tanh form), "gelu_erf" or "silu".

    x [B, A, K] fp32 or of the weights' dtype; out [B, A, N] likewise; fp32, bf16 or fp16 weights; the last dimension
    contiguous, other strides free (columns of a wider buffer are fine). fp32 rows that meet other weights are rounded
    to their dtype first. Products and sums are fp32, one sum over K from its first term to its last; bias and
    activation are fp32 too, and each result is rounded once. Natively the bits of a row depend neither on other rows,
    nor on how many there are, nor on the number of threads; they may differ in the last place between instruction sets:
    those with bf16 dot products add two products at a time and take numbers below 2^-126 for 0.

    Raises :class:`dsa_rt.errors.ShapeError` for a wrong shape, dtype, device, stride or overlap of the output with
    another argument, before anything is written, and :class:`dsa_rt.errors.OptionError` for weights packed for another
    instruction set, an unknown activation, a ``backend`` that cannot serve the call or where a gradient is wanted.
    """
    if served("linear", backend, weight.weight, (out, x, weight.weight, weight.bias), (activation, weight.layout)):
        return
    out.copy_(reference.linear(x, weight.unpacked(), weight.bias, activation))
