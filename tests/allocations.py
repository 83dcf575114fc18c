"""What ops allocate, and whether passes are replayed here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsa_rt.ops.backend import choose


class Allocations(TorchDispatchMode):
    """Bytes of every tensor that an op makes inside the block, outputs in given memory excepted; by op."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made.append((str(op), tensor.untyped_storage().nbytes()))
        return result

    @property
    def largest(self) -> tuple[str, int]:
        return max(self.made, key=lambda pair: pair[1], default=("", 0))


def replayed(dtype: torch.dtype) -> bool:
    """Whether passes are programs here: elsewhere the framework is left some of the ops."""
    return all(choose(op, "cpu", dtype) == "native" for op in ("linear", "active_attention"))
