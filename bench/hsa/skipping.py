"""Rivals that skip whole steps by a criterion read at run time, written plainly: TeaCache and EasyCache.

Both compute the first and the last step, and have one threshold: the larger it is, the more is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from bench.hsa.clip import STEPS, Clip
from dsa_rt.models.wan import Block, WanModel
from dsa_rt.ops import layers as ops

DEGREE = 4  # of TeaCache's polynomial, as published


@dataclass(frozen=True)
class TeaCache:
    """TeaCache (Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv
    2411.19108).

    The relative L1 change of the first block's timestep-modulated input from step to step, rescaled by a polynomial to
    an estimate of the relative change of the output, is summed up; while the sum is below ``threshold`` the blocks are
    skipped and what they last added to their input (a residual for each guidance branch) is added again; the embedding
    and the head run in every step. Before guidance both branches have one input, so they share the decision.

    polynomial: highest power first, from :func:`fit_polynomial`.
    """

    threshold: float
    polynomial: tuple[float, ...]
    steps: int = STEPS

    def __call__(self, clip: Clip) -> Tensor:
        model, sigmas, x = clip.model, clip.sigmas(self.steps), clip.noise()
        residuals: list[Tensor] = []
        previous, distance = x, 0.0
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            embedded, modulated = modulated_input(clip, x, sigma)
            distance += 0.0 if step == 0 else float(np.polyval(self.polynomial, _change(modulated, previous)))
            previous = modulated
            if step in (0, self.steps - 1) or distance >= self.threshold:
                distance, timesteps, last = 0.0, clip.timesteps(sigma), (model.config.layers - 1,)
                outputs = [model(x, clip.dense, timesteps, text, None, last) for text in clip.texts()]
                residuals = [output.taps[0] - embedded for output in outputs]
                branches = [output.velocity.float() for output in outputs]
            else:
                branches = [_head(clip, embedded + residual, sigma) for residual in residuals]
            x += (following - sigma) * clip.guided(branches)
        return x


def modulated_input(clip: Clip, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Embedded rows [1, N, C], and what the first block makes of them for its self-attention."""
    model, embedded = clip.model, clip.model.patch_embedding(x.to(clip.model.dtype))
    _, modulation = model.embed_timesteps(clip.timesteps(sigma))
    first = model.blocks[0]
    assert isinstance(first, Block)
    m = (modulation + first.modulation.float()).unbind(2)
    return embedded, ops.norm_modulate(embedded, m[0], m[1], clip.dense.modulation_rows, model.config.eps)


def _head(clip: Clip, hidden: Tensor, sigma: float) -> Tensor:
    """Velocity [1, N, P] fp32 of the last block's output."""
    model: WanModel = clip.model
    modulation, _ = model.embed_timesteps(clip.timesteps(sigma))
    shift, scale = (modulation[:, :, None] + model.head.modulation.float()).unbind(2)
    normed = ops.norm_modulate(hidden, shift, scale, clip.dense.modulation_rows, model.config.eps)
    return model.head.head(normed).float()


@torch.no_grad()
def fit_polynomial(clips: Sequence[Clip], steps: int = STEPS) -> tuple[float, ...]:
    """Least squares on dense runs: relative L1 change of the modulated input -> that of the output (the prompt's
    velocity), from step to step, as TeaCache fits its rescaling for each model."""
    inputs, outputs = [], []
    for clip in clips:
        x, before = clip.noise(), None
        for sigma, following in pairwise(clip.sigmas(steps)):
            _, modulated = modulated_input(clip, x, sigma)
            branches = clip.velocities(x, sigma, clip.dense)
            if before is not None:
                inputs.append(_change(modulated, before[0]))
                outputs.append(_change(branches[0], before[1]))
            before = modulated, branches[0]
            x += (following - sigma) * clip.guided(branches)
    return tuple(np.polyfit(inputs, outputs, DEGREE).tolist())


@dataclass(frozen=True)
class EasyCache:
    """EasyCache (Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive
    Caching", arXiv 2507.02860).

    The transformation rate k = ‖v − v'‖₁ / ‖x − x'‖₁ of the last two computed steps is taken as constant, so that a
    step changes the output by about k‖x_i − x_{i−1}‖₁ / ‖v‖₁; while the sum of that is below ``threshold``, the step is
    skipped and v = x + (v − x at the last computed step). Both branches share the decision, made on the prompt's. The
    first ``warm_up`` steps are computed (published: a fifth of them), and the last.
    """

    threshold: float
    warm_up: int = STEPS // 5
    steps: int = STEPS

    def __call__(self, clip: Clip) -> Tensor:
        x = clip.noise()
        before: Tensor | None = None  # the last step's x
        computed: tuple[Tensor, Tensor] | None = None  # x and the prompt's velocity of the last computed step
        offset, error, rate = x, 0.0, None
        for step, (sigma, following) in enumerate(pairwise(clip.sigmas(self.steps))):
            if rate is not None and before is not None and computed is not None:
                error += rate * _distance(x, before) / float(computed[1].abs().mean())
            if rate is None or step < self.warm_up or step == self.steps - 1 or error >= self.threshold:
                branches = clip.velocities(x, sigma, clip.dense)
                velocity, error = clip.guided(branches), 0.0
                if computed is not None:
                    rate = _distance(branches[0], computed[1]) / _distance(x, computed[0])
                computed, offset = (x, branches[0]), velocity - x
            else:
                velocity = x + offset  # linear, so guidance over the branches' own offsets is the same
            before, x = x, x + (following - sigma) * velocity
        return x


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


def _change(fresh: Tensor, old: Tensor) -> float:
    """‖fresh − old‖₁ / ‖old‖₁."""
    return _distance(fresh, old) / float(old.float().abs().mean())
