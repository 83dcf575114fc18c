"""The autoregressive loop under scripted decisions: which passes run, on what, and the clip in fp64 without a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from plain_wan import plain_wan, token_positions
from tiny import make_model, randomise
from torch import Tensor, nn

from dsa_rt import reference
from dsa_rt.engine import Engine, Sizes
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.plan import TokenGrid
from dsa_rt.recording import Recorded
from dsa_rt.sampler.rollout import DenoisedChunk, Rollout, advance
from dsa_rt.schedule import few_step_sigmas

GRID = TokenGrid(2, 3)
CHUNK, CHUNKS = 2, 4
SIGMAS = few_step_sigmas((1000.0, 750.0, 500.0, 250.0), 5.0)


class ScriptedDecider:
    """So many passes for each chunk; remembers what it was asked and told."""

    def __init__(self, passes: Sequence[int], judged: set[tuple[int, int]] | None = None) -> None:
        self.passes, self.judged = passes, judged or set()
        self.threshold: float | None = None
        self.calls: list[tuple[int, int, float | None]] = []

    def wants_confidence(self, chunk: int, passes: int) -> bool:
        return (chunk, passes) in self.judged

    def another_pass(self, chunk: int, passes: int, confidence: float | None) -> bool:
        self.calls.append((chunk, passes, confidence))
        self.threshold = 0.25 * passes if confidence is not None else None
        return passes < self.passes[chunk]


def eager(device: torch.device, function: Callable[[], None], *, pool: object = None) -> Recorded:
    function()
    return Recorded("eager", function, function)


@dataclass
class Call:
    """What the model was called with: rows [A, P], the level of each, segments, and taps."""

    rows: Tensor
    levels: list[int]
    segments: list[list[int]]
    taps: tuple[int, ...]


class Clip:
    """A rollout over a small random model, its K/V poisoned, and every call of that model."""

    def __init__(
        self, decider: ScriptedDecider, seed: int, window: int = CHUNK * CHUNKS, sink: int = 0,
        head: ConfidenceHead | None = None, spare: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.calls = make_model(1), list[Call]()
        if head is not None:
            head.prepare()
        sizes = Sizes(GRID, CHUNK, window, sink, window + spare, tuple(SIGMAS))
        engine = Engine(self.model, head, sizes, torch.device("cpu"), eager)
        (lane,) = engine.lanes()
        engine.warm_up([lane], CHUNKS, judged=True)
        for buffer in (*engine.cache.k, *engine.cache.v, engine.rows, engine.clean):
            buffer.fill_(torch.nan)
        self.text = torch.randn(1, 7, 20)
        engine.read_prompt(lane, self.text)
        self.rollout = Rollout(lane, decider, seed)  # type: ignore[arg-type]
        self.model.register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, given: tuple) -> None:
        rows, active, _, _, _, taps, _ = given
        self.calls.append(Call(rows[0].clone(), active.modulation_rows.tolist(), active.segments.tolist(), tuple(taps)))

    def chunk(self, check: Callable[[], None] = lambda: None) -> DenoisedChunk:
        done = None
        while done is None:
            check()
            (done,) = advance([self.rollout])
        return replace(done, x0=done.x0.clone())

    def run(self, chunks: int = CHUNKS) -> list[DenoisedChunk]:
        return [self.chunk() for _ in range(chunks)]


@pytest.mark.parametrize("spare", [0, CHUNK])
@pytest.mark.parametrize(("window", "sink"), [(8, 0), (5, 1), (3, 0), (4, 2), (2, 0)])
@pytest.mark.parametrize("passes", [(4, 4, 4, 4), (4, 1, 2, 3), (1, 1, 1, 1)])
def test_clip_equals_fp64_without_a_cache(window: int, sink: int, passes: tuple[int, ...], spare: int) -> None:
    """The whole clip, noise draws included, from the plain model under a mask: no cache, no active set, no ops. With
    room for a chunk more, and wherever nothing is evicted, context passes run with the next chunk's first."""
    made = Clip(ScriptedDecider(passes), seed=-7, window=window, sink=sink, spare=spare)
    state, tokens, seeds, text = made.model.state_dict(), GRID.tokens, torch.tensor([-7]), made.text
    frames = CHUNK * CHUNKS
    frame_of = torch.arange(frames * tokens) // tokens
    positions = token_positions(list(range(frames)), GRID.height, GRID.width)
    sees, kept = torch.zeros(frames, frames, dtype=torch.bool), []
    clean = torch.empty(1, 0, 12, dtype=torch.float64)
    for chunk, done in enumerate(made.run()):
        span = range(chunk * CHUNK, (chunk + 1) * CHUNK)
        kept = [*kept, *span]
        while len(kept) > window:
            del kept[sink]
        for frame in span:
            sees[frame, kept] = True
        seen = span.stop * tokens
        mask = sees[frame_of[:seen]][:, frame_of[:seen]]
        own = torch.arange(seen - CHUNK * tokens, seen)
        x = reference.philox_normal(seeds, own, 12, 0).double()
        for number in range(1, passes[chunk] + 1):
            sigma = SIGMAS[number - 1]
            timesteps = torch.zeros(1, seen)
            timesteps[:, own] = 1000 * sigma
            velocity, _ = plain_wan(state, 2, torch.cat([clean, x], 1), positions[:seen], timesteps, text, mask)
            x0 = x - sigma * velocity[:, own]
            if number < passes[chunk]:
                fresh = reference.philox_normal(seeds, own, 12, number).double()
                x = (1 - SIGMAS[number]) * x0 + SIGMAS[number] * fresh
        assert done.passes == passes[chunk] and done.frames == span and done.index == chunk
        assert (done.x0 - x0).abs().max() < 5e-4 * x0.abs().max()
        clean = torch.cat([clean, x0], 1)
    joint = sum(len(call.segments) == 2 for call in made.calls)
    assert joint == (CHUNKS - 1 if spare else sum((chunk + 1) * CHUNK <= window for chunk in range(1, CHUNKS)))
    assert len(made.calls) == sum(passes) + CHUNKS - 1 - joint


def test_passes_are_the_scripted_ones() -> None:
    """Which model calls run, at which timesteps, with which taps; the context pass gets the clean rows."""
    head = ConfidenceHead(ConfidenceConfig(48, 2, 64, (1,)))
    randomise(head, 2)
    passes, judged = (3, 1, 4, 2), {(0, 1), (0, 3), (2, 2), (3, 1)}
    decider = ScriptedDecider(passes, judged)
    made = Clip(decider, seed=5, head=head)
    reported: list[tuple[int, float | None]] = []
    contexts: list[int] = []
    chunks = []
    for _ in passes:
        chunks.append(made.chunk())
        made.rollout.tell(lambda done, c: reported.append((done, c)), contexts.append)
    assert contexts == [0, 1, 2] and [done.contexts for done in chunks] == [0, 1, 1, 1]
    expected = [(chunk, number) for chunk, count in enumerate(passes) for number in range(1, count + 1)]
    assert len(made.calls) == len(expected)
    for (chunk, number), call in zip(expected, made.calls, strict=True):
        levels = {"own": [number - 1] * CHUNK * GRID.tokens, "context": [len(SIGMAS)] * CHUNK * GRID.tokens}
        if number > 1 or not chunk:
            assert call.levels == levels["own"]
        else:
            first, second = ("own", "context") if chunk % 2 == 0 else ("context", "own")
            assert call.levels == levels[first] + levels[second]
            clean = call.rows.chunk(2)[(chunk + 1) % 2]
            assert torch.equal(clean, chunks[chunk - 1].x0[0])
        assert call.taps == ((1,) if (chunk, number) in judged else ())
    asked = [(chunk, number) for chunk, number in expected if number]
    assert [(chunk, number) for chunk, number, _ in decider.calls] == asked
    for chunk, number, confidence in decider.calls:
        assert (confidence is not None) == ((chunk, number) in judged)
        assert confidence == chunks[chunk].confidences[number - 1]
        assert confidence is None or 0 < confidence < 1
    assert reported == [(number, confidence) for _, number, confidence in decider.calls]
    # The threshold a chunk reports is the one its first judged pass met.
    assert [done.threshold for done in chunks] == [0.25, None, 0.5, 0.25]


def test_noise_depends_on_seed_token_and_draw_alone() -> None:
    """What a chunk starts from does not depend on what earlier chunks were given."""
    passes = (1, 4, 1, 3)
    first, position = Clip(ScriptedDecider(passes), seed=9), 0
    first.run()
    for chunk, count in enumerate(passes):
        call = first.calls[position]
        rows = call.rows if not chunk else call.rows.chunk(2)[chunk % 2]
        own = torch.arange(chunk * CHUNK * GRID.tokens, (chunk + 1) * CHUNK * GRID.tokens)
        assert torch.equal(rows, reference.philox_normal(torch.tensor([9]), own, 12, 0)[0])
        position += count
    others = []
    for seed in (9, 10, 9 + 2**32):
        torch.manual_seed(0)
        others.append(Clip(ScriptedDecider((1, 1, 1, 1)), seed=seed).run(1)[0].x0)
    assert not torch.equal(others[0], others[1]) and not torch.equal(others[0], others[2])


def test_confidence_is_the_heads() -> None:
    """The number the decider hears is the sigmoid of the head's logit on the taps of that pass, as the head's plain
    form has it."""
    head = ConfidenceHead(ConfidenceConfig(48, 2, 64, (0, 1)))
    randomise(head, 2, spread=2.0)
    decider = ScriptedDecider((2, 1, 3, 1), {(c, p) for c in range(4) for p in range(1, 4)})
    made = Clip(decider, seed=1, head=head)
    logits: list[float] = []
    engine = made.rollout.lane.engine
    judge = engine.judge

    def noting(taps: Sequence[Tensor]) -> float:
        logits.append(float(head(list(taps))))
        return judge(taps)

    engine.judge = noting  # type: ignore[method-assign]
    made.run()
    heard = [confidence for _, _, confidence in decider.calls]
    assert len(logits) == len(heard) == 7
    for logit, confidence in zip(logits, heard, strict=True):
        assert confidence == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)
    assert len(set(heard)) == 7


def test_a_judged_clip_is_the_unjudged_one() -> None:
    """Asking the head changes no sample."""
    head = ConfidenceHead(ConfidenceConfig(48, 2, 64, (0, 1)))
    passes, everything = (2, 4, 1, 3), {(c, p) for c in range(4) for p in range(1, 5)}
    torch.manual_seed(0)
    judged = Clip(ScriptedDecider(passes, everything), seed=1, head=head).run()
    torch.manual_seed(0)
    plain = Clip(ScriptedDecider(passes), seed=1).run()
    assert all(torch.equal(a.x0, b.x0) for a, b in zip(judged, plain, strict=True))


def test_check_runs_before_every_pass_and_stops() -> None:
    """A check that raises before the n-th model call leaves n - 1 calls."""
    for allowed in range(7):
        made = Clip(ScriptedDecider((3, 2, 1, 1)), seed=1)
        left = [allowed]

        def check(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            for _ in range(4):
                made.chunk(check)
        assert len(made.calls) == allowed
