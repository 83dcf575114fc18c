"""Model passes over one chunk against a cache of its own, as training runs them; inference has :mod:`dsa_rt.engine`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_rt.cache import KVCache, TextKV
from dsa_rt.models.wan import Output, WanModel
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens
from dsa_rt.schedule import TRAIN_TIMESTEPS


class ChunkPasses:
    """A causal generator, its caches and its token grid: denoise passes and the context pass of any chunk."""

    def __init__(self, model: WanModel, grid: TokenGrid, text: TextKV, cache: KVCache) -> None:
        self.model, self.grid, self.text, self.cache = model, grid, text, cache

    def active(self, frames: range) -> ActiveSet:
        """All tokens of these latent frames with their cache rows: the active set of each of the chunk's passes."""
        return frame_tokens(
            self.grid,
            frames,
            self.model.config.head_dim,
            per_frame=True,
            slots=self.cache.slots(frames),
            valid=self.cache.valid(frames.stop),
            device=self.cache.k.device,
        )

    def denoise(self, rows: Tensor, active: ActiveSet, sigma: float, taps: Sequence[int] = ()) -> Output:
        """One pass at a noise level; rows [B, A, patch_dim]. The chunk's K/V replace those of its last pass."""
        frames = len(active.tokens) // self.grid.tokens
        timesteps = torch.full((rows.shape[0], frames), TRAIN_TIMESTEPS * sigma, device=rows.device)
        return self.model(rows, active, timesteps, self.text, self.cache, taps)

    def write_context(self, x0: Tensor, active: ActiveSet) -> None:
        """The context pass: timestep 0 on the clean prediction leaves the chunk's K/V for the chunks to come."""
        with torch.no_grad():
            self.denoise(x0, active, 0.0)
