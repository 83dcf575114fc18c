"""Sessions: endless clips, prompts that change, cancellation, failing callers, and the order of events."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from plain_wan import plain_wan, token_positions
from torch import Tensor

from dsa_rt import reference
from dsa_rt.cache import KVCache
from dsa_rt.errors import Cancelled, OptionError, PromptError
from dsa_rt.generate import Generate, Session
from dsa_rt.media import Video
from dsa_rt.plan import frame_tokens
from dsa_rt.progress import Event
from dsa_rt.runtime import Runtime
from dsa_rt.schedule import few_step_sigmas

PROMPT, OTHER = "a red square bouncing", "a blue circle at rest on a striped ground"
SIGMAS = few_step_sigmas((1000.0, 750.0, 500.0, 250.0), 5.0)


def clip(generate: Generate, prompt: str = PROMPT, seed: int = 0) -> Video:
    video = generate(prompt, seed)
    assert isinstance(video, Video)
    return video


# Endless


@pytest.mark.parametrize(("window", "sink"), [(6, 0), (5, 0), (7, 1), (6, 3)])
def test_endless_past_the_window(causal: Runtime, window: int, sink: int) -> None:
    """Six chunks through the public face, against the fp64 model that masks all that has left the window."""
    generate = causal.compile(policy="fixed-2-then-1", window=window, sink=sink)
    session = generate.session(PROMPT, 4, endless=True)
    latents = torch.cat([session.next_chunk().latents for _ in range(6)], 1)
    grid, frames = generate.settings.grid, 18
    text, seeds = causal.text_encoder.encode([PROMPT]), torch.tensor([4])
    frame_of, positions = torch.arange(frames * 6) // 6, token_positions(list(range(frames)), 3, 2)
    sees, kept = torch.zeros(frames, frames, dtype=torch.bool), []
    clean = torch.empty(1, 0, 16, dtype=torch.float64)
    for chunk in range(6):
        span = range(3 * chunk, 3 * chunk + 3)
        kept = [*kept, *span]
        while len(kept) > window:
            del kept[sink]
        for frame in span:
            sees[frame, kept] = True
        own, seen = torch.arange(span.start * 6, span.stop * 6), span.stop * 6
        x = reference.philox_normal(seeds, own, 16, 0).double()
        passes = 2 if chunk == 0 else 1
        for number in range(passes):
            times = torch.zeros(1, seen)
            times[:, own] = 1000 * SIGMAS[number]
            mask = sees[frame_of[:seen]][:, frame_of[:seen]]
            rows = torch.cat([clean, x], 1)
            velocity, _ = plain_wan(causal.model.state_dict(), 2, rows, positions[:seen], times, text, mask)
            x0 = x - SIGMAS[number] * velocity[:, own]
            if number + 1 < passes:
                noise = reference.philox_normal(seeds, own, 16, number + 1)
                x = (1 - SIGMAS[number + 1]) * x0 + SIGMAS[number + 1] * noise
        clean = torch.cat([clean, x0], 1)
    exact = grid.unpatchify(clean)[0]
    assert (latents - exact).abs().max() < 1e-3 * exact.abs().max()
    assert not sees[-1].all()


def test_endless_memory_is_flat(causal: Runtime) -> None:
    """Long past the window nothing is held but what was held before: the same bytes of tensors."""
    session = causal.compile(policy="dsa-paper", window=5, sink=1).session(PROMPT, endless=True)
    sizes = []
    for index in range(40):
        session.next_chunk()
        if index in (9, 39):
            sizes.append(live_bytes())
    assert sizes[0] == sizes[1]
    assert session.stats().frames == 1 + 12 * 40 - 4


def test_memory_is_flat_over_generations(causal: Runtime) -> None:
    generate, sizes = causal.compile(policy="dsa-paper"), []
    for _ in range(2):
        for seed in range(3):
            generate(PROMPT, seed)
            next(generate.stream(PROMPT, seed))
            generate.session(PROMPT, seed, endless=True).next_chunk()
        sizes.append(live_bytes())
    assert sizes[0] == sizes[1]


def live_bytes() -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_endless_begins_like_a_clip(causal: Runtime) -> None:
    """The same policy, seed and window: the first chunks are those of the clip, bit for bit."""
    generate = causal.compile(policy="fixed-2")
    session = generate.session(PROMPT, 3, endless=True)
    frames = torch.cat([session.next_chunk().frames for _ in range(3)])
    assert torch.equal(frames, clip(generate, seed=3).frames)
    assert session.next_chunk().frames.shape == (12, 48, 32, 3)  # and it goes on


def test_endless_keeps_the_window_that_was_asked_for(causal: Runtime) -> None:
    """Also one that is longer than the compiled clip: the same chunks as of a function compiled for more frames."""
    short = causal.compile(frames=9, policy="fixed-1", window=9).session(PROMPT, 3, endless=True)
    long = causal.compile(frames=33, policy="fixed-1").session(PROMPT, 3, endless=True)
    assert all(torch.equal(short.next_chunk().frames, long.next_chunk().frames) for _ in range(4))


# Prompts


def test_prompt_changes_from_the_next_chunk_on(causal: Runtime) -> None:
    generate = causal.compile(policy="fixed-2")
    whole = [c.frames for c in generate.stream(PROMPT, 1)]
    session = generate.session(PROMPT, 1)
    before = [session.next_chunk(), session.next_chunk()]
    session.set_prompt(OTHER)
    after = session.next_chunk()
    assert torch.equal(before[0].frames, whole[0]) and torch.equal(before[1].frames, whole[1])
    assert not torch.equal(after.frames, whole[2])
    assert session.prompt == session.stats().prompt == OTHER
    # The same prompt again changes nothing, and neither does a prompt set before the first chunk.
    session = generate.session(OTHER, 1)
    session.set_prompt(PROMPT)
    session.set_prompt(PROMPT, recache=True)
    assert all(torch.equal(c.frames, w) for c, w in zip(session, whole, strict=True))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_context_pass_alone_is_counted(causal: Runtime, ahead: bool) -> None:
    """Before the prompt changes it runs by itself: it counts with the chunk that follows, as it does elsewhere."""
    generate = causal.compile(policy="fixed-2")
    generate.ahead = ahead
    session = generate.session(PROMPT, 1)
    session.next_chunk()
    session.set_prompt(OTHER)
    rest = list(session)
    assert [chunk.stats.context_passes for chunk in rest] == [1, 1]
    assert session.stats().model_calls == 6 + 2


def test_a_refused_prompt_changes_nothing(causal: Runtime) -> None:
    generate = causal.compile(policy="fixed-2")
    whole = [c.frames for c in generate.stream(PROMPT, 1)]
    session = generate.session(PROMPT, 1)
    session.next_chunk()
    with pytest.raises(PromptError, match="hovering"):
        session.set_prompt("a red square hovering")
    assert session.prompt == PROMPT
    assert torch.equal(session.next_chunk().frames, whole[1])


@pytest.mark.parametrize(
    ("window", "sink", "chunks"), [(9, 0, 2), (6, 0, 4), (5, 0, 4), (7, 2, 4), (5, 2, 5), (8, 4, 3)]
)
def test_recached_keys_are_those_of_a_fresh_cache(causal: Runtime, window: int, sink: int, chunks: int) -> None:
    """After a change with recache the frames of the window have the K/V that a new cache would get: frame runs of
    the window in order under the new prompt, each run seeing those before it, also where the window cut a chunk."""
    session = causal.compile(policy="fixed-1", window=window, sink=sink).session(PROMPT, 2, endless=True)
    x0 = torch.cat([session.settings.grid.patchify(session.next_chunk().latents[None]) for _ in range(chunks)], 1)
    session.set_prompt(OTHER, recache=True)
    end = 3 * chunks
    kept = [f for f in range(end) if f < sink or f >= end - (window - sink)]
    runs = [[f for f in kept if f // 3 == chunk] for chunk in range(chunks)]
    runs = [part for run in runs for part in ([f for f in run if f < sink], [f for f in run if f >= sink])]
    if kept == list(range(end)):  # nothing was evicted: whole chunks
        runs = [list(range(3 * chunk, 3 * chunk + 3)) for chunk in range(chunks)]
    fresh = KVCache(
        layers=2, batch=1, window=len(kept), sink=0, tokens_per_frame=6, heads=2, head_dim=24, dtype=torch.float32
    )
    text = causal.model.embed_text(causal.text_encoder.encode([OTHER]))
    written = 0
    for run in filter(None, runs):
        rows = slice(run[0] * 6, (run[-1] + 1) * 6)
        slots = torch.arange(written * 6, (written + len(run)) * 6)
        written += len(run)
        span = range(run[0], run[-1] + 1)
        active = frame_tokens(session.settings.grid, span, 24, per_frame=True, slots=slots, valid=written * 6)
        causal.model(x0[:, rows], active, torch.zeros(1, len(run)), text, fresh)
    lane = session.rollout.lane
    ring, cache = lane.ring, lane.engine.cache
    for place, frame in enumerate(kept):
        there, here = ring.place(frame) * 6, place * 6
        for held, expected in ((torch.stack(cache.k), fresh.k), (torch.stack(cache.v), fresh.v)):
            torch.testing.assert_close(
                held[:, :, there : there + 6], expected[:, :, here : here + 6], rtol=0, atol=1e-5, msg=f"frame {frame}"
            )
    following = session.next_chunk()  # and the next chunk takes the places of the oldest
    assert torch.isfinite(following.latents).all()
    after = [f for f in kept if f < sink or f >= end + 3 - (window - sink)]
    for place, frame in enumerate(kept):
        if frame in after:
            there, here = ring.place(frame) * 6, place * 6
            held, expected = torch.stack(cache.k)[:, :, there : there + 6], fresh.k[:, :, here : here + 6]
            torch.testing.assert_close(held, expected, rtol=0, atol=1e-5)


def test_recached_chunk_continues_like_a_fresh_rollout(causal: Runtime) -> None:
    """Past the window, what a chunk sees after a change with recache: the window's frames and no others."""
    session = causal.compile(policy="fixed-1", window=9, sink=0).session(PROMPT, 2, endless=True)
    rows = [session.settings.grid.patchify(session.next_chunk().latents[None]) for _ in range(4)]
    session.set_prompt(OTHER, recache=True)
    got = session.next_chunk().latents
    text, own = causal.text_encoder.encode([OTHER]), torch.arange(12 * 6, 15 * 6)
    noise = reference.philox_normal(torch.tensor([2]), own, 16, 0)
    # Chunks 1 to 3 were in the window when the prompt changed; chunk 1 leaves it for chunk 4, the others have seen it.
    chunk_of = torch.arange(12 * 6) // 18
    mask = (chunk_of[:, None] >= chunk_of) & ~((chunk_of[:, None] == 3) & (chunk_of == 0))
    times = torch.zeros(1, 72)
    times[:, 54:] = 1000.0
    velocity, _ = plain_wan(
        causal.model.state_dict(), 2, torch.cat([*rows[1:], noise], 1), token_positions(list(range(3, 15)), 3, 2),
        times, text, mask,
    )  # fmt: skip
    expected = session.settings.grid.unpatchify(noise - velocity[:, 54:])[0]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_prompt_change_needs_chunks(many_step: Runtime) -> None:
    session = many_step.compile().session(PROMPT)
    with pytest.raises(OptionError, match="cannot change inside a clip that is made whole"):
        session.set_prompt(OTHER)
    with pytest.raises(OptionError, match="endless=True needs an autoregressive bundle"):
        many_step.compile().session(PROMPT, endless=True)


# Ends, cancellation, failing callers


def test_past_the_end(causal: Runtime) -> None:
    session = causal.compile(policy="fixed-1").session(PROMPT)
    for _ in range(3):
        session.next_chunk()
    with pytest.raises(OptionError, match="the clip has 3 chunks and all are made"):
        session.next_chunk()
    session.close()
    for act in (session.next_chunk, lambda: session.set_prompt(OTHER)):
        with pytest.raises(OptionError, match="session is closed"):
            act()


@pytest.mark.parametrize(
    ("form", "kind"),
    [*(("causal", kind) for kind in ("text", "pass", "context", "decode", "chunk")),
     *(("many_step", kind) for kind in ("text", "pass", "decode", "chunk"))],
)  # fmt: skip
def test_cancelled_from_an_event(request: pytest.FixtureRequest, form: str, kind: str) -> None:
    """At most one more pass after the flag; the function stays as it was."""
    generate = request.getfixturevalue(form).compile(policy="dense")
    whole, flag = clip(generate), threading.Event()
    events: list[str] = []

    def cancel_at_second(event: Event) -> None:
        events.append(event.kind)
        if events.count(kind) == (2 if form == "causal" and kind != "text" else 1):
            flag.set()

    last = form == "many_step" and kind in ("decode", "chunk")  # its one chunk is done by then
    if last:
        generate(PROMPT, on_event=cancel_at_second, cancel=flag)
    else:
        with pytest.raises(Cancelled, match="cancelled in chunk"):
            generate(PROMPT, on_event=cancel_at_second, cancel=flag)
        after = events[len(events) - events[::-1].index(kind) :]
        assert after == {"decode": ["chunk"], "context": ["pass"]}.get(kind, [])  # one pass made both
    assert flag.is_set() and torch.equal(clip(generate).frames, whole.frames)
    with pytest.raises(Cancelled):
        generate(PROMPT, cancel=flag)  # set before it began


def test_cancelled_from_another_thread(causal: Runtime) -> None:
    generate, flag, reached = causal.compile(policy="dense"), threading.Event(), threading.Event()
    session = generate.session(PROMPT, endless=True, cancel=flag, on_event=lambda event: reached.set())
    caught: list[BaseException] = []

    def endless() -> None:
        try:
            for _ in session:
                pass
        except Cancelled as error:
            caught.append(error)

    worker = threading.Thread(target=endless)
    worker.start()
    assert reached.wait(30)
    flag.set()
    worker.join(30)
    assert not worker.is_alive() and len(caught) == 1
    with pytest.raises(OptionError, match="closed"):
        session.next_chunk()


def failing(at: int, error: BaseException) -> Callable[[Event], None]:
    count = [0]

    def on_event(_: Event) -> None:
        count[0] += 1
        if count[0] == at:
            raise error

    return on_event


@pytest.mark.parametrize("at", range(1, 9))
def test_an_event_handler_that_fails(causal: Runtime, at: int) -> None:
    """The handler's own exception comes out, the session ends, and the function is as before."""
    generate = causal.compile(policy="fixed-2")
    whole = clip(generate)
    with pytest.raises(ZeroDivisionError):
        generate(PROMPT, on_event=failing(at, ZeroDivisionError()))
    if at > 1:
        session = generate.session(PROMPT, on_event=failing(at, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            for _ in range(3):
                session.next_chunk()
        with pytest.raises(OptionError, match="closed"):  # half a chunk may be in its caches
            session.next_chunk()
    assert torch.equal(clip(generate).frames, whole.frames)


def test_a_consumer_that_fails_or_leaves(causal: Runtime) -> None:
    generate = causal.compile(policy="dense")
    whole = clip(generate)
    with pytest.raises(ZeroDivisionError):
        for _ in generate.stream(PROMPT):
            raise ZeroDivisionError
    for first in generate.stream(PROMPT):  # noqa: B007
        break
    stream = generate.stream(PROMPT)
    assert torch.equal(next(stream).frames, first.frames)
    stream.close()  # type: ignore[attr-defined]
    assert list(stream) == []
    assert torch.equal(clip(generate).frames, whole.frames)


# Events


@pytest.mark.parametrize(
    ("policy", "passes"), [("dense", (4, 4, 4)), ("fixed-3-then-1", (3, 1, 1)), ("dsa-paper", None)]
)
def test_events_of_a_clip(causal: Runtime, policy: str, passes: tuple[int, ...] | None) -> None:
    """Complete and in order: text, then for each chunk its passes, context, decode, chunk."""
    events: list[Event] = []
    video = causal.compile(policy=policy)(PROMPT, 6, on_event=events.append)
    assert isinstance(video, Video) and video.stats is not None
    spent = video.stats.chunks
    assert passes is None or tuple(c.passes for c in spent) == passes
    expected: list[tuple[str, int, int, float | None]] = [("text", 0, 0, None)]
    for c in spent:
        if c.index:
            expected.append(("context", c.index - 1, 0, None))
        expected += [("pass", c.index, n + 1, c.confidences[n]) for n in range(c.passes)]
        expected += [(kind, c.index, c.passes, None) for kind in ("decode", "chunk")]
    assert [(e.kind, e.chunk, e.passes, e.confidence) for e in events] == expected
    assert all(e.chunks == 3 and e.passes_scheduled == 4 for e in events)
    times = [e.seconds for e in events]
    assert times == sorted(times) and times[0] >= 0


def test_events_of_endless_and_many_step(causal: Runtime, many_step: Runtime) -> None:
    events: list[Event] = []
    session = causal.compile(policy="fixed-1").session(PROMPT, on_event=events.append, endless=True)
    session.next_chunk()
    assert [e.kind for e in events] == ["text", "pass", "decode", "chunk"]
    session.next_chunk()
    assert [(e.kind, e.chunk) for e in events[4:6]] == [("context", 0), ("pass", 1)]
    assert {e.chunks for e in events} == {None}
    events.clear()
    many_step.compile(steps=2)(PROMPT, on_event=events.append)
    assert [(e.kind, e.passes) for e in events] == [
        ("text", 0), ("pass", 1), ("pass", 2), ("decode", 2), ("chunk", 2)
    ]  # fmt: skip
    assert {(e.chunks, e.passes_scheduled) for e in events} == {(1, 2)}


def test_events_of_a_compile(causal: Runtime) -> None:
    for policy in ("dense", "dsa-paper"):
        events: list[Event] = []
        causal.compile(policy=policy, on_event=events.append)
        assert events and {e.kind for e in events} == {"warmup"}
        assert [e.chunk for e in events] == list(range(len(events))) and {e.chunks for e in events} == {len(events)}


def test_session_is_what_generate_makes(causal: Runtime) -> None:
    generate = causal.compile(policy="fixed-1")
    session = generate.session(PROMPT, 5)
    assert isinstance(session, Session) and session.chunks == 3
    chunk = session.next_chunk()
    assert chunk.index == 0 and chunk.passes == chunk.stats.passes == 1 and chunk.confidences == (None,)
    assert len(list(session)) == 2  # iterating goes on from there
