"""What is worked out before a step runs: the token grid, the active set, and the memory it will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from dsa_rt.errors import ShapeError


@dataclass(frozen=True)
class TokenGrid:
    """Rows, columns and patch of one latent frame; tokens are numbered over (frame, row, column)."""

    height: int
    width: int
    patch: tuple[int, int, int] = (1, 2, 2)

    @classmethod
    def for_latents(cls, height: int, width: int, patch: tuple[int, int, int]) -> TokenGrid:
        """Grid of latents ``height`` x ``width``; :class:`ShapeError` where the patch does not divide them."""
        if patch[0] != 1:
            raise ShapeError(f"temporal patch is {patch[0]}; only 1 is supported")
        for name, size, step in (("height", height, patch[1]), ("width", width, patch[2])):
            if size < step or size % step:
                raise ShapeError(f"latent {name} {size} is not a multiple of the patch size {step}")
        return cls(height // patch[1], width // patch[2], patch)

    @property
    def tokens(self) -> int:
        """Tokens per latent frame."""
        return self.height * self.width

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] -> rows [B, F * tokens, ph * pw * C]; inside a row (ph, pw, channel)."""
        b, c, f, h, w = latents.shape
        _, ph, pw = self.patch
        rows = latents.reshape(b, c, f, h // ph, ph, w // pw, pw).permute(0, 2, 3, 5, 4, 6, 1)
        return rows.reshape(b, f * self.tokens, ph * pw * c)

    def unpatchify(self, rows: Tensor) -> Tensor:
        """Rows [B, F * tokens, ph * pw * C] -> latents [B, C, F, h, w]."""
        _, ph, pw = self.patch
        b, n, p = rows.shape
        f, c = n // self.tokens, p // (ph * pw)
        latents = rows.reshape(b, f, self.height, self.width, ph, pw, c).permute(0, 6, 1, 2, 4, 3, 5)
        return latents.reshape(b, c, f, self.height * ph, self.width * pw)


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs of a head for (frame, row, column), Wan's split: 128 -> 22, 21, 21."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def rope_table(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin [A, head_dim / 2] fp32 for positions [A, 3] (frame, row, column); angles in float64."""
    angles = []
    for axis, pairs in enumerate(rope_axes(head_dim)):
        frequency = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angles.append(positions[:, axis, None].double() * frequency)
    angle = torch.cat(angles, -1)
    return angle.cos().float(), angle.sin().float()


@dataclass(frozen=True)
class ActiveSet:
    """The tokens one forward pass computes. The model sees this, the rows and the cache, and no policy.

    tokens [A] int64: index in the whole sequence (noise is keyed by it); cos, sin [A, D / 2] fp32: RoPE at the
    tokens' own positions; modulation_rows [A] int64: row of the timestep table; slots [A] int64: the tokens' rows
    in the K/V cache (None without a cache); valid: rows [0, valid) of the cache are attended.

    segments, text_segments [S, 5] int64 on the CPU: which of the tokens attend to which rows of K/V and of text, where
    not all attend to all of them; see :func:`dsa_rt.ops.attention.active_attention`.
    """

    tokens: Tensor
    cos: Tensor
    sin: Tensor
    modulation_rows: Tensor
    slots: Tensor | None = None
    valid: int = 0
    parts: tuple[range, ...] = ()
    segments: Tensor | None = None
    text_segments: Tensor | None = None

    def room(self, parts: Sequence[range], valid: int) -> ActiveSet:
        """Some of these tokens, whose numbers, rotations and modulation rows are written later: as many as ``parts``
        have cache rows, which they take."""
        slots = torch.cat([torch.arange(0), *(torch.arange(part.start, part.stop) for part in parts)])
        tokens, cos, sin, modulation_rows = (
            t.new_zeros(len(slots), *t.shape[1:]) for t in (self.tokens, self.cos, self.sin, self.modulation_rows)
        )
        return ActiveSet(tokens, cos, sin, modulation_rows, slots.to(tokens.device), valid, tuple(parts))

    @cached_property
    def slot_range(self) -> tuple[int, int] | None:
        """(start, stop) when the slots are consecutive, so that a write is a plain copy; else None."""
        if self.slots is None or not len(self.slots):
            return None
        if self.parts:  # known here, where reading the slots would wait for the device
            adjoin = all(left.stop == right.start for left, right in pairwise(self.parts))
            return (self.parts[0].start, self.parts[-1].stop) if adjoin else None
        first, count = int(self.slots[0]), len(self.slots)
        consecutive = torch.equal(self.slots.cpu(), torch.arange(first, first + count))
        return (first, first + count) if consecutive else None


def frame_tokens(
    grid: TokenGrid,
    frames: range,
    head_dim: int,
    *,
    per_frame: bool,
    slots: Tensor | None = None,
    valid: int = 0,
    device: torch.device | str = "cpu",
) -> ActiveSet:
    """All tokens of consecutive latent frames, with a modulation row per frame or one row for all."""
    count = len(frames) * grid.tokens
    tokens = torch.arange(frames.start * grid.tokens, frames.stop * grid.tokens)
    inside = tokens % grid.tokens
    positions = torch.stack((tokens // grid.tokens, inside // grid.width, inside % grid.width), -1)
    cos, sin = rope_table(positions, head_dim)
    rows = tokens // grid.tokens - frames.start if per_frame else torch.zeros(count, dtype=torch.int64)
    return ActiveSet(
        tokens.to(device), cos.to(device), sin.to(device), rows.to(device),
        None if slots is None else slots.to(device), valid,
    )  # fmt: skip
