"""What an image-to-video run is given beside noise and text: further input channels, and tokens that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsa_rt.errors import ShapeError
from dsa_rt.plan import TokenGrid

if TYPE_CHECKING:
    from dsa_rt.codec import AnyCodec


@dataclass(frozen=True, eq=False)
class Conditions:
    """extra [1, N, E]: rows of further input channels (Wan I2V: mask and condition latents), in the order of latents
    rows, (patch row, patch column, channel); they follow the noise channels of each patch element.

    fixed [n] int64: tokens that are conditions at sigma 0 (Wan 2.2 TI2V: those of the first frame), rising;
    fixed_rows [1, n, P]: their clean rows. They never move, and their modulation is that of timestep 0.

    Raises :class:`~dsa_rt.errors.ShapeError`.
    """

    extra: Tensor | None = None
    fixed_rows: Tensor | None = None
    fixed: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.fixed is None) != (self.fixed_rows is None):
            raise ShapeError("conditions: fixed and fixed_rows belong together; give both or neither")
        if self.extra is not None and (self.extra.ndim != 3 or self.extra.shape[0] != 1):
            raise ShapeError(f"conditions: extra has shape {list(self.extra.shape)}; expected [1, N, E]")
        if self.fixed is not None and self.fixed_rows is not None:
            if self.fixed.ndim != 1 or self.fixed.dtype != torch.int64 or not len(self.fixed):
                raise ShapeError(
                    f"conditions: fixed is {self.fixed.dtype} of shape {list(self.fixed.shape)}; expected int64 [n]"
                )
            if bool((self.fixed[1:] <= self.fixed[:-1]).any()):
                raise ShapeError("conditions: fixed token indices do not rise; sort them, each once")
            if self.fixed_rows.ndim != 3 or self.fixed_rows.shape[:2] != (1, len(self.fixed)):
                raise ShapeError(
                    f"conditions: fixed_rows has shape {list(self.fixed_rows.shape)}; expected "
                    f"[1, {len(self.fixed)}, P]"
                )

    @property
    def count(self) -> int:
        """Tokens that never move."""
        return 0 if self.fixed is None else len(self.fixed)

    def check(self, tokens: int, width: int, input_width: int) -> None:
        """:class:`~dsa_rt.errors.ShapeError` unless all fits N tokens of latent rows ``width`` wide and a model that
        reads rows ``input_width`` wide."""
        extra = 0 if self.extra is None else self.extra.shape[2]
        if self.extra is not None and self.extra.shape[1] != tokens:
            raise ShapeError(f"conditions: extra has {self.extra.shape[1]} rows; expected {tokens}, one for each token")
        if width + extra != input_width:
            raise ShapeError(
                f"conditions: latent rows of {width} values and {extra} extra ones; the generator reads rows of "
                f"{input_width}"
            )
        if self.fixed is not None and self.fixed_rows is not None:
            first, last = int(self.fixed[0]), int(self.fixed[-1])
            if first < 0 or last >= tokens or self.count >= tokens:
                raise ShapeError(
                    f"conditions: {self.count} fixed tokens from {first} to {last}; expected indices in [0, {tokens}), "
                    "and at least one token that moves"
                )
            if self.fixed_rows.shape[2] != width:
                raise ShapeError(f"conditions: fixed_rows are {self.fixed_rows.shape[2]} wide; expected {width}")

    def place(self, x: Tensor) -> None:
        """Write the clean rows into x [1, N, P]."""
        if self.fixed is not None and self.fixed_rows is not None:
            x[:, self.fixed] = self.fixed_rows.to(x.dtype)

    def modulation_rows(self, tokens: int, device: torch.device) -> Tensor:
        """[N] int64: the modulation row of every token, where 0 is that of the step's own timestep and 1 that of 0."""
        rows = torch.zeros(tokens, dtype=torch.int64, device=device)
        if self.fixed is not None:
            rows[self.fixed] = 1
        return rows


@torch.no_grad()
def image_conditions(
    kind: str, codec: AnyCodec, image: Tensor, frames: int, grid: TokenGrid, device: torch.device
) -> Conditions:
    """Of a clip of ``frames`` frames that begins with image [H, W, 3] uint8.

    kind: "concat" (Wan 2.1 and 2.2 A14B): a mask of as many channels as a latent frame stands for frames, 1 in the
    first latent frame, and the latents of the image followed by grey frames. "first-frame" (Wan 2.2 TI2V): the latents
    of the image alone are the first latent frame.
    """
    pixels = (image.to(device, torch.float32) / 255 * 2 - 1).permute(2, 0, 1)[None, :, None]
    if kind == "first-frame":
        rows = grid.patchify(codec.encode(pixels).float())
        return Conditions(None, rows, torch.arange(grid.tokens, device=device))
    video = torch.cat([pixels, pixels.new_zeros(1, 3, frames - 1, *image.shape[:2])], 2)
    latents = codec.encode(video).float()
    mask = latents.new_zeros(1, codec.temporal_factor, *latents.shape[2:])
    mask[:, :, 0] = 1
    return Conditions(grid.patchify(torch.cat([mask, latents], 1)))
