"""The chart: blocks that ran are filled, thumbnails are the frames below them, dots sit at their values."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from dsa_rt.chart import SPENT, chart, draw
from dsa_rt.errors import OptionError, OutputError
from dsa_rt.media import Video
from dsa_rt.stats import ChunkStats, Stats


def make(
    passes: list[int], scheduled: int = 4, confidence: bool = True, prompt: str = "a red square"
) -> Video:
    """Frames are flat; their blue counts up with the frame number, so that a thumbnail tells which it is."""
    chunks = tuple(
        ChunkStats(
            index=index,
            passes=spent,
            passes_scheduled=scheduled,
            frames=9 if index == 0 else 12,
            refined=spent > 1,
            confidences=(0.3 + 0.05 * index, *[None] * (spent - 2), *[0.2] * (spent > 1))
            if confidence
            else (),
            threshold=0.5 if confidence and index else None,
            denoise_ms=10 * spent,
            context_ms=5,
            decode_ms=5,
        )
        for index, spent in enumerate(passes)
    )
    stats = Stats(chunks=chunks, prompt=prompt, seed=0, policy="dsa", total_ms=1000)
    numbers = torch.arange(stats.frames).view(-1, 1, 1, 1)
    return Video(
        (numbers * 2 + torch.tensor([40, 0, 80])).clamp(max=255).to(torch.uint8).expand(-1, 8, 8, 3),
        None,
        16,
        stats,
    )


def blocks(figure: object, filled: bool) -> list[tuple[int, float]]:
    """(chunk, height of the lower edge) of the blocks in the row of passes."""
    from matplotlib.colors import to_rgba

    patches = figure.axes[1].patches  # type: ignore[attr-defined]
    found = [patch for patch in patches if (patch.get_facecolor() == to_rgba(SPENT)) == filled]
    return sorted((round(patch.get_x() + patch.get_width() / 2), patch.get_y()) for patch in found)


@pytest.mark.parametrize("passes", [[4, 1, 1, 3, 4, 2, 1], [1], [2, 2]])
def test_blocks_count_the_passes(passes: list[int]) -> None:
    video = make(passes)
    figure = draw(video.stats, video.numpy())
    for index, spent in enumerate(passes):
        ran = [low for chunk, low in blocks(figure, True) if chunk == index]
        saved = [low for chunk, low in blocks(figure, False) if chunk == index]
        assert (len(ran), len(saved)) == (spent, 4 - spent)
        assert not saved or max(ran) < min(saved)


def test_dots_sit_at_the_confidences() -> None:
    video = make([4, 1, 2])
    axes = draw(video.stats, video.numpy()).axes[2]
    dots = {
        item.get_label(): np.asarray(item.get_offsets())
        for item in axes.collections
        if hasattr(item, "get_sizes")
    }
    assert np.allclose(dots["first pass"], [(0, 0.30), (1, 0.35), (2, 0.40)])
    assert np.allclose(dots["last pass"], [(0, 0.2), (2, 0.2)])
    low, high = axes.get_ylim()
    assert low < 0.2 and high > 0.5  # the thresholds are in sight too


@pytest.mark.parametrize(
    "passes, pictures", [([4, 1, 1, 3, 4, 2, 1], 21), ([1], 9), ([1, 2] * 20, 20), ([1] * 25, 13)]
)
def test_thumbnails_belong_to_the_chunks_above_which_they_stand(passes: list[int], pictures: int) -> None:
    video = make(passes)
    shown = draw(video.stats, video.numpy()).axes[0].images
    assert len(shown) == pictures
    spans = video.stats.frame_spans()
    last = -1
    for picture in shown:
        left, right, _, _ = picture.get_extent()
        number = (int(np.asarray(picture.get_array())[0, 0, 2]) - 80) // 2
        if number < 87:  # the colour of later frames is cut off at 255
            assert number > last and (last := number) >= 0
            assert any(
                number in spans[chunk]
                for chunk in range(round(left - 0.49), round(right + 0.49) + 1)
                if chunk in range(len(spans))
            )


def test_picture_on_disk_shows_it(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    path = chart(make([4, 1, 4]), tmp_path / "c.png")
    pixels = np.asarray(image.open(path).convert("RGB")).astype(int)
    blue = np.abs(pixels - [int(SPENT[start : start + 2], 16) for start in (1, 3, 5)]).sum(-1) < 12
    columns = blue.sum(0)
    third = pixels.shape[1] // 3
    assert (
        columns[: 2 * third].max() > 3 * columns[third + third // 4 : 2 * third].max() > 0
    )  # 4 blocks against 1
    assert (pixels[0] == 255).all() and (pixels[:, -1] == 255).all()  # nothing runs out of the picture
    assert os.listdir(tmp_path) == ["c.png"]


@pytest.mark.parametrize("name, start", [("c.svg", b"<?xml"), ("c.pdf", b"%PDF")])
def test_other_formats(tmp_path: Path, name: str, start: bytes) -> None:
    assert chart(make([4, 1]), tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("prompt", ["", "$x_1 \\frac$ 100% 'a'", "a red square bouncing " * 40, "word" * 200])
def test_any_prompt_fits(prompt: str) -> None:
    video = make([4, 1], prompt=prompt)
    figure = draw(video.stats, video.numpy())
    figure.canvas.draw()
    for text in figure.texts:
        assert text.get_window_extent().x1 <= figure.bbox.width


def test_without_confidence_and_with_many_steps() -> None:
    video = make([50], scheduled=50, confidence=False)
    figure = draw(video.stats, video.numpy())
    assert len(figure.axes) == 2
    (bar,) = figure.axes[1].patches
    assert bar.get_height() == 50


def test_bad_input(tmp_path: Path) -> None:
    video = make([4, 1])
    with pytest.raises(OutputError, match=r"\.png, \.svg, \.pdf"):
        chart(video, tmp_path / "c.jpeg")
    with pytest.raises(OptionError, match="no statistics"):
        chart(Video(video.frames), tmp_path / "c.png")
    with pytest.raises(OptionError, match="20 frames for statistics over 21"):
        draw(video.stats, video.numpy()[:20])
    assert os.listdir(tmp_path) == []
