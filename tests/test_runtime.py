"""One seed, one result: eager, compiled, streamed, in sessions, side by side; and statistics that add up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from allocations import replayed
from torch import Tensor, nn

from dsa_rt import reference
from dsa_rt.cache import KVCache
from dsa_rt.generate import Generate
from dsa_rt.media import Video
from dsa_rt.models.confidence import ConfidenceConfig
from dsa_rt.ops.layers import packed_bytes
from dsa_rt.plan import frame_tokens
from dsa_rt.policy import Decider, Policy
from dsa_rt.runtime import Runtime, load
from dsa_rt.schedule import euler_sigmas, few_step_sigmas
from dsa_rt.settings import preview
from dsa_rt.stats import Stats

PROMPT, OTHER = "a red square bouncing", "a blue circle at rest on a striped ground"
SIGMAS = few_step_sigmas((1000.0, 750.0, 500.0, 250.0), 5.0)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def runtime(request: pytest.FixtureRequest, causal_bundle: Path) -> Runtime:
    return load(causal_bundle, dtype=request.param)


def clip(generate: Generate, prompt: str = PROMPT, seed: int = 0) -> Video:
    video = generate(prompt, seed)
    assert isinstance(video, Video)
    return video


def same(a: Video, b: Video) -> bool:
    assert a.latents is not None and b.latents is not None
    return torch.equal(a.frames, b.frames) and torch.equal(a.latents, b.latents)


def to_pixels(runtime: Runtime, latents: Tensor) -> Tensor:
    decoded = runtime.codec.decode(latents)[0].float()
    return ((decoded + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def eager(
    runtime: Runtime, passes: Sequence[int], seed: int, window: int = 9, sink: int = 0
) -> tuple[Tensor, Tensor]:
    """The loop of Algorithm 1 for given passes, written out: model, reference ops, one decode at the end. Each pass
    alone and unrecorded, over a cache of its own; the context pass of the last chunk too."""
    model, seeds = runtime.model, torch.tensor([seed])
    grid = runtime.compile(policy="dense").settings.grid
    text = model.embed_text(runtime.text_encoder.encode([PROMPT]))
    cache = KVCache(
        layers=2, batch=1, window=window, sink=sink, tokens_per_frame=6, heads=2, head_dim=24, dtype=runtime.dtype
    )
    tables = model.modulation(torch.tensor([[1000 * sigma for sigma in (*SIGMAS, 0.0)]]))
    clean = []

    def run(rows: Tensor, level: int) -> Tensor:
        levels = torch.full_like(active.modulation_rows, level)
        return model(rows, dataclasses.replace(active, modulation_rows=levels), tables, text, cache).velocity.float()

    for chunk, count in enumerate(passes):
        span = range(3 * chunk, 3 * chunk + 3)
        active = frame_tokens(grid, span, 24, per_frame=True, slots=cache.slots(span), valid=cache.valid(span.stop))
        x = reference.philox_normal(seeds, active.tokens, 16, 0)
        for number in range(1, count + 1):
            sigma, following = SIGMAS[number - 1], SIGMAS[number] if number < count else 0.0
            x, x0 = reference.renoise(x, run(x, number - 1), sigma, following, seeds, active.tokens, number)
        run(x0, len(SIGMAS))
        clean.append(grid.unpatchify(x0))
    latents = torch.cat(clean, 2)
    return to_pixels(runtime, latents), latents[0]


@pytest.mark.parametrize(
    ("policy", "passes"),
    [("dense", (4, 4, 4)), ("fixed-1", (1, 1, 1)), ("fixed-3", (3, 3, 3)), ("fixed-4-then-1", (4, 1, 1)),
     ("fixed-1-then-all", (1, 4, 4)), ("fixed-2-then-3", (2, 3, 3))],
)  # fmt: skip
def test_compiled_equals_eager(runtime: Runtime, policy: str, passes: tuple[int, ...]) -> None:
    video = clip(runtime.compile(policy=policy), seed=21)
    frames, latents = eager(runtime, passes, 21)
    assert video.latents is not None and torch.equal(video.latents, latents)
    assert torch.equal(video.frames, frames)
    assert video.stats is not None and tuple(c.passes for c in video.stats.chunks) == passes
    assert frames.float().std() > 20  # a picture, in which a difference would show


@pytest.mark.parametrize(("window", "sink"), [(6, 0), (5, 1), (3, 0)])
def test_compiled_window_equals_eager(runtime: Runtime, window: int, sink: int) -> None:
    """Up to the order of keys in sums: the compiled cache has room for a chunk more, and other places."""
    video = clip(runtime.compile(policy="fixed-2", window=window, sink=sink), seed=3)
    assert video.latents is not None
    bound = 1e-5 if runtime.dtype == torch.float32 else 0.05
    torch.testing.assert_close(video.latents, eager(runtime, (2, 2, 2), 3, window, sink)[1], rtol=bound, atol=bound)
    assert not torch.equal(video.latents, eager(runtime, (2, 2, 2), 3)[1])


@pytest.mark.parametrize("policy", ["dense", "dsa-paper", "dsa-paper-retest"])
def test_call_stream_and_session_are_bit_identical(runtime: Runtime, policy: str) -> None:
    generate = runtime.compile(policy=policy)
    once = clip(generate, seed=8)
    assert same(once, clip(generate, seed=8)) and same(once, clip(runtime.compile(policy=policy), seed=8))
    for chunks in (list(generate.stream(PROMPT, 8)), list(generate.session(PROMPT, 8))):
        assert torch.equal(torch.cat([c.frames for c in chunks]), once.frames)
        assert torch.equal(torch.cat([c.latents for c in chunks], 1), once.latents)
        assert [c.index for c in chunks] == [0, 1, 2] and [len(c.frames) for c in chunks] == [9, 12, 12]
        assert once.stats is not None
        assert [c.confidences for c in chunks] == [c.confidences for c in once.stats.chunks]
    assert not same(once, clip(generate, seed=9)) and not same(once, clip(generate, OTHER, 8))


def test_list_of_prompts_equals_single_ones(runtime: Runtime) -> None:
    generate = runtime.compile(policy="dsa-paper")
    videos = generate([PROMPT, OTHER, PROMPT], 5)
    assert isinstance(videos, list) and len(videos) == 3
    for number, (video, prompt) in enumerate(zip(videos, (PROMPT, OTHER, PROMPT), strict=True)):
        assert same(video, clip(generate, prompt, 5 + number))
    chosen = generate((OTHER, PROMPT), (2**63 - 1, -9))
    assert same(chosen[0], clip(generate, OTHER, 2**63 - 1)) and same(chosen[1], clip(generate, PROMPT, -9))
    assert generate([]) == []


def test_interleaved_sessions_are_as_alone(runtime: Runtime) -> None:
    dsa, dense = runtime.compile(policy="dsa-paper"), runtime.compile(policy="dense", window=5, sink=1)
    asked: list[tuple[Generate, str, int]] = [(dsa, PROMPT, 1), (dense, OTHER, 1), (dsa, OTHER, 2), (dense, PROMPT, 1)]
    alone = [[c.frames for c in g.stream(p, s)] for g, p, s in asked]
    sessions = [g.session(p, s) for g, p, s in asked]
    for index in range(3):
        for number in (2, 0, 3, 1):
            assert torch.equal(sessions[number].next_chunk().frames, alone[number][index])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_as_alone(causal_bundle: Path, threads: int) -> None:
    """Sessions of one function and of two runtimes, all at once, while others run: the bits of a single one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = load(causal_bundle, dtype="fp32"), load(causal_bundle, dtype="bf16")
        functions = [first.compile(policy="dsa-paper"), second.compile(policy="fixed-2")]
        asked = [(g, p, s) for g in functions for p, s in ((PROMPT, 1), (OTHER, 2))][:: threads]
        alone = [clip(*a) for a in asked]
        together: list[list[Video]] = [[] for _ in asked]
        gate = threading.Barrier(len(asked))

        def work(number: int) -> None:
            gate.wait(30)
            for _ in range(2):
                together[number].append(clip(*asked[number]))

        workers = [threading.Thread(target=work, args=(number,)) for number in range(len(asked))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [len(videos) for videos in together] == [2] * len(asked)
        assert all(same(video, one) for one, videos in zip(alone, together, strict=True) for video in videos)
    finally:
        torch.set_num_threads(before)


# Policies


@dataclass(frozen=True)
class Scripted(Policy):
    """Passes per chunk as written down; asks the head after every pass if told to."""

    passes: tuple[int, ...]
    judged: bool = True

    @property
    def name(self) -> str:
        return "scripted"

    def begin(self, passes_max: int, chunks: int | None, *_: object, **__: object) -> Decider:
        return ScriptedDecider(passes_max, self)


class ScriptedDecider(Decider):
    def __init__(self, passes_max: int, policy: Scripted) -> None:
        super().__init__(passes_max)
        self.policy = policy

    def wants_confidence(self, chunk: int, passes: int) -> bool:
        return self.policy.judged

    def _another_pass(self, chunk: int, passes: int, confidence: float | None) -> bool:
        return passes < self.policy.passes[chunk]


def test_every_chunk_refined_is_dense(runtime: Runtime) -> None:
    """DSA that refines everywhere has the bits of the dense policy, though the head ran after every pass."""
    dense = clip(runtime.compile(policy="dense"), seed=2)
    refined = clip(runtime.compile(policy=Scripted((4, 4, 4))), seed=2)
    assert same(dense, refined)
    assert refined.stats is not None and dense.stats is not None
    assert all(c.confidences == (None,) * 4 for c in dense.stats.chunks)
    assert all(None not in c.confidences and len(c.confidences) == 4 for c in refined.stats.chunks)


@pytest.mark.parametrize("passes", [(1, 4, 2), (3, 1, 1)])
def test_scripted_passes_equal_eager(runtime: Runtime, passes: tuple[int, ...]) -> None:
    for judged in (True, False):
        video = clip(runtime.compile(policy=Scripted(passes, judged)), seed=13)
        assert video.latents is not None and torch.equal(video.latents, eager(runtime, passes, 13)[1])


class ScriptedHead(nn.Module):
    """A head that says what it is told, one logit a call."""

    def __init__(self, confidences: Sequence[float]) -> None:
        super().__init__()
        self.config = ConfidenceConfig(48, 2, 8, (0, 1))
        self.confidences, self.calls = list(confidences), 0

    def judge(self, taps: list[Tensor], arena: object) -> Tensor:
        assert len(taps) == 2 and all(tap.shape == (1, 18, 48) for tap in taps)
        confidence = torch.tensor([self.confidences[self.calls % len(self.confidences)]], dtype=torch.float64)
        self.calls += 1
        return confidence.logit().float()


@pytest.mark.parametrize("trial", range(6))
def test_papers_rule_through_the_face(causal: Runtime, trial: int) -> None:
    """Algorithm 1, line by line, on scripted confidences: passes, what was heard, the threshold, and the samples."""
    said = (0.05 + 0.9 * torch.rand(6, generator=torch.Generator().manual_seed(trial))).tolist()
    said = [round(value, 3) for value in said]
    heard = iter(said)
    previous, expected = 1.0, []
    for _ in range(3):
        threshold = previous
        first = last = next(heard)
        passes = 1
        if first < previous:
            passes = 4
            last = next(heard)  # the head is asked again on the last pass
        previous = last
        expected.append((passes, first, last, threshold))
    head = ScriptedHead(said)
    generate = dataclasses.replace(causal, head=head).compile(policy="dsa-paper")  # type: ignore[arg-type]
    head.calls = 0
    video = clip(generate, seed=trial)
    assert video.stats is not None and video.latents is not None
    for chunk, (passes, first, last, threshold) in zip(video.stats.chunks, expected, strict=True):
        assert chunk.passes == passes and chunk.refined == (passes > 1)
        assert chunk.first_confidence == pytest.approx(first, abs=1e-6)
        assert chunk.last_confidence == pytest.approx(last, abs=1e-6)
        assert chunk.threshold == pytest.approx(threshold, abs=1e-6)
        assert [c is not None for c in chunk.confidences] == ([True] if passes == 1 else [True, False, False, True])
    assert head.calls == sum(1 if passes == 1 else 2 for passes, *_ in expected)
    counts = [passes for passes, *_ in expected]
    assert torch.equal(video.latents, eager(causal, counts, trial)[1])


def test_default_policy(causal: Runtime, headless: Runtime, many_step: Runtime) -> None:
    assert causal.compile().policy.name == "dsa"
    assert headless.compile().policy.name == "dense" and many_step.compile().policy.name == "dense"


# Statistics


@pytest.mark.parametrize("policy", ["dense", "dsa-paper", "fixed-2"])
def test_statistics_add_up(runtime: Runtime, policy: str) -> None:
    generate = runtime.compile(policy=policy)
    video = clip(generate, seed=4)
    stats = video.stats
    assert stats is not None and video.latents is not None
    assert video.frames.dtype == torch.uint8 and video.frames.shape == (33, 48, 32, 3)
    assert video.latents.shape == (4, 9, 6, 4) and video.latents.dtype == torch.float32
    assert stats.frames == 33 and [c.frames for c in stats.chunks] == [9, 12, 12]
    assert stats.frames_sha256 == hashlib.sha256(video.frames.numpy().tobytes()).hexdigest()
    assert stats.passes == sum(c.passes for c in stats.chunks) and stats.passes_scheduled == 12
    assert stats.model_calls == stats.passes + 2 and stats.model_calls_scheduled == 14  # none after the last chunk
    for chunk in stats.chunks:
        assert chunk.tokens == 18 and chunk.active_tokens == (18,) * chunk.passes
        assert len(chunk.confidences) == chunk.passes and chunk.calls_per_pass == 1
        assert chunk.context_passes == min(chunk.index, 1) and (chunk.context_ms > 0) == (chunk.index > 0)
        assert min(chunk.denoise_ms, chunk.decode_ms) > 0
    parts = stats.text_ms + stats.denoise_ms + stats.context_ms + stats.decode_ms
    assert stats.total_ms >= parts > 0
    first = stats.chunks[0]
    assert stats.time_to_first_frame_ms is not None
    assert stats.total_ms > stats.time_to_first_frame_ms
    assert stats.time_to_first_frame_ms >= stats.text_ms + first.denoise_ms + first.context_ms + first.decode_ms
    assert (stats.prompt, stats.seed, stats.policy) == (PROMPT, 4, policy)
    assert (stats.height, stats.width, stats.video_fps, stats.bundle, stats.device) == (48, 32, 16.0, "tiny", "cpu")
    assert stats.dtype == str(runtime.dtype).removeprefix("torch.")
    assert stats.planned_memory_bytes == generate.plan.total > 0
    assert stats.settings["sigmas"] == pytest.approx([1, 0.9375, 5 / 6, 0.625])
    assert stats.settings["window"] == 9 and stats.settings["sink"] == 0
    back = Stats.from_dict(json.loads(json.dumps(stats.to_dict())))
    assert back.frames_sha256 == stats.frames_sha256 and back.chunks == stats.chunks


def test_statistics_of_a_many_step_clip(many_step: Runtime) -> None:
    for guidance, calls in ((2.5, 2), (1.0, 1)):
        video = clip(many_step.compile(steps=5, guidance_scale=guidance))
        assert video.stats is not None
        (chunk,) = video.stats.chunks
        assert (chunk.passes, chunk.passes_scheduled, chunk.calls_per_pass, chunk.context_passes) == (5, 5, calls, 0)
        assert video.stats.model_calls == 5 * calls and chunk.tokens == 54 and chunk.active_tokens == (54,) * 5
        assert chunk.frames == video.stats.frames == 33


@pytest.mark.parametrize(("guidance", "steps"), [(None, None), (1.0, 2), (4.0, 6)])
def test_many_step_equals_eager(many_step: Runtime, guidance: float | None, steps: int | None) -> None:
    """A plain Euler loop with classifier-free guidance; the defaults are the bundle's (3 steps, 2.5)."""
    generate = many_step.compile(steps=steps, guidance_scale=guidance)
    video = clip(generate, seed=17)
    scale, model = 2.5 if guidance is None else guidance, many_step.model
    text, empty = (model.embed_text(many_step.text_encoder.encode([p])) for p in (PROMPT, ""))
    active = frame_tokens(generate.settings.grid, range(9), 24, per_frame=False)
    x = reference.philox_normal(torch.tensor([17]), active.tokens, 16, 0)
    sigmas = euler_sigmas(steps or 3, 5.0)
    for sigma, following in pairwise(sigmas):
        velocity = model(x, active, torch.full((1, 1), 1000 * sigma), text).velocity
        if scale != 1.0:
            without = model(x, active, torch.full((1, 1), 1000 * sigma), empty).velocity
            velocity = without + scale * (velocity - without)
        x = x + (following - sigma) * velocity
    latents = generate.settings.grid.unpatchify(x)
    assert video.latents is not None and torch.equal(video.latents, latents[0])
    assert torch.equal(video.frames, to_pixels(many_step, latents))
    assert torch.equal(torch.cat([c.frames for c in generate.stream(PROMPT, 17)]), video.frames)


# Sizes and the plan


@pytest.mark.parametrize(("height", "width", "frames"), [(16, 64, 9), (80, 16, 21), (32, 48, 45)])
def test_other_sizes(causal: Runtime, height: int, width: int, frames: int) -> None:
    video = clip(causal.compile(height, width, frames, policy="fixed-1"))
    assert video.frames.shape == (frames, height, width, 3)
    assert video.latents is not None and video.latents.shape == (4, (frames + 3) // 4, height // 8, width // 8)
    assert video.stats is not None and len(video.stats.chunks) == (frames + 3) // 12


def test_longer_clips_take_the_window_of_the_bundle(causal: Runtime) -> None:
    """The default window is the clip, up to what the generator was trained for."""
    assert causal.compile(frames=21, policy="fixed-1").settings.window == 6
    long = causal.compile(frames=81, policy="fixed-1")
    assert (long.settings.window, long.settings.sink, long.settings.chunks) == (9, 0, 7)
    assert clip(long).stats.settings["window"] == 9  # type: ignore[union-attr]


def test_the_plan_counts_what_is_there(runtime: Runtime) -> None:
    """Weights and caches are exactly what is allocated; a smaller window takes less."""
    plan = runtime.compile(policy="dense").plan
    modules = (runtime.model, runtime.head, runtime.codec, runtime.text_encoder)
    held = [(packed_bytes(m), *(p.nbytes for p in (*m.parameters(), *m.buffers()))) for m in modules if m]
    assert plan.weights == sum(map(sum, held)) and held[0][0] > sum(held[0][1:]) / 2  # packed beside the parameters
    session = runtime.compile(policy="dense").session(PROMPT)
    engine = session.rollout.lane.engine
    text = sum(t.nbytes for pair in engine.text.layers for t in pair)
    assert plan.kv_cache == sum(t.nbytes for t in (*engine.cache.k, *engine.cache.v)) + text
    least = plan.weights + plan.kv_cache + plan.output
    assert least + plan.activations < plan.total <= least + plan.activations + plan.decode
    smaller = runtime.compile(policy="dense", window=3).plan
    # Three frames, and three more for a chunk that runs with the one before it, in place of nine.
    assert smaller.kv_cache - text == (plan.kv_cache - text) * 2 / 3 and smaller.weights == plan.weights
    assert runtime.compile(policy="dense", frames=21).plan.output < plan.output
    assert 3 < runtime.compile(96, 64, policy="dense").plan.activations / plan.activations < 4


def test_weights_are_shared_and_unchanged(causal: Runtime) -> None:
    def digest() -> str:
        state: Iterator[Tensor] = iter(causal.model.state_dict().values())
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in state)).hexdigest()

    before, place = digest(), causal.model.head.head.weight.data_ptr()
    functions: list[Callable[..., object]] = [causal.compile(policy="dsa-paper"), causal.compile(policy="dense")]
    for function in functions:
        function(PROMPT)
    assert digest() == before and causal.model.head.head.weight.data_ptr() == place
    assert not any(p.requires_grad for p in causal.model.parameters())


def test_dtype_auto_is_one_the_machine_multiplies(causal_bundle: Path) -> None:
    assert load(causal_bundle).dtype in (torch.float32, torch.bfloat16)
    assert load(causal_bundle, dtype="fp16").dtype == torch.float16


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_dtype_runs_on_native_ops(causal_bundle: Path, many_step: Runtime, dtype: str) -> None:
    """Passes are programs, a stream has the bits of a call, and what is planned from a bundle alone is what is held."""
    few, many = (load(bundle, dtype=dtype) for bundle in (causal_bundle, many_step.bundle.path))
    generate = few.compile(policy="dsa-paper")
    engine = generate.session(PROMPT).rollout.lane.engine
    if replayed(few.dtype):
        assert {recorded.kind for recorded, _ in engine.passes.values()} == {"program"}
    video = generate(PROMPT, 3)
    assert video.latents is not None and video.latents.isfinite().all()
    assert torch.equal(torch.cat([chunk.frames for chunk in generate.stream(PROMPT, 3)]), video.frames)
    planned = preview(many.bundle, "dense", dtype=many.dtype).memory
    compiled = many.compile(policy="dense").plan
    assert (planned.weights, planned.total) == (compiled.weights, compiled.total)
