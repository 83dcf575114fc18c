"""Text encoders and video codecs, behind two small interfaces and found by the kind a bundle names.

A codec or text encoder is a ``torch.nn.Module`` that has one of the protocols below, is built by
``from_dict(sizes)`` from plain JSON values and gets its weights by ``load_state_dict``.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dsa_rt.errors import BundleError

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class StreamDecoder(Protocol):
    """Decodes the latent frames of one clip, or of several side by side, in portions of any length."""

    def decode(self, latents: Tensor) -> Tensor:
        """The next normalised latents [B, z, f, h, w] -> their frames [B, 3, t, H, W] in [-1, 1].

        The first latent frame of a clip is one video frame, each later one ``temporal_factor`` frames. How a clip
        is portioned does not change a bit of the result.
        """
        ...


@runtime_checkable
class VideoCodec(Protocol):
    """Video in [-1, 1] <-> normalised latents, causal in time; sizes that do not fit raise ``ShapeError``."""

    kind: str
    temporal_factor: int
    spatial_factor: int

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

    def to_dict(self) -> dict[str, Any]:
        """Sizes as plain JSON values, what ``from_dict`` takes."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts -> the rows that the generator's cross-attention reads."""

    kind: str

    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts -> [B, words, text_dim]; ``PromptError`` when one is not understood or too long."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Sizes as plain JSON values, what ``from_dict`` takes."""
        ...


VIDEO_CODECS = MappingProxyType({"conv": "dsa_rt.codec.conv:ConvCodec"})
TEXT_ENCODERS = MappingProxyType({"grammar": "dsa_rt.codec.text:GrammarTextEncoder"})


def video_codec_class(kind: str) -> Any:
    """The class of a video codec by the kind that a bundle names; :class:`BundleError` when there is none."""
    return _find(kind, VIDEO_CODECS, "video codec")


def text_encoder_class(kind: str) -> Any:
    """The class of a text encoder by the kind that a bundle names; :class:`BundleError` when there is none."""
    return _find(kind, TEXT_ENCODERS, "text encoder")


def _find(kind: str, known: MappingProxyType[str, str], what: str) -> Any:
    if kind not in known:
        raise BundleError(f"unknown {what} kind {kind!r}; this version of dsa_rt knows: {', '.join(known)}.")
    module, name = known[kind].split(":")
    return getattr(import_module(module), name)
