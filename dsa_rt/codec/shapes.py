"""Checks of sizes that all video codecs share. The first latent frame is one video frame, later ones several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsa_rt.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor


def latent_shape(
    channels: int, temporal: int, spatial: int, frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """(channels, latent frames, rows, columns) of a clip of that size; ShapeError where it does not divide."""
    if frames < 1 or frames % temporal != 1 % temporal:
        below = (frames - 1) // temporal * temporal + 1
        near = f"{below} or {below + temporal}" if frames > 0 else "1"
        raise ShapeError(
            f"{frames} frames do not fit the video codec: it needs 1 + {temporal}k frames, as {near} would be."
        )
    for name, size in (("height", height), ("width", width)):
        if size < spatial or size % spatial:
            below = size // spatial * spatial
            near = f"{below} or {below + spatial}" if below else f"{spatial}"
            raise ShapeError(
                f"{name} {size} is not divisible by {spatial}, as the video codec needs; {near} would be."
            )
    return channels, 1 + (frames - 1) // temporal, height // spatial, width // spatial


def check_frames(frames: Tensor) -> None:
    """ShapeError unless it is video [B, 3, T, H, W] in floating point."""
    if frames.ndim != 5 or frames.shape[1] != 3:
        raise ShapeError(f"frames must be [batch, 3, frames, height, width]; got {list(frames.shape)}.")
    if not frames.is_floating_point():
        raise ShapeError(f"frames must be floating point in [-1, 1]; got {frames.dtype}.")


def check_latents(latents: Tensor, channels: int, spatial: int) -> None:
    """ShapeError unless it is latents [B, channels, f, h, w] with at least one of each."""
    if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
        raise ShapeError(
            f"latents must be [batch, {channels}, latent frames, height/{spatial}, width/{spatial}], none of them "
            f"empty; got {list(latents.shape)}."
        )


class StreamShape:
    """The batch and size that a stream decoder was begun with."""

    def __init__(self, channels: int, spatial: int, batch: int) -> None:
        if batch < 1:
            raise ShapeError(f"a stream decoder needs a batch of at least 1; got {batch}.")
        self.channels, self.spatial, self.batch = channels, spatial, batch
        self._size: tuple[int, int] | None = None

    def check(self, latents: Tensor) -> bool:
        """Whether these are the clip's first latents; ShapeError when batch or size change on the way."""
        check_latents(latents, self.channels, self.spatial)
        size = (latents.shape[3], latents.shape[4])
        if latents.shape[0] != self.batch or self._size not in (None, size):
            rows, columns = self._size or size
            raise ShapeError(
                f"this stream decodes latents [{self.batch}, {self.channels}, any, {rows}, {columns}]; "
                f"got {list(latents.shape)}. Make another stream decoder for another clip."
            )
        first, self._size = self._size is None, size
        return first
