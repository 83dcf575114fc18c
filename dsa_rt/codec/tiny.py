"""A tiny decoder for Wan's latents, in the published TAEHV layout (taew2_1, taew2_2): what real-time users decode with.

::

    0 clamp   1 conv z -> 256   2 relu
    3-5   memory blocks of 256   6 twice the size    7 in time: 1   8 conv -> 128
    9-11  memory blocks of 128  12 twice the size   13 in time: 2  14 conv -> 64
    15-17 memory blocks of 64   18 twice the size   19 in time: 2  20 conv -> 64
    21 relu  22 conv -> 3 * p * p, p x p pixels folded into channels

A memory block reads the frame and, beside it on channels, the frame before it at the same depth; before the first it is
zero. It decodes normalised latents into [0, 1]. The first latent frame gives four frames too, of which the first three
are left out, so that frame counts are those of Wan's VAE. Its pictures are a preview of the VAE's, at a small part of
the work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from dsa_rt.bundle import Bundle
from dsa_rt.bundle.tensors import is_finite, read_header
from dsa_rt.codec.shapes import StreamShape, check_latents, latent_shape
from dsa_rt.errors import BundleError, OptionError

if TYPE_CHECKING:
    from dsa_rt.codec.wan_vae import WanVaeCodec

_GROWTH = (1, 2, 2)  # frames that each of the three stages makes of one
_TIMES = (7, 13, 19)  # where the stages do so
_COLOURS = 3


@dataclass(frozen=True)
class TinyConfig:
    """z: latent channels; widths of the three stages and of the last convolution; patch: pixels folded per side."""

    z: int
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    patch: int = 1

    def __post_init__(self) -> None:
        for name, value in (("z", self.z), *((f"widths[{i}]", width) for i, width in enumerate(self.widths))):
            if not 1 <= value <= 8192:
                raise OptionError(f"tiny decoder {name} is {value}; expected 1 to 8192")
        if not 1 <= self.patch <= 16:
            raise OptionError(f"tiny decoder patch is {self.patch}; expected 1 to 16")

    def decode_bytes(self, height: int, width: int, dtype: torch.dtype) -> int:
        """Most that decoding one more latent frame of a stream holds [bytes]: feature maps at full resolution, counted
        on small decoders whose widths have the published ratios."""
        return 10 * self.widths[-1] * (height * width // self.patch**2) * dtype.itemsize


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, added to the frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class Grow(nn.Module):
    """Each frame becomes ``factor`` frames, by a 1x1 convolution onto as many times the channels."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, h, w] -> [N * factor, width, h, w], the frames of one input side by side."""
        return self.conv(x).unflatten(1, (self.factor, -1)).flatten(0, 1)


class Clamp(nn.Module):
    """Latents softly limited to [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class TinyCodec(nn.Module):
    """Latents [B, z, f, h, w] -> video [B, 3, 4f - 3, s*h, s*w] in [-1, 1], s = 8 * patch; decodes only.

    Implements :class:`dsa_rt.codec.VideoCodec`, ``encode`` excepted. Parameters have the published names.
    """

    kind = "taehv"

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [Clamp(), nn.Conv2d(config.z, config.widths[0], 3, padding=1), nn.ReLU()]
        for width, following, factor in zip(config.widths, config.widths[1:], _GROWTH, strict=False):
            layers += [*(MemoryBlock(width) for _ in range(3)), nn.Upsample(scale_factor=2), Grow(width, factor),
                       nn.Conv2d(width, following, 3, padding=1, bias=False)]  # fmt: skip
        last = nn.Conv2d(config.widths[-1], _COLOURS * config.patch**2, 3, padding=1)
        self.decoder = nn.Sequential(*layers, nn.ReLU(), last)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self.config) | {"widths": list(self.config.widths)}

    @property
    def temporal_factor(self) -> int:
        return 4

    @property
    def spatial_factor(self) -> int:
        return 8 * self.config.patch

    @property
    def latent_channels(self) -> int:
        return self.config.z

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(z, latent frames, rows, columns) of a clip. :class:`ShapeError` when a size does not divide."""
        return latent_shape(self.config.z, self.temporal_factor, self.spatial_factor, frames, height, width)

    def encode(self, frames: Tensor) -> NoReturn:
        raise OptionError("the tiny decoder cannot encode; use a bundle with the video codec of its model")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents of whole clips -> video."""
        check_latents(latents, self.config.z, self.spatial_factor)
        return self.stream_decoder(latents.shape[0]).decode(latents)

    def stream_decoder(self, batch: int = 1) -> TinyStreamDecoder:
        """A decoder that takes a clip's latent frames in any portions, for ``batch`` clips side by side."""
        return TinyStreamDecoder(self, batch)

    def decode_bytes(self, height: int, width: int) -> int:
        """Most that decoding one more latent frame of a stream holds [bytes]."""
        return self.config.decode_bytes(height, width, self.dtype)


class TinyStreamDecoder:
    """Decodes one clip (or ``batch`` clips side by side) portion by portion; made by ``TinyCodec.stream_decoder``.

    Holds one frame of features before every memory block: a constant amount of memory for clips of any length.
    """

    def __init__(self, codec: TinyCodec, batch: int) -> None:
        self.codec, self.batch = codec, batch
        self._shape = StreamShape(codec.config.z, codec.spatial_factor, batch)
        self._before: dict[int, Tensor] = {}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next normalised latents [B, z, f, h, w] -> their frames [B, 3, t, s*h, s*w], clamped to [-1, 1].

        t = 4f - 3 on the first call, 4f later. Raises :class:`ShapeError` when batch or size change on the way.
        """
        first = self._shape.check(latents)
        frames = []
        for index in range(latents.shape[2]):  # one at a time, so that portions do not change the arithmetic
            grown = self._step(latents[:, :, index].to(self.codec.dtype))
            frames.append(grown[:, -1:] if first and index == 0 else grown)
        return torch.cat(frames, 1).mul_(2).sub_(1).clamp_(-1, 1).transpose(1, 2)

    def _step(self, x: Tensor) -> Tensor:
        """One latent frame [B, z, h, w] -> four frames [B, 4, 3, s*h, s*w] around [0, 1]."""
        for depth, layer in enumerate(self.codec.decoder):
            if isinstance(layer, MemoryBlock):
                x = layer(x, self._shifted(depth, x))
            else:
                x = layer(x)
        return F.pixel_shuffle(x, self.codec.config.patch).unflatten(0, (self.batch, -1))

    def _shifted(self, depth: int, x: Tensor) -> Tensor:
        """For each of the frames [B * t, C, h, w] the one before it; the last is kept for the next call."""
        clips = x.unflatten(0, (self.batch, -1))
        before = self._before.get(depth, torch.zeros_like(clips[:, :1]))
        self._before[depth] = clips[:, -1:].clone()
        return torch.cat([before, clips[:, :-1]], 1).flatten(0, 1)


class TinyDecoded(nn.Module):
    """A whole codec whose clips a tiny decoder decodes: for image-to-video, which must also encode."""

    def __init__(self, codec: WanVaeCodec, tiny: TinyCodec) -> None:
        super().__init__()
        self.codec, self.tiny = codec, tiny
        self.kind = codec.kind
        self.temporal_factor, self.spatial_factor = codec.temporal_factor, codec.spatial_factor
        self.latent_channels = codec.latent_channels
        self.latent_shape, self.encode = codec.latent_shape, codec.encode
        self.decode, self.stream_decoder = tiny.decode, tiny.stream_decoder
        self.decode_bytes = tiny.decode_bytes
        self.to_dict = codec.to_dict

    @property
    def dtype(self) -> torch.dtype:
        return self.tiny.dtype


def from_bundle(bundle: Bundle) -> TinyCodec:
    """The decoder that a bundle describes, its weights still to be loaded."""
    config = bundle.config("codec", TinyConfig)
    with torch.device("meta"):
        return TinyCodec(config)


def wanted(name: str) -> bool:
    """Whether a tensor of a published file belongs to the decoder; the encoder beside it is left out."""
    return not name.startswith("encoder.")


def config_of(shapes: Mapping[str, Sequence[int]], file: str) -> TinyConfig:
    """Sizes of the decoder with these tensors; BundleError that names the file and what it lacks."""
    widths = []
    for name in ("decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight"):
        if len(shapes.get(name, ())) != 4:
            raise BundleError(
                f"{file} has no tensor '{name}' [out, in, 3, 3]; expected a tiny decoder in the TAEHV layout, such as "
                "taew2_1.safetensors"
            )
        widths.append(shapes[name][0])
    last = shapes.get("decoder.22.weight", (0,))[0]
    patch = round((last / _COLOURS) ** 0.5)
    if last < 1 or _COLOURS * patch**2 != last:
        raise BundleError(f"{file}: decoder.22.weight makes {last} channels; expected 3 times a square number")
    return TinyConfig(shapes["decoder.1.weight"][1], (widths[0], widths[1], widths[2], widths[3]), patch)


def rows(name: str, config: TinyConfig) -> int | None:
    """How many of the first dimension's rows of a growing layer's tensor are used, None for other tensors.

    Files of models that grow more in time have more; the last frame that a stage makes is then the one that lies where
    this model has its only one, so that the last rows count.
    """
    place = re.fullmatch(r"decoder\.(\d+)\.conv\.weight", name)
    if place is None or int(place[1]) not in _TIMES:
        return None
    stage = _TIMES.index(int(place[1]))
    return config.widths[stage] * _GROWTH[stage]


def _cut(tensor: Tensor, count: int | None) -> Tensor:
    return tensor if count is None or tensor.ndim == 0 else tensor[-count:]


def load_tiny(path: Path, device: torch.device, dtype: torch.dtype) -> TinyCodec:
    """The decoder of a safetensors file, or of a folder that holds exactly one. BundleError for anything else."""
    file = _only_file(path)
    try:
        with open(file, "rb") as stream:
            entries = read_header(stream, file.stat().st_size, str(file))
        entries = {name: entry for name, entry in entries.items() if wanted(name)}
        config = config_of({name: entry.shape for name, entry in entries.items()}, str(file))
        with torch.device("meta"):
            codec = TinyCodec(config)
        expected = {name: tuple(tensor.shape) for name, tensor in codec.state_dict().items()}
        if odd := sorted(set(expected) ^ set(entries)):
            fault = "lacks" if odd[0] in expected else "has a surplus tensor"
            raise BundleError(f"{file} {fault} {odd[0]!r}; expected a tiny decoder in the TAEHV layout")
        with safe_open(file, framework="pt", device="cpu") as mapped:
            state = {name: _cut(mapped.get_tensor(name), rows(name, config)) for name in entries}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{file} cannot be read ({error}); name a tiny decoder's safetensors file") from error
    for name, tensor in state.items():
        if tuple(tensor.shape) != expected[name]:
            raise BundleError(f"{file}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {expected[name]}")
        state[name] = tensor.to(device, dtype, copy=True)
        if not is_finite(state[name]):
            raise BundleError(f"{file}: tensor {name!r} holds NaN or Inf, or does not fit into {dtype}")
    codec.load_state_dict(state, assign=True)
    return codec.requires_grad_(False).eval()


def _only_file(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise BundleError(f"the folder '{path}' has {len(files)} .safetensors files; name the tiny decoder's own")
        return files[0]
    if not path.is_file():
        raise BundleError(f"there is no tiny decoder '{path}'; check the path")
    if path.suffix != ".safetensors":
        raise BundleError(
            f"'{path}' is not a .safetensors file, and pickled weights are not opened at run time; "
            "dsa-rt export --decoder reads them into a bundle"
        )
    return path
