"""A rival that chooses tokens anew in every step: RAS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from bench.hsa.clip import STEPS, Clip
from dsa_rt.errors import OptionError
from dsa_rt.models.config import WanConfig
from dsa_rt.ops import step as ops
from dsa_rt.plan import ActiveSet


@dataclass(frozen=True)
class RAS:
    """RAS (Liu et al., "Region-Adaptive Sampling for Diffusion Transformers", arXiv 2502.10389), for video tokens.

    A step computes the ``active`` share of tokens with the highest std(v) · exp(starvation · D): v the velocity last
    predicted for the token, over its elements; D in how many steps it was left out so far. The others keep their
    velocity, and in attention the K/V they last had. The first ``warm_up`` steps and those of ``resets`` compute all
    tokens (published for SD3: 4 of 28, and steps 12 and 20; here the same places on 40).
    """

    active: float
    steps: int = STEPS
    warm_up: int = 6
    resets: tuple[int, ...] = (17, 29)
    starvation: float = 1.0

    @classmethod
    def at_share(cls, share: float) -> RAS:
        """The share of active tokens that makes the whole run cost ``share`` of :data:`STEPS` full steps."""
        dense = cls.warm_up + len(cls.resets)
        active = (share * STEPS - dense) / (STEPS - dense)
        if not 0 < active <= 1:
            raise OptionError(f"ras: a share of {share:g} cannot be had with {dense} of {STEPS} steps dense")
        return cls(active)

    def __call__(self, clip: Clip) -> Tensor:
        x, dense = clip.noise(), clip.dense
        velocity, left_out = torch.zeros_like(x), torch.zeros(clip.tokens)
        caches = [AnyRows(clip.model.config, clip.tokens, clip.model.dtype) for _ in range(clip.branches)]
        count = max(1, round(self.active * clip.tokens))
        for step, (sigma, following) in enumerate(pairwise(clip.sigmas(self.steps))):
            if step < self.warm_up or step in self.resets:
                index = dense.tokens
            else:
                metric = velocity[0].std(-1) * torch.exp(self.starvation * left_out.double())
                index = metric.argsort(descending=True, stable=True)[:count].sort().values
            left_out += 1
            left_out[index] -= 1
            active = replace(
                dense, tokens=index, cos=dense.cos[index], sin=dense.sin[index],
                modulation_rows=dense.modulation_rows[index], slots=index,
            )  # fmt: skip
            fresh = clip.guided(clip.velocities(x[:, index], sigma, active, [*caches]))
            ops.cached_step(x, velocity, index, fresh, following - sigma)
        return x


class AnyRows:
    """Self-attention K/V of all tokens in token order, of which any may be replaced."""

    def __init__(self, config: WanConfig, tokens: int, dtype: torch.dtype) -> None:
        shape = (config.layers, 1, tokens, config.heads, config.head_dim)
        self.k, self.v = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def destination(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
        """K and V [1, N, H, D] and the rows of the active tokens in them."""
        return self.k[layer], self.v[layer], active.slots

    def attended(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor]:
        """Those of all tokens."""
        return self.k[layer], self.v[layer]
