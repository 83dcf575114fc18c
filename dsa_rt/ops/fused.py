"""Attention by fused kernels that others wrote: cuDNN's and FlashAttention as the framework has them, FlashAttention-3
from its own package. Not run on a GPU so far.

Each is called by itself, not through ``torch.nn.attention.sdpa_kernel``: that switches kernels for the whole process,
other threads included. Results are new tensors, copied into the caller's: 4·A·C bytes in bf16, half a percent of the
time of A = 4680 queries and 32760 rows if both run at their floors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

MOST_CALLS = 4  # one for each run of queries that attend to the same rows; above, one kernel that takes segments is it
_Rows = tuple[slice, slice]  # of queries, and of the keys and values that they attend to


@dataclass(frozen=True)
class Kernel:
    """attend: q [B, A, H, D], k and v [B, N, H, D] -> [B, A, H, D]. why_not: it cannot, or None. note: what it is.
    missing: why it cannot run on this machine at all."""

    note: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    why_not: Callable[[Tensor, Tensor, Tensor], str | None]
    missing: str = ""

    def run(self, out: Tensor, lse: None, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> None:
        """The op with the arguments of its schema, once checked: a call, and a copy of its result, for each part."""
        parts = _parts(q, k, segments)
        assert not isinstance(parts, str)
        with torch.cuda.device_of(out):
            for queries, rows in parts:
                out[:, queries].copy_(self.attend(q[:, queries], k[:, rows], v[:, rows]))

    def refuses(
        self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None
    ) -> str | None:
        """Why this call is not for it; None where it is, or where the op's own check will say what is wrong."""
        if torch.compiler.is_compiling():
            return "it reads addresses and segments on the host, which torch.compile does not trace"
        if any(x is None or x.ndim != 4 for x in (q, k, v)):
            return None
        if segments is not None and (segments.shape[1:] != (5,) or segments.dtype != torch.int64):
            return None
        if lse is not None:
            return "it leaves no log-sum-exp"
        if q.shape[3] % 8 or not 8 <= q.shape[3] <= 256:
            return f"the head dimension is {q.shape[3]}, expected a multiple of 8 up to 256"
        if not all(_aligned(x) for x in (q, k, v)):
            return "rows of q, k or v do not begin at multiples of 16 bytes"
        parts = _parts(q, k, segments)
        if isinstance(parts, str):
            return parts
        with torch.cuda.device_of(out):
            found = (self.why_not(q[:, queries], k[:, rows], v[:, rows]) for queries, rows in parts)
            return next((reason for reason in found if reason), None)


def _aligned(x: Tensor) -> bool:
    """Such kernels move 16 bytes at a time, and not all of them look first."""
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    return not (x.data_ptr() % 16 or any(stride * x.itemsize % 16 for stride in strides))


def _parts(q: Tensor, k: Tensor, segments: Tensor | None) -> list[_Rows] | str:
    """The calls that segments come to, or why they are not a few calls over slices. No calls for malformed segments:
    the op's own check says what is wrong with them."""
    if not q.numel():
        return []
    if segments is None:
        return [(slice(0, q.shape[1]), slice(0, k.shape[1]))]
    parts: list[_Rows] = []
    start = 0
    for number, (count, *ends) in enumerate(segments.tolist()):
        ranges = sorted(pair for pair in (ends[:2], ends[2:]) if pair[0] != pair[1])
        if len(ranges) == 2 and ranges[0][1] == ranges[1][0]:
            ranges = [[ranges[0][0], ranges[1][1]]]
        if len(ranges) == 2:
            return f"segments[{number}] has two ranges of rows that are not one, which would have to be copied"
        if count < 0 or not ranges or not 0 <= ranges[0][0] < ranges[0][1] <= k.shape[1]:
            return []  # malformed
        rows, stop = slice(*ranges[0]), start + count
        if parts and parts[-1][1] == rows:
            parts[-1] = (slice(parts[-1][0].start, stop), rows)
        elif count:
            parts.append((slice(start, stop), rows))
        start = stop
    if start != q.shape[1]:
        return []  # malformed
    if len(parts) > MOST_CALLS:
        return f"its segments would take {len(parts)} calls, expected at most {MOST_CALLS}"
    return parts


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, False)[0]
    return result.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v))[0]
    return result.transpose(1, 2)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result = importlib.import_module("flash_attn_interface").flash_attn_func(q, k, v)
    found: Tensor = result[0] if isinstance(result, tuple) else result  # its first versions add the log-sum-exp
    return found


def _unless(usable: Callable[[SDPAParams], bool], name: str) -> Callable[[Tensor, Tensor, Tensor], str | None]:
    """By the framework's own test, which knows the card, its libraries and what was switched off."""

    def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if usable(SDPAParams(*_heads_first(q, k, v), None, 0.0, False, False)):
            return None
        return (
            f"the framework does not take {name} for {q.shape[1]} queries, {k.shape[1]} rows and head dimension "
            f"{q.shape[3]} here (torch.backends.cuda.{usable.__name__})"
        )

    return why_not


def _not_hopper(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if torch.cuda.get_device_capability(q.device) == (9, 0):
        return None
    return f"{torch.cuda.get_device_name(q.device)} is no device of compute capability 9.0"


_NO_FLASH3 = "" if find_spec("flash_attn_interface") else "the package flash_attn_interface is not installed"
KERNELS = {
    "cudnn": Kernel("cuDNN's kernel", _cudnn, _unless(can_use_cudnn_attention, "cuDNN's attention")),
    "flash": Kernel("the framework's FlashAttention", _flash, _unless(can_use_flash_attention, "FlashAttention")),
    "flash3": Kernel("FlashAttention-3", _flash3, _not_hopper, _NO_FLASH3),
}
"""Backend of ``active_attention`` -> what runs it."""
