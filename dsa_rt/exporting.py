"""Writing a bundle from models in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsa_rt.bundle import Bundle, Latent, Manifest, Part, Schedule, Size, write_bundle
from dsa_rt.errors import OptionError
from dsa_rt.models.confidence import ConfidenceHead
from dsa_rt.models.wan import WanModel
from dsa_rt.policy import Calibration

if TYPE_CHECKING:
    from dsa_rt.codec import AnyTextEncoder
    from dsa_rt.codec.conv import ConvCodec
    from dsa_rt.codec.tiny import TinyCodec
    from dsa_rt.codec.wan_vae import WanVaeCodec


def export(
    path: str | os.PathLike[str],
    *,
    name: str,
    model: WanModel,
    codec: ConvCodec | WanVaeCodec | TinyCodec,
    text_encoder: AnyTextEncoder,
    schedule: Schedule,
    size: Size,
    head: ConfidenceHead | None = None,
    chunk_frames: int | None = None,
    window: int | None = None,
    sink: int | None = None,
    guidance: float = 1.0,
    fps: float = 16.0,
    calibration: Calibration | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle folder; nothing has that name until all of it is written and checked.

    schedule: few-step timesteps (falling) or a number of Euler steps, with the shift. size: what the generator was
    trained for [pixels, frames]. chunk_frames, window, sink [latent frames]: autoregressive generators. dtype: of all
    weights in the files. Raises BundleError, OutputError, OptionError.
    """
    if (model.config.form == "causal") != (chunk_frames is not None):
        raise OptionError(
            "chunk_frames belongs to a causal generator and to no other; model.config.form says which it is"
        )
    manifest = Manifest(
        name=name,
        architecture={"kind": "wan", **model.config.to_dict()},
        schedule=schedule,
        latent=Latent(codec.latent_channels, codec.spatial_factor, codec.temporal_factor),
        size=size,
        codec=Part(codec.kind, codec.to_dict()),
        text_encoder=Part(text_encoder.kind, text_encoder.to_dict()),
        fps=fps,
        chunk_frames=chunk_frames,
        window=window,
        sink=sink,
        guidance=guidance,
        confidence_head=head.config.to_dict() if head is not None else None,
        calibration=calibration.to_dict() if calibration is not None else None,
        training=dict(training or {}),
    )
    parts: dict[str, nn.Module] = {"generator": model, "codec": codec, "text_encoder": text_encoder}
    if head is not None:
        parts["confidence_head"] = head
    tensors = {key: _weights(part, dtype) for key, part in parts.items()}
    return write_bundle(path, manifest, tensors, overwrite=overwrite, assets=text_encoder.assets())


def _weights(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    state = module.state_dict()
    return {key: t.detach().to(dtype if t.is_floating_point() else t.dtype).contiguous() for key, t in state.items()}
