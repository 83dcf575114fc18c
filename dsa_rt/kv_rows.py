"""Where K/V rows of a many-step run are kept between steps: in the model's dtype, in FP8, or in host memory."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dsa_rt.errors import MemoryLimitError

BLOCK = 64
"""Rows of one head that share a scale in FP8 storage."""

_FP8_MAX = 448.0


class Rows(ABC):
    """K/V rows of all layers that outlive a step, in parts that are always written and read whole.

    lengths: rows of each part; their sum is at most the capacity. :meth:`read_into` is called for layer after layer, so
    storage elsewhere can fetch the next layer's rows while one is computed.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.lengths: tuple[int, ...] = ()

    def arrange(self, lengths: Sequence[int]) -> None:
        """Another division into parts; the contents are undefined until they are written."""
        self.lengths = tuple(lengths)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated on the device."""

    @property
    def host_nbytes(self) -> int:
        """Bytes allocated in host memory beside a CUDA device."""
        return 0

    @abstractmethod
    def write(self, layer: int, part: int, k: Tensor, v: Tensor) -> None:
        """Store k, v [B, rows of the part, H, D]."""

    @abstractmethod
    def read_into(self, layer: int, part: int, k: Tensor, v: Tensor) -> None:
        """Fill k, v [B, rows of the part, H, D] with what was stored."""

    def _span(self, part: int) -> slice:
        start = sum(self.lengths[:part])
        return slice(start, start + self.lengths[part])


class ModelRows(Rows):
    """Rows in the dtype of the model: k, v [layers, B, capacity, H, D]."""

    def __init__(
        self, layers: int, batch: int, capacity: int, heads: int, head_dim: int, dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__(layers)
        self.k, self.v = (
            torch.empty(layers, batch, capacity, heads, head_dim, dtype=dtype, device=device) for _ in range(2)
        )

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def write(self, layer: int, part: int, k: Tensor, v: Tensor) -> None:
        span = self._span(part)
        self.k[layer, :, span] = k
        self.v[layer, :, span] = v

    def read_into(self, layer: int, part: int, k: Tensor, v: Tensor) -> None:
        span = self._span(part)
        k.copy_(self.k[layer, :, span])
        v.copy_(self.v[layer, :, span])


class Float8Rows(Rows):
    """Rows as E4M3 with an fp32 scale for each head of each block of :data:`BLOCK` rows: amax / 448.

    Blocks are counted from the start of a part, so that writing one part leaves the scales of others alone.
    """

    def __init__(
        self, layers: int, batch: int, capacity: int, heads: int, head_dim: int, parts: int,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__(layers)
        shape = (layers, batch, capacity, heads, head_dim)
        scales = (layers, batch, fp8_blocks(capacity, parts), heads)
        self.k, self.v = (torch.empty(shape, dtype=torch.float8_e4m3fn, device=device) for _ in range(2))
        self.k_scale, self.v_scale = (torch.empty(scales, dtype=torch.float32, device=device) for _ in range(2))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.k_scale, self.v_scale))

    def write(self, layer: int, part: int, k: Tensor, v: Tensor) -> None:
        rows, blocks = self._span(part), self._blocks(part)
        for values, stored, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            amax = torch.maximum(values.amax(-1), -values.amin(-1)).float()
            padding = -amax.shape[1] % BLOCK
            amax = torch.nn.functional.pad(amax, (0, 0, 0, padding)).unflatten(1, (-1, BLOCK)).amax(2)
            scale = (amax / _FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
            scales[layer, :, blocks] = scale
            stored[layer, :, rows] = (values / _per_row(scale, values.shape[1])).to(stored.dtype)

    def read_into(self, layer: int, part: int, k: Tensor, v: Tensor) -> None:
        rows, blocks = self._span(part), self._blocks(part)
        for out, stored, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            out.copy_(stored[layer, :, rows])  # exact: bf16 and fp16 hold every value of E4M3
            out.mul_(_per_row(scales[layer, :, blocks], out.shape[1]))

    def _blocks(self, part: int) -> slice:
        ends = list(accumulate((-(-length // BLOCK) for length in self.lengths), initial=0))
        return slice(ends[part], ends[part + 1])


def fp8_blocks(rows: int, parts: int) -> int:
    """Scales that are needed for ``rows`` rows in up to ``parts`` parts, each of which may end in part of a block."""
    return -(-rows // BLOCK) + parts


def _per_row(scale: Tensor, rows: int) -> Tensor:
    """Scales [B, blocks, H] -> [B, rows, H, 1]."""
    return scale.repeat_interleave(BLOCK, 1)[:, :rows, :, None]


class HostRows(Rows):
    """Rows in host memory in the dtype of the model, and the room of one layer on the device.

    k, v [layers, B, capacity, H, D] are page-locked beside a CUDA device; staged_k, staged_v [B, capacity, H, D] are on
    it. A part that is read is fetched by then: when a layer has taken it, that of the next layer (after the last, of
    the first) sets out, beside the computation. A part that is written leaves for the host in the same way. Each part
    has its place in the room, and whoever needs the place waits for the copy under way there.
    """

    def __init__(
        self, layers: int, batch: int, capacity: int, heads: int, head_dim: int, dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__(layers)
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

    @property
    def nbytes(self) -> int:
        staged = self.staged_k.nbytes + self.staged_v.nbytes
        return staged if self._device.type == "cuda" else staged + self.k.nbytes + self.v.nbytes

    @property
    def host_nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes if self._device.type == "cuda" else 0

    def arrange(self, lengths: Sequence[int]) -> None:
        for part in self._last:
            self.copies.wait(self._last[part])
        self._last.clear()
        self._fetched.clear()
        super().arrange(lengths)

    def write(self, layer: int, part: int, k: Tensor, v: Tensor) -> None:
        self.copies.wait(self._last.get(part))
        self._fetched.pop(part, None)
        (staged_k, kept_k), (staged_v, kept_v) = self._places(layer, part)
        staged_k.copy_(k)
        staged_v.copy_(v)
        self._last[part] = self.copies.start((kept_k, staged_k), (kept_v, staged_v))

    def read_into(self, layer: int, part: int, k: Tensor, v: Tensor) -> None:
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
        span = self._span(part)
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
