"""The automatic score: does a clip show what its prompt asked for?

For every asked object three attributes are judged by measurement (:mod:`dsa_rt.demo.track`), without a model:

- colour: an object of that colour, and one only, is there in nearly every frame from its first to the end;
- shape: the outline fits the asked shape better than the others, at a steady size, in most frames and in
  every third of the object's time;
- motion: the path, size and angle over the whole clip are those of the asked motion and of no other.

An object that vanishes, splits, or changes colour or shape midway therefore fails. When no object of the
asked colour is there at all, its shape and motion count as wrong too: another colour does not stand in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsa_rt.demo.grammar import COLOURS, SHAPES, ObjectSpec, SceneSpec
from dsa_rt.demo.track import Palette, Track, label_colours, track
from dsa_rt.demo.world import SIZE
from dsa_rt.errors import ShapeError

FEWEST_FRAMES = 81  # for that many the world promises a busy half, enough to name any motion

# Shares of frames, from the first that shows the object to the last of the clip.
THERE = 0.9  # colour: frames with the object
RIGHT_SHAPE = 0.75  # shape: frames of the asked shape and steady size
RIGHT_IN_THIRD = 0.5  # and in each third of that time
LATEST_START = 0.8  # of the clip: an object first seen later than that is not there

# Areas relative to the object's usual (median) area.
LEAST_WHOLE = 0.4  # colour: less than that is a remnant, not the object
MOST_ELSEWHERE = 0.4  # colour: more of the colour than that in other places is a second object
STEADY_AREA = (0.7, 1.4)  # shape: outside of that the object has shrunk or swollen

# Lengths in pixels of a 64 x 64 frame, angles in degrees. In the world's own clips
# (world.py): still 0; drift 28; bounce 32 high with 2 turning points or more, 4.6 a frame at most; spin 100 or more.
# The limits lie well between what they tell apart; what lies between two is neither.
STILL = 4.0
STILL_ANGLE = 30.0
DRIFT = 15.0
STRAIGHT = 4.0
BOUNCE_HEIGHT = 20.0
BOUNCE_SWING = 5.0
BOUNCE_SIDEWAYS = 10.0
SPIN = 75.0
LONGEST_STEP = 18.0


@dataclass(frozen=True)
class ObjectScore:
    """What was asked of one object, whether it is there, and what was measured."""

    asked: ObjectSpec
    colour: bool
    shape: bool
    motion: bool
    seen_shape: str  # most frequent shape, or "none"
    seen_motion: str  # a motion of the grammar, or why it is none of them
    there: float  # share of frames with the object, from its first on
    right_shape: float  # share of frames with the asked shape, likewise
    measured: dict[str, float]  # of the motion, for debugging
    rgb: tuple[int, int, int] | None  # mean colour

    @property
    def attributes(self) -> tuple[bool, bool, bool]:
        """Colour, shape, motion."""
        return self.colour, self.shape, self.motion


@dataclass(frozen=True)
class SceneScore:
    """The score of a clip. ``attributes`` is what tables report; ``all_right`` also asks for the ground."""

    objects: tuple[ObjectScore, ...]
    ground: bool  # the asked ground is there
    seen_ground: str
    surplus: tuple[str, ...]  # colours of objects that nobody asked for

    @property
    def attributes(self) -> float:
        """Share of right attributes, 0 to 1: the mean over the objects' colour, shape and motion."""
        return float(np.mean([o.attributes for o in self.objects]))

    @property
    def all_right(self) -> bool:
        """Every attribute of every object and the ground are right, and nothing else is there."""
        return all(all(o.attributes) for o in self.objects) and self.ground and not self.surplus


def score(frames: NDArray[np.uint8], scene: SceneSpec) -> SceneScore:
    """Judge ``frames`` [T, H, W, 3] uint8 (square, at least 81 of them) against ``scene``.

    Raises :class:`~dsa_rt.errors.ShapeError` for another dtype or shape.
    """
    frames = np.asarray(frames)
    if (
        frames.dtype != np.uint8
        or frames.ndim != 4
        or frames.shape[3] != 3
        or frames.shape[1] != frames.shape[2]
    ):
        raise ShapeError(
            f"score needs square uint8 frames [T, H, W, 3], got {frames.dtype} {list(frames.shape)}"
        )
    if len(frames) < FEWEST_FRAMES:
        raise ShapeError(f"score needs at least {FEWEST_FRAMES} frames to judge a motion, got {len(frames)}")
    palette = label_colours(frames)
    objects = tuple(_judge(track(frames, palette, spec.colour), spec) for spec in scene.objects)
    ground = _ground(frames, palette)
    asked = {o.colour for o in scene.objects}
    surplus = tuple(c for c in COLOURS if c not in asked and _surplus(frames, palette, c))
    return SceneScore(objects, ground == scene.ground, ground, surplus)


def _judge(found: Track | None, asked: ObjectSpec) -> ObjectScore:
    frames = 0 if found is None else len(found.visible)
    first = int(found.visible.argmax()) if found is not None else 0
    if found is None or first > LATEST_START * frames:
        return ObjectScore(asked, False, False, False, "none", "nothing of that colour", 0.0, 0.0, {}, None)
    visible, area = found.visible[first:], found.area[first:]
    usual = float(np.median(area[visible]))
    grown = _grown(area, usual) if first else 0
    whole = visible & (area > LEAST_WHOLE * usual)
    whole[:grown] = visible[:grown]
    once = whole & (found.elsewhere[first:] < MOST_ELSEWHERE * usual)

    seen = np.bincount(found.shape[found.shape >= 0], minlength=len(SHAPES))
    steady = (area[grown:] > STEADY_AREA[0] * usual) & (area[grown:] < STEADY_AREA[1] * usual)
    right = (found.shape[first + grown :] == SHAPES.index(asked.shape)) & steady
    thirds = [float(part.mean()) for part in np.array_split(right, 3) if len(part)]

    motion, measured = _motion(found, first, usual)
    return ObjectScore(
        asked,
        colour=bool(once.mean() >= THERE),
        shape=bool(right.mean() >= RIGHT_SHAPE and min(thirds) >= RIGHT_IN_THIRD),
        motion=motion == asked.motion,
        seen_shape=SHAPES[int(seen.argmax())] if seen.any() else "none",
        seen_motion=motion,
        there=float(once.mean()),
        right_shape=float(right.mean()),
        measured={
            "area": usual,
            "first": float(first),
            "fit": float(np.median(found.fit.max(1)[first:])),
            "softness": float(np.median(found.softness[first:])),
            **measured,
        },
        rgb=found.rgb,
    )


def _grown(area: NDArray[np.float32], usual: float) -> int:
    """Frames until an object that has just appeared has four fifths of its usual area; at most 16."""
    return min(16, int((area > 0.8 * usual).argmax()))


def _motion(found: Track, first: int, usual: float) -> tuple[str, dict[str, float]]:
    """Name the motion from the path, the angle and the area over the whole clip, with what was measured."""
    visible = found.visible[first:]
    if visible.mean() < THERE:
        return "vanishing", {}
    late = first > 2
    start = first + (_grown(found.area[first:], usual) if late else 0)
    frames = start + np.nonzero(found.visible[start:])[0]
    path = found.centre[frames]
    angle = np.rad2deg(_smooth(found.angle[frames]))
    step = np.linalg.norm(np.diff(path, axis=0), axis=1) / np.diff(frames) if len(frames) > 1 else np.zeros(1)
    low, high = np.percentile(path, [2, 98], axis=0)
    across, height = (high - low).tolist()

    middle = path.mean(0)
    along = np.linalg.svd(path - middle, full_matrices=False)[2][0]
    progress = _smooth((path - middle) @ along)
    aside = (path - middle) @ np.array([-along[1], along[0]])
    net = abs(float(progress[-1] - progress[0]))
    span = float(progress.max() - progress.min())
    turned = abs(float(angle[-1] - angle[0]))
    wobble = float(angle.max() - angle.min())
    turns = _turning_points(path[:, 1], BOUNCE_SWING)
    measured = {
        "across": across, "height": height, "net": net, "turns": float(turns), "turned": turned,
        "aside": float(np.percentile(np.abs(aside), 95)), "step": float(step.max()),
    }  # fmt: skip

    still = max(across, height) <= STILL
    upright = wobble <= STILL_ANGLE
    if step.max() > LONGEST_STEP:
        return "jumping", measured
    if late:
        return ("appearing" if still and upright else "appearing and moving"), measured
    if still and upright:
        return "at rest", measured
    if still and turned >= SPIN and turned >= 0.7 * wobble:
        return "spinning", measured
    if height >= BOUNCE_HEIGHT and turns >= 2 and across <= BOUNCE_SIDEWAYS and upright:
        return "bouncing", measured
    if net >= DRIFT and net >= 0.85 * span and turns == 0 and measured["aside"] <= STRAIGHT and upright:
        return "drifting", measured
    return "unclear", measured


def _smooth(values: NDArray) -> NDArray:
    """Mean over five frames; the ends repeat."""
    return np.convolve(np.pad(values, 2, mode="edge"), np.full(5, 0.2), "valid")


def _turning_points(values: NDArray, swing: float) -> int:
    """How often a path turns round, counting only moves of at least ``swing``."""
    turns, heading, extreme = 0, 0, float(values[0])
    lowest = highest = extreme
    for value in values.tolist():
        if heading == 0:
            lowest, highest = min(lowest, value), max(highest, value)
            if highest - lowest >= swing:
                heading, extreme = (1 if value == highest else -1), value
        elif (value - extreme) * heading > 0:
            extreme = value
        elif (extreme - value) * heading >= swing:
            turns, heading, extreme = turns + 1, -heading, value
    return turns


def _surplus(frames: NDArray[np.uint8], palette: Palette, colour: str) -> bool:
    """An object of ``colour`` is there in more than a tenth of the frames."""
    if (palette.label == COLOURS.index(colour)).sum() < 0.1 * len(frames) * 45 * (
        frames.shape[1] / SIZE
    ) ** 2:
        return False
    found = track(frames, palette, colour)
    return found is not None and bool(found.visible.mean() > 0.1)


def _ground(frames: NDArray[np.uint8], palette: Palette) -> str:
    """The kind of ground: contrast of the median frame, and whether it repeats in one direction or in two."""
    some = slice(None, None, 8)
    grey = frames[some].mean(-1, dtype=np.float32)
    u, v = (c[some] for c in palette.chroma)
    coloured = np.abs(u) + np.abs(v) > 30
    grey[coloured] = np.nan
    seen = ~coloured.all(0)
    ground = np.zeros(grey.shape[1:], np.float32)
    ground[seen] = np.nanmedian(grey[:, seen], 0)
    ground[seen] -= ground[seen].mean()
    if ground[seen].std() < 8:
        return "plain"
    window = np.hanning(len(ground) + 2)[1:-1]
    power = np.abs(np.fft.fftshift(np.fft.fft2(ground * window * window[:, None]))) ** 2
    middle = len(ground) // 2
    one = power[middle + 2 : middle + 8, middle + 2 : middle + 8].sum()
    two = power[middle + 2 : middle + 8, middle - 7 : middle - 1].sum()
    straight = power[middle - 1 : middle + 2].sum() + power[:, middle - 1 : middle + 2].sum()
    return "checkered" if min(one, two) > 0.4 * max(one, two) and one + two > straight else "striped"
