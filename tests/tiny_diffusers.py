"""diffusers' Wan transformer and video codec with few channels and random weights, and ours with the same weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from tiny import randomise

from dsa_rt.convert.names import config_from_diffusers, from_diffusers
from dsa_rt.models.wan import WanModel

HEIGHT, WIDTH, FRAMES = 48, 80, 9
LATENT = (3, 6, 10)  # of such a clip: 3 latent frames of 3 x 5 tokens
TEXT_DIM, IMAGE_DIM = 24, 20


def transformer(seed: int, inside: int = 16, outside: int = 16, image_dim: int | None = None) -> WanTransformer3DModel:
    """Of these input and output channels, with image_dim reading CLIP rows."""
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=inside, out_channels=outside, text_dim=TEXT_DIM,
        freq_dim=32, ffn_dim=80, num_layers=2, image_dim=image_dim,
        added_kv_proj_dim=None if image_dim is None else 48,
    ).eval()  # fmt: skip
    randomise(model, seed)
    return model


def autoencoder(channels: int) -> AutoencoderKLWan:
    """Of these latent channels, whose mean and deviation are random too."""
    model = AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=torch.randn(channels).tolist(), latents_std=(0.5 + torch.rand(channels)).tolist(),
    ).eval()  # fmt: skip
    randomise(model, 3)
    return model


def ours(theirs: WanTransformer3DModel) -> WanModel:
    """The same transformer as ours, with weights of its own."""
    model = WanModel(config_from_diffusers(theirs.config))
    model.load_state_dict(from_diffusers(theirs.state_dict()))
    return model.requires_grad_(False).eval()
