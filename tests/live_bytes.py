"""How much memory tensors take while something runs: counted, not sampled, and independent of time."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """Bytes behind all tensors that operations have made inside the block and that are still alive; their peak.

    apart: tensors that were there before, whose memory is not counted where operations make views of it.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._apart = {tensor.untyped_storage().data_ptr() for tensor in apart}
        self._known: dict[int, tuple[int, int]] = {}  # tensor -> where its memory begins, and its bytes

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return made

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that no operation made, too: one that was read, say."""
        if id(tensor) not in self._known and tensor.device.type != "meta":
            memory = tensor.untyped_storage()
            if memory.data_ptr() in self._apart:
                return
            self._known[id(tensor)] = memory.data_ptr(), memory.nbytes()
            weakref.finalize(tensor, self._known.pop, id(tensor), None)
            self.peak = max(self.peak, self.now)

    @property
    def now(self) -> int:
        return sum(dict(self._known.values()).values())
