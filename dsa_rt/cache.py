"""The synchronized K/V cache: a bounded ring of latent frames with a sink, and the per-prompt text K/V.

Every pass writes its tokens' K (after qk-norm and RoPE at absolute positions) and V into their own rows before it
attends. Latent frame f lives in one place: frames below ``sink`` stay for good, later ones take turns in the other
``window - sink`` places. So a chunk that does not fit evicts the oldest frames after the sink, frame by frame, nothing
is shifted or copied, later passes of a chunk reuse its rows, and the attended rows are always a prefix of the buffer
(attention has no order among keys: their positions are in their rotation).
"""

from __future__ import annotations

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


class KVCache:
    """Self-attention K/V of the last ``window`` latent frames, ``sink`` of them the clip's first.

    k, v: [layers, B, window * tokens_per_frame, H, D]. ``window`` counts the sink and the chunk being denoised.
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
        if not 0 <= sink < window:
            raise OptionError(f"sink is {sink} latent frames; expected 0 <= sink < window ({window})")
        self.window, self.sink, self.tokens_per_frame = window, sink, tokens_per_frame
        self._first = sink  # the frame that opens the ring
        shape = (layers, batch, window * tokens_per_frame, heads, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def place(self, frame: int) -> int:
        """Which of the ``window`` places latent frame ``frame`` takes."""
        if frame < self.sink:
            return frame
        return self.sink + (frame - self._first) % (self.window - self.sink)

    def restart(self, frame: int) -> None:
        """Empty the ring; ``frame``, after the sink, is the next one it takes. For writing the K/V of the frames in
        the window again, oldest first: each then attends to those before it and to nothing else."""
        self._first = max(frame, self.sink)

    def slots(self, frames: range) -> Tensor:
        """Cache rows [len(frames) * tokens_per_frame] int64 of consecutive frames."""
        if len({self.place(f) for f in frames}) < len(frames):
            raise OptionError(
                f"a chunk of {len(frames)} latent frames does not fit a window of {self.window} with a sink of "
                f"{self.sink}; make the window at least {self.sink + len(frames)}"
            )
        inside = torch.arange(self.tokens_per_frame)
        return torch.cat([self.place(f) * self.tokens_per_frame + inside for f in frames])

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
