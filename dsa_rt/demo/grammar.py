"""What the demo generator can be asked for: a small grammar of coloured shapes, their motion and the ground.

    a red square bouncing
    a yellow triangle spinning and a blue circle at rest on a striped ground
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass

import numpy as np

from dsa_rt.errors import PromptError

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("at rest", "drifting", "bouncing", "spinning", "appearing")
GROUNDS = ("plain", "striped", "checkered")
MAX_WORDS = 20
VOCABULARY = (
    "<pad>", "a", ",", "on", "ground", "at", "rest", *COLOURS, *SHAPES, *MOTIONS[1:], *GROUNDS,
)  # fmt: skip

HELP = (
    f"The demo understands one or two objects, 'a COLOUR SHAPE MOTION', and 'on a GROUND ground'; "
    f"colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; motions: {', '.join(MOTIONS)}; "
    f"grounds: {', '.join(GROUNDS)}. For example: 'a red square bouncing, a blue circle at rest on a striped ground'"
)


@dataclass(frozen=True)
class ObjectSpec:
    """One object of a scene, in the words of the grammar."""

    colour: str
    shape: str
    motion: str


@dataclass(frozen=True)
class SceneSpec:
    """One or two objects in front of a ground."""

    objects: tuple[ObjectSpec, ...]
    ground: str = "plain"


def example_prompts() -> list[str]:
    """A few prompts that show what the grammar can say."""
    return [
        "a red square bouncing, a blue circle at rest",
        "a green triangle spinning on a checkered ground",
        "a yellow circle drifting, a purple square appearing on a striped ground",
        "an orange circle bouncing",
    ]


def format_scene(scene: SceneSpec) -> str:
    """The canonical prompt of a scene."""
    objects = ", ".join(
        f"{'an' if o.colour[0] in 'aeiou' else 'a'} {o.colour} {o.shape} {o.motion}" for o in scene.objects
    )
    return objects if scene.ground == "plain" else f"{objects} on a {scene.ground} ground"


def parse(prompt: str) -> SceneSpec:
    """The scene a prompt asks for; :class:`~dsa_rt.errors.PromptError` names the word that is not understood."""
    words = prompt.lower().replace(",", " , ").replace(".", " ").split()
    if not words:
        raise PromptError(f"the prompt is empty. {HELP}")
    if len(words) > MAX_WORDS:
        raise PromptError(f"the prompt has {len(words)} words; the demo reads at most {MAX_WORDS}. {HELP}")
    reader = _Reader(prompt, words)
    objects = [reader.object()]
    while reader.take(",", "and"):
        reader.take("and")
        objects.append(reader.object())
    ground = "plain"
    if reader.take("on"):
        reader.take("a", "the")
        ground = reader.need("ground", GROUNDS)
        reader.need("the word 'ground'", ("ground", "background"))
    reader.end()
    if len(objects) > 2:
        raise PromptError(f"prompt {prompt!r} has {len(objects)} objects; the demo draws one or two")
    if len({o.colour for o in objects}) < len(objects):
        raise PromptError(f"prompt {prompt!r} has two {objects[0].colour} objects; give them different colours")
    return SceneSpec(tuple(objects), ground)


class _Reader:
    def __init__(self, prompt: str, words: list[str]) -> None:
        self.prompt, self.words, self.at = prompt, words, 0

    def take(self, *options: str) -> bool:
        if self.at < len(self.words) and self.words[self.at] in options:
            self.at += 1
            return True
        return False

    def need(self, what: str, options: tuple[str, ...]) -> str:
        word = self.words[self.at] if self.at < len(self.words) else None
        if word in options:
            self.at += 1
            return str(word)
        found = "the prompt ends" if word is None else f"found {word!r}"
        near = difflib.get_close_matches(word or "", options, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise PromptError(f"prompt {self.prompt!r}: expected a {what} but {found}{hint}. {HELP}")

    def object(self) -> ObjectSpec:
        self.take("a", "an", "the", "one")
        colour = self.need("colour", COLOURS)
        shape = self.need("shape", SHAPES)
        motion = "at rest" if self.take("resting") else self.need("motion", ("at", *MOTIONS[1:]))
        if motion == "at":
            self.need("the word 'rest'", ("rest",))
            motion = "at rest"
        if shape == "circle" and motion == "spinning":
            raise PromptError(f"prompt {self.prompt!r}: a spinning circle looks at rest; ask for a square or triangle")
        return ObjectSpec(colour, shape, motion)

    def end(self) -> None:
        if self.at < len(self.words):
            raise PromptError(f"prompt {self.prompt!r}: {self.words[self.at]!r} is not understood there. {HELP}")


def tokenize(prompt: str) -> list[int]:
    """Word numbers of the canonical prompt, padded to MAX_WORDS; "" is the empty (unconditional) prompt."""
    if not prompt.strip():
        return [0] * MAX_WORDS
    words = format_scene(parse(prompt)).replace(",", " ,").split()
    numbers = [VOCABULARY.index("a" if w == "an" else w) for w in words]
    return numbers + [0] * (MAX_WORDS - len(numbers))


def is_held_out(scene: SceneSpec) -> bool:
    """About one scene in ten is never trained on; a stable hash of its canonical prompt decides."""
    return hashlib.sha256(format_scene(scene).encode()).digest()[0] < 26


def sample_scene(source: np.random.Generator, *, held_out: bool = False) -> SceneSpec:
    """A random scene, from the held-out ones or from the others.

    The others are trained on: there "spinning" is drawn twice as often, since it is the hardest to learn and circles
    cannot do it.
    """
    while True:
        count = 1 if source.random() < 0.35 else 2
        colours = source.choice(len(COLOURS), count, replace=False)
        objects = []
        for colour in colours:
            shape = SHAPES[source.integers(len(SHAPES))]
            motions = [m for m in MOTIONS if not (shape == "circle" and m == "spinning")]
            if not held_out and "spinning" in motions:
                motions.append("spinning")
            objects.append(ObjectSpec(COLOURS[colour], shape, motions[source.integers(len(motions))]))
        scene = SceneSpec(tuple(objects), GROUNDS[0] if source.random() < 0.5 else GROUNDS[source.integers(1, 3)])
        if is_held_out(scene) == held_out:
            return scene
