"""Wan's video codec: the parts of diffusers' ``AutoencoderKLWan``, with latents normalised, decoded as a stream.

diffusers decodes a clip latent frame by latent frame and carries the last two frames of every causal convolution along,
in lists that belong to the model. Here they belong to the stream decoder, so that a clip may come in portions, several
clips may be decoded side by side, and threads do not meet. The whole decode is the stream in one portion. Both VAEs are
read: Wan 2.1's (16 channels, 8x8 pixels) and Wan 2.2 TI2V's (48 channels, 16x16 pixels, 2x2 of them folded).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from dsa_rt.bundle import Bundle
from dsa_rt.codec import require
from dsa_rt.codec.shapes import StreamShape, check_frames, check_latents, latent_shape
from dsa_rt.errors import OptionError

_MODULE = "diffusers.models.autoencoders.autoencoder_kl_wan"
_COLOURS = 3


@dataclass(frozen=True)
class WanVaeConfig:
    """Configuration of ``AutoencoderKLWan`` by diffusers' names. Fields with a default came with Wan 2.2; older
    configurations lack them."""

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    attn_scales: tuple[float, ...] = ()
    dropout: float = 0.0
    decoder_base_dim: int | None = None
    is_residual: bool = False
    in_channels: int = _COLOURS
    out_channels: int = _COLOURS
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        wide = self.decoder_base_dim if self.decoder_base_dim is not None else self.base_dim
        patch = self.patch_size if self.patch_size is not None else 1
        for name, value, most in (("base_dim", self.base_dim, 4096), ("decoder_base_dim", wide, 4096),
                                  ("z_dim", self.z_dim, 4096), ("num_res_blocks", self.num_res_blocks, 64),
                                  ("patch_size", patch, 16)):  # fmt: skip
            if not 1 <= value <= most:
                raise OptionError(f"video codec {name} is {value}; expected 1 to {most}")
        if not 1 <= len(self.dim_mult) <= 8 or not all(1 <= factor <= 64 for factor in self.dim_mult):
            raise OptionError(f"video codec dim_mult is {list(self.dim_mult)}; expected 1 to 8 factors of 1 to 64")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise OptionError(
                f"video codec temperal_downsample has {len(self.temperal_downsample)} entries; "
                f"expected one less than dim_mult, {len(self.dim_mult) - 1}"
            )
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if len(values) != self.z_dim:
                raise OptionError(f"video codec {name} has {len(values)} values for {self.z_dim} channels")
        if min(self.latents_std) <= 0:
            raise OptionError("video codec latents_std has a value that is not above 0")
        folded = _COLOURS * patch**2
        spatial = 2 ** (len(self.dim_mult) - 1) * patch
        for name, found, expected in (
            ("in_channels", self.in_channels, folded), ("out_channels", self.out_channels, folded),
            ("scale_factor_spatial", self.scale_factor_spatial, spatial),
            ("scale_factor_temporal", self.scale_factor_temporal, 2 ** sum(self.temperal_downsample)),
        ):  # fmt: skip
            if found != expected:
                raise OptionError(f"video codec {name} is {found}, but its other sizes make it {expected}")

    def decode_bytes(self, height: int, width: int, dtype: torch.dtype) -> int:
        """Most that decoding one more latent frame of a stream holds [bytes]: feature maps at full resolution, counted
        on small codecs of the same depth; almost half of it is carried from frame to frame."""
        maps = 90 if self.is_residual else 55
        base = self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim
        pixels = height * width // (1 if self.patch_size is None else self.patch_size) ** 2
        return maps * base * self.dim_mult[0] * pixels * dtype.itemsize

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """What a ``vae/config.json`` says, as the keys and values of a manifest, still to be parsed. TI2V's published
        one has a ``clip_output``, which no version of diffusers reads: frames are always clipped."""
        given = {key: value for key, value in config.items() if not key.startswith("_") and key != "clip_output"}
        defaults = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in (defaults | given).items()}


class WanVaeCodec(nn.Module):
    """Video [B, 3, T, H, W] in [-1, 1] <-> latents [B, z, 1 + (T-1)/4, H/s, W/s] of about unit variance.

    Implements :class:`dsa_rt.codec.VideoCodec`; parameters have diffusers' names. Inputs are cast to the module's dtype
    and results have it; normalisation is in fp32.
    """

    kind = "wan-vae"

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        self.config = config
        self._library = require(_MODULE, "the video codec of Wan")
        vae = self._library.AutoencoderKLWan(**self.to_dict())
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def to_dict(self) -> dict[str, Any]:
        return WanVaeConfig.from_diffusers(asdict(self.config))

    @property
    def temporal_factor(self) -> int:
        return self.config.scale_factor_temporal

    @property
    def spatial_factor(self) -> int:
        return self.config.scale_factor_spatial

    @property
    def latent_channels(self) -> int:
        return self.config.z_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(z, latent frames, rows, columns) of a clip. :class:`ShapeError` when a size does not divide."""
        return latent_shape(self.latent_channels, self.temporal_factor, self.spatial_factor, frames, height, width)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Video [B, 3, T, H, W] in [-1, 1], T = 1 + 4k -> normalised latents [B, z, 1 + k, H/s, W/s].

        The mean of the posterior, as image-to-video uses it. Causal. Raises :class:`ShapeError`.
        """
        check_frames(frames)
        self.latent_shape(*frames.shape[2:])
        x = frames.to(self.dtype)
        if self.config.patch_size is not None:
            x = self._library.patchify(x, self.config.patch_size)
        caches = self._caches(self.encoder)
        groups = [x[:, :, :1], *x[:, :, 1:].split(self.temporal_factor, 2)] if x.shape[2] > 1 else [x]
        parts = [self.encoder(group, feat_cache=caches, feat_idx=[0]) for group in groups]
        raw = self.quant_conv(torch.cat(parts, 2))[:, : self.latent_channels].float()
        mean, std = self.statistics(raw.device)
        return ((raw - mean) / std).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, z, f, h, w] of a whole clip -> video [B, 3, 4f - 3, s*h, s*w] in [-1, 1]."""
        check_latents(latents, self.latent_channels, self.spatial_factor)
        return self.stream_decoder(latents.shape[0]).decode(latents)

    def stream_decoder(self, batch: int = 1) -> WanVaeStreamDecoder:
        """A decoder that takes a clip's latent frames in any portions, for ``batch`` clips side by side."""
        return WanVaeStreamDecoder(self, batch, self._caches(self.decoder))

    def decode_bytes(self, height: int, width: int) -> int:
        """Most that decoding one more latent frame of a stream holds [bytes]."""
        return self.config.decode_bytes(height, width, self.dtype)

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of raw latents, each [1, z, 1, 1, 1] fp32."""
        values = torch.tensor([self.config.latents_mean, self.config.latents_std], device=device)
        mean, std = values.view(2, 1, -1, 1, 1, 1)
        return mean, std

    def _caches(self, part: nn.Module) -> list[Any]:
        """Room for what each causal convolution carries from one portion to the next."""
        return [None] * sum(isinstance(module, self._library.WanCausalConv3d) for module in part.modules())


class WanVaeStreamDecoder:
    """Decodes one clip (or ``batch`` clips side by side) portion by portion; made by ``WanVaeCodec.stream_decoder``.

    Holds two frames of features before every causal convolution: a constant amount of memory for clips of any length.
    """

    def __init__(self, codec: WanVaeCodec, batch: int, caches: list[Any]) -> None:
        self.codec = codec
        self._caches = caches
        self._shape = StreamShape(codec.latent_channels, codec.spatial_factor, batch)
        self._statistics: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next normalised latents [B, z, f, h, w] -> their frames [B, 3, t, s*h, s*w], clamped to [-1, 1].

        t = 4f - 3 on the first call, 4f later. Raises :class:`ShapeError` when batch or size change on the way.
        """
        first = self._shape.check(latents)
        codec = self.codec
        if self._statistics is None:
            self._statistics = codec.statistics(latents.device)
        mean, std = self._statistics
        raw = (latents.float() * std + mean).to(codec.dtype)
        frames = []
        for index in range(raw.shape[2]):  # one at a time, so that portions do not change the arithmetic
            x = codec.post_quant_conv(raw[:, :, index : index + 1])
            begins = first and index == 0
            frames.append(codec.decoder(x, feat_cache=self._caches, feat_idx=[0], first_chunk=begins))
        video = torch.cat(frames, 2)
        if codec.config.patch_size is not None:
            video = codec._library.unpatchify(video, codec.config.patch_size)
        return video.clamp_(-1, 1)


def from_bundle(bundle: Bundle) -> WanVaeCodec:
    """The codec that a bundle describes, its weights still to be loaded."""
    config = bundle.config("codec", WanVaeConfig)
    with torch.device("meta"):
        return WanVaeCodec(config)
