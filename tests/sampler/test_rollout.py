"""The autoregressive loop under scripted decisions: which passes run, on what, and the clip in fp64 without a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from plain_wan import plain_wan, token_positions
from tiny import make_model, randomise
from torch import Tensor, nn

from dsa_rt import reference
from dsa_rt.cache import KVCache
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import TokenGrid
from dsa_rt.sampler.passes import ChunkPasses
from dsa_rt.sampler.rollout import DenoisedChunk, Rollout
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


class Recorder(nn.Module):
    """A model that notes what it is called with."""

    def __init__(self, model: WanModel) -> None:
        super().__init__()
        self.model, self.config, self.calls = model, model.config, []

    def forward(self, rows: Tensor, active: object, timesteps: Tensor, *rest: object) -> object:
        self.calls.append((rows.clone(), timesteps.clone(), rest[2] if len(rest) > 2 else ()))
        return self.model(rows, active, timesteps, *rest)


def start(
    decider: ScriptedDecider, seed: int, window: int = CHUNK * CHUNKS, sink: int = 0, head: ConfidenceHead | None = None
) -> tuple[Rollout, Recorder, Tensor]:
    model = Recorder(make_model(1))
    cache = KVCache(
        layers=2, batch=1, window=window, sink=sink, tokens_per_frame=GRID.tokens, heads=2, head_dim=24,
        dtype=torch.float32,
    )  # fmt: skip
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    text = torch.randn(1, 7, 20)
    passes = ChunkPasses(model, GRID, model.model.embed_text(text), cache)  # type: ignore[arg-type]
    return Rollout(passes, head, SIGMAS, decider, seed, CHUNK), model, text  # type: ignore[arg-type]


def run(rollout: Rollout, chunks: int = CHUNKS) -> list[DenoisedChunk]:
    return [rollout.next_chunk(lambda *_: None, lambda: None) for _ in range(chunks)]


@pytest.mark.parametrize(("window", "sink"), [(8, 0), (5, 1), (3, 0), (4, 2)])
@pytest.mark.parametrize("passes", [(4, 4, 4, 4), (4, 1, 2, 3), (1, 1, 1, 1)])
def test_clip_equals_fp64_without_a_cache(window: int, sink: int, passes: tuple[int, ...]) -> None:
    """The whole clip, noise draws included, from the plain model under a mask: no cache, no active set, no ops."""
    rollout, _, text = start(ScriptedDecider(passes), seed=-7, window=window, sink=sink)
    state, tokens, seeds = rollout.passes.model.model.state_dict(), GRID.tokens, torch.tensor([-7])
    frames = CHUNK * CHUNKS
    frame_of = torch.arange(frames * tokens) // tokens
    positions = token_positions(list(range(frames)), GRID.height, GRID.width)
    sees, kept = torch.zeros(frames, frames, dtype=torch.bool), []
    clean = torch.empty(1, 0, 12, dtype=torch.float64)
    for chunk, done in enumerate(run(rollout)):
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


def test_passes_are_the_scripted_ones() -> None:
    """Which model calls run, at which timesteps, with which taps; the context pass gets the clean rows."""
    head = ConfidenceHead(ConfidenceConfig(48, 2, 64, (1,)))
    randomise(head, 2)
    passes, judged = (3, 1, 4, 2), {(0, 1), (0, 3), (2, 2), (3, 1)}
    decider = ScriptedDecider(passes, judged)
    rollout, model, _ = start(decider, seed=5, head=head)
    reported: list[tuple[int, float | None]] = []
    chunks = [rollout.next_chunk(lambda done, c: reported.append((done, c)), lambda: None) for _ in passes]
    expected = [(chunk, number) for chunk, count in enumerate(passes) for number in (*range(1, count + 1), 0)]
    assert len(model.calls) == len(expected) == sum(passes) + len(passes)
    for (chunk, number), (rows, timesteps, taps) in zip(expected, model.calls, strict=True):
        level = SIGMAS[number - 1] if number else 0.0
        assert timesteps.shape == (1, CHUNK) and torch.equal(timesteps, torch.full((1, CHUNK), 1000 * level))
        assert tuple(taps) == ((1,) if (chunk, number) in judged else ())
        if number == 0:
            assert torch.equal(rows, chunks[chunk].x0)
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
    first, model, _ = start(ScriptedDecider((1, 4, 1, 3)), seed=9)
    run(first)
    starts = {}
    position = 0
    for chunk, count in enumerate((1, 4, 1, 3)):
        starts[chunk] = model.calls[position][0]
        position += count + 1
    for chunk, rows in starts.items():
        own = torch.arange(chunk * CHUNK * GRID.tokens, (chunk + 1) * CHUNK * GRID.tokens)
        assert torch.equal(rows, reference.philox_normal(torch.tensor([9]), own, 12, 0))
    others = [start(ScriptedDecider((1, 1, 1, 1)), seed=s)[0] for s in (9, 10, 9 + 2**32)]
    same, other, far = (run(rollout, 1)[0].x0 for rollout in others)
    assert not torch.equal(same, other) and not torch.equal(same, far)


def test_confidence_is_the_heads() -> None:
    """The number the decider hears is the sigmoid of the head's logit on the taps of that pass."""
    head = ConfidenceHead(ConfidenceConfig(48, 2, 64, (0, 1)))
    randomise(head, 2, spread=2.0)
    decider = ScriptedDecider((2, 1, 3, 1), {(c, p) for c in range(4) for p in range(1, 4)})
    rollout, _, _ = start(decider, seed=1, head=head)
    logits: list[float] = []
    head.register_forward_hook(lambda _, __, logit: logits.append(float(logit)))
    run(rollout)
    heard = [confidence for _, _, confidence in decider.calls]
    assert len(logits) == len(heard) == 7
    for logit, confidence in zip(logits, heard, strict=True):
        assert confidence == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-7)
    assert len(set(heard)) == 7


def test_a_judged_clip_is_the_unjudged_one() -> None:
    """Asking the head changes no sample."""
    head = ConfidenceHead(ConfidenceConfig(48, 2, 64, (0, 1)))
    passes, everything = (2, 4, 1, 3), {(c, p) for c in range(4) for p in range(1, 5)}
    torch.manual_seed(0)
    judged = run(start(ScriptedDecider(passes, everything), seed=1, head=head)[0])
    torch.manual_seed(0)
    plain = run(start(ScriptedDecider(passes), seed=1)[0])
    assert all(torch.equal(a.x0, b.x0) for a, b in zip(judged, plain, strict=True))


def test_check_runs_before_every_pass_and_stops() -> None:
    """A check that raises before the n-th model call leaves n - 1 calls."""
    for allowed in range(7):
        rollout, model, _ = start(ScriptedDecider((3, 2, 1, 1)), seed=1)
        left = [allowed]

        def check(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            for _ in range(4):
                rollout.next_chunk(lambda *_: None, check)
        assert len(model.calls) == allowed
