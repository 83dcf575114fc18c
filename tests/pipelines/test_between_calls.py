"""attach: one call after another, and what calls share and leave: weights, memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from tiny_diffusers import transformer
from torch import Tensor

import dsa_rt
from dsa_rt.errors import MemoryLimitError, OptionError, PolicyError
from dsa_rt.pipelines.run import Run
from dsa_rt.policy import HSA

from .cases import FRAME, HSA_8, TOKENS, Case, close, make, solved


def test_one_run_after_another() -> None:
    """Other steps, sizes and batches; interrupted, failing and refused calls leave nothing to the next one."""
    case = make()
    policy = HSA(((0.25, 4), (0.75, 2)), window=1.0, selection="uniform")
    dsa_rt.attach(case.pipe, policy)
    expected = case(num_inference_steps=4)
    with torch.inference_mode():
        assert torch.equal(case(num_inference_steps=4), expected)
    assert torch.equal(case(num_inference_steps=4), expected)

    def stop(pipe: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = step == 2
        return {}

    def fail(pipe: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("stopped")

    stopped = case(num_inference_steps=4, callback_on_step_end=stop)
    assert torch.isfinite(stopped).all() and len(dsa_rt.attached(case.pipe).last_run.active_tokens) == 3
    assert torch.equal(case(num_inference_steps=4), expected)
    with pytest.raises(RuntimeError, match="stopped"):
        case(num_inference_steps=4, callback_on_step_end=fail)
    assert torch.equal(case(num_inference_steps=4), expected)
    with pytest.raises(RuntimeError):  # in the second call of a step
        case(num_inference_steps=4, negative_prompt_embeds=torch.randn(1, 9, 5))
    with pytest.raises(PolicyError, match="num_inference_steps=4"):
        case(num_inference_steps=6)
    smaller = case(num_inference_steps=4, height=32, num_frames=5, latents=torch.randn(1, 16, 2, 4, 10))
    assert dsa_rt.attached(case.pipe).last_run.tokens == 2 * 2 * 5 and torch.isfinite(smaller).all()
    assert torch.equal(case(num_inference_steps=4), expected)


def test_weights_are_shared() -> None:
    """One copy, of this pipeline alone, that follows pipe.to() and freshly loaded values; freed with the pipeline."""
    case = make()
    pipe, model = case.pipe, case.pipe.transformer
    other = WanPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    unchanged = Case(other, case.arguments)()
    dsa_rt.attach(pipe, HSA_8)
    assert all(a is b for a, b in zip(model.parameters(), pipe.transformer.parameters(), strict=True))
    first = case()
    assert torch.equal(Case(other, case.arguments)(), unchanged)
    pipe.to(torch.float64).to(torch.float32)
    assert torch.equal(case(), first)
    model.load_state_dict(transformer(9).state_dict())
    close(case(), solved(case, HSA_8), 1e-5)
    held = WanPipeline(**pipe.components)
    with pytest.raises(OptionError, match="called outside of a call of that pipeline"):
        Case(held, case.arguments)()
    gone = weakref.ref(pipe)
    gc.disable()
    try:
        del pipe, held
        case.pipe = None
        assert gone() is None
    finally:
        gc.enable()


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded before the first call of the transformer; freed after the last, and after an interruption."""
    case, runs = make(), []

    def begun(*arguments: Any) -> Run:
        run = Run(*arguments)
        runs.append(weakref.ref(run))
        return run

    def stop(pipe: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        assert runs[-1]() is not None
        pipe._interrupt = step == 3
        return {}

    monkeypatch.setattr("dsa_rt.pipelines.attach.Run", begun)
    dsa_rt.attach(case.pipe, HSA_8, memory_limit="10kB")
    with pytest.raises(MemoryLimitError, match="the memory limit is 0.0 MB.*kv_storage='fp8'"):
        case()
    assert not runs and dsa_rt.attached(case.pipe).last_run is None
    dsa_rt.detach(case.pipe)
    dsa_rt.attach(case.pipe, HSA_8, memory_limit="10MB")
    case()
    case(callback_on_step_end=stop)
    assert len(runs) == 2 and not any(run() for run in runs)
    # K/V of all tokens, one layer's K while groups are formed, text K/V, and rows: two branches, the mix
    assert HSA_8.plan(8, TOKENS, FRAME).captures
    rows = 2 * 2 * TOKENS + TOKENS / 2 + 2 * 2 * 9
    assert dsa_rt.attached(case.pipe).last_run.memory == 4 * (2 * 48 * rows + 3 * 64 * TOKENS)
