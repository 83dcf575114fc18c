"""The demo's video codec: small, causal, and cheap enough to decode on one CPU core while a clip is generated.

Everything runs at the latent frame rate. The four frames behind one latent frame are stacked on channels and
folded 4x4 into a quarter of the resolution (192 channels at 16x16 for 64x64 video), so no convolution ever sees
full resolution. Time enters only through causal taps: each block also reads the previous latent frame's features
through a 1x1 convolution. The first video frame has a latent frame of its own (it is repeated four times on the
way in; one of four is kept on the way out), which is the layout of Wan's codec: T = 1 + 4k frames, 1 + k latents.

Beside the network, encoder and decoder have a linear path from a cell's 8x8 pixels of four frames to its latents and
back. Training starts it at the principal components of the data, so that the network only learns what they lack.

Decoding always goes latent frame by latent frame, with the same tensors in every call, so a clip decoded in
chunks of any size has the same bits as the clip decoded at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsa_rt.bundle import Bundle
from dsa_rt.codec.shapes import StreamShape, check_frames, check_latents, latent_shape

TIME = 4  # video frames per latent frame
FOLD = 4  # pixels per side folded into channels before the first convolution
SPACE = 8  # pixels per side of a latent
COLOURS = 3


@dataclass(frozen=True)
class ConvCodecConfig:
    """Sizes of :class:`ConvCodec`. ``width`` counts channels at a quarter of the resolution, ``width_latent`` at
    an eighth; the block counts are for encoder and decoder at each of the two."""

    z: int = 12
    width: int = 64
    width_latent: int = 96
    encoder_blocks: int = 2
    encoder_blocks_latent: int = 1
    decoder_blocks_latent: int = 2
    decoder_blocks: int = 3

    def decode_bytes(self, height: int, width: int, dtype: torch.dtype) -> int:
        """Most that decoding one more latent frame of a stream holds [bytes], counted on small codecs."""
        frames = 3 * TIME * COLOURS * height * width
        features = 6 * self.width * (height // FOLD) * (width // FOLD)
        return (frames + features) * dtype.itemsize


class _Folded:
    """History for a batch in which the latent frames of a clip lie side by side: a shift by one frame."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def previous(self, features: Tensor) -> Tensor:
        clips = features.unflatten(0, (-1, self.frames))
        shifted = torch.cat([torch.zeros_like(clips[:, :1]), clips[:, :-1]], dim=1)
        return shifted.flatten(0, 1)


class _Carried:
    """History for one latent frame at a time: each block finds what it left here a latent frame ago."""

    def __init__(self, blocks: int) -> None:
        self.features: list[Tensor | None] = [None] * blocks
        self.block = 0

    def rewind(self) -> None:
        self.block = 0

    def previous(self, features: Tensor) -> Tensor | None:
        before, self.features[self.block] = self.features[self.block], features
        self.block += 1
        return before


class CausalBlock(nn.Module):
    """Residual block: two 3x3 convolutions, the first joined by a 1x1 tap on the previous latent frame.

    There is no normalisation layer: the second convolution starts at zero, which is what lets a network of this
    depth train without one, and a flat background stays flat.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.tap = nn.Conv2d(channels, channels, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, history: _Folded | _Carried) -> Tensor:
        active = F.silu(x)
        before = history.previous(active)
        hidden = self.first(active)
        if before is not None:
            hidden = hidden + self.tap(before)
        return x + self.second(F.silu(hidden))


class Encoder(nn.Module):
    """Stacked frames [N, 12, H, W] -> raw latents [N, z, H/8, W/8]."""

    def __init__(self, config: ConvCodecConfig) -> None:
        super().__init__()
        wide, deep = config.width, config.width_latent
        self.stem = nn.Conv2d(TIME * COLOURS * FOLD**2, wide, 3, padding=1)
        self.blocks = nn.ModuleList(CausalBlock(wide) for _ in range(config.encoder_blocks))
        self.down = nn.Conv2d(wide, deep, 2, stride=2)
        self.blocks_latent = nn.ModuleList(CausalBlock(deep) for _ in range(config.encoder_blocks_latent))
        self.head = nn.Conv2d(deep, config.z, 3, padding=1)
        self.linear = nn.Conv2d(TIME * COLOURS * FOLD**2, config.z, 2, stride=2, bias=False)

    def forward(self, stacked: Tensor, history: _Folded | _Carried) -> Tensor:
        folded = F.pixel_unshuffle(stacked, FOLD).contiguous(memory_format=torch.channels_last)
        x = self.stem(folded)
        for block in self.blocks:
            x = block(x, history)
        x = self.down(x)
        for block in self.blocks_latent:
            x = block(x, history)
        return self.head(F.silu(x)) + self.linear(folded)


class Decoder(nn.Module):
    """Raw latents [N, z, h, w] -> stacked frames [N, 12, 8h, 8w]."""

    def __init__(self, config: ConvCodecConfig) -> None:
        super().__init__()
        wide, deep = config.width, config.width_latent
        self.stem = nn.Conv2d(config.z, deep, 3, padding=1)
        self.blocks_latent = nn.ModuleList(CausalBlock(deep) for _ in range(config.decoder_blocks_latent))
        self.up = nn.Conv2d(deep, 4 * wide, 1)
        self.blocks = nn.ModuleList(CausalBlock(wide) for _ in range(config.decoder_blocks))
        self.head = nn.Conv2d(wide, TIME * COLOURS * FOLD**2, 3, padding=1)
        self.linear = nn.Conv2d(config.z, 4 * TIME * COLOURS * FOLD**2, 1, bias=False)
        self.block_count = config.decoder_blocks_latent + config.decoder_blocks

    def forward(self, latents: Tensor, history: _Folded | _Carried) -> Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last)
        x = self.stem(latents)
        for block in self.blocks_latent:
            x = block(x, history)
        x = F.pixel_shuffle(self.up(x), 2).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x, history)
        x = self.head(F.silu(x)) + F.pixel_shuffle(self.linear(latents), 2)
        return F.pixel_shuffle(x, FOLD)


class ConvCodec(nn.Module):
    """Video [B, 3, T, H, W] in [-1, 1] <-> latents [B, z, 1 + (T-1)/4, H/8, W/8] of about unit variance.

    Implements :class:`dsa_rt.codec.VideoCodec`. Inputs are cast to the module's dtype and results have it;
    fp32 and bf16 are both meant to be used. ``latent_mean`` and ``latent_std`` [z] are measured after training.
    """

    kind = "conv"
    temporal_factor = TIME
    spatial_factor = SPACE

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: ConvCodecConfig | None = None) -> None:
        super().__init__()
        self.config = config or ConvCodecConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.register_buffer("latent_mean", torch.zeros(self.config.z))
        self.register_buffer("latent_std", torch.ones(self.config.z))
        for module in self.modules():
            stays_zero = isinstance(module, nn.Conv2d) and not module.weight.any()  # the last one of a block
            if isinstance(module, nn.Conv2d) and not stays_zero:
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for head in (self.encoder.head, self.decoder.head):  # at first the codec is its linear paths
            nn.init.zeros_(head.weight)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, sizes: dict[str, Any]) -> ConvCodec:
        """Untrained codec with the sizes that :meth:`to_dict` wrote."""
        return cls(ConvCodecConfig(**sizes))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self.config)

    @property
    def latent_channels(self) -> int:
        return self.config.z

    @property
    def dtype(self) -> torch.dtype:
        return self.latent_mean.dtype

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(z, latent frames, rows, columns) of a clip. :class:`ShapeError` when a size does not divide."""
        return latent_shape(self.config.z, TIME, SPACE, frames, height, width)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Video [B, 3, T, H, W] in [-1, 1], T = 1 + 4k -> normalised latents [B, z, 1 + k, H/8, W/8].

        Causal: latent frame k depends on video frames 0 .. 4k only. Raises :class:`ShapeError`.
        """
        check_frames(frames)
        self.latent_shape(*frames.shape[2:])
        first = frames[:, :, :1].expand(-1, -1, TIME, -1, -1)
        raw = self.encode_groups(torch.cat([first, frames[:, :, 1:]], dim=2).to(self.dtype))
        return (raw - self._column(self.latent_mean)) / self._column(self.latent_std)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, z, f, h, w] of a whole clip -> video [B, 3, 4f - 3, 8h, 8w] in [-1, 1]."""
        check_latents(latents, self.config.z, SPACE)
        return self.stream_decoder(latents.shape[0]).decode(latents)

    def stream_decoder(self, batch: int = 1) -> ConvStreamDecoder:
        """A decoder that takes a clip's latent frames in any portions, for ``batch`` clips side by side."""
        return ConvStreamDecoder(self, batch)

    def decode_bytes(self, height: int, width: int) -> int:
        """Most that decoding one more latent frame of a stream holds [bytes]."""
        return self.config.decode_bytes(height, width, self.dtype)

    def encode_groups(self, frames: Tensor) -> Tensor:
        """Groups of four frames [B, 3, 4f, H, W] -> raw latents [B, z, f, h, w], with gradients (for training)."""
        batch, _, count, height, width = frames.shape
        stacked = frames.unflatten(2, (-1, TIME)).permute(0, 2, 3, 1, 4, 5)
        stacked = stacked.reshape(batch * (count // TIME), TIME * COLOURS, height, width)
        raw = self.encoder(stacked, _Folded(count // TIME))
        return raw.unflatten(0, (batch, -1)).transpose(1, 2)

    def decode_groups(self, raw: Tensor) -> Tensor:
        """Raw latents [B, z, f, h, w] -> groups of four frames [B, 3, 4f, 8h, 8w], with gradients (for training)."""
        batch, _, count, _, _ = raw.shape
        stacked = self.decoder(raw.transpose(1, 2).flatten(0, 1), _Folded(count))
        grouped = stacked.unflatten(1, (TIME, COLOURS)).unflatten(0, (batch, count))
        return grouped.permute(0, 3, 1, 2, 4, 5).flatten(2, 3)

    def _column(self, per_channel: Tensor) -> Tensor:
        return per_channel.view(1, -1, 1, 1, 1)


class ConvStreamDecoder:
    """Decodes one clip (or ``batch`` clips side by side) portion by portion; made by ``ConvCodec.stream_decoder``.

    Holds each block's features of the latest latent frame: a constant amount of memory for clips of any length.
    """

    def __init__(self, codec: ConvCodec, batch: int) -> None:
        self.codec = codec
        self._shape = StreamShape(codec.config.z, SPACE, batch)
        self._history = _Carried(codec.decoder.block_count)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next normalised latents [B, z, f, h, w] -> their frames [B, 3, t, 8h, 8w], clamped to [-1, 1].

        t = 4f - 3 on the first call, 4f later. Raises :class:`ShapeError` when batch or size change on the way.
        """
        first = self._shape.check(latents)
        codec = self.codec
        raw = latents.to(codec.dtype) * codec._column(codec.latent_std) + codec._column(codec.latent_mean)
        frames = []
        for index in range(raw.shape[2]):
            self._history.rewind()
            stacked = codec.decoder(raw[:, :, index], self._history)
            group = stacked.unflatten(1, (TIME, COLOURS)).transpose(1, 2)
            frames.append(group[:, :, -1:] if first and index == 0 else group)
        return torch.cat(frames, dim=2).clamp_(-1, 1)


def from_bundle(bundle: Bundle) -> ConvCodec:
    """The codec that a bundle describes, its weights still to be loaded."""
    return ConvCodec(bundle.config("codec", ConvCodecConfig))
