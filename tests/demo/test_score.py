"""The score: near perfect on the world's own clips, clean and softened, and wrong where the clip is wrong."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dsa_rt.demo.grammar import COLOURS, GROUNDS, MOTIONS, SHAPES, ObjectSpec, SceneSpec, sample_scene
from dsa_rt.demo.score import SceneScore, score
from dsa_rt.demo.world import render
from dsa_rt.errors import ShapeError

from .soften import Frames, blur, fade, stretch, turn_hue

KINDS = [k for k in itertools.product(SHAPES, MOTIONS) if k != ("circle", "spinning")]
STEADY = [m for m in MOTIONS if m != "appearing"]


def fresh() -> np.random.Generator:
    return np.random.default_rng()


def single(shape: str, motion: str, source: np.random.Generator, ground: str | None = None) -> SceneSpec:
    colour = COLOURS[source.integers(len(COLOURS))]
    return SceneSpec((ObjectSpec(colour, shape, motion),), ground or GROUNDS[source.integers(len(GROUNDS))])


def clip(scene: SceneSpec, source: np.random.Generator) -> tuple[Frames, int]:
    seed = int(source.integers(2**31))
    return render(scene, seed), seed


def judged(result: SceneScore) -> tuple[bool, bool, bool]:
    return result.objects[0].attributes


def without_objects(frames: Frames) -> Frames:
    """The same clip on a plain ground with every object painted over."""
    return np.broadcast_to(frames[:, :1, :1], frames.shape).copy()


@pytest.mark.slow
def test_the_worlds_own_clips_score_right_clean_and_softened() -> None:
    """212 clips: every shape x motion x ground alone, and random scenes of two; 99% of attributes right."""
    source = fresh()
    scenes = [single(s, m, source, g) for (s, m), g in itertools.product(KINDS, GROUNDS)]
    while len(scenes) < 212:
        scene = sample_scene(source)
        scenes += [scene] if len(scene.objects) == 2 else []
    for name in ("clean", "softened"):
        right: Counter[str] = Counter()
        asked = whole = 0
        for scene in scenes:
            frames, _ = clip(scene, source)
            result = score(frames if name == "clean" else blur(frames, 1.0, 6.0, source), scene)
            asked += len(scene.objects)
            whole += result.all_right
            for o in result.objects:
                right.update(
                    a for a, ok in zip(("colour", "shape", "motion"), o.attributes, strict=True) if ok
                )
        for attribute in ("colour", "shape", "motion"):
            assert right[attribute] >= 0.99 * asked, (
                f"{name}: {attribute} right in {right[attribute]} of {asked}"
            )
        assert whole >= 0.97 * len(scenes), f"{name}: {whole} of {len(scenes)} wholly right"


@pytest.mark.parametrize(("shape", "motion"), KINDS)
def test_a_wrong_prompt_is_wrong_in_what_was_changed(shape: str, motion: str) -> None:
    source = fresh()
    scene = single(shape, motion, source)
    frames, seed = clip(scene, source)
    frames = blur(frames, 1.0, 4.0, source)
    asked = scene.objects[0]
    for other in SHAPES:
        result = score(frames, replace(scene, objects=(replace(asked, shape=other),)))
        assert judged(result) == (True, other == shape, True), f"{scene} as {other}, seed {seed}"
    for other in MOTIONS:
        result = score(frames, replace(scene, objects=(replace(asked, motion=other),)))
        assert judged(result) == (True, True, other == motion), f"{scene} as {other}, seed {seed}"
    for other in set(COLOURS) - {asked.colour}:
        result = score(frames, replace(scene, objects=(replace(asked, colour=other),)))
        assert judged(result) == (False, False, False), f"{scene} as {other}, seed {seed}"
        assert result.surplus == (asked.colour,) and not result.all_right and result.attributes == 0


def test_exchanged_attributes_of_two_objects_are_wrong() -> None:
    source = fresh()
    a, b = ObjectSpec("orange", "circle", "bouncing"), ObjectSpec("yellow", "triangle", "spinning")
    for ground in GROUNDS:
        frames, seed = clip(SceneSpec((a, b), ground), source)
        shapes = SceneSpec((replace(a, shape=b.shape), replace(b, shape=a.shape)), ground)
        motions = SceneSpec((replace(a, motion=b.motion), replace(b, motion=a.motion)), ground)
        assert [o.attributes for o in score(frames, shapes).objects] == [(True, False, True)] * 2, (
            f"seed {seed}"
        )
        assert [o.attributes for o in score(frames, motions).objects] == [(True, True, False)] * 2, (
            f"seed {seed}"
        )
        assert score(frames, SceneSpec((b, a), ground)).all_right, f"the order does not matter, seed {seed}"


@pytest.mark.parametrize("ground", GROUNDS)
def test_ground_and_surplus_objects_are_reported(ground: str) -> None:
    source = fresh()
    a, b = ObjectSpec("red", "square", "drifting"), ObjectSpec("blue", "circle", "at rest")
    frames, _ = clip(SceneSpec((a, b), ground), source)
    for asked in GROUNDS:
        result = score(frames, SceneSpec((a, b), asked))
        assert (result.ground, result.all_right) == (asked == ground, asked == ground)
        assert result.seen_ground == ground and result.attributes == 1
    result = score(frames, SceneSpec((a,), ground))
    assert result.attributes == 1 and result.surplus == ("blue",) and not result.all_right


@pytest.mark.parametrize("at", [20, 40, 64])
@pytest.mark.parametrize("motion", STEADY)
def test_a_change_midway_fails(motion: str, at: int) -> None:
    """One seed gives one path, so two renders spliced together are one object that changes."""
    source = fresh()
    scene = single("square", motion, source, "plain")
    asked = scene.objects[0]
    frames, seed = clip(scene, source)

    def spliced(rest: Frames) -> tuple[bool, bool, bool]:
        return judged(score(np.concatenate([frames[:at], rest[at:]]), scene))

    other = next(c for c in COLOURS if c != asked.colour)
    assert not spliced(render(SceneSpec((replace(asked, colour=other),)), seed))[0], "a change of colour"
    triangle = render(SceneSpec((replace(asked, shape="triangle"),)), seed)
    assert spliced(triangle)[:2] == (True, False), "a change of shape"
    assert spliced(without_objects(frames)) == (False, False, False), "it vanishes"
    assert not spliced(np.roll(frames, 45, 2))[2], "it jumps"


def test_flicker_fading_doubles_and_ghosts_fail() -> None:
    source = fresh()
    scene = single("square", "at rest", source, "plain")
    frames, _ = clip(scene, source)
    flicker = frames.copy()
    flicker[::4] = without_objects(frames)[::4]
    assert not score(flicker, scene).objects[0].colour
    assert not score(fade(frames, 0.7), scene).objects[0].colour
    half = np.roll(frames, 32, 2)
    double = np.where((np.ptp(half, -1) > np.ptp(frames, -1))[..., None], half, frames)
    assert not score(double, scene).objects[0].colour
    assert score(np.concatenate([without_objects(frames)[:70], frames[70:]]), scene).attributes == 0


def test_an_object_that_swells_has_no_steady_shape() -> None:
    source = fresh()
    scene = single("circle", "at rest", source, "plain")
    frames, _ = clip(scene, source)
    middle = np.array(np.nonzero(np.ptp(frames[0], -1) > 60)).mean(1)
    swelling = []
    for t, frame in enumerate(frames):
        factor = 0.5 + t / 80
        rows, columns = (
            np.clip(np.rint((np.arange(64) - m) / factor + m), 0, 63).astype(int) for m in middle
        )
        swelling.append(frame[rows][:, columns])
    assert not score(np.stack(swelling), scene).objects[0].shape


@pytest.mark.parametrize("motion", ["drifting", "bouncing", "spinning"])
def test_a_frozen_clip_is_at_rest(motion: str) -> None:
    source = fresh()
    scene = single("triangle", motion, source)
    frames, _ = clip(scene, source)
    frozen = np.broadcast_to(frames[:1], frames.shape).copy()
    result = score(frozen, scene).objects[0]
    assert result.attributes == (True, True, False) and result.seen_motion == "at rest"


def test_an_appearance_run_backwards_is_not_one() -> None:
    source = fresh()
    scene = single("triangle", "appearing", source)
    frames, _ = clip(scene, source)
    assert score(frames, scene).attributes == 1
    assert not score(frames[::-1].copy(), scene).objects[0].motion


@pytest.mark.parametrize(("shape", "motion"), KINDS)
def test_slightly_deformed_drifted_and_soft_objects_still_count(shape: str, motion: str) -> None:
    source = fresh()
    scene = single(shape, motion, source)
    frames, seed = clip(scene, source)
    for name, changed in {
        "narrower": stretch(frames, 0.9),
        "hue": turn_hue(frames, source.choice([-6, 6])),
        "paler": fade(frames, 0.25),
        "soft": blur(frames, 1.8, 8.0, source),
    }.items():
        assert score(changed, scene).attributes == 1, f"{name}: {scene} seed {seed}"


def test_empty_and_noisy_clips_score_nothing() -> None:
    source = fresh()
    scene = single("square", "at rest", source)
    for frames in (np.full((81, 64, 64, 3), 130), source.integers(0, 256, (81, 64, 64, 3))):
        result = score(frames.astype(np.uint8), scene)
        assert result.attributes == 0 and not result.all_right


def test_chance_prompts_score_low() -> None:
    """Clips judged by prompts of other scenes: the score of a generator that ignores its prompt."""
    source = fresh()
    scenes = [sample_scene(source) for _ in range(60)]
    results = [
        score(clip(a, source)[0], b) for a, b in zip(scenes, scenes[1:] + scenes[:1], strict=True) if a != b
    ]
    assert np.mean([r.attributes for r in results]) < 0.45
    assert np.mean([r.all_right for r in results]) < 0.05


@pytest.mark.parametrize(("frames", "size"), [(81, 96), (81, 128), (161, 64)])
def test_other_sizes_and_lengths(frames: int, size: int) -> None:
    source = fresh()
    for shape, motion in KINDS[::2]:
        scene = single(shape, motion, source)
        seed = int(source.integers(2**31))
        assert score(render(scene, seed, frames, size), scene).attributes == 1, f"{scene} seed {seed}"


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((81, 64, 64, 3), np.float32),
        ((81, 64, 64), np.uint8),
        ((81, 64, 48, 3), np.uint8),
        ((80, 64, 64, 3), np.uint8),
    ],
)
def test_what_cannot_be_judged_is_refused(shape: tuple[int, ...], dtype: type) -> None:
    with pytest.raises(ShapeError, match="score needs"):
        score(np.zeros(shape, dtype), single("square", "at rest", fresh()))
