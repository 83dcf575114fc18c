"""The prompts that quality and speed are measured on: scenes that no training clip has shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsa_rt.demo.grammar import SceneSpec, format_scene, sample_scene

SEED = 20260604  # of the drawing; changing it makes another benchmark


@dataclass(frozen=True)
class Case:
    """One clip to make: noise and the ground truth's rendering take the same seed."""

    number: int
    scene: SceneSpec
    seed: int

    @property
    def prompt(self) -> str:
        return format_scene(self.scene)

    @property
    def motions(self) -> tuple[str, ...]:
        """The motions in the scene, each once."""
        return tuple(dict.fromkeys(item.motion for item in self.scene.objects))


def held_out_cases(count: int) -> list[Case]:
    """``count`` different held-out scenes, always the same ones in the same order, clip i under seed i.

    As scenes are not repeated and there are few of one object, most have two, which is the harder half of the
    world.
    """
    source = np.random.default_rng(SEED)
    scenes: dict[str, SceneSpec] = {}
    while len(scenes) < count:
        scene = sample_scene(source, held_out=True)
        scenes.setdefault(format_scene(scene), scene)
    return [Case(number, scene, number) for number, scene in enumerate(scenes.values())]
