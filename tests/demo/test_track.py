"""Tracking against pictures drawn by other means: many samples per pixel, a plain inside test."""

from __future__ import annotations

import numpy as np
import pytest

from dsa_rt.demo.grammar import COLOURS, SHAPES
from dsa_rt.demo.track import label_colours, track
from dsa_rt.demo.world import RGB


def draw(shape: str, centre: tuple[float, float], radius: float, angle: float) -> np.ndarray:
    """Cover [64, 64] of a shape from 8 x 8 samples a pixel; polygons by the sides their edges lie on."""
    axis = (np.arange(64 * 8) + 0.5) / 8
    x, y = axis[None, :] - centre[0], axis[:, None] - centre[1]
    if shape == "circle":
        inside = x * x + y * y < radius * radius
    else:
        count = 4 if shape == "square" else 3
        corners = [
            (radius * np.cos(angle + 2 * np.pi * k / count), radius * np.sin(angle + 2 * np.pi * k / count))
            for k in range(count)
        ]
        inside = np.ones((512, 512), bool)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0
    return inside.reshape(64, 8, 64, 8).mean((1, 3))


def paint(cover: np.ndarray, colour: str, ground: np.ndarray) -> np.ndarray:
    mixed = ground[..., None] * (1 - cover[..., None]) + np.array(RGB[colour]) * cover[..., None]
    return np.rint(mixed).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_place_size_shape_and_angle_are_measured(shape: str, colour: str) -> None:
    source = np.random.default_rng()
    ground = source.choice([90.0, 140.0], (8, 8)).repeat(8, 0).repeat(8, 1)
    radius, start, step = source.uniform(9.5, 13), source.uniform(0, 6), np.deg2rad(source.uniform(-20, 20))
    centres = source.uniform(16, 48, (12, 2))
    covers = [draw(shape, tuple(c), radius, start + step * i) for i, c in enumerate(centres)]
    frames = np.stack([paint(c, colour, ground) for c in covers])
    found = track(frames, label_colours(frames), colour)
    assert found is not None and found.visible.all()
    assert np.abs(found.centre - centres).max() < 0.25
    assert np.allclose(found.area, [c.sum() for c in covers], rtol=0.06)
    assert (found.shape == SHAPES.index(shape)).all()
    assert found.fit.max(1).min() > 0.9
    assert np.abs(np.array(found.rgb) - RGB[colour]).max() <= 2
    turned = 0 if shape == "circle" else step
    assert np.abs(found.angle - turned * np.arange(12)).max() < np.deg2rad(3)


def test_an_absent_colour_has_no_track_and_a_gap_is_seen() -> None:
    ground = np.full((64, 64), 120.0)
    red, none = (
        paint(draw("circle", (30, 34), 11, 0), "red", ground),
        paint(np.zeros((64, 64)), "red", ground),
    )
    frames = np.stack([red, none, red, red])
    palette = label_colours(frames)
    assert track(frames, palette, "blue") is None
    found = track(frames, palette, "red")
    assert found is not None and found.visible.tolist() == [True, False, True, True]
    assert found.shape[1] == -1 and found.area[1] == 0


def test_the_larger_of_two_is_followed_and_the_rest_reported() -> None:
    ground = np.full((64, 64), 120.0)
    small, large = draw("square", (12, 12), 9, 0.3), draw("square", (46, 40), 13, 0.3)
    frames = np.stack([paint(small + large, "green", ground)] * 2)
    found = track(frames, label_colours(frames), "green")
    assert found is not None
    assert np.abs(found.centre - [46, 40]).max() < 0.25
    assert np.allclose(found.elsewhere, small.sum(), rtol=0.2)


def test_forms_that_are_none_of_the_shapes() -> None:
    ground = np.full((64, 64), 120.0)
    bar = np.zeros((64, 64))
    bar[20:27, 10:56] = 1
    ring = draw("circle", (32, 32), 14, 0) - draw("circle", (32, 32), 9, 0)
    for cover in (bar, ring):
        frames = np.stack([paint(cover, "blue", ground)] * 2)
        found = track(frames, label_colours(frames), "blue")
        assert found is None or (found.shape == -1).all()
