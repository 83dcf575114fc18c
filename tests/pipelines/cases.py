"""diffusers' Wan pipelines with tiny random components, and the same runs by dsa_rt's own sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from tiny_diffusers import FRAMES, HEIGHT, IMAGE_DIM, LATENT, TEXT_DIM, WIDTH, autoencoder, ours, transformer
from torch import Tensor

from dsa_rt import reference
from dsa_rt.plan import TokenGrid
from dsa_rt.policy import HSA
from dsa_rt.sampler.conditions import Conditions
from dsa_rt.sampler.ode import Expert, solve, switch_step

TOKENS, FRAME, SEED = 45, 15, 7
GROUPS = ((0.2, 8), (0.3, 4), (0.5, 2))
HSA_8 = HSA(GROUPS, window=0.5)  # steps 0, 1, 6, 7 are full; step 1 is scored
FORMS = ("t2v", "t2v-expanded", "a14b-t2v", "i2v", "a14b-i2v", "ti2v")


def noise(channels: int, seed: int = SEED) -> Tensor:
    """The latents that dsa_rt's sampler begins with."""
    rows = reference.philox_normal(torch.tensor([seed]), torch.arange(TOKENS), 4 * channels, 0)
    return TokenGrid(3, 5).unpatchify(rows)


@dataclass
class Case:
    """A pipeline and the arguments of its calls."""

    pipe: Any
    arguments: dict[str, Any]
    image: Tensor | None = None
    clip: Tensor | None = None

    def __call__(self, **changes: Any) -> Tensor:
        return self.pipe(**(self.arguments | changes)).frames


def make(form: str = "t2v") -> Case:
    """Random weights and inputs; 8 steps."""
    pictured, experts, channels = "i2v" in form, 2 if "a14b" in form else 1, 48 if form == "ti2v" else 16
    image_dim = IMAGE_DIM if form == "i2v" else None
    inside = 36 if form in ("i2v", "a14b-i2v") else channels
    models = [transformer(1 + n, inside, channels, image_dim) for n in range(experts)]
    parts: dict[str, Any] = {
        "tokenizer": None, "text_encoder": None, "vae": autoencoder(channels) if pictured else None,
        "transformer": models[0], "transformer_2": models[1] if experts == 2 else None,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "boundary_ratio": 0.875 if experts == 2 else None, "expand_timesteps": form in ("ti2v", "t2v-expanded"),
    }  # fmt: skip
    pipe = (WanImageToVideoPipeline if pictured else WanPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    text_rows = 512 if form == "i2v" else 9  # with image rows diffusers takes 512 text rows, no fewer
    arguments: dict[str, Any] = {
        "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 8, "output_type": "latent",
        "guidance_scale": 3.0, "latents": noise(channels),
    }  # fmt: skip
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        arguments[name] = torch.randn(1, text_rows, TEXT_DIM)
    case = Case(pipe, arguments)
    if experts == 2:
        arguments["guidance_scale_2"] = 2.0
    if pictured:
        case.image = arguments["image"] = torch.rand(1, 3, HEIGHT, WIDTH)
    if image_dim is not None:
        case.clip = torch.randn(1, 11, IMAGE_DIM)
        pipe.encode_image = lambda image, device: case.clip
    return case


def solved(case: Case, policy: HSA, seed: int = SEED, **changes: Any) -> Tensor:
    """The same run by dsa_rt's own sampler, with weights of its own."""
    pipe, arguments, grid = case.pipe, case.arguments | changes, TokenGrid(3, 5)
    pipe.scheduler.set_timesteps(arguments["num_inference_steps"])
    sigmas = pipe.scheduler.sigmas.tolist()
    conditions = Conditions()
    if case.image is not None:
        made = pipe.prepare_latents(
            2 * case.image - 1, 1, pipe.vae.config.z_dim, HEIGHT, WIDTH, FRAMES, torch.float32, "cpu", None,
            arguments["latents"],
        )  # fmt: skip
        rows = grid.patchify(made[1])
        first = torch.arange(FRAME)
        conditions = Conditions(fixed=first, fixed_rows=rows) if len(made) == 3 else Conditions(extra=rows)

    def expert(theirs: WanTransformer3DModel, guidance: float) -> Expert:
        model = ours(theirs)
        text, empty = (
            model.embed_text(arguments[name], case.clip) for name in ("prompt_embeds", "negative_prompt_embeds")
        )
        return Expert(model, text, empty if arguments["guidance_scale"] > 1 else None, guidance)

    high, low, full, boundary = expert(pipe.transformer, arguments["guidance_scale"]), None, (), 0.0
    if pipe.transformer_2 is not None:
        boundary = pipe.config.boundary_ratio
        low, full = expert(pipe.transformer_2, arguments["guidance_scale_2"]), (switch_step(sigmas, boundary),)
    plan = policy.plan(len(sigmas) - 1, TOKENS, FRAME, fixed=conditions.count, full=full)
    assert 0 < min(plan.counts) < TOKENS
    done = solve(
        high.model, grid, range(LATENT[0]), high.text, high.empty, sigmas, high.guidance, seed,
        lambda *_: None, lambda: None, plan=plan, conditions=conditions, low=low, boundary=boundary,
    )  # fmt: skip
    return grid.unpatchify(done.x0)


def close(result: Tensor, expected: Tensor, bound: float) -> None:
    assert result.shape == expected.shape and 0.1 < expected.std() < 20  # or the bound would mean nothing
    assert (result - expected).abs().max() <= bound
