"""Points in the work of a device, and the time between them."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """On a CPU a mark is now; on CUDA it is when the device reaches it, and only :meth:`between` waits for that."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """A point after all work that has been started."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Milliseconds from one mark to a later one."""
        if not self._cuda:
            return 1000 * (last - first)
        last.synchronize()
        return float(first.elapsed_time(last))
