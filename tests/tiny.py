"""Small models and bundles whose random weights are random everywhere, norms and modulation tables included."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dsa_rt.bundle import Schedule, Size
from dsa_rt.codec.conv import ConvCodec, ConvCodecConfig
from dsa_rt.codec.text import GrammarTextConfig, GrammarTextEncoder
from dsa_rt.demo.grammar import MAX_WORDS, VOCABULARY
from dsa_rt.exporting import export
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel


def make_model(seed: int = 0, **changes: object) -> WanModel:
    """A generator of width 48 with random weights; sizes by keyword."""
    sizes = {"dim": 48, "ffn_dim": 80, "heads": 2, "layers": 2, "in_channels": 3, "out_channels": 3,
             "text_dim": 20, "text_length": 7, "freq_dim": 32, "form": "causal"}  # fmt: skip
    model = WanModel(WanConfig(**(sizes | changes)))  # type: ignore[arg-type]
    randomise(model, seed)
    return model.requires_grad_(False).eval()


def randomise(module: nn.Module, seed: int, spread: float = 1.0) -> None:
    """Every parameter random, norms and modulation tables included, with activations that stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "table" not in name and "modulation" not in name:
                parameter.copy_(noise * spread * parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)


def make_bundle(path: Path, form: str, *, with_head: bool = True) -> Path:
    """Random weights for 48x32 pixels (3x2 tokens a frame) and 33 frames: three chunks of three latent frames."""
    causal = form == "causal"
    config = WanConfig(48, 96, 2, 2, 4, 4, 16, MAX_WORDS, freq_dim=32, form=form)
    model, codec = WanModel(config), ConvCodec(ConvCodecConfig(4, 8, 8, 1, 1, 1, 1))
    text = GrammarTextEncoder(GrammarTextConfig(len(VOCABULARY), MAX_WORDS, 16, 2, 1))
    head = ConfidenceHead(ConfidenceConfig(48, 2, 64, (0, 1))) if causal and with_head else None
    for seed, module in enumerate((model, codec, text)):
        randomise(module, seed)
    if head is not None:
        randomise(head, 3, spread=3.0)  # confidences far from 0.5, on both sides
    with torch.no_grad():
        codec.latent_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
        codec.latent_std.copy_(torch.tensor([0.5, 0.8, 1.1, 0.6]))
        codec.decoder.head.weight.mul_(0.3)  # most pixels inside [-1, 1], where a difference shows
        for block in model.blocks:
            block.cross_attn.o.weight.mul_(5)  # prompts that matter
    export(
        path, name="tiny", model=model, codec=codec, text_encoder=text, head=head, dtype=torch.float32,
        schedule=Schedule(5.0, (1000.0, 750.0, 500.0, 250.0) if causal else 3), size=Size(48, 32, 33),
        chunk_frames=3 if causal else None, guidance=1.0 if causal else 2.5,
    )  # fmt: skip
    return path
