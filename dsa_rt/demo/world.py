"""The demo's video world: anti-aliased coloured shapes that move in front of grey grounds, drawn from a seed.

Each clip has calm and busy spans: a time warp whose pace changes between 1 and 0.1, which motions follow.
Geometry is in pixels of a 96 x 96 frame and scales with the frame.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsa_rt.demo.grammar import ObjectSpec, SceneSpec

FPS = 16
SIZE = 96
RGB = {
    "red": (220, 40, 40),
    "orange": (245, 140, 25),
    "yellow": (240, 220, 50),
    "green": (50, 175, 70),
    "blue": (45, 95, 225),
    "purple": (150, 60, 200),
}
Array = NDArray[np.float32]


def render(scene: SceneSpec, seed: int, frames: int = 81, size: int = SIZE) -> NDArray[np.uint8]:
    """Frames [T, size, size, 3] uint8 of one clip; the same for the same arguments."""
    source = np.random.default_rng([seed, 0x57])
    pace = _pace(source, frames)
    warped = np.concatenate([[0], np.cumsum(pace)[:-1]]).astype(np.float32)
    image = np.broadcast_to(_ground(scene.ground, source, size)[None, :, :, None], (frames, size, size, 3)).copy()
    lanes = [(4.0, 92.0)] if len(scene.objects) == 1 else [(3.0, 47.0), (49.0, 93.0)]
    for spec, lane in zip(scene.objects, source.permutation(np.array(lanes)), strict=True):
        _draw(image, spec, _motion(spec, lane, warped, source), size)
    return np.rint(image).astype(np.uint8)


def _pace(source: np.random.Generator, frames: int) -> Array:
    """Pace per frame: spans of 16 to 36 frames, busy (1) and calm (0.1) in turn, at least half of them busy."""
    length = max(frames, 81)
    while True:
        busy, pace = source.random() < 0.6, np.empty(0)
        while len(pace) < length + 4:
            pace = np.concatenate([pace, np.full(source.integers(16, 37), 1.0 if busy else 0.1)])
            busy = not busy
        smooth = np.convolve(pace, np.full(5, 0.2), "valid")[:length]
        if (smooth > 0.5).mean() >= 0.5:
            return smooth[:frames].astype(np.float32)


def _ground(kind: str, source: np.random.Generator, size: int) -> Array:
    base = source.uniform(60, 200)
    if kind == "plain":
        return np.full((size, size), base, np.float32)
    other = base + source.uniform(35, 55) * (1 if base < 130 else -1)
    period, phase = source.uniform(20, 28), source.uniform(0, 1, 2)
    y, x = np.mgrid[:size, :size].astype(np.float32) * (SIZE / size) + 0.5
    sharp = period / 4 * (SIZE / size) ** -1

    def square_wave(t: Array, offset: float) -> Array:
        triangle = np.abs(((t / period + offset) % 1) - 0.5) * 4 - 1
        return np.clip(triangle * sharp, -1, 1)

    if kind == "striped":
        angle = source.integers(4) * np.pi / 4
        wave = square_wave(x * np.cos(angle) + y * np.sin(angle), phase[0])
    else:
        wave = square_wave(x, phase[0]) * square_wave(y, phase[1])
    return (base + (other - base) * (wave + 1) / 2).astype(np.float32)


def _motion(spec: ObjectSpec, lane: Array, time: Array, source: np.random.Generator) -> tuple[Array, ...]:
    """Centre x, y, angle and radius per frame, in pixels of a 96 x 96 frame; ``time`` is warped."""
    frames, radius = len(time), source.uniform(12, 15.5)
    left, right = lane[0] + radius, lane[1] - radius
    top, bottom = 4 + radius, 92 - radius
    still = np.ones(frames, np.float32)
    x, y = still * source.uniform(left, right), still * source.uniform(top, bottom)
    angle, size = still * source.uniform(-0.3, 0.3), still * radius
    if spec.motion == "drifting":
        full = time[-1] if time[-1] > 0 else 1.0
        while True:
            heading, path = source.uniform(0, 2 * np.pi), source.uniform(30, 42)
            x0, y0 = source.uniform(left, right), source.uniform(top, bottom)
            x1, y1 = x0 + path * np.cos(heading), y0 + path * np.sin(heading)
            if left <= x1 <= right and top <= y1 <= bottom:
                break
        x, y = x0 + (x1 - x0) * time / max(full, 1.0), y0 + (y1 - y0) * time / max(full, 1.0)
    elif spec.motion == "bouncing":
        height, period, phase = source.uniform(34, 48), source.uniform(26, 34), source.uniform(0, 1)
        t = (time / period + phase) % 1
        y = 90 - radius - height * 4 * t * (1 - t)
    elif spec.motion == "spinning":
        angle = angle + np.deg2rad(source.uniform(3.5, 5)) * source.choice([-1, 1]) * time
    elif spec.motion == "appearing":
        start = source.uniform(10, 48)
        growth = np.clip((np.arange(frames) - start) / 8, 0, 1)
        size = radius * growth * growth * (3 - 2 * growth)
    return tuple(np.asarray(v, np.float32) for v in (x, y, angle, size))


def _draw(image: Array, spec: ObjectSpec, motion: tuple[Array, ...], size: int) -> None:
    scale = size / SIZE
    colour = np.array(RGB[spec.colour], np.float32)
    for t, (x, y, angle, radius) in enumerate(zip(*motion, strict=True)):
        if radius < 0.2:
            continue
        x, y, radius = x * scale, y * scale, radius * scale
        x0, x1 = max(0, int(x - radius - 2)), min(size, int(x + radius + 3))
        y0, y1 = max(0, int(y - radius - 2)), min(size, int(y + radius + 3))
        dx = np.arange(x0, x1, dtype=np.float32)[None, :] + 0.5 - x
        dy = np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5 - y
        cover = np.clip(0.5 - _distance(spec.shape, dx, dy, angle, radius), 0, 1)[..., None]
        patch = image[t, y0:y1, x0:x1]
        patch += (colour - patch) * cover


def _distance(shape: str, dx: Array, dy: Array, angle: float, radius: float) -> NDArray[np.floating]:
    """Signed distance to the outline, positive outside; all shapes touch the circle of ``radius``."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - radius * 0.92
    sides, offset = (4, np.pi / 4) if shape == "square" else (3, np.pi / 2)
    inner = radius * 1.08 * np.cos(np.pi / sides)
    faces = [angle + offset + np.pi / sides * (2 * k + 1) for k in range(sides)]
    return np.max([dx * np.cos(f) + dy * np.sin(f) for f in faces], 0) - inner
