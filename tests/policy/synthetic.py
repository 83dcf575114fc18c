"""Calibration records of known structure: chunks of differing difficulty, errors that fall with diminishing
returns."""

from __future__ import annotations

import numpy as np

from dsa_rt.policy import Records


def synthetic_records(
    clips: int = 64,
    chunks: int = 7,
    passes: int = 4,
    *,
    strength: float = 0.7,
    seed: int = 0,
    clip_share: float = 0.3,
    persistence: float = 0.4,
    spread: float = 0.7,
    decay: float = 0.4,
    decay_spread: float = 0.5,
    floor: float = 0.1,
) -> Records:
    """strength: correlation of a confidence's logit with the log error at its level (negative sign).

    Log difficulty (standard deviation ``spread``) is a clip's own share plus a chain along its chunks. Each
    pass leaves about ``decay`` of the difficulty, differing from chunk to chunk. Levels have confidences of
    different means, as real heads do.
    """
    generator = np.random.default_rng(seed)
    clip = generator.normal(size=(clips, 1))
    own = generator.normal(size=(clips, chunks))
    for chunk in range(1, chunks):
        own[:, chunk] = persistence * own[:, chunk - 1] + np.sqrt(1 - persistence**2) * own[:, chunk]
    hard = np.sqrt(clip_share) * clip + np.sqrt(1 - clip_share) * own
    odds = np.log(decay / (1 - decay)) + decay_spread * generator.normal(size=(clips, chunks, passes - 1))
    left = np.cumprod(1 / (1 + np.exp(-odds)), -1)
    left = np.concatenate([np.ones((clips, chunks, 1)), left], -1)
    error = floor + np.exp(spread * hard)[..., None] * left
    log_error = np.log(error)
    log_error = (log_error - log_error.mean((0, 1))) / log_error.std((0, 1))
    noise = generator.normal(size=error.shape)
    logit = np.linspace(0.15, -0.25, passes) - 0.6 * (strength * log_error + np.sqrt(1 - strength**2) * noise)
    return Records(1 / (1 + np.exp(-logit)), error)
