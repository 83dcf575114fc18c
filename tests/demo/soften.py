"""What a codec or a small generator does to clean frames: blur, noise, a stretch, a drift of colour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


def blur(frames: Frames, sigma: float, noise: float, source: np.random.Generator) -> Frames:
    """Gaussian blur of ``sigma`` pixels in space, then white noise of ``noise`` grey levels."""
    reach = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    weights /= weights.sum()
    soft = frames.astype(np.float32)
    for axis in (1, 2):
        pad = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded, size = np.pad(soft, pad, mode="edge"), soft.shape[axis]
        views = (
            padded[:, k : k + size] if axis == 1 else padded[:, :, k : k + size] for k in range(len(weights))
        )
        soft = sum(w * v for w, v in zip(weights, views, strict=True))
    soft = soft + noise * source.standard_normal(soft.shape, dtype=np.float32)
    return np.clip(np.rint(soft), 0, 255).astype(np.uint8)


def stretch(frames: Frames, factor: float) -> Frames:
    """Widen every frame about its middle, keeping its size."""
    size = frames.shape[2]
    columns = np.clip(np.rint((np.arange(size) - size / 2) / factor + size / 2), 0, size - 1).astype(int)
    return frames[:, :, columns]


def fade(frames: Frames, share: float) -> Frames:
    """Mix every pixel with its own grey: ``share`` 1 leaves no colour."""
    grey = frames.mean(-1, keepdims=True)
    return np.rint(frames * (1 - share) + grey * share).astype(np.uint8)


def turn_hue(frames: Frames, degrees: float) -> Frames:
    """Rotate every colour about the grey axis."""
    axis = np.full(3, 3**-0.5)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    a = np.deg2rad(degrees)
    turn = np.cos(a) * np.eye(3) + np.sin(a) * cross + (1 - np.cos(a)) * np.outer(axis, axis)
    return np.clip(np.rint(frames @ turn.T), 0, 255).astype(np.uint8)
