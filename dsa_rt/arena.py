"""Working buffers with names: allocated at their first use, which is in compile, and the same memory ever after."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Arena:
    """A name and a dtype stand for one buffer; what is asked for under them takes its first elements. So two tensors
    that live at one time need two names, and a smaller request never moves a larger one's memory."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.allocations = 0
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Contiguous memory of this shape, with what was left in it. A request beyond all before it allocates, and
        tensors that were given out earlier under the name keep the old memory."""
        count = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or len(held) < count:
            held = None  # a smaller one goes first, so that two are never there
            self._held.pop((name, dtype), None)
            held = self._held[name, dtype] = torch.empty(count, dtype=dtype, device=self.device)
            self.allocations += 1
        return held[:count].view(*shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._held.values())


class Room:
    """Rows of one forward pass in an arena: [B, A, width] by name. Without an arena there is none: ops then make their
    own results."""

    def __init__(self, arena: Arena | None, rows: Sequence[int], dtype: torch.dtype) -> None:
        self._arena, self._rows, self._dtype = arena, tuple(rows), dtype

    def __call__(self, name: str, *width: int) -> Tensor | None:
        """The buffer [B, A, *width], or None."""
        if self._arena is None:
            return None
        return self._arena.get(name, (*self._rows, *width), self._dtype)
