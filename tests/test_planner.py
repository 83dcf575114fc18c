"""What the planner promises against what runs hold at their peak: of a pass, of decoding, of whole clips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from tiny import make_model

import dsa_rt
from dsa_rt.bundle import Part
from dsa_rt.codec.conv import ConvCodec
from dsa_rt.codec.tiny import TinyCodec, TinyConfig
from dsa_rt.codec.wan_vae import WanVaeCodec, WanVaeConfig
from dsa_rt.plan import TokenGrid
from dsa_rt.planner import Run, Subject, plan_memory
from dsa_rt.policy import HSA, StepPlan
from dsa_rt.runtime import Runtime
from dsa_rt.sampler.conditions import Conditions
from dsa_rt.sampler.ode import Expert, Solver
from dsa_rt.schedule import euler_sigmas
from dsa_rt.sync import STORAGES

CPU, DTYPES = torch.device("cpu"), [torch.float32, torch.bfloat16]
PROMPT = "a red square bouncing, a blue circle at rest"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ffn_dim", [96, 560])
@pytest.mark.parametrize("update", ["held", "extrapolated"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("extra", [0, 5])
def test_a_run(
    many_step: Runtime, dtype: torch.dtype, ffn_dim: int, update: str, guidance: float, extra: int
) -> None:
    """The peak of all tensors from the first buffer to the last step, with feed-forward networks as wide as the rest
    and wider."""
    model = make_model(form="bidirectional", dim=96, ffn_dim=ffn_dim, heads=4, in_channels=16 + extra, out_channels=16)
    model = model.to(dtype).requires_grad_(False).prepare()
    grid, width = TokenGrid(9, 11), 4 * extra
    plan = HSA(((0.25, 8), (0.75, 2)), 0.5, update=update).plan(8, 396, 99)
    given = Conditions(torch.ones(1, 396, width)) if extra else Conditions()
    texts = [model.embed_text(torch.randn(1, 7, 20)) for _ in range(2)]
    of_text = [t for text in texts[: 1 if guidance == 1 else 2] for pair in text.layers for t in pair]
    with LiveBytes([*model.parameters(), *of_text]) as live:
        if given.extra is not None:
            live.add(given.extra)
        expert = Expert(model, texts[0], None if guidance == 1 else texts[1], guidance)
        solver = Solver(expert, grid, range(4), euler_sigmas(8, 3.0), plan)
        solver.warm_up()
        solver.run(0, lambda *_: None, lambda: None, given)
    subject = Subject(many_step.manifest, model.config, 0, dtype, CPU)
    planned = plan_memory(subject, Run(144, 176, 13, grid, 4, 4, guidance != 1, [plan]), "model")
    promised = planned.activations + planned.velocities + planned.kv_cache - sum(t.nbytes for t in of_text)
    assert live.peak <= 1.01 * promised <= 1.1 * live.peak, (live.peak, promised)


def wan_vae(residual: bool) -> WanVaeCodec:
    """Narrow, of the published proportions: Wan 2.1's, or with residual TI2V 5B's."""
    z, colours = (48, 12) if residual else (16, 3)
    return WanVaeCodec(WanVaeConfig(
        base_dim=20 if residual else 12, decoder_base_dim=32 if residual else None, z_dim=z, dim_mult=(1, 2, 4, 4),
        num_res_blocks=2, temperal_downsample=(False, True, True), latents_mean=(0.0,) * z, latents_std=(1.0,) * z,
        is_residual=residual, in_channels=colours, out_channels=colours, patch_size=2 if residual else None,
        scale_factor_spatial=16 if residual else 8,
    ))  # fmt: skip


CODECS = {
    "conv": lambda: ConvCodec(),
    "taehv": lambda: TinyCodec(TinyConfig(16, (64, 32, 16, 16))),
    "taehv, folded": lambda: TinyCodec(TinyConfig(48, (64, 32, 16, 16), 2)),
    "wan 2.1": lambda: wan_vae(False),
    "wan 2.2 ti2v": lambda: wan_vae(True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CODECS)
def test_decoding(many_step: Runtime, kind: str, dtype: torch.dtype) -> None:
    """Clips of 5 and of 33 frames, up to pixels in bytes; and Wan's codecs encode no more than they decode."""
    codec = CODECS[kind]().to(dtype).requires_grad_(False)
    side, latent = 32, 32 // codec.spatial_factor
    manifest = replace(many_step.manifest, codec=Part(codec.kind, codec.to_dict()), image_conditioning="concat")
    subject = Subject(manifest, many_step.model.config, 0, dtype, CPU)
    for frames, count in ((5, 2), (33, 9)):
        latents = torch.zeros(1, codec.latent_channels, count, latent, latent)
        with LiveBytes(codec.state_dict().values()) as live:
            pixels = codec.stream_decoder().decode(latents)
            pixels[0].float().add_(1).mul_(127.5).round_().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
        run = Run(side, side, frames, TokenGrid(2, 2), count, count, False, [StepPlan.dense(3, 4 * count)])
        planned = plan_memory(subject, run, "model").decode
        plain = plan_memory(replace(subject, manifest=replace(manifest, image_conditioning="none")), run, "model")
        assert live.peak <= plain.decode <= 1.4 * live.peak, (frames, live.peak, plain.decode)
        if kind.startswith("wan"):
            video = torch.zeros(1, 3, frames, side, side)
            with LiveBytes(codec.state_dict().values()) as live:
                live.add(video)
                codec.encode(video)
            assert live.peak <= planned


def peak(runtime: Runtime, **options: Any) -> tuple[int, int]:
    """Bytes beside the weights at the peak of a compile and a call, as planned and as counted."""
    with LiveBytes(tensor for module in runtime.modules for tensor in module.state_dict().values()) as live:
        generate = runtime.compile(**options)
        generate(PROMPT, 1)
    assert generate.plan.live is not None
    return generate.plan.live, live.peak


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_whole_clips(dtype: str) -> None:
    """The demos: no more is held than planned, and not much less."""
    runtime = dsa_rt.load("demo-many-step", dtype=dtype, verify_hashes=False)
    for storage in STORAGES:
        planned, held = peak(
            runtime, frames=17, policy="hsa:groups=0.2@12+0.8@3,window=0.5", steps=12, kv_storage=storage
        )
        assert held <= planned <= 1.1 * held, (storage, held, planned)
    planned, held = peak(runtime, frames=33, policy="dense", steps=1, guidance_scale=1)
    assert held <= planned <= 1.1 * held, (held, planned)
    runtime = dsa_rt.load("demo", dtype=dtype, verify_hashes=False)
    for frames, policy in ((33, "dsa"), (45, "fixed-1")):
        planned, held = peak(runtime, frames=frames, policy=policy)
        assert held <= planned <= 1.15 * held, (frames, held, planned)


def test_another_decoder_is_planned(many_step: Runtime) -> None:
    """The codec that was loaded counts, not the one that the bundle names."""
    tiny = replace(many_step, codec=TinyCodec(TinyConfig(4, (64, 32, 16, 16))))
    ours, theirs = (
        runtime.compile(frames=5, policy="dense", steps=1).plan.decode for runtime in (tiny, many_step)
    )
    assert ours > 2 * theirs
