"""Find a coloured object in the frames of a clip; measure its place, size, shape and angle by image analysis.

Every ground of the demo is grey, so a pixel that an object covers partly is a mix of its colour and grey.
The chroma of a mix (what is left of RGB without its grey part, a vector in a plane) is the object's chroma
times the cover: hue says whose pixel it is, and chroma along that hue how much of the pixel is covered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsa_rt.demo.grammar import COLOURS, SHAPES
from dsa_rt.demo.world import RGB, SIZE

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


def _chroma(red: Array, green: Array, blue: Array) -> tuple[Array, Array]:
    """Coordinates of colours along two orthonormal axes of the plane that is normal to grey."""
    return (red - green) * np.float32(0.5**0.5), (red + green - 2 * blue) * np.float32(6**-0.5)


# The palette in that plane: unit hue [6, 2] and strength [6].
_PALETTE = np.stack(_chroma(*np.array([RGB[c] for c in COLOURS], np.float32).T), 1)
_STRENGTH = np.linalg.norm(_PALETTE, axis=1)
_HUE = _PALETTE / _STRENGTH[:, None]

COLOURED = 0.4  # of its palette colour's chroma: paler pixels belong to no object
VISIBLE_AREA = 45.0  # square pixels of a 64 x 64 frame: about a fifth of the smallest object of the world
SHAPE_FIT = 0.8  # least overlap (intersection over union) with the ideal that counts as a shape
SOFTEST = 3.0  # pixels (standard deviation) of blur beyond which an outline is no shape any more
_SIDES = {"square": 4, "triangle": 3}


@dataclass(frozen=True)
class Palette:
    """The pixels of a clip by colour: ``label`` [T, H, W] (-1: grey) and two coordinates of the chroma."""

    label: NDArray[np.int8]
    chroma: tuple[Array, Array]


@dataclass(frozen=True)
class Track:
    """One object through a clip of T frames; lengths in pixels of a 64 x 64 frame; 0 where not visible."""

    visible: Mask  # [T] a blob of plausible area is there
    area: Array  # [T]
    centre: Array  # [T, 2] x, y
    angle: Array  # [T] radians, continuous; 0 for circles
    shape: NDArray[np.int8]  # [T] best fitting shape, index into SHAPES; -1 where none fits
    fit: Array  # [T, 3] overlap with the ideal circle, square, triangle of the same centre, area and angle
    softness: Array  # [T] standard deviation of the blur of the outline
    elsewhere: Array  # [T] area of the same colour outside the object
    rgb: tuple[int, int, int]  # mean colour of the object's inside


def label_colours(frames: NDArray[np.uint8]) -> Palette:
    """Sort the pixels of ``frames`` [T, H, W, 3] uint8 by the nearest hue of the demo's palette."""
    u, v = _chroma(*(frames[..., i].astype(np.float32) for i in range(3)))
    label = np.full(frames.shape[:3], -1, np.int8)
    candidates = np.flatnonzero(u * u + v * v > (COLOURED * _STRENGTH.min()) ** 2)
    along = np.stack([u.ravel()[candidates], v.ravel()[candidates]], 1) @ _HUE.T
    best = along.argmax(1)
    strong = along[np.arange(len(best)), best] > COLOURED * _STRENGTH[best]
    label.ravel()[candidates] = np.where(strong, best, -1)
    return Palette(label, (u, v))


def track(frames: NDArray[np.uint8], palette: Palette, colour: str) -> Track | None:
    """Follow the largest compact blob of ``colour``; None when no frame has one."""
    number, scale = COLOURS.index(colour), frames.shape[1] / SIZE
    mine = palette.label == number
    half = int(np.ceil(24 * scale))
    seeds = _densest(mine, max(3, round(13 * scale)))
    own, other = (_windows(a, seeds, half) for a in (mine, (palette.label >= 0) & ~mine))
    blob = _connected(own, half)
    pixels = blob.sum((1, 2))
    if pixels.max() < VISIBLE_AREA * scale**2:
        return None

    # Most blob pixels are wholly covered: their upper quartile is the object's chroma.
    along = sum(_windows(c, seeds, half) * h for c, h in zip(palette.chroma, _HUE[number], strict=True))
    near = _grow(_grow(_grow(blob))) & ~other
    cover = np.where(near, np.clip(along / np.percentile(along[blob], 75), 0, 1), 0).astype(np.float32)
    cover[cover < 0.1] = 0
    area = cover.sum((1, 2))
    axis = np.arange(-half, half + 1, dtype=np.float32)
    safe = np.maximum(area, 1e-3)
    x = (cover.sum(1) @ axis) / safe
    y = (cover.sum(2) @ axis) / safe

    visible = area >= VISIBLE_AREA * scale**2
    softness = _softness(cover, area)
    phase, fit = _fit_shapes(cover, x, y, area, softness, axis)
    formed = visible & (fit.max(1) >= SHAPE_FIT) & (softness <= SOFTEST * scale)
    shape = np.where(formed, fit.argmax(1), -1).astype(np.int8)
    centre = (np.stack([x, y], 1) + seeds[:, ::-1] + 0.5) / scale
    inside = _windows(frames, seeds, half)[blob & (cover >= 1)]
    mean = inside.mean(0).round().astype(int).tolist() if len(inside) else [0, 0, 0]
    return Track(
        visible=visible,
        area=np.where(visible, area / scale**2, 0).astype(np.float32),
        centre=np.where(visible[:, None], centre, 0).astype(np.float32),
        angle=_continuous_angle(phase, fit, shape),
        shape=shape,
        fit=np.where(visible[:, None], fit, 0).astype(np.float32),
        softness=np.where(visible, softness / scale, 0).astype(np.float32),
        elsewhere=((mine.sum((1, 2)) - pixels) / scale**2).astype(np.float32),
        rgb=(mean[0], mean[1], mean[2]),
    )


def _densest(mask: Mask, side: int) -> NDArray[np.int64]:
    """Row and column [T, 2] of the middle of the fullest square of ``side`` pixels in each frame."""
    side += 1 - side % 2
    padded = np.pad(mask, ((0, 0), (side // 2 + 1, side // 2), (side // 2 + 1, side // 2))).astype(np.int16)
    total = padded.cumsum(1, dtype=np.int32).cumsum(2)
    box = (
        total[:, side:, side:] - total[:, :-side, side:] - total[:, side:, :-side] + total[:, :-side, :-side]
    )
    return np.stack(np.unravel_index(box.reshape(len(mask), -1).argmax(1), mask.shape[1:]), 1)


def _windows(values: NDArray, centres: NDArray[np.int64], half: int) -> NDArray:
    """The square of 2 half + 1 pixels around one centre per frame, zero outside of the frame."""
    padded = np.pad(values, ((0, 0), (half, half), (half, half), *[(0, 0)] * (values.ndim - 3)))
    reach = np.arange(2 * half + 1)
    rows, columns = centres[:, :1] + reach, centres[:, 1:] + reach
    return padded[np.arange(len(values))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _grow(mask: Mask) -> Mask:
    """Add the four neighbours of every pixel, frame by frame."""
    grown = mask.copy()
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    grown[:, :, 1:] |= mask[:, :, :-1]
    grown[:, :, :-1] |= mask[:, :, 1:]
    return grown


def _connected(mask: Mask, half: int) -> Mask:
    """The part of each window that hangs together with its middle (5 x 5: one bad pixel does not matter)."""
    blob = np.zeros_like(mask)
    blob[:, half - 2 : half + 3, half - 2 : half + 3] = mask[:, half - 2 : half + 3, half - 2 : half + 3]
    count = -1
    while count != (count := int(blob.sum())):
        blob = _grow(blob) & mask
    return blob


def _softness(cover: Array, area: Array) -> Array:
    """Standard deviation [T] of the blur of an outline: c (1 - c) across an edge sums to it / sqrt(pi)."""
    outline = 1.08 * 2 * np.sqrt(np.pi * np.maximum(area, 1e-3))  # between that of a circle and of a triangle
    return (cover * (1 - cover)).sum((1, 2)) * np.sqrt(np.pi) / outline


def _fit_shapes(
    cover: Array, x: Array, y: Array, area: Array, softness: Array, axis: Array
) -> tuple[Array, Array]:
    """Phase of the corners and overlap with the ideal picture, both [T, 3], per shape.

    A regular shape of k corners has a k-fold moment sum(cover z^k), z = dx + i dy, whose phase is k times the
    angle of a corner. With centre, area and angle known, each ideal shape is drawn, blurred like the object
    (blur makes any outline rounder), and compared.
    """
    reach = np.maximum(softness, 0.3)[:, None, None]
    blur = np.exp(-0.5 * ((axis[:, None] - axis[None, :]) / reach) ** 2)
    blur /= blur.sum(2, keepdims=True)
    dx = axis[None, None, :] - x[:, None, None]
    dy = axis[None, :, None] - y[:, None, None]
    z = dx + 1j * dy
    phase = np.zeros((len(cover), len(SHAPES)), np.float32)
    fit = np.zeros_like(phase)
    square = z * z
    for i, shape in enumerate(SHAPES):
        if shape == "circle":
            distance = np.abs(z) - np.sqrt(area / np.pi)[:, None, None]
        else:
            sides = _SIDES[shape]
            power = square * (square if sides == 4 else z)
            phase[:, i] = np.angle((cover * power).sum((1, 2)))
            inner = np.sqrt(area / (sides * np.tan(np.pi / sides)))[:, None, None]
            turns = phase[:, i] / sides + np.pi / sides
            faces = [turns[:, None, None] + 2 * np.pi * j / sides for j in range(sides)]
            distance = np.max([dx * np.cos(f) + dy * np.sin(f) for f in faces], 0) - inner
        ideal = blur @ np.clip(0.5 - distance, 0, 1) @ blur.transpose(0, 2, 1)
        fit[:, i] = np.minimum(cover, ideal).sum((1, 2)) / np.maximum(
            np.maximum(cover, ideal).sum((1, 2)), 1e-3
        )
    return phase, fit


def _continuous_angle(phase: Array, fit: Array, shape: NDArray[np.int8]) -> Array:
    """Angle [T] of the shape seen most often, unwrapped over the frames it fits, linear between them."""
    angle = np.zeros(len(phase), np.float32)
    seen = np.bincount(shape[shape >= 0], minlength=len(SHAPES))
    main = int(seen.argmax())
    if seen.sum() == 0 or SHAPES[main] not in _SIDES:
        return angle
    frames = np.nonzero((shape >= 0) & (fit[:, main] >= SHAPE_FIT))[0]
    turned = np.unwrap(phase[frames, main]) / _SIDES[SHAPES[main]]
    return np.interp(np.arange(len(phase)), frames, turned - turned[0]).astype(np.float32)
