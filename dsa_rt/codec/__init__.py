"""Text encoders, image encoders and video codecs, behind small interfaces.

Each implementation is a ``torch.nn.Module`` with one of the protocols below; ``kind`` is the name that a bundle's
manifest knows it by. :func:`build` makes the one that a bundle asks for; what a kind needs is imported only then.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from dsa_rt.errors import BundleError, OptionError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dsa_rt.bundle import Bundle
    from dsa_rt.codec.conv import ConvCodec
    from dsa_rt.codec.text import GrammarTextEncoder
    from dsa_rt.codec.tiny import TinyCodec, TinyDecoded
    from dsa_rt.codec.umt5 import Umt5TextEncoder
    from dsa_rt.codec.wan_vae import WanVaeCodec

    AnyCodec: TypeAlias = ConvCodec | WanVaeCodec | TinyCodec | TinyDecoded
    AnyTextEncoder: TypeAlias = GrammarTextEncoder | Umt5TextEncoder

# Section of the manifest -> kind -> the module with its ``from_bundle``: Bundle -> nn.Module without weights.
KINDS: Mapping[str, Mapping[str, str]] = {
    "codec": {"conv": "dsa_rt.codec.conv", "wan-vae": "dsa_rt.codec.wan_vae", "taehv": "dsa_rt.codec.tiny"},
    "text_encoder": {"demo-grammar": "dsa_rt.codec.text", "umt5": "dsa_rt.codec.umt5"},
    "image_encoder": {"clip-vision": "dsa_rt.codec.clip"},
}


def build(bundle: Bundle, section: str) -> nn.Module:
    """The module of a manifest section, its weights still to be loaded.

    Raises BundleError for a section that is absent or of an unknown kind, OptionError for a package that is missing.
    """
    part = getattr(bundle.manifest, section)
    if part is None:
        raise BundleError(
            f"bundle '{bundle.path}' was exported without its {section}, so that it cannot be run; export it again "
            "with --components and a folder that has one (a diffusers pipeline of the same model, for example)"
        )
    known = KINDS[section]
    if part.kind not in known:
        names = ", ".join(map(repr, known))
        raise BundleError(
            f"bundle '{bundle.path}': {section} kind {part.kind!r} is unknown; this version reads {names}"
        )
    module: nn.Module = importlib.import_module(known[part.kind]).from_bundle(bundle)
    return module


def require(name: str, purpose: str) -> ModuleType:
    """An optional package's module, by name; OptionError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(
            f"{purpose} needs the package {name.partition('.')[0]} ({error}): pip install 'dsa-rt[hf]'"
        ) from error


@runtime_checkable
class StreamDecoder(Protocol):
    """Decodes the latent frames of one clip, or of several side by side, in portions of any length."""

    def decode(self, latents: Tensor) -> Tensor:
        """The next normalised latents [B, z, f, h, w] -> their frames [B, 3, t, H, W] in [-1, 1].

        The first latent frame of a clip is one video frame, each later one ``temporal_factor`` frames. How a
        clip is portioned does not change a bit of the result.
        """
        ...


@runtime_checkable
class VideoCodec(Protocol):
    """Video in [-1, 1] <-> normalised latents, causal in time; sizes that do not fit raise ``ShapeError``."""

    kind: str

    @property
    def temporal_factor(self) -> int: ...

    @property
    def spatial_factor(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(z, latent frames, rows, columns) of a clip of that size."""
        ...

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, T, H, W] -> latents [B, z, f, h, w] of about unit variance per channel."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of whole clips [B, z, f, h, w] -> frames [B, 3, T, H, W]."""
        ...

    def stream_decoder(self, batch: int = 1) -> StreamDecoder: ...

    def decode_bytes(self, height: int, width: int) -> int:
        """Most that decoding one more latent frame of a stream holds, beside weights and latents [bytes]."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Sizes as plain JSON values, for the manifest."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts -> the rows that the generator's cross-attention reads."""

    kind: str

    @property
    def dim(self) -> int:
        """Width of a row."""
        ...

    @property
    def length(self) -> int:
        """Rows of a prompt, padding included."""
        ...

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """What its weights are best kept in beside a generator in ``dtype``."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, length, dim]; ``PromptError`` when one is not understood or too long."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Sizes as plain JSON values, for the manifest."""
        ...

    def assets(self) -> dict[str, bytes]:
        """Whole files that belong to it, by their names in ``dsa_rt.bundle.ASSETS``."""
        ...


@runtime_checkable
class ImageEncoder(Protocol):
    """Pictures -> the image rows that the generator's cross-attention reads beside the text."""

    kind: str

    @property
    def dim(self) -> int:
        """Width of a row."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, height, width, 3] uint8, of any size -> [B, rows, dim]."""
        ...
