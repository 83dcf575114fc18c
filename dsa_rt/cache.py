"""The synchronized K/V cache: a bounded ring of latent frames with a sink, and the per-prompt text K/V.

Every pass writes its tokens' K (after qk-norm and RoPE at absolute positions) and V into their own rows before it
attends. Latent frame f lives in one place: frames below ``sink`` stay for good, later ones take turns in the other
places. So a chunk that does not fit evicts the oldest frames after the sink, frame by frame, nothing is shifted or
copied, and later passes of a chunk reuse its rows (attention has no order among keys: their positions are in their
rotation). With as many places as the window has frames the attended rows are a prefix of the buffer. With a chunk more,
what a new chunk pushes out of the window is still there for the chunk before it, so that the context pass of one and
the first pass of the other can run as one; the attended rows then are one or two ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_rt.errors import OptionError
from dsa_rt.plan import ActiveSet


def cache_bytes(
    layers: int, batch: int, window: int, tokens_per_frame: int, dim: int, dtype: torch.dtype
) -> int:
    """Bytes of K and V for a window of latent frames."""
    return 2 * layers * batch * window * tokens_per_frame * dim * dtype.itemsize


class Ring:
    """Where the latent frames of one clip lie in a cache of ``places`` frames (default: ``window``). ``window`` counts
    the sink, the clip's first frames that stay, and the chunk being denoised."""

    def __init__(self, window: int, sink: int, places: int | None = None) -> None:
        if not 0 <= sink < window:
            raise OptionError(f"sink is {sink} latent frames; expected 0 <= sink < window ({window})")
        self.window, self.sink, self.places = window, sink, places or window
        if self.places < window:
            raise OptionError(f"a cache of {places} latent frames does not hold a window of {window}")
        self._first = sink  # the frame that opens the ring

    def place(self, frame: int) -> int:
        """Which place latent frame ``frame`` takes."""
        if frame < self.sink:
            return frame
        return self.sink + (frame - self._first) % (self.places - self.sink)

    def restart(self, frame: int) -> None:
        """Empty the ring; ``frame``, after the sink, is the next one it takes. For writing the K/V of the frames in
        the window again, oldest first: each then attends to those before it and to nothing else."""
        self._first = max(frame, self.sink)

    def written(self, frames: range) -> list[int]:
        """The places of consecutive frames; OptionError where they do not fit beside the sink."""
        if len(frames) > self.window - min(self.sink, frames.start):
            raise OptionError(
                f"a chunk of {len(frames)} latent frames does not fit a window of {self.window} with a sink of "
                f"{self.sink}; make the window at least {self.sink + len(frames)}"
            )
        return [self.place(frame) for frame in frames]

    def seen(self, stop: int) -> list[tuple[int, int]]:
        """The one or two ranges of places that a chunk attends to which ends before frame ``stop``."""
        oldest = max(self._first, stop - (self.window - self.sink))
        places = sorted({self.place(f) for f in (*range(min(self.sink, stop)), *range(oldest, stop))})
        ranges: list[tuple[int, int]] = []
        for place in places:
            if ranges and ranges[-1][1] == place:
                ranges[-1] = (ranges[-1][0], place + 1)
            else:
                ranges.append((place, place + 1))
        return ranges


class KVCache(Ring):
    """Self-attention K/V of the last ``window`` latent frames, ``sink`` of them the clip's first.

    k, v: [layers, B, window * tokens_per_frame, H, D].
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        window: int,
        sink: int,
        tokens_per_frame: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(window, sink)
        self.tokens_per_frame = tokens_per_frame
        shape = (layers, batch, window * tokens_per_frame, heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def slots(self, frames: range) -> Tensor:
        """Cache rows [len(frames) * tokens_per_frame] int64 of consecutive frames."""
        inside = torch.arange(self.tokens_per_frame)
        return torch.cat([place * self.tokens_per_frame + inside for place in self.written(frames)])

    def valid(self, frames_seen: int) -> int:
        """Rows [0, valid) hold K/V once ``frames_seen`` frames have been written."""
        in_ring = min(max(frames_seen - self._first, 0), self.window - self.sink)
        return (min(frames_seen, self.sink) + in_ring) * self.tokens_per_frame

    def destination(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where the active rows of a layer go: K and V [B, N, H, D] and the row in them of each token, None for rows 0
        to A - 1."""
        assert active.slots is not None
        return destination(self.k[layer], self.v[layer], active)

    def attended(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor]:
        """K and V [B, valid, H, D], once the active rows are written."""
        return self.k[layer, :, : active.valid], self.v[layer, :, : active.valid]

    def update(self, layer: int, k: Tensor, v: Tensor, active: ActiveSet) -> tuple[Tensor, Tensor]:
        """The attended K and V [B, valid, H, D] with k, v [B, A, H, D] in place of the active rows, in a copy: the
        buffer stays as it is, and earlier chunks are constants of the graph, as in Self-Forcing training."""
        assert active.slots is not None
        held_k, held_v = self.attended(layer, active)
        return (
            held_k.to(k.dtype).index_copy(1, active.slots, k),
            held_v.to(v.dtype).index_copy(1, active.slots, v),
        )


def destination(k: Tensor, v: Tensor, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
    """``k``, ``v`` [B, N, H, D] and the active rows' slots in them, or where these are consecutive just those rows."""
    if active.slot_range is None:
        return k, v, active.slots
    start, stop = active.slot_range
    return k[:, start:stop], v[:, start:stop], None


@dataclass(eq=False)
class TextKV:
    """Cross-attention K/V of one prompt batch: a pair [B, L, H, D] for each layer, made once per prompt.

    All L text rows are attended, padding included, as in Wan. image_layers: the same for CLIP image rows
    [B, I, H, D], which a second attention reads; None where the generator takes none.
    """

    layers: list[tuple[Tensor, Tensor]]
    image_layers: list[tuple[Tensor, Tensor]] | None = None

    @classmethod
    def room(
        cls, layers: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, images: int = 0
    ) -> TextKV:
        """Zeros, for :meth:`dsa_rt.models.wan.WanModel.embed_text` to write to.

        shape: (B, L, H, D); images: CLIP rows.
        """

        def pairs(rows: int) -> list[tuple[Tensor, Tensor]]:
            sizes = (shape[0], rows, *shape[2:])
            return [
                (torch.zeros(sizes, dtype=dtype, device=device), torch.zeros(sizes, dtype=dtype, device=device))
                for _ in range(layers)
            ]

        return cls(pairs(shape[1]), pairs(images) if images else None)
