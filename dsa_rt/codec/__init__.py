"""Text encoders and video codecs, behind two small interfaces.

Each implementation is a ``torch.nn.Module`` with one of the protocols below; ``kind`` is the name that a
bundle's manifest knows it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


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
        """Sizes as plain JSON values, for the manifest."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts -> the rows that the generator's cross-attention reads."""

    kind: str

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, words, text_dim]; ``PromptError`` when one is not understood or too long."""
        ...
