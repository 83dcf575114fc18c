"""Token rows against loops, and the active set of whole frames."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_rt.errors import ShapeError
from dsa_rt.plan import TokenGrid, frame_tokens, rope_axes, rope_table

SIZES = [(3, 2, 4, 6, (1, 2, 2)), (1, 1, 2, 2, (1, 2, 2)), (2, 5, 6, 4, (1, 3, 2)), (4, 3, 3, 5, (1, 1, 1)),
         (2, 4, 4, 9, (1, 4, 3))]  # fmt: skip


@pytest.mark.parametrize(("channels", "frames", "height", "width", "patch"), SIZES)
def test_rows_against_loops(channels: int, frames: int, height: int, width: int, patch: tuple[int, int, int]) -> None:
    """Row (frame, row, column), inside it (patch row, patch column, channel)."""
    latents = torch.randn(2, channels, frames, height, width)
    grid = TokenGrid.for_latents(height, width, patch)
    rows = grid.patchify(latents)
    _, ph, pw = patch
    expected = []
    for f in range(frames):
        for r in range(0, height, ph):
            for c in range(0, width, pw):
                values = [
                    latents[:, channel, f, r + i, c + j]
                    for i in range(ph)
                    for j in range(pw)
                    for channel in range(channels)
                ]
                expected.append(torch.stack(values, -1))
    assert torch.equal(rows, torch.stack(expected, 1))
    assert grid.tokens == (height // ph) * (width // pw)
    assert torch.equal(grid.unpatchify(rows), latents)


def test_patchify_takes_views() -> None:
    whole = torch.randn(2, 7, 3, 6, 8)
    view = whole[:, 1:4, ::2, :, 2:6]
    grid = TokenGrid.for_latents(6, 4, (1, 2, 2))
    assert torch.equal(grid.patchify(view), grid.patchify(view.clone()))


@pytest.mark.parametrize(
    ("height", "width", "patch", "message"),
    [
        (5, 4, (1, 2, 2), "latent height 5 is not a multiple of the patch size 2"),
        (4, 7, (1, 2, 3), "latent width 7 is not a multiple of the patch size 3"),
        (0, 4, (1, 2, 2), "latent height 0"),
        (4, 4, (2, 2, 2), "temporal patch is 2; only 1"),
    ],
)
def test_sizes_the_patch_does_not_divide(height: int, width: int, patch: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        TokenGrid.for_latents(height, width, patch)


def test_rope_axes() -> None:
    assert rope_axes(128) == (22, 21, 21)
    for head_dim in range(2, 260, 2):
        frame, row, column = rope_axes(head_dim)
        assert row == column == head_dim // 6 and frame + row + column == head_dim // 2 and frame >= row


@pytest.mark.parametrize("head_dim", [2, 8, 24, 64, 128])
def test_rope_table_in_plain_arithmetic(head_dim: int) -> None:
    positions = torch.tensor([(0, 0, 0), (1, 2, 3), (1023, 5, 88), (100_000, 0, 1)])
    cos, sin = rope_table(positions, head_dim)
    assert cos.dtype == sin.dtype == torch.float32
    for token, position in enumerate(positions.tolist()):
        column = 0
        for place, pairs in zip(position, rope_axes(head_dim), strict=True):
            for pair in range(pairs):
                angle = place * math.exp(-math.log(10000) * pair / pairs)
                assert cos[token, column] == pytest.approx(math.cos(angle), abs=1e-6)
                assert sin[token, column] == pytest.approx(math.sin(angle), abs=1e-6)
                column += 1
        assert column == cos.shape[1]


@pytest.mark.parametrize("per_frame", [False, True])
def test_frame_tokens(per_frame: bool) -> None:
    grid, frames = TokenGrid(3, 5), range(4, 7)
    slots = torch.randperm(45)
    active = frame_tokens(grid, frames, 24, per_frame=per_frame, slots=slots, valid=77)
    wanted = [(f, r, c) for f in frames for r in range(3) for c in range(5)]
    assert active.tokens.tolist() == [(f * 3 + r) * 5 + c for f, r, c in wanted]
    assert active.modulation_rows.tolist() == [f - 4 if per_frame else 0 for f, _, _ in wanted]
    cos, sin = rope_table(torch.tensor(wanted), 24)
    assert torch.equal(active.cos, cos) and torch.equal(active.sin, sin)
    assert torch.equal(active.slots, slots) and active.valid == 77
    assert frame_tokens(grid, frames, 24, per_frame=True).slots is None
