"""Runtimes with random weights, for speed at sizes whose checkpoints are not at hand.

Every figure made with one says that its weights are random. Weights are made on the device, in the dtype they run in,
one tensor after the other; nothing is written to disk. The text encoder is left out: its rows are random too, and cost
nothing. The video codec is a tiny decoder (TAEHV's shape), as real-time users decode with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsa_rt.bundle import Bundle, Latent, Manifest, Part, Schedule, Size, TensorEntry
from dsa_rt.codec.tiny import TinyCodec, TinyConfig
from dsa_rt.errors import OptionError
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.models.config import WanConfig
from dsa_rt.models.sizes import WAN_SIZES
from dsa_rt.models.wan import WanModel
from dsa_rt.runtime import Runtime, dtype_for

TINY = WanConfig(
    dim=96, ffn_dim=192, heads=2, layers=2, in_channels=16, out_channels=16, text_dim=32, text_length=24, freq_dim=64
)
SIZES: Mapping[str, WanConfig] = {**WAN_SIZES, "tiny": TINY}  # tiny: to try the suite itself
SPREAD = 0.02  # standard deviation of every weight matrix: activations stay finite in bf16


class RandomText(nn.Module):
    """Stands in for a text encoder: rows [B, length, dim] that a prompt alone decides, made when it first comes."""

    kind = "random"

    def __init__(self, config: WanConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.dim, self.length, self._device, self._dtype = config.text_dim, config.text_length, device, dtype
        self._rows: dict[str, Tensor] = {}

    def encode(self, prompts: Sequence[str]) -> Tensor:
        for prompt in prompts:
            if prompt not in self._rows:
                seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6])
                rows = torch.randn(self.length, self.dim, generator=torch.Generator().manual_seed(seed))
                self._rows[prompt] = rows.to(self._device, self._dtype)
        return torch.stack([self._rows[prompt] for prompt in prompts])


def weight_bytes(size: str, dtype: torch.dtype) -> int:
    """Of the generator of that size; nothing is allocated. :class:`OptionError` for a size that is not known."""
    with torch.device("meta"):
        return sum(p.numel() for p in WanModel(_config(size, "causal")).parameters()) * dtype.itemsize


def random_runtime(size: str, form: str, device: str | torch.device, dtype: str, seed: int = 0) -> Runtime:
    """A runtime of a known size. form: "causal" (chunks of three latent frames, four passes, a confidence head that
    taps three blocks) or "bidirectional" (40 steps, no guidance)."""
    config = _config(size, form)
    if config.image_dim is not None or config.in_channels != config.out_channels:
        raise OptionError(f"size {size!r} makes video from images; random weights are for text-to-video sizes")
    place, number = torch.device(device), dtype_for(dtype, device)
    causal, generator = form == "causal", torch.Generator(place).manual_seed(seed)
    model: WanModel = _filled(WanModel, config, place, number, generator).prepare()
    head: ConfidenceHead | None = None
    if causal:
        taps = tuple(sorted({config.layers * part // 8 - 1 for part in (4, 6, 8)} - {-1}))
        sizes = ConfidenceConfig(config.dim, config.heads, config.dim, taps)
        head = _filled(ConfidenceHead, sizes, place, number, generator)
        head.prepare()
    codec = _filled(TinyCodec, _decoder(size, config), place, number, generator)
    manifest = Manifest(
        name=f"{size} {form}, random weights", architecture={"kind": "wan", **config.to_dict()},
        schedule=Schedule(5.0, (1000.0, 750.0, 500.0, 250.0)) if causal else Schedule(5.0, 40),
        latent=Latent(config.out_channels, codec.spatial_factor, codec.temporal_factor), size=Size(480, 832, 81),
        codec=Part(codec.kind, codec.to_dict()), text_encoder=Part(RandomText.kind, {}),
        chunk_frames=3 if causal else None, confidence_head=None if head is None else head.config.to_dict(),
    )  # fmt: skip
    return Runtime(
        bundle=_bundle(manifest), model=model, head=head, codec=codec, device=place, dtype=number,
        text_encoder=RandomText(config, place, number),  # type: ignore[arg-type]  # has what the runtime asks of one
    )  # fmt: skip


def _config(size: str, form: str) -> WanConfig:
    if size not in SIZES:
        raise OptionError(f"size {size!r} is not known; there are {', '.join(SIZES)}")
    return replace(SIZES[size], form=form)


def _decoder(size: str, config: WanConfig) -> TinyConfig:
    """The published widths, except for the size that only tries the suite."""
    published = TinyConfig(config.out_channels)
    return replace(published, widths=(16, 8, 4, 4)) if size == "tiny" else published


def _filled(
    kind: type[Any], config: object, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Any:
    """A module with random weights, made in place: norms near one, biases zero, all else normal."""
    with torch.device("meta"):
        module: nn.Module = kind(config)
    module = module.to(dtype).to_empty(device=device)
    for name, parameter in module.named_parameters():
        last = name.rpartition(".")[2]
        if parameter.ndim > 1 or last not in ("weight", "bias"):
            nn.init.normal_(parameter, 0.0, SPREAD, generator=generator)
        else:
            nn.init.constant_(parameter, 1.0 if last == "weight" else 0.0)
    return module.requires_grad_(False).eval()


def _bundle(manifest: Manifest) -> Bundle:
    """A bundle that is nowhere on disk: what it says of itself is the manifest."""
    parts = ["generator", *(["confidence_head"] if manifest.confidence_head is not None else [])]
    nowhere = {part: {"random": TensorEntry("random", torch.float32, ())} for part in parts}
    return Bundle(Path("random weights"), manifest, nowhere, hashes_verified=False)
