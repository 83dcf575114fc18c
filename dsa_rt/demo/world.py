"""The demo's video world: anti-aliased coloured shapes that move in front of grey grounds, drawn from a seed.

Each clip has calm and busy spans: a time warp, which motions follow, whose pace is 1 or 0.1 for two or three chunks of
12 frames. Of two objects the first is on the left. Places, headings, spans and greys are left to chance; sizes, speeds
and the height of bounces are fixed, so that a small generator can learn the world in hours of two CPU cores. Geometry
is in pixels of a 64 x 64 frame and scales with the frame.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsa_rt.demo.grammar import ObjectSpec, SceneSpec

FPS = 16
SIZE = 64
RADIUS = 12.0
REACH = 1.08 * RADIUS  # of the corners of a square
MARGIN = 1.0  # between an object and the edge of its lane
DRIFT = 28.0  # pixels in a whole clip
BOUNCE, PERIOD = 32.0, 28.0  # height in pixels, frames at pace 1 from floor to floor
SPIN = 2.4  # degrees a frame at pace 1
GROWTH = 8.0  # frames in which an object appears
STRIPES = SIZE / 3  # period
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
    middle = SIZE / 2
    lanes = [(0.0, SIZE)] if len(scene.objects) == 1 else [(0.0, middle), (middle, SIZE)]
    for spec, lane in zip(scene.objects, lanes, strict=True):
        _draw(image, spec, _motion(spec, lane, warped, source), size)
    return np.rint(image).astype(np.uint8)


def _pace(source: np.random.Generator, frames: int) -> Array:
    """Pace per frame: busy (1) and calm (0.1) in turn, each for 24 or 36 frames, at least half of them busy.

    Spans begin where chunks of three latent frames do: at frame 9, 21, 33 and so on.
    """
    length = max(frames, 81)
    while True:
        busy, pace = source.random() < 0.6, np.empty(0)
        while len(pace) < length + 7:
            pace = np.concatenate([pace, np.full(12 * source.integers(2, 4), 1.0 if busy else 0.1)])
            busy = not busy
        smooth = np.convolve(np.pad(pace[3:], 2, mode="edge"), np.full(5, 0.2), "valid")[:length]
        if (smooth > 0.5).mean() >= 0.5:
            return smooth[:frames].astype(np.float32)


def _ground(kind: str, source: np.random.Generator, size: int) -> Array:
    base = source.uniform(60, 200)
    if kind == "plain":
        return np.full((size, size), base, np.float32)
    other = base + (45 if base < 130 else -45)
    y, x = np.mgrid[:size, :size].astype(np.float32) * (SIZE / size) + 0.5 * SIZE / size
    sharp = STRIPES / 4 * size / SIZE

    def square_wave(t: Array) -> Array:
        triangle = np.abs((t / STRIPES) % 1 - 0.5) * 4 - 1
        return np.clip(triangle * sharp, -1, 1)

    if kind == "striped":
        wave = square_wave(x if source.random() < 0.5 else y)
    else:
        wave = square_wave(x) * square_wave(y)
    return (base + (other - base) * (wave + 1) / 2).astype(np.float32)


def _motion(spec: ObjectSpec, lane: tuple[float, float], time: Array, source: np.random.Generator) -> tuple[Array, ...]:
    """Centre x, y, angle and radius per frame, in pixels of a 64 x 64 frame; ``time`` is warped."""
    frames, free = len(time), REACH + MARGIN
    left, right, top, bottom = lane[0] + free, lane[1] - free, free, SIZE - free
    still = np.ones(frames, np.float32)
    x, y = still * source.uniform(left, right), still * source.uniform(top, bottom)
    angle, size = 0 * still, RADIUS * still
    if spec.motion == "drifting":
        way = DRIFT * time / max(float(time[-1]), 1.0)
        ahead = source.random() < 0.5
        if right - left >= DRIFT and source.random() < 0.5:
            x = source.uniform(left, right - DRIFT) + (way if ahead else DRIFT - way)
        else:
            y = source.uniform(top, bottom - DRIFT) + (way if ahead else DRIFT - way)
    elif spec.motion == "bouncing":
        t = (time / PERIOD) % 1
        y = bottom - BOUNCE * 4 * t * (1 - t)
    elif spec.motion == "spinning":
        angle = np.deg2rad(SPIN) * time
    elif spec.motion == "appearing":
        growth = np.clip((np.arange(frames) - (9 + 12 * source.integers(4))) / GROWTH, 0, 1)
        size = RADIUS * growth * growth * (3 - 2 * growth)
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
