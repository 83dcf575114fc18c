"""Training data: clips of the demo world, rendered from seeds and encoded once into latent rows."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsa_rt.codec.conv import ConvCodec
from dsa_rt.demo.grammar import format_scene, sample_scene, tokenize
from dsa_rt.demo.world import render
from dsa_rt.plan import TokenGrid

SHARD = 250


def clip(seed: int, frames: int) -> tuple[list[int], np.ndarray]:
    """Word numbers and frames [T, H, W, 3] uint8 of training clip ``seed``; never a held-out scene."""
    scene = sample_scene(np.random.default_rng(seed), held_out=False)
    return tokenize(format_scene(scene)), render(scene, seed, frames=frames)


def _shard(path: Path, seeds: range, frames: int, codec: ConvCodec, patch: tuple[int, int, int]) -> None:
    torch.set_num_threads(1)
    rows, ids = [], []
    with torch.no_grad():
        for seed in seeds:
            words, video = clip(seed, frames)
            pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            latents = codec.encode(pixels)
            height, width = latents.shape[-2:]
            rows.append(TokenGrid.for_latents(height, width, patch).patchify(latents)[0].bfloat16())
            ids.append(words)
    partial = path.with_suffix(".partial")
    save_file({"rows": torch.stack(rows), "ids": torch.tensor(ids)}, partial)
    partial.replace(path)


def encode_clips(
    folder: Path, codec: ConvCodec, patch: tuple[int, int, int], *, clips: int, frames: int, first_seed: int = 0
) -> None:
    """Write the latent rows of ``clips`` clips in shards of 250; shards that exist are kept."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for index in range((clips + SHARD - 1) // SHARD):
        path = folder / f"latents-{index:04d}.safetensors"
        start = first_seed + index * SHARD
        if not path.exists():
            jobs.append((path, range(start, start + min(SHARD, clips - index * SHARD)), frames, codec.cpu(), patch))
    # Fresh interpreters: a forked child would inherit the locks of torch's thread pool.
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1) or 1, mp_context=context) as pool:
        for result in tqdm([pool.submit(_shard, *job) for job in jobs], desc="encoding clips", disable=None):
            result.result()


class LatentClips:
    """All encoded clips in memory: rows [n, F * tokens, patch_dim] bf16, ids [n, length]."""

    def __init__(self, folder: Path) -> None:
        shards = [load_file(path) for path in sorted(folder.glob("latents-*.safetensors"))]
        self.rows = torch.cat([s["rows"] for s in shards])
        self.ids = torch.cat([s["ids"] for s in shards])

    def batch(self, count: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Random clips: rows [B, N, patch_dim] fp32 and ids [B, length]."""
        pick = torch.randint(len(self.rows), (count,))
        return self.rows[pick].float().to(device), self.ids[pick].to(device)
