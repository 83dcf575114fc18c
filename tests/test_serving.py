"""Several clips in shared passes: each as it would be alone, whoever else runs, fails or leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsa_rt.errors import Cancelled, OptionError
from dsa_rt.generate import Generate, Session
from dsa_rt.media import Video
from dsa_rt.progress import Event
from dsa_rt.runtime import Runtime, load

PROMPTS = (
    "a red square bouncing", "a blue circle at rest on a striped ground", "a green triangle spinning",
    "a yellow square at rest", "a purple circle bouncing",
)  # fmt: skip


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def runtime(request: pytest.FixtureRequest, causal_bundle: Path) -> Runtime:
    return load(causal_bundle, dtype=request.param)


def frames_of(served: Iterable[tuple[Session, object]]) -> dict[Session, list[Tensor]]:
    frames: dict[Session, list[Tensor]] = {}
    for session, chunk in served:
        frames.setdefault(session, []).append(chunk.frames)  # type: ignore[attr-defined]
    return frames


def alone(generate: Generate, prompt: str, seed: int, chunks: int = 3) -> list[Tensor]:
    session = generate.session(prompt, seed, endless=True)
    made = [session.next_chunk().frames for _ in range(chunks)]
    session.close()
    return made


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 5, "sink": 1}, {"window": 3}])
@pytest.mark.parametrize("policy", ["dsa-paper", "dense", "fixed-2-then-1"])
def test_sessions_at_different_chunks_are_as_alone(runtime: Runtime, policy: str, options: dict[str, int]) -> None:
    """Three clips, one of which began two chunks earlier and another one chunk; the paper's rule gives them different
    passes too."""
    generate = runtime.compile(policy=policy, sessions=3, **options)
    asked = [(prompt, 11 * seed) for seed, prompt in enumerate(PROMPTS[:3])]
    expected = [alone(generate, *one) for one in asked]
    sessions = [generate.session(*one) for one in asked]
    made = {session: [] for session in sessions}
    made[sessions[1]].append(sessions[1].next_chunk().frames)
    made[sessions[2]] += [sessions[2].next_chunk().frames for _ in range(2)]
    for session, chunk in generate.serve(sessions):
        made[session].append(chunk.frames)
    for session, frames in zip(sessions, expected, strict=True):
        assert equal(made[session], frames)
    assert not torch.equal(expected[0][0], expected[1][0])


def test_a_list_of_prompts_is_as_one_by_one(runtime: Runtime) -> None:
    """More prompts than clips side by side: those that wait begin as others end."""
    together = runtime.compile(policy="dsa-paper", sessions=2)
    one = runtime.compile(policy="dsa-paper")
    videos = together(PROMPTS, 3)
    assert isinstance(videos, list) and len(videos) == len(PROMPTS)
    for number, (prompt, video) in enumerate(zip(PROMPTS, videos, strict=True)):
        single = one(prompt, 3 + number)
        assert isinstance(single, Video) and torch.equal(single.frames, video.frames)
        assert single.latents is not None and video.latents is not None
        assert torch.equal(single.latents, video.latents)
        assert single.stats is not None and video.stats is not None
        assert single.stats.frames_sha256 == video.stats.frames_sha256
        assert [c.passes for c in single.stats.chunks] == [c.passes for c in video.stats.chunks]


def test_endless_and_finite_side_by_side(causal: Runtime) -> None:
    generate = causal.compile(policy="fixed-1", sessions=2, window=6)
    expected = alone(generate, PROMPTS[0], 1, 8), alone(generate, PROMPTS[1], 2)
    endless, clip = generate.session(PROMPTS[0], 1, endless=True), generate.session(PROMPTS[1], 2)
    made: dict[Session, list[Tensor]] = {endless: [], clip: []}
    for session, chunk in generate.serve([endless, clip]):
        made[session].append(chunk.frames)
        if len(made[endless]) == 8:
            endless.close()
    assert equal(made[endless], expected[0]) and equal(made[clip], expected[1])


def test_a_prompt_changes_while_others_run(causal: Runtime) -> None:
    generate = causal.compile(policy="fixed-2", sessions=2)
    changing, still = generate.session(PROMPTS[0], 1), generate.session(PROMPTS[1], 2)
    lone = generate.session(PROMPTS[0], 1)  # a third one has an engine of its own
    expected = [lone.next_chunk().frames]
    lone.set_prompt(PROMPTS[2])
    expected += [chunk.frames for chunk in lone]
    made: dict[Session, list[Tensor]] = {changing: [], still: []}
    for session, chunk in generate.serve([changing, still]):
        made[session].append(chunk.frames)
        if session is changing and chunk.index == 0:
            changing.set_prompt(PROMPTS[2])
    assert equal(made[changing], expected) and equal(made[still], alone(generate, PROMPTS[1], 2))


@pytest.mark.parametrize("how", ["handler", "cancel"])
def test_one_that_fails_leaves_the_others(causal: Runtime, how: str) -> None:
    generate, flag = causal.compile(policy="fixed-2", sessions=2), threading.Event()

    def fail(event: Event) -> None:
        if event.kind == "pass" and event.chunk == 1:
            if how == "handler":
                raise ZeroDivisionError
            flag.set()

    failing = generate.session(PROMPTS[0], 1, on_event=fail, cancel=flag)
    other = generate.session(PROMPTS[1], 2)
    made: list[Tensor] = []
    with pytest.raises(ZeroDivisionError if how == "handler" else Cancelled):
        for session, chunk in generate.serve([failing, other]):
            if session is other:
                made.append(chunk.frames)
    assert not failing.is_open and other.is_open
    made += frames_of(generate.serve([other]))[other]
    assert equal(made, alone(generate, PROMPTS[1], 2))
    first, second = (generate.session(PROMPTS[0], seed) for seed in (1, 5))  # its place is free again
    assert equal(frames_of(generate.serve([first, second]))[first], alone(generate, PROMPTS[0], 1))


@pytest.mark.parametrize("first", [True, False], ids=["fails-first", "fails-last"])
@pytest.mark.parametrize("kind", ["pass", "decode", "chunk"])
def test_chunks_of_the_pass_after_which_one_fails_are_not_lost(causal: Runtime, kind: str, first: bool) -> None:
    """In lockstep: the pass that ends chunk 1 of the one that fails ends chunk 1 of the other too."""
    generate, happened = causal.compile(policy="fixed-1", sessions=2), []

    def fail(event: Event) -> None:
        if event.kind == kind and event.chunk == 1:
            happened.append(event)
            raise ZeroDivisionError

    failing, other = generate.session(PROMPTS[0], 1, on_event=fail), generate.session(PROMPTS[1], 2)
    made: list[Tensor] = []
    with pytest.raises(ZeroDivisionError):
        for session, chunk in generate.serve([failing, other] if first else [other, failing]):
            if session is other:
                made.append(chunk.frames)
    assert len(happened) == 1 and not failing.is_open and other.is_open
    assert len(made) == 2
    made += frames_of(generate.serve([other]))[other]
    assert equal(made, alone(generate, PROMPTS[1], 2))


@pytest.mark.parametrize("how", ["serve", "next_chunk"])
def test_a_loop_left_between_two_chunks_of_a_pass_loses_none(causal: Runtime, how: str) -> None:
    """In lockstep, left after the first of two chunks, every time, the last ones too."""
    generate = causal.compile(policy="fixed-1", sessions=2)
    sessions = [generate.session(prompt, seed) for seed, prompt in enumerate(PROMPTS[:2])]
    made: dict[Session, list[Tensor]] = {session: [] for session in sessions}
    while any(session.is_open for session in sessions):
        for session, chunk in generate.serve([s for s in sessions if s.is_open]):
            made[session].append(chunk.frames)
            break
        if how == "next_chunk" and sessions[1].waiting is not None:
            made[sessions[1]].append(sessions[1].next_chunk().frames)
    for session, prompt, seed in zip(sessions, PROMPTS, range(2), strict=False):
        assert equal(made[session], alone(generate, prompt, seed))


def test_a_prompt_for_a_clip_that_is_made(causal: Runtime) -> None:
    generate = causal.compile(policy="fixed-1", sessions=2)
    first, second = (generate.session(prompt, 1) for prompt in PROMPTS[:2])
    for _ in range(3):
        next(iter(generate.serve([first, second])))
        if first.is_open:
            second.next_chunk()
    with pytest.raises(OptionError, match="the last one waits to be taken"):
        second.set_prompt(PROMPTS[2])
    second.close()
    assert not second.is_open
    with pytest.raises(OptionError, match="closed"):
        second.next_chunk()


def test_a_list_that_is_cancelled_gives_its_places_back(causal: Runtime) -> None:
    generate, flag = causal.compile(policy="fixed-2", sessions=2), threading.Event()
    with pytest.raises(Cancelled):
        generate(PROMPTS, on_event=lambda event: flag.set() if event.chunk == 2 else None, cancel=flag)
    assert len(list(generate.serve([generate.session(PROMPTS[0]), generate.session(PROMPTS[1])]))) == 6


def test_what_cannot_be_served(causal: Runtime, many_step: Runtime) -> None:
    two, other = causal.compile(policy="fixed-1", sessions=2), causal.compile(policy="fixed-1", sessions=2)
    sessions = [two.session(PROMPTS[0], seed) for seed in range(3)]
    with pytest.raises(OptionError, match="up to 2 sessions of the function .* sessions=3"):
        list(two.serve(sessions))
    with pytest.raises(OptionError, match="up to 2 sessions"):
        list(two.serve([other.session(PROMPTS[0])]))
    assert len(list(two.serve(sessions[:2]))) == 6
    with pytest.raises(OptionError, match="it is over, or its bundle makes clips whole"):
        list(two.serve(sessions[:1]))
    with pytest.raises(OptionError, match="sessions=2 is for autoregressive bundles"):
        many_step.compile(sessions=2)
    for count in (0, -1, 1.5, True):
        with pytest.raises(OptionError, match="sessions is"):
            causal.compile(sessions=count)  # type: ignore[arg-type]


def test_the_plan_counts_every_session(causal: Runtime) -> None:
    one, three = (causal.compile(policy="fixed-1", sessions=n) for n in (1, 3))
    assert three.plan.kv_cache == 3 * one.plan.kv_cache and three.plan.weights == one.plan.weights
    engine = three.session(PROMPTS[0]).rollout.lane.engine
    held = sum(t.nbytes for t in (*engine.cache.k, *engine.cache.v)) + sum(
        t.nbytes for pair in engine.text.layers for t in pair
    )
    assert held == three.plan.kv_cache


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 4, "sink": 1}])
def test_a_pass_ahead_changes_nothing(causal: Runtime, options: dict[str, int]) -> None:
    """The next chunk's first pass before a chunk is handed out, as on CUDA: also where the prompt changes then."""

    def clips(ahead: bool) -> list[list[Tensor]]:
        generate = causal.compile(policy="dsa-paper", **options)
        generate.ahead = ahead
        made = [[chunk.frames for chunk in generate.stream(PROMPTS[0], 4)]]
        for recache in (False, True):
            session = generate.session(PROMPTS[1], 5, endless=True)
            frames = [session.next_chunk().frames for _ in range(4)]
            session.set_prompt(PROMPTS[2], recache=recache)
            made.append(frames + [session.next_chunk().frames for _ in range(2)])
            session.close()
        return made

    for before, after in zip(clips(False), clips(True), strict=True):
        assert equal(before, after)


def test_events_with_a_pass_ahead(causal: Runtime) -> None:
    """The same events in the same order."""

    def events(ahead: bool) -> list[tuple[object, ...]]:
        generate, seen = causal.compile(policy="fixed-2"), []
        generate.ahead = ahead
        session = generate.session(PROMPTS[0], on_event=seen.append)
        session.next_chunk()
        session.set_prompt(PROMPTS[1])
        list(session)
        return [(event.kind, event.chunk, event.passes) for event in seen]

    assert events(True) == events(False)
