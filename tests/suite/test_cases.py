"""Cases: selection, short clips, what is refused, and scripted policies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_rt.errors import OptionError, PolicyError
from dsa_rt.policy import parse_policy
from dsa_rt.runtime import Runtime
from dsa_rt.suite.cases import CASES, Case, quick, select
from dsa_rt.suite.measure import refusal
from dsa_rt.suite.random_weights import random_runtime, weight_bytes
from dsa_rt.suite.scripted import Scripted, suite_policy


def test_selection_keeps_the_order_and_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) and select([]) == list(CASES)
    assert [case.name for case in select(["many-*", "demo-dsa"])] == ["demo-dsa", *names[4:8]]
    assert {case.policy for case in select(["demo-*", "many-*"])} == {
        "dense", "dsa", "dsa-paper", "fixed-2", "hsa-50", "hsa-25", "window-75"
    }  # fmt: skip
    with pytest.raises(OptionError, match=r"no case is called 'demo-dsb'; there are demo-dense, "):
        select(["many-*", "demo-dsb"])


def test_large_cases_are_what_they_are_held_against() -> None:
    """832x480, 81 frames, bf16: 7 chunks of which 3 are refined make 23 model calls; 40 steps for the rest."""
    by_name = {case.name: case for case in select(["1.3b-*"])}
    assert {(c.height, c.width, c.frames, c.dtype, c.device) for c in by_name.values()} == {
        (480, 832, 81, "bf16", "cuda")
    }
    refined = suite_policy(by_name["1.3b-causal-dsa"].policy)
    decider, calls = refined.begin(4, 7, has_head=True), 7
    for chunk in range(7):
        passes = 1
        while decider.another_pass(chunk, passes, 0.5 if decider.wants_confidence(chunk, passes) else None):
            passes += 1
        calls += passes
    assert calls == 23
    steps = {name: (case.steps or 40, case.policy) for name, case in by_name.items() if case.form == "bidirectional"}
    assert steps == {"1.3b-dense": (40, "dense"), "1.3b-hsa-50": (40, "hsa-50"), "1.3b-hsa-25": (40, "hsa-25")}
    assert 2.8e9 < weight_bytes("wan2.1-t2v-1.3b", torch.bfloat16) < 2.9e9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bundle": "demo"}, "either a bundle, or a size and a form"),
        ({"size": None}, "either a bundle, or a size and a form"),
        ({"decoder": "bundle"}, "decoder is 'bundle'; random weights have 'tiny'"),
        ({"device": "cpu"}, "expected device 'any' or 'cuda'"),
        ({"batch": 0}, "a batch of 1 or more"),
    ],
)
def test_cases_that_cannot_be(changes: dict[str, object], said: str) -> None:
    good = Case("c", "", size="tiny", form="causal", decoder="tiny")
    with pytest.raises(OptionError, match=said):
        replace(good, **changes)  # type: ignore[arg-type]


def test_quick_is_short_and_says_so() -> None:
    for case in CASES:
        short = quick(case)
        assert short.frames == 33 and short.name == f"{case.name}, quick" and short.bundle == case.bundle
    assert quick(select(["1.3b-causal-dsa"])[0]).policy == "scripted:0"  # it has three chunks


def test_what_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    large = select(["1.3b-dense"])[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(large, "cpu") == "it needs a CUDA device, and torch sees none"
    assert refusal(select(["demo-dsa"])[0], "cuda") == "it needs a CUDA device, and torch sees none"
    assert refusal(select(["demo-dsa"])[0], "cpu") is None
    here = replace(large, device="any")
    monkeypatch.setattr("dsa_rt.suite.measure.free_memory", lambda _: 10**9)
    assert refusal(here, "cpu") == "its weights need 2.8 GB, but 1.0 GB are free on cpu"
    monkeypatch.setattr("dsa_rt.suite.measure.free_memory", lambda _: 10**10)
    assert refusal(here, "cpu") is None


def test_scripted_passes(causal: Runtime) -> None:
    video = causal.compile(policy=Scripted((2, 0, 2)))("a red square bouncing")
    assert [chunk.passes for chunk in video.stats.chunks] == [4, 1, 4]
    assert [chunk.confidences[0] is None for chunk in video.stats.chunks] == [False] * 3  # the head runs, as in DSA
    assert all(value is None for chunk in video.stats.chunks for value in chunk.confidences[1:])
    assert video.stats.policy == "scripted:0,2" and suite_policy("scripted:0,2") == Scripted((0, 2))


def test_scripted_refusals(causal: Runtime) -> None:
    with pytest.raises(PolicyError, match="refines chunk 3, but the clip has 3 chunks"):
        causal.compile(policy=Scripted((3,)))
    with pytest.raises(PolicyError, match="expected indices of chunks with commas"):
        suite_policy("scripted:a")
    with pytest.raises(PolicyError, match="expected indices of chunks, from 0"):
        Scripted((-1,))
    assert suite_policy("hsa-50") == parse_policy("hsa-50") and suite_policy("scripted:") == Scripted(())


@pytest.mark.parametrize("form", ["causal", "bidirectional"])
def test_random_weights_run(form: str) -> None:
    runtime = random_runtime("tiny", form, "cpu", "bf16")
    assert {p.dtype for p in runtime.model.parameters()} == {torch.bfloat16}
    assert sum(p.nbytes for p in runtime.model.parameters()) == weight_bytes("tiny", torch.bfloat16)
    generate = runtime.compile(height=16, width=32, frames=33, policy="dense", steps=4 if form != "causal" else None)
    first, other, again = (generate(prompt, seed=1) for prompt in ("a", "b", "a"))
    assert first.frames.shape == (33, 16, 32, 3) and first.latents.isfinite().all() and first.latents.std() > 0.1
    assert torch.equal(first.latents, again.latents) and not torch.equal(first.latents, other.latents)
    anew = random_runtime("tiny", form, "cpu", "bf16").model
    assert torch.equal(anew.head.head.weight, runtime.model.head.head.weight)


def test_random_weights_refusals() -> None:
    with pytest.raises(OptionError, match="size 'large' is not known; there are wan2.1-t2v-1.3b"):
        random_runtime("large", "causal", "cpu", "fp32")
    with pytest.raises(OptionError, match="makes video from images"):
        random_runtime("wan2.1-i2v-14b", "causal", "cpu", "fp32")
