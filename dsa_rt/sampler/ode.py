"""Many-step Euler sampling of a whole clip with a bidirectional generator."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from dsa_rt.cache import TextKV
from dsa_rt.models.wan import WanModel
from dsa_rt.ops import step as ops
from dsa_rt.plan import TokenGrid, frame_tokens
from dsa_rt.sampler.rollout import DenoisedChunk
from dsa_rt.schedule import TRAIN_TIMESTEPS


@torch.no_grad()
def solve(
    model: WanModel,
    grid: TokenGrid,
    frames: range,
    text: TextKV,
    empty: TextKV | None,
    sigmas: Sequence[float],
    guidance: float,
    seed: int,
    on_pass: Callable[[int, float | None], None],
    check: Callable[[], None],
) -> DenoisedChunk:
    """Dense Euler over all tokens: ``x += (sigma' - sigma) v``; with ``empty`` under classifier-free guidance.

    sigmas: steps + 1 levels, the last one 0. The clip is one chunk of ``len(sigmas) - 1`` passes.
    """
    start = time.perf_counter()
    device = model.patch_embedding.weight.device
    active = frame_tokens(grid, frames, model.config.head_dim, per_frame=False, device=device)
    x = torch.empty(1, len(active.tokens), model.config.patch_dim, device=device)
    ops.philox_normal(x, torch.tensor([seed], device=device), active.tokens, 0)
    velocity_cache = torch.zeros_like(x)
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        check()
        timesteps = torch.full((1, 1), TRAIN_TIMESTEPS * sigma, device=device)
        velocity = model(x, active, timesteps, text).velocity.float()
        if empty is not None:
            other = model(x, active, timesteps, empty).velocity.float()
            velocity = other + guidance * (velocity - other)
        ops.cached_step(x, velocity_cache, active.tokens, velocity, following - sigma)
        on_pass(step + 1, None)
    passes = len(sigmas) - 1
    return DenoisedChunk(0, frames, x, passes, (None,) * passes, None, 1000 * (time.perf_counter() - start), 0.0)
