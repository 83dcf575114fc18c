"""Flow-matching noise levels: grids, the timestep shift, and conversions between velocity and clean sample.

``x_sigma = (1 - sigma) x0 + sigma * noise``; the model predicts ``v = noise - x0`` and sees ``t = 1000 sigma``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dsa_rt.errors import OptionError

TRAIN_TIMESTEPS = 1000


def shift_sigma(sigma: float, shift: float) -> float:
    """Timestep shift of Wan and Self-Forcing: ``shift * s / (1 + (shift - 1) * s)``."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def euler_sigmas(steps: int, shift: float) -> list[float]:
    """``steps + 1`` levels from 1 to 0, equidistant before the shift: the grid of the many-step sampler."""
    if steps < 1:
        raise OptionError(f"steps is {steps}; a many-step run needs at least 1")
    return [shift_sigma(1 - i / steps, shift) for i in range(steps + 1)]


def few_step_sigmas(timesteps: Sequence[float], shift: float) -> list[float]:
    """Warped levels of a few-step generator (Self-Forcing: [1000, 750, 500, 250], shift 5).

    Gives [1, 0.9375, 0.8333, 0.625] for those: one level per pass, highest first.
    """
    levels = [shift_sigma(t / TRAIN_TIMESTEPS, shift) for t in timesteps]
    falling = all(a > b for a, b in itertools.pairwise(levels))
    if not levels or not falling or not 0 < levels[-1] <= levels[0] <= 1:
        raise OptionError(f"few-step timesteps are {list(timesteps)}; expected falling values in (0, 1000]")
    return levels


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """``(1 - sigma) x0 + sigma * noise``."""
    return (1 - sigma) * x0 + sigma * noise


def to_x0(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Clean sample implied by a velocity at a noise level: ``x - sigma * v``."""
    return x - sigma * velocity


def sample_sigmas(count: int, shift: float, generator: torch.Generator | None = None) -> Tensor:
    """Uniform levels under the shift, for training: [count] fp32 in (0, 1), one in each of ``count`` equal parts."""
    part = torch.randperm(count, generator=generator)
    u = (part + torch.rand(count, generator=generator)) / count
    return shift * u / (1 + (shift - 1) * u)
