"""K/V rows of a many-step run that are kept in host memory between steps."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_rt.errors import MemoryLimitError


class HostRows:
    """Rows of all layers in host memory in the dtype of the model, and the room of one layer on the device. Rows come
    in parts that are always written and read whole.

    lengths: rows of each part; their sum is at most the capacity. :meth:`read_into` is called for layer after layer.
    k, v [layers, B, capacity, H, D] are page-locked beside a CUDA device; staged_k, staged_v [B, capacity, H, D] are on
    it. A part that is read is fetched by then: when a layer has taken it, that of the next layer (after the last, of
    the first) sets out, beside the computation. A part that is written leaves for the host in the same way. Each part
    has its place in the room, and whoever needs the place waits for the copy under way there.
    """

    def __init__(
        self, layers: int, batch: int, capacity: int, heads: int, head_dim: int, dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.layers = layers
        self.lengths: tuple[int, ...] = ()
        shape = (batch, capacity, heads, head_dim)
        self._device = torch.device(device)
        self.k, self.v = (torch.empty(layers, *shape, dtype=dtype) for _ in range(2))
        self.staged_k, self.staged_v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.copies = CopyStream(self._device)
        self._fetched: dict[int, int] = {}  # part -> the layer whose rows are in its place or on the way there
        self._last: dict[int, torch.cuda.Event | None] = {}  # part -> the last copy from or to its place
        if self._device.type == "cuda":
            for staged, kept in ((self.staged_k, self.k), (self.staged_v, self.v)):
                self.copies.share(staged)
                _pin(self, kept)

    def arrange(self, lengths: Sequence[int]) -> None:
        """Another division into parts; the contents are undefined until they are written."""
        for part in self._last:
            self.copies.wait(self._last[part])
        self._last.clear()
        self._fetched.clear()
        self.lengths = tuple(lengths)

    def write(self, layer: int, part: int, k: Tensor, v: Tensor) -> None:
        """Store k, v [B, rows of the part, H, D]."""
        self.copies.wait(self._last.get(part))
        self._fetched.pop(part, None)
        (staged_k, kept_k), (staged_v, kept_v) = self._places(layer, part)
        staged_k.copy_(k)
        staged_v.copy_(v)
        self._last[part] = self.copies.start((kept_k, staged_k), (kept_v, staged_v))

    def read_into(self, layer: int, part: int, k: Tensor, v: Tensor) -> None:
        """Fill k, v [B, rows of the part, H, D] with what was stored."""
        if self._fetched.get(part) != layer:
            self.fetch(layer, part)
        self.copies.wait(self._last[part])
        (staged_k, _), (staged_v, _) = self._places(layer, part)
        k.copy_(staged_k)
        v.copy_(staged_v)
        self.fetch((layer + 1) % self.layers, part)

    def fetch(self, layer: int, part: int) -> None:
        """Start bringing the rows of a part into its place; after everything that was started before."""
        self._last[part] = self.copies.start(*self._places(layer, part))
        self._fetched[part] = layer

    def _places(self, layer: int, part: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(place on the device, place in host memory) of K and of V."""
        start = sum(self.lengths[:part])
        span = slice(start, start + self.lengths[part])
        return (self.staged_k[:, span], self.k[layer, :, span]), (self.staged_v[:, span], self.v[layer, :, span])


class CopyStream:
    """Copies beside the computation on a CUDA device, one after the other; on the CPU they are made where they are
    started. The CUDA half has not been run yet: it was written on a machine without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def share(self, tensor: Tensor) -> None:
        """Keep a tensor's memory, once it is freed, until copies under way are done."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def start(self, *pairs: tuple[Tensor, Tensor]) -> torch.cuda.Event | None:
        """Copy (to, from) pairs, after all that has been asked of the device so far; the result is for :meth:`wait`."""
        if self._stream is None:
            for to, source in pairs:
                to.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copy: torch.cuda.Event | None) -> None:
        """Let what is asked of the device from now on wait for a copy."""
        if copy is not None:
            torch.cuda.current_stream(self._device).wait_event(copy)

    def finish(self) -> None:
        """Block until all copies are done."""
        if self._stream is not None:
            self._stream.synchronize()


def _pin(rows: HostRows, tensor: Tensor) -> None:
    """Page-lock a tensor for as long as ``rows`` lives. In place: torch's own allocator of pinned memory rounds up to a
    power of two, up to twice of what the plan says."""
    runtime = torch.cuda.cudart()
    if runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0) != runtime.cudaError.success:
        raise MemoryLimitError(
            f"{tensor.nbytes / 1e6:.1f} MB of host memory for K/V could not be page-locked; use kv_storage='fp8', "
            "fewer frames, or raise the limit of locked memory (ulimit -l)"
        )
    weakref.finalize(rows, _unpin, rows.copies, tensor).atexit = False  # the driver is gone by then


def _unpin(copies: CopyStream, tensor: Tensor) -> None:
    copies.finish()
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
