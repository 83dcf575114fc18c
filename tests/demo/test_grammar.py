"""The grammar of prompts: what it reads, what it writes, and what it says when it does not understand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dsa_rt.demo import grammar
from dsa_rt.demo.grammar import ObjectSpec, SceneSpec, format_scene, parse, tokenize
from dsa_rt.errors import PromptError

OBJECTS = [
    ObjectSpec(*o)
    for o in itertools.product(grammar.COLOURS, grammar.SHAPES, grammar.MOTIONS)
    if o[1:] != ("circle", "spinning")
]
SINGLE = [SceneSpec((o,), g) for o in OBJECTS for g in grammar.GROUNDS]


def random_scenes(count: int, **options: bool) -> list[SceneSpec]:
    source = np.random.default_rng()
    return [grammar.sample_scene(source, **options) for _ in range(count)]


def test_every_scene_survives_the_way_through_its_prompt() -> None:
    for scene in SINGLE + random_scenes(500):
        assert parse(format_scene(scene)) == scene


@pytest.mark.parametrize(
    "prompt",
    [
        "a red square bouncing, an orange circle at rest on a striped ground",
        "A Red SQUARE bouncing and an orange circle at rest on the striped ground.",
        "  red square bouncing ,orange circle resting   on striped background ",
        "one red square bouncing, and the orange circle at rest on a striped ground",
    ],
)
def test_the_reader_is_tolerant_of_form(prompt: str) -> None:
    asked = (ObjectSpec("red", "square", "bouncing"), ObjectSpec("orange", "circle", "at rest"))
    assert parse(prompt) == SceneSpec(asked, "striped")


def test_no_ground_said_is_plain() -> None:
    assert parse("a blue triangle spinning").ground == "plain"


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a pink square bouncing", ["'pink'", "red, orange"]),
        ("a red sqare bouncing", ["'sqare'", "did you mean 'square'"]),
        ("a red square flying", ["'flying'", "at rest, drifting"]),
        ("a red square", ["the prompt ends", "motion"]),
        ("a red square at home", ["'home'"]),
        ("a red square bouncing on a dotted ground", ["'dotted'", "plain, striped, checkered"]),
        ("a red square bouncing on a striped", ["the prompt ends"]),
        ("a red square bouncing loudly", ["'loudly'"]),
        ("a red square bouncing, a red circle at rest", ["two red objects"]),
        ("a red square bouncing, a blue circle at rest, a green circle at rest", ["3 objects"]),
        ("a red circle spinning", ["spinning circle"]),
        ("a cat on a sofa", ["'cat'", "For example"]),
        ("", ["empty", "For example"]),
        ("   ", ["empty"]),
        ("a " * 21, ["21 words", "at most 20"]),
    ],
)
def test_a_prompt_outside_the_grammar_is_explained(prompt: str, named: list[str]) -> None:
    with pytest.raises(PromptError) as caught:
        parse(prompt)
    for words in named:
        assert words in str(caught.value)


def test_examples_are_understood_and_differ() -> None:
    scenes = [parse(p) for p in grammar.example_prompts()]
    assert len(scenes) >= 3 and len(set(scenes)) == len(scenes)


def test_rows_of_words_have_one_length_and_name_one_scene_each() -> None:
    scenes = list(dict.fromkeys(SINGLE + random_scenes(300)))
    rows = [tuple(tokenize(format_scene(s))) for s in scenes]
    assert {len(r) for r in rows} == {grammar.MAX_WORDS}
    assert len(set(rows)) == len(scenes)
    for row in rows:
        used = sum(n != 0 for n in row)
        assert 0 not in row[:used] and set(row[used:]) <= {0}
    assert len(set(grammar.VOCABULARY)) == len(grammar.VOCABULARY) and grammar.VOCABULARY[0] == "<pad>"


def test_words_spell_the_prompt() -> None:
    prompt = "a red square bouncing, a blue circle at rest on a striped ground"
    words = [grammar.VOCABULARY[n] for n in tokenize(prompt)]
    assert " ".join(w for w in words if w != "<pad>").replace(" ,", ",") == prompt


def test_one_scene_is_one_row_however_it_is_said() -> None:
    assert tokenize("RED square Bouncing and blue circle resting") == tokenize(
        "a red square bouncing, a blue circle at rest"
    )


def test_the_empty_prompt_is_all_padding() -> None:
    assert tokenize("") == tokenize("  ") == [0] * grammar.MAX_WORDS


def test_held_out_scenes_are_a_tenth_and_never_drawn_for_training() -> None:
    share = np.mean([grammar.is_held_out(s) for s in SINGLE])
    assert 0.05 < share < 0.16
    assert not any(grammar.is_held_out(s) for s in random_scenes(300))
    assert all(grammar.is_held_out(s) for s in random_scenes(100, held_out=True))


def test_held_out_never_changes() -> None:
    """The trained weights that ship know what they have not seen: this list may not move."""
    named = {format_scene(s) for s in SINGLE if s.ground == "checkered" and grammar.is_held_out(s)}
    assert named == HELD_OUT_ON_CHECKERED


def test_random_scenes_cover_the_grammar() -> None:
    source = np.random.default_rng(5)
    scenes = [grammar.sample_scene(source) for _ in range(1500)]
    drawn = {(o.colour, o.shape, o.motion) for s in scenes for o in s.objects}
    assert drawn == {(o.colour, o.shape, o.motion) for o in OBJECTS}
    assert {s.ground for s in scenes} == set(grammar.GROUNDS)
    assert {len(s.objects) for s in scenes} == {1, 2}
    assert all(len({o.colour for o in s.objects}) == len(s.objects) for s in scenes)
    again = np.random.default_rng(5)
    assert scenes[:50] == [grammar.sample_scene(again) for _ in range(50)]


HELD_OUT_ON_CHECKERED = {
    "a red triangle drifting on a checkered ground",
    "an orange triangle at rest on a checkered ground",
    "a yellow square drifting on a checkered ground",
    "a yellow square spinning on a checkered ground",
    "a green circle at rest on a checkered ground",
    "a green circle bouncing on a checkered ground",
    "a green square bouncing on a checkered ground",
    "a green triangle drifting on a checkered ground",
    "a green triangle spinning on a checkered ground",
    "a blue circle appearing on a checkered ground",
    "a blue triangle drifting on a checkered ground",
    "a purple circle drifting on a checkered ground",
}
