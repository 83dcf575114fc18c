"""What the planner promises against what is allocated, what it picks as the limit falls, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import make_model
from torch import Tensor

from dsa_rt import load, planner
from dsa_rt.bundle import Part, open_bundle
from dsa_rt.cli import main
from dsa_rt.errors import MemoryLimitError, OptionError
from dsa_rt.memory import MemoryPlan, choose, parse_bytes
from dsa_rt.models.sizes import WAN_SIZES
from dsa_rt.plan import TokenGrid
from dsa_rt.planner import Run, Subject, plan_memory, plans_memory
from dsa_rt.policy import HSA, StepPlan
from dsa_rt.runtime import Runtime, find_bundle
from dsa_rt.sync import STORAGES

PROMPT = "a red square bouncing"
POLICY = "hsa:groups=0.3@12+0.7@3,window=0.5"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_planned_kv_is_what_is_allocated(many_step: Runtime, storage: str, guidance: float) -> None:
    generate = many_step.compile(policy=POLICY, kv_storage=storage, guidance_scale=guidance)
    with generate.workspace() as workspace:
        (solver,) = workspace.solvers.values()
        caches = solver.groups.caches
        parts = [vars(part) for cache in caches for part in (cache, getattr(cache, "rows", cache))]
        kept = [tensor for part in parts for name, tensor in part.items() if not name.startswith("_")]
        texts = [kv for kv in (solver.experts[0].text, solver.experts[0].empty) if kv is not None]
        taken = sum({t.data_ptr(): t.nbytes for t in kept if isinstance(t, Tensor)}.values())
        taken += sum(t.nbytes for kv in texts for pair in kv.layers for t in pair)
    assert len(caches) == len(texts) == (1 if guidance == 1 else 2)
    assert abs(generate.plan.kv_cache - taken) <= 0.05 * taken
    assert generate.plan.storage == storage and generate.plan.host == 0
    session = generate.session(PROMPT)
    session.next_chunk()
    assert session.stats().settings["kv_storage"] == storage


def test_every_part_counts(many_step: Runtime) -> None:
    """Rows of extrapolation, text of both experts, and CLIP rows, against tensors of those sizes."""
    held_plan, line = (many_step.compile(policy=p).plan for p in (POLICY, POLICY + ",update=extrapolated"))
    assert line.velocities - held_plan.velocities == 54 * 16 * 4  # 54 tokens, 16 values of fp32
    model = make_model(form="bidirectional", in_channels=11, image_dim=10)  # 4 mask and 4 condition channels
    text = model.embed_text(torch.randn(1, 7, 20), torch.randn(1, 17, 10))
    assert text.image_layers is not None
    bytes_of_text = sum(t.nbytes for pairs in (text.layers, text.image_layers) for pair in pairs for t in pair)
    clip = Part("clip-vision", {"image_size": 28, "patch_size": 7})
    manifest = replace(many_step.manifest, image_conditioning="concat", image_encoder=clip)
    subject = Subject(manifest, model.config, 1000, torch.float32, CPU)
    run = Run(48, 32, 33, TokenGrid(3, 2), 9, 9, False, [StepPlan.dense(3, 54)])
    alone, guided = (plan_memory(subject, replace(run, guided=guided), "model") for guided in (False, True))
    assert alone.kv_cache == bytes_of_text and guided.kv_cache == 2 * bytes_of_text and alone.weights == 1000
    two = plan_memory(replace(subject, manifest=replace(manifest, boundary=0.9)), run, "model")
    assert two.kv_cache == 2 * bytes_of_text
    assert alone.live is not None and alone.total == 1000 + alone.live == alone.to_dict()["total"]
    parts = (alone.kv_cache, alone.activations, alone.decode, alone.output, alone.velocities)
    assert max(parts) < alone.live < sum(parts)
    assert replace(alone, live=None).total == 1000 + sum(parts)


def test_near_the_run_in_the_dtype_of_the_model() -> None:
    """The demo's weights under strong guidance: frames and latents of FP8 storage at 41 dB or more, of host storage bit
    for bit. Were full passes to read rounded rows too, frames would be at 39.9."""
    runtime = load("demo-many-step", dtype="fp32")
    videos = {}
    for storage in STORAGES:
        generate = runtime.compile(frames=33, policy=POLICY, kv_storage=storage, guidance_scale=6)
        video = generate("a red square bouncing, a blue circle at rest", 5)
        assert not isinstance(video, list) and video.latents is not None
        videos[storage] = (video.frames.double(), video.latents.double())
    for exact, host, fp8, peak in zip(*(videos[s] for s in ("model", "host", "fp8")), (255.0, None), strict=True):
        assert torch.equal(host, exact)
        peak = peak or float(exact.max() - exact.min())
        error = float((fp8 - exact).square().mean())
        assert 0 < error <= peak**2 / 10**4.1, 10 * torch.log10(torch.tensor(peak**2 / error))


@pytest.fixture
def light_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that K/V decide what a small bundle takes at its peak."""
    monkeypatch.setattr(planner, "_decode_bytes", lambda *_: (0, 0))


def cuda_plans() -> list[MemoryPlan]:
    """Wan 2.1 1.3B's sizes with 81 frames of 480 x 832, as the demo's manifest does not say."""
    subject = Subject(open_bundle(find_bundle("demo-many-step")).manifest, WAN_SIZES["wan2.1-t2v-1.3b"], 15 * 10**9,
                      torch.bfloat16, CUDA)  # fmt: skip
    run = Run(480, 832, 81, TokenGrid(30, 52), 21, 21, True, [HSA().plan(40, 32760, 1560)])
    return plans_memory(subject, run, "auto", "hsa-50")


@pytest.mark.usefixtures("light_codec")
def test_auto_takes_the_first_that_fits(many_step: Runtime) -> None:
    """On a device with memory of its own "host" needs the least of it; on the CPU it never helps."""
    plans = cuda_plans()
    model, _, fp8, _, host = plans
    assert [(plan.storage, plan.held) for plan in plans] == [
        ("model", True), ("model", False), ("fp8", True), ("fp8", False), ("host", False)
    ]  # fmt: skip
    kept = 2 * 2 * 30 * 27518 * 1536 * 2  # K and V, both branches, 84% of the tokens, bf16
    assert model.host == fp8.host == 0 and host.host == kept
    assert all(before.total > after.total for before, after in pairwise(plans))
    assert model.kv_cache - host.kv_cache == 2 * 2 * 30 * 32760 * 1536 * 2 - kept // 30
    for number, plan in enumerate(plans):
        limits = [plan.total] if number == 0 else [plan.total, plans[number - 1].total - 1]
        for limit in limits:
            chosen = choose(plans, limit, CUDA, here=False)
            assert (chosen.storage, chosen.held) == (plan.storage, plan.held) and chosen.total <= limit
            for before in plans[:number]:
                assert f"{before.manner} would take" in chosen.reason
            assert f"storage {plan.manner} ({chosen.reason})" in chosen.table()
    with pytest.raises(MemoryLimitError) as caught:
        choose(plans, host.total - 1, CUDA, here=False)
    numbers = [f"{plan.manner}: {plan.total / 1e6:.1f} MB" for plan in plans]
    bound = f"the memory limit is {(host.total - 1) / 1e6:.1f} MB"
    for words in (*numbers, f"{host.host / 1e6:.1f} MB of host memory", bound):
        assert words in str(caught.value)

    compiled = {storage: many_step.compile(policy=POLICY, kv_storage=storage).plan for storage in STORAGES}
    auto = many_step.compile(policy=POLICY, memory_limit=compiled["model"].total)
    assert auto.plan == replace(compiled["model"], reason="it fits") and compiled["host"].total > auto.plan.total
    by_clip = many_step.compile(policy=POLICY, memory_limit=compiled["model"].total - 1)
    assert by_clip.plan.storage == "model" and not by_clip.plan.held
    assert torch.equal(by_clip(PROMPT).latents, auto(PROMPT).latents)  # type: ignore[union-attr]
    less = many_step.compile(policy=POLICY, memory_limit=by_clip.plan.total - 1)
    assert less.plan.storage == "fp8" and "model would take" in less.plan.reason
    fixed = many_step.compile(policy=POLICY, kv_storage="fp8")
    assert torch.equal(less(PROMPT).latents, fixed(PROMPT).latents)  # type: ignore[union-attr]
    with pytest.raises(MemoryLimitError, match=r"needs .* \(with K/V storage model: .* fp8: .* host.*\), but the"):
        many_step.compile(policy=POLICY, memory_limit="1kB")
    with pytest.raises(MemoryLimitError, match=f"this needs {by_clip.plan.total / 1e6:.1f} MB"):
        many_step.compile(policy=POLICY, kv_storage="model", memory_limit=by_clip.plan.total - 1)


def test_what_is_free(many_step: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are loaded already: what is free need not hold them. Host memory counts apart."""
    model, _, fp8, fp8_by_clip, host = cuda_plans()
    free = {"cuda": 10**15, "cpu": 10**15}
    monkeypatch.setattr("dsa_rt.memory.free_memory", lambda device: free[device.type])
    for plan, place, size in ((model, "cuda", model.total - model.weights), (host, "cpu", host.host)):
        free[place] = size
        assert plan.shortage(None, CUDA) is None
        free[place] = size - 1
        assert f"{(size - 1) / 1e6:.1f} MB" in (plan.shortage(None, CUDA) or "")
        free[place] = 10**15
    free["cuda"] = fp8_by_clip.total - fp8_by_clip.weights - 1
    assert choose([model, fp8, fp8_by_clip, host], None, CUDA).storage == "host"
    free["cpu"] = host.host - 1
    with pytest.raises(MemoryLimitError, match="the free host memory is"):
        choose([model, fp8, host], None, CUDA)


def test_storage_that_would_mean_nothing(causal: Runtime, many_step: Runtime) -> None:
    for runtime, policy in ((causal, "dense"), (many_step, "dense"), (many_step, "hsa:groups=1@2,window=0.5,steps=8")):
        assert runtime.compile(policy=policy, kv_storage="model").plan.storage == "model"
        with pytest.raises(OptionError, match="kv_storage='fp8' is for runs that keep K/V from step to step"):
            runtime.compile(policy=policy, kv_storage="fp8")
    with pytest.raises(OptionError, match="kv_storage is 'disk'; expected 'auto', 'model', 'fp8', 'host'"):
        many_step.compile(policy=POLICY, kv_storage="disk")


@pytest.mark.usefixtures("light_codec")
def test_inspect_shows_the_plan(many_step: Runtime, capfd: pytest.CaptureFixture[str]) -> None:
    """The plan of a bundle that is not loaded is that of the compiled function."""
    path = str(many_step.bundle.path)
    expected = many_step.compile(policy=POLICY, memory_limit="1GB").plan
    asked = ["inspect", path, "--policy", POLICY, "--dtype", "fp32"]
    assert main([*asked, "--memory-limit", "1GB", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["plan"]["memory"] == expected.to_dict()
    assert main([*asked, "--memory-limit", str(expected.total - 1)]) == 0
    shown = capfd.readouterr().out
    assert "memory on cpu in float32" in shown
    assert "K/V storage model, buffers made for each clip (model would take" in shown
    assert main([*asked, "--device", "cuda", "--kv-storage", "host"]) == 0
    assert "host memory" in capfd.readouterr().out
    assert main([*asked, "--memory-limit", "1kB"]) == 5
    assert "with K/V storage model" in capfd.readouterr().err
    assert main(["inspect", path, "--memory-limit", "1GB"]) == 2
    assert "--memory-limit belongs to a run" in capfd.readouterr().err
    assert parse_bytes("1.5 GiB") == 3 * 2**29
