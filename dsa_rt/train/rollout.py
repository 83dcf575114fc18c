"""Autoregressive rollouts for training: batched, with a scripted number of passes per chunk, over ``ChunkPasses``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_rt.cache import KVCache
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import TokenGrid
from dsa_rt.schedule import add_noise, to_x0
from dsa_rt.train.passes import ChunkPasses


@dataclass
class ChunkPass:
    """One pass of a training rollout: x0 [B, A, patch_dim] fp32 and the tapped hidden states."""

    x0: Tensor
    taps: list[Tensor]


def chunk_passes(model: WanModel, grid: TokenGrid, text_rows: Tensor, frames: int) -> ChunkPasses:
    """Passes of a batch with a fresh cache that holds the whole clip; text_rows [B, L, text_dim]."""
    config = model.config
    cache = KVCache(
        layers=config.layers, batch=len(text_rows), window=frames, sink=0, tokens_per_frame=grid.tokens,
        heads=config.heads, head_dim=config.head_dim, dtype=torch.bfloat16, device=text_rows.device,
    )  # fmt: skip
    return ChunkPasses(model, grid, model.embed_text(text_rows), cache)


def chunk_frames(frames: int, chunk: int) -> list[range]:
    return [range(start, start + chunk) for start in range(0, frames, chunk)]


def rollout(
    passes: ChunkPasses,
    chunks: Sequence[range],
    sigmas: Sequence[float],
    counts: Sequence[int],
    *,
    taps: Sequence[int] = (),
    gradient: bool = False,
    keep_all: bool = False,
) -> list[list[ChunkPass]]:
    """Denoise chunk after chunk with ``counts[chunk]`` passes, each followed by its context pass.

    With ``gradient`` the last pass of every chunk carries one (earlier chunks are constants). Returns for each chunk
    its last pass, or all passes with ``keep_all``.
    """
    device, batch = passes.cache.k.device, passes.cache.k.shape[1]
    kept: list[list[ChunkPass]] = []
    for frames, count in zip(chunks, counts, strict=True):
        active = passes.active(frames)
        x = torch.randn(batch, len(active.tokens), passes.model.config.patch_dim, device=device)
        chunk: list[ChunkPass] = []
        for index in range(count):
            last = index == count - 1
            with torch.set_grad_enabled(gradient and last):
                out = passes.denoise(x, active, sigmas[index], taps)
                x0 = to_x0(x, out.velocity.float(), sigmas[index])
            if keep_all or last:
                chunk.append(ChunkPass(x0, out.taps))
            if not last:
                x = add_noise(x0, torch.randn_like(x0), sigmas[index + 1])
        passes.write_context(chunk[-1].x0.detach(), active)
        kept.append(chunk)
    return kept
