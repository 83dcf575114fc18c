"""The video world: one clip per seed, whole objects that stay apart, a pace that changes inside the clip."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dsa_rt.demo.grammar import COLOURS, GROUNDS, MOTIONS, SHAPES, ObjectSpec, SceneSpec, sample_scene
from dsa_rt.demo.world import RGB, render


def one(motion: str, shape: str = "square", colour: str = "red", ground: str = "plain") -> SceneSpec:
    return SceneSpec((ObjectSpec(colour, shape, motion),), ground)


def fresh_seeds(count: int) -> list[int]:
    return [int(s) for s in np.random.default_rng().integers(0, 2**31, count)]


def saturation(frames: NDArray[np.uint8]) -> NDArray[np.int16]:
    return frames.max(-1).astype(np.int16) - frames.min(-1)


def test_a_clip_is_decided_by_scene_and_seed() -> None:
    scene = sample_scene(np.random.default_rng())
    a, b = fresh_seeds(2)
    first, again, other = render(scene, a), render(scene, a), render(scene, b)
    assert first.shape == (81, 64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_colour_and_shape_do_not_change_the_path() -> None:
    seed = fresh_seeds(1)[0]
    square, circle = (saturation(render(one("bouncing", s), seed)) > 60 for s in ("square", "circle"))
    rows = np.arange(64)[None, :, None]
    heights = [(m * rows).sum((1, 2)) / m.sum((1, 2)) for m in (square, circle)]
    assert np.abs(heights[0] - heights[1]).max() < 0.7


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_anti_aliased_like_a_fine_picture_averaged(shape: str, motion: str) -> None:
    """Oracle: the clip drawn six times as large and averaged over 6 x 6 pixels."""
    if (shape, motion) == ("circle", "spinning"):
        return
    seed = fresh_seeds(1)[0]
    for t in (0, 20):
        small = render(one(motion, shape), seed, frames=21)[t].astype(np.float32)
        large = render(one(motion, shape), seed, frames=21, size=384)[t].astype(np.float32)
        error = np.abs(large.reshape(64, 6, 64, 6, 3).mean((1, 3)) - small)
        # A pixel at a sharp corner may be half off; a hard edge would be that along the whole outline.
        wrong = (error.max(-1) > 26).sum()
        assert wrong <= 8 and error.mean() < 0.25, f"seed {seed}: {wrong} pixels"


@pytest.mark.parametrize("ground", GROUNDS)
def test_grounds_are_grey_and_still(ground: str) -> None:
    for seed in fresh_seeds(5):
        frames = render(one("at rest", ground=ground), seed)
        assert (frames == frames[0]).all(), f"seed {seed}"
        grey = frames[0][saturation(frames[:1])[0] == 0]
        assert len(grey) > 0.8 * 64 * 64 and grey.min() >= 20 and grey.max() <= 235
        contrast = int(grey.max()) - int(grey.min())
        assert contrast <= 1 if ground == "plain" else 30 <= contrast <= 60, f"seed {seed}"


@pytest.mark.parametrize("colour", COLOURS)
def test_the_inside_of_an_object_has_its_colour(colour: str) -> None:
    frames = render(one("at rest", colour=colour), fresh_seeds(1)[0])
    coloured = frames[saturation(frames) > 0]
    assert (coloured == RGB[colour]).all(1).mean() > 0.7


def test_objects_are_whole_and_apart() -> None:
    source = np.random.default_rng()
    for seed in fresh_seeds(25):
        scene = sample_scene(source)
        frames = render(scene, seed).astype(np.int16)
        edge = np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)])
        assert (edge.max(1) - edge.min(1)).max() < 60, f"an object leaves the frame: {scene} seed {seed}"
        full = [(np.abs(frames - RGB[o.colour]).max(-1) <= 2).sum((1, 2)) for o in scene.objects]
        for o, pixels in zip(scene.objects, full, strict=True):
            seen = pixels[-20:] if o.motion == "appearing" else pixels
            assert seen.min() > 130 and seen.max() < 680, f"{scene} seed {seed}"
            if o.motion == "appearing":
                assert pixels[:9].max() == 0


def test_the_pace_changes_and_at_least_half_is_busy() -> None:
    """A spinning object turns by a fixed step of warped time, so its change per frame shows the pace."""
    both = 0
    for seed in fresh_seeds(20):
        frames = render(one("spinning"), seed).astype(np.float32)
        change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        busy = change > 0.5 * np.percentile(change, 90)
        assert busy.mean() > 0.45, f"seed {seed}"
        both += bool((change < 0.3 * np.percentile(change, 90)).sum() >= 8)
    assert both >= 16


def test_an_object_at_rest_does_not_move_beside_one_that_does() -> None:
    seed = fresh_seeds(1)[0]
    scene = SceneSpec(
        (ObjectSpec("red", "square", "at rest"), ObjectSpec("blue", "circle", "bouncing")), "striped"
    )
    frames = render(scene, seed).astype(np.int16)
    red, blue = ((np.abs(frames - RGB[c]).max(-1) <= 1) for c in ("red", "blue"))
    assert (red == red[0]).all() and not (blue == blue[0]).all()


def test_clips_of_other_lengths() -> None:
    scene = one("bouncing", "triangle", "green", "checkered")
    seed = fresh_seeds(1)[0]
    whole = render(scene, seed)
    assert np.array_equal(render(scene, seed, frames=33), whole[:33])
    assert render(scene, seed, frames=161).shape == (161, 64, 64, 3)
    assert render(scene, seed, frames=1).shape == (1, 64, 64, 3)
