"""The compiled function on a CUDA device: graphs, no allocation and no wait within a chunk, the samples of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsa_rt.generate import Generate
from dsa_rt.media import Video
from dsa_rt.runtime import Runtime, load
from dsa_rt.sampler.rollout import advance

PROMPTS = ("a red square bouncing", "a blue circle at rest on a striped ground")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none"),
]


@pytest.fixture(scope="module")
def runtime(causal_bundle: Path) -> Runtime:
    return load(causal_bundle, "cuda", "fp32")


@pytest.fixture(scope="module")
def whole(many_step: Runtime) -> Runtime:
    return load(many_step.bundle.path, "cuda", "fp32")


def alike(here: Generate, there: Generate) -> None:
    """The samples of the CPU, and the same bits again."""
    for seed, prompt in enumerate(PROMPTS):
        made, expected = here(prompt, seed), there(prompt, seed)
        assert isinstance(made, Video) and isinstance(expected, Video)
        assert made.latents is not None and expected.latents is not None
        torch.testing.assert_close(made.latents.cpu(), expected.latents, rtol=1e-3, atol=1e-3)
        again = here(prompt, seed)
        assert isinstance(again, Video) and torch.equal(again.frames, made.frames)


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 5, "sink": 1}])
def test_samples_are_those_of_the_cpu(runtime: Runtime, causal: Runtime, options: dict[str, int]) -> None:
    here, there = (r.compile(policy="fixed-3", **options) for r in (runtime, causal))
    alike(here, there)


def test_passes_are_graphs_and_none_is_captured_later(runtime: Runtime) -> None:
    generate = runtime.compile(policy="dsa-paper", window=6)
    engine = generate.session(PROMPTS[0]).rollout.lane.engine
    assert {recorded.kind for recorded, _ in engine.passes.values()} == {"graph"}
    before = set(engine.passes), set(engine.judgements)
    for seed, prompt in enumerate(PROMPTS * 2):
        generate(prompt, seed)
    assert (set(engine.passes), set(engine.judgements)) == before


def test_no_wait_and_no_allocation_within_a_chunk(runtime: Runtime) -> None:
    """Under PyTorch's own watch for calls that wait for the device."""
    session = runtime.compile(policy="fixed-4").session(PROMPTS[0])
    session.next_chunk()
    torch.cuda.synchronize()
    if session._ahead is not None:  # the pass that was launched ahead is taken by hand
        session._ahead = None
        session.rollout.drop()
    held = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            advance([session.rollout])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    made = torch.cuda.memory_stats()["allocation.all.allocated"] - held
    assert made <= 16  # tables of a chunk's positions, of a few bytes each


def test_company_changes_a_clip_by_rounding_alone(runtime: Runtime) -> None:
    together, alone = runtime.compile(policy="fixed-2", sessions=2), runtime.compile(policy="fixed-2")
    videos = together(list(PROMPTS), 3)
    assert isinstance(videos, list)
    for number, (prompt, video) in enumerate(zip(PROMPTS, videos, strict=True)):
        single = alone(prompt, 3 + number)
        assert isinstance(single, Video) and single.latents is not None and video.latents is not None
        torch.testing.assert_close(video.latents, single.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["dense", "hsa-50:selection=random", "hsa-25", "window-75"])
def test_many_step_samples_are_those_of_the_cpu(whole: Runtime, many_step: Runtime, policy: str) -> None:
    """As graphs, none of which is captured later."""
    here, there = (runtime.compile(policy=policy) for runtime in (whole, many_step))
    with here.workspace() as workspace:
        (solver,) = workspace.solvers.values()
    assert {recorded.kind for recorded, _ in solver.passes.values()} == {"graph"}
    before = set(solver.passes)
    alike(here, there)
    assert set(solver.passes) == before


@pytest.mark.parametrize("policy", ["dense", "hsa-25", "window-75"])
def test_no_wait_and_no_allocation_within_a_many_step_clip(whole: Runtime, policy: str) -> None:
    """Where groups need no scores, which the host reads once in a clip."""
    with whole.compile(policy=policy).workspace() as workspace:
        (solver,) = workspace.solvers.values()
        solver.run(0, lambda *_: None, lambda: None)
        torch.cuda.synchronize()
        held = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            solver.run(1, lambda *_: None, lambda: None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == held
