"""Peers of many-step runs make the runtime's clips: same weights, noise, guidance and active tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsa_rt.errors import OptionError
from dsa_rt.runtime import Runtime

sys.path.append(str(Path(__file__).parents[2]))  # bench/ is no part of the package
from bench.peers.many_step import DiffusersLoop, GatherLoop

BOUND = 1e-3  # of latents of order one, in fp32
PROMPT = "a red square bouncing"


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_diffusers_makes_the_same_clip(many_step: Runtime, guidance: float) -> None:
    generate = many_step.compile(policy="dense", steps=4, guidance_scale=guidance)
    video = generate(PROMPT, seed=3)
    run = DiffusersLoop(generate)(PROMPT, 3)
    assert video.latents.abs().max() > 0.5 and run.seconds > 0
    assert (run.latents - video.latents).abs().max() <= BOUND


@pytest.mark.parametrize(
    "policy",
    ["hsa-25:steps=20", "hsa-50:groups=0.3@12+0.7@3,steps=12,selection=random", "hsa-50:groups=0.3@20+0.7@5,steps=20"],
)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_gathering_makes_the_same_clip(many_step: Runtime, policy: str, guidance: float) -> None:
    generate = many_step.compile(policy=policy, guidance_scale=guidance)
    assert generate.settings.token_plan is not None and min(generate.settings.token_plan.counts) < 54
    loop = GatherLoop(generate)
    for seed in (3, -1):  # the second finds the first one's caches
        video = generate(PROMPT, seed=seed)
        assert (loop(PROMPT, seed).latents - video.latents).abs().max() <= BOUND


def test_skipped_tokens_are_not_computed(many_step: Runtime) -> None:
    generate = many_step.compile(policy="hsa-25")
    loop, counts = GatherLoop(generate), []
    loop.model.blocks[0].register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))
    loop(PROMPT, 0)
    plan = generate.settings.token_plan
    assert plan is not None and counts == [count for count in plan.counts if count for _ in range(2)]


def test_refusals(many_step: Runtime, causal: Runtime) -> None:
    with pytest.raises(OptionError, match="expected a policy such as 'hsa-50'"):
        GatherLoop(many_step.compile(policy="dense"))
    with pytest.raises(OptionError, match="window-75"):
        GatherLoop(many_step.compile(policy="window-75", steps=40))
    with pytest.raises(OptionError, match="many-step bundle"):
        DiffusersLoop(causal.compile(policy="dense"))
