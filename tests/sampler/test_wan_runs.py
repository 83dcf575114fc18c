"""Whole short runs against diffusers' pipelines: same weights, noise and Euler levels, latents in and latents out.

Here the loop is written out once more in rows, so that what the model takes (conditions in channels, CLIP rows, clean
first frames, two experts) is held against what the pipelines do with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from tiny_diffusers import FRAMES, HEIGHT, IMAGE_DIM, LATENT, TEXT_DIM, WIDTH, autoencoder, ours, transformer
from torch import Tensor

from dsa_rt.models.wan import WanModel
from dsa_rt.plan import TokenGrid, frame_tokens

STEPS = 4


def encoded(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Normalised latents [1, C, F, h, w] of pixels [1, 3, frames, height, width] in [-1, 1]."""
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        return (vae.encode(video).latent_dist.mode() - mean) / std


def run_pipeline(pipeline: Any, noise: Tensor, text: Tensor, empty: Tensor, **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=STEPS, latents=noise, prompt_embeds=text,
        negative_prompt_embeds=empty, output_type="latent", **arguments,
    ).frames  # fmt: skip


def components(shift: float, *models: WanTransformer3DModel, vae: AutoencoderKLWan | None = None) -> dict[str, Any]:
    """What a pipeline is made of: no text encoder, since text rows are given."""
    return {
        "tokenizer": None, "text_encoder": None, "vae": vae, "transformer": models[0],
        "transformer_2": models[1] if len(models) > 1 else None,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
    }  # fmt: skip


def euler(
    experts: Sequence[tuple[WanModel, float]],
    sigmas: Sequence[float],
    noise: Tensor,
    text: Tensor,
    empty: Tensor,
    *,
    boundary: float = 0.0,
    image: Tensor | None = None,
    extra: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Guided Euler over rows. experts: models with their guidance, the second below ``1000 boundary``; extra
    [1, C, F, h, w]: condition channels; first [1, C, 1, h, w]: the clean first frame, which stays at timestep 0."""
    grid = TokenGrid.for_latents(*LATENT[1:], (1, 2, 2))
    active = frame_tokens(grid, range(LATENT[0]), 24, per_frame=first is not None)
    x = grid.patchify(noise)
    fixed = None if first is None else grid.patchify(first)
    used = []
    for sigma, following in pairwise(sigmas):
        used.append(0 if sigma >= boundary else 1)
        model, guidance = experts[used[-1]]
        timesteps = torch.full((1, LATENT[0] if first is not None else 1), 1000 * sigma)
        if fixed is not None:
            x[:, : grid.tokens], timesteps[:, 0] = fixed, 0.0
        rows = x if extra is None else grid.patchify(torch.cat((grid.unpatchify(x), extra), 1))
        wanted, other = (model(rows, active, timesteps, model.embed_text(t, image)).velocity for t in (text, empty))
        x = x + (following - sigma) * (other + guidance * (wanted - other))
    assert len(set(used)) == len(experts)  # every expert had a step
    if fixed is not None:
        x[:, : grid.tokens] = fixed
    return grid.unpatchify(x)


def texts(rows: int = 9) -> tuple[Tensor, Tensor]:
    """A prompt's rows and the empty prompt's: one row and padding."""
    empty = torch.zeros(1, rows, TEXT_DIM)
    empty[:, 0] = torch.randn(TEXT_DIM)
    return torch.randn(1, rows, TEXT_DIM), empty


def same(result: Tensor, expected: Tensor, noise: Tensor) -> None:
    assert 0.1 < expected.std() < 20 and (expected - noise).std() > 0.1  # or 1e-4 would mean nothing
    assert (result - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("expand", [False, True])
def test_text_to_video(expand: bool) -> None:
    """Wan 2.1; expanded timesteps as for TI2V 5B without an image: alike for all tokens."""
    theirs, (text, empty), noise = transformer(1), texts(), torch.randn(1, 16, *LATENT)
    pipeline = WanPipeline(**components(5.0, theirs), expand_timesteps=expand)
    expected = run_pipeline(pipeline, noise, text, empty, guidance_scale=3.0)
    same(euler([(ours(theirs), 3.0)], pipeline.scheduler.sigmas.tolist(), noise, text, empty), expected, noise)


def test_text_to_video_with_two_experts() -> None:
    """Wan 2.2 A14B: another model and another guidance below the boundary."""
    high, low = transformer(1), transformer(2)
    (text, empty), noise = texts(), torch.randn(1, 16, *LATENT)
    pipeline = WanPipeline(**components(12.0, high, low), boundary_ratio=0.875)
    expected = run_pipeline(pipeline, noise, text, empty, guidance_scale=4.0, guidance_scale_2=3.0)
    experts, sigmas = [(ours(high), 4.0), (ours(low), 3.0)], pipeline.scheduler.sigmas.tolist()
    same(euler(experts, sigmas, noise, text, empty, boundary=0.875), expected, noise)


def image_condition(vae: AutoencoderKLWan, image: Tensor) -> Tensor:
    """Wan 2.1 and 2.2 A14B: four mask channels, one in the first latent frame, then the latents of the image followed
    by grey frames: [1, 20, F, h, w]."""
    video = torch.zeros(1, 3, FRAMES, HEIGHT, WIDTH)
    video[:, :, 0] = 2 * image - 1
    mask = torch.zeros(1, 4, *LATENT)
    mask[:, :, 0] = 1
    return torch.cat((mask, encoded(vae, video)), 1)


def test_image_to_video_with_clip_rows() -> None:
    """Wan 2.1: 36 channels, and CLIP rows in both branches of guidance."""
    theirs, vae = transformer(1, 36, image_dim=IMAGE_DIM), autoencoder(16)
    (text, empty), noise = texts(512), torch.randn(1, 16, *LATENT)  # diffusers takes 512 text rows, no fewer
    image, clip = torch.rand(1, 3, HEIGHT, WIDTH), torch.randn(1, 11, IMAGE_DIM)
    pipeline = WanImageToVideoPipeline(**components(3.0, theirs, vae=vae))
    pipeline.encode_image = lambda image, device: clip
    expected = run_pipeline(pipeline, noise, text, empty, image=image, guidance_scale=3.0)
    sigmas, extra = pipeline.scheduler.sigmas.tolist(), image_condition(vae, image)
    same(euler([(ours(theirs), 3.0)], sigmas, noise, text, empty, image=clip, extra=extra), expected, noise)


def test_image_to_video_with_two_experts() -> None:
    """Wan 2.2 A14B: the channels, no CLIP rows."""
    high, low, vae = transformer(1, 36), transformer(2, 36), autoencoder(16)
    (text, empty), noise, image = texts(), torch.randn(1, 16, *LATENT), torch.rand(1, 3, HEIGHT, WIDTH)
    pipeline = WanImageToVideoPipeline(**components(5.0, high, low, vae=vae), boundary_ratio=0.9)
    expected = run_pipeline(pipeline, noise, text, empty, image=image, guidance_scale=3.5)
    experts, sigmas = [(ours(high), 3.5), (ours(low), 3.5)], pipeline.scheduler.sigmas.tolist()
    extra = image_condition(vae, image)
    same(euler(experts, sigmas, noise, text, empty, boundary=0.9, extra=extra), expected, noise)


def test_image_to_video_with_a_clean_first_frame() -> None:
    """Wan 2.2 TI2V 5B: 48 channels, the first frame in place with timestep 0 for its tokens."""
    theirs, vae = transformer(1, 48, 48), autoencoder(48)
    (text, empty), noise, image = texts(), torch.randn(1, 48, *LATENT), torch.rand(1, 3, HEIGHT, WIDTH)
    pipeline = WanImageToVideoPipeline(**components(5.0, theirs, vae=vae), expand_timesteps=True)
    expected = run_pipeline(pipeline, noise, text, empty, image=image, guidance_scale=3.0)
    first = encoded(vae, 2 * image[:, :, None] - 1)
    result = euler([(ours(theirs), 3.0)], pipeline.scheduler.sigmas.tolist(), noise, text, empty, first=first)
    same(result, expected, noise)
    assert torch.equal(result[:, :, :1], first)
