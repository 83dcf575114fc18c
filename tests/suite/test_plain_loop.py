"""The plain loop is the same computation as the runtime's, on the same weights and noise, pass for pass."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from plain_wan import plain_wan, token_positions
from tiny import make_model

from dsa_rt.errors import OptionError
from dsa_rt.plan import TokenGrid
from dsa_rt.policy import Fixed
from dsa_rt.runtime import Runtime, load

sys.path.append(str(Path(__file__).parents[2]))  # bench/ is no part of the package
from bench.peers.plain_loop import PlainLoop, published_noise, runtime_noise
from bench.peers.plain_model import PlainWan

BOUND = 1e-3  # of latents of order one, in fp32
PROMPT = "a red square bouncing"


def test_plain_model_against_fp64() -> None:
    """Per-frame timesteps, odd sizes, no cache; norms and tables random."""
    model = make_model(3, in_channels=5, out_channels=5, heads=2, dim=60)
    grid, frames = TokenGrid(3, 1), 3
    latents, text, timesteps = torch.randn(2, 5, frames, 6, 2), torch.randn(2, 7, 20), 1000 * torch.rand(2, frames)
    made = PlainWan.of(model)(latents, timesteps, text)
    rows, positions = grid.patchify(latents), token_positions(list(range(frames)), 3, 1)
    per_token = timesteps.repeat_interleave(grid.tokens, 1)
    expected, _ = plain_wan(model.state_dict(), 2, rows, positions, per_token, text)
    assert (made - grid.unpatchify(expected)).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("seed", [0, -5])
@pytest.mark.parametrize("policy", ["dense", "fixed-3-then-1", "dsa-paper"])
def test_same_clip_as_the_runtime(causal: Runtime, policy: str, seed: int) -> None:
    generate = causal.compile(policy=policy)
    loop = PlainLoop(generate)
    for prompt in (PROMPT, "a blue circle at rest"):  # the second finds the first one's caches
        video = generate(prompt, seed=seed)
        passes = [chunk.passes for chunk in video.stats.chunks]
        contexts = sum(chunk.context_passes for chunk in video.stats.chunks)
        clip = loop(prompt, runtime_noise(generate, seed), passes, contexts)
        assert clip.model_calls == video.stats.model_calls
        if seed == 0:  # the last context pass is read by nobody
            assert torch.equal(loop(prompt, runtime_noise(generate, seed), passes).latents, clip.latents)
        assert video.latents.abs().max() > 0.5
        assert (clip.latents - video.latents).abs().max() <= BOUND
        assert clip.frames.shape == video.frames.shape and clip.frames.dtype == torch.uint8
        assert (clip.frames.int() - video.frames.int()).abs().max() <= 1


def test_same_clip_as_the_runtime_on_the_demo() -> None:
    generate = load("demo", dtype="fp32").compile(policy="dense", frames=33)
    video = generate(PROMPT, seed=7)
    clip = PlainLoop(generate)(PROMPT, runtime_noise(generate, 7))
    assert clip.model_calls == 3 * 5
    assert (clip.latents - video.latents).abs().max() <= BOUND


def test_published_noise_is_drawn_anew(causal: Runtime) -> None:
    generate = causal.compile(policy="dense")
    draw = published_noise(generate, 1)
    first, second = draw(range(3), 0), draw(range(3), 1)
    assert first.shape == (1, 4, 3, 6, 4) and not torch.equal(first, second)
    assert torch.equal(published_noise(generate, 1)(range(3), 0), first)
    clip = PlainLoop(generate)(PROMPT, published_noise(generate, 1))
    assert clip.latents.isfinite().all()


def test_refusals(causal: Runtime, many_step: Runtime) -> None:
    loop = PlainLoop(causal.compile(policy="dense"))
    with pytest.raises(OptionError, match=r"passes are \[4, 5, 1\]; expected 3 numbers from 1 to 4"):
        loop(PROMPT, runtime_noise(causal.compile(policy="dense"), 0), [4, 5, 1])
    with pytest.raises(OptionError, match="shorter than its clip"):
        PlainLoop(causal.compile(policy=Fixed(1), window=6))
    with pytest.raises(OptionError, match="bidirectional"):
        PlainLoop(many_step.compile(policy="dense"))
