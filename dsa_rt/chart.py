"""The picture of a generation: passes and confidence per chunk under thumbnails of its frames."""

from __future__ import annotations

import math
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsa_rt.errors import OptionError
from dsa_rt.output import CHART_FORMATS, check_output, whole_file

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dsa_rt.media import Video
    from dsa_rt.stats import Stats

INK, QUIET, PALE, SPENT, SURE = "#1d2433", "#6b7485", "#cfd6e1", "#2f6bdb", "#e2711d"
WIDTH, MARGIN, LABELS = 13.0, 0.35, 1.45  # inches: the picture, its border, the column of row names
CELLS = 8  # up to this many scheduled passes are drawn one by one


def chart(video: Video, path: str | os.PathLike[str]) -> Path:
    """Draws `video` (its frames and stats) to a PNG, SVG or PDF file and returns the path.

    Raises OptionError when the video carries no stats, OutputError when the file cannot be written.
    """
    target = check_output(path, CHART_FORMATS)
    if video.stats is None or not video.stats.chunks:
        raise OptionError("this video carries no statistics, so there is nothing to chart")
    figure = draw(video.stats, video.numpy())
    with whole_file(target) as file:
        figure.savefig(file, dpi=160, facecolor="white")
    return target


def draw(stats: Stats, frames: numpy.ndarray[Any, Any]) -> Figure:
    """The chart as a matplotlib figure (no pyplot, no global state).

    frames: uint8 [T, H, W, 3], all frames of the chunks in `stats`; a different T is an OptionError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if len(frames) != stats.frames:
        raise OptionError(
            f"{len(frames)} frames for statistics over {stats.frames}: give the frames of that generation"
        )
    with_confidence = any(chunk.last_confidence is not None for chunk in stats.chunks)
    count = len(stats.chunks)
    inner = WIDTH - 2 * MARGIN - LABELS
    group, picks = _thumbnail_grid(count, max(chunk.frames for chunk in stats.chunks))
    thumb_width = 0.94 * group / picks
    thumb_height = thumb_width * inner / count * frames.shape[1] / frames.shape[2]

    title = textwrap.wrap(f"“{stats.prompt}”", 82, max_lines=3, placeholder=" …”") or [""]
    heights = {
        "title": 0.33 * len(title) + 0.42,
        "frames": thumb_height + 0.2,
        "passes": 1.5,
        "confidence": 1.95 if with_confidence else 0.0,
        "chunk names": 0.5 if count <= 12 else 0.3,
    }
    height = sum(heights.values()) + 2 * MARGIN
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    _title(figure, title, stats, height)

    top = height - MARGIN - heights["title"]

    def axes(row: str, above: float = 0.0, below: float = 0.0) -> Axes:
        nonlocal top
        tall = heights[row] - above - below
        box = (MARGIN + LABELS, top - above - tall, inner, tall)
        top -= heights[row]
        made = figure.add_axes((box[0] / WIDTH, box[1] / height, box[2] / WIDTH, box[3] / height))
        made.set_xlim(-0.5, count - 0.5)
        for side in made.spines.values():
            side.set_visible(False)
        made.tick_params(length=0, labelsize=10, colors=QUIET, labelbottom=False)
        return made

    _thumbnails(axes("frames", below=0.2), stats, frames, group, picks, thumb_width)
    lowest = axes("passes")
    _passes(lowest, stats, inner / count)
    if with_confidence:
        lowest = axes("confidence", above=0.25)
        _confidence(lowest, stats)
    _chunk_names(lowest, stats)
    return figure


def _title(figure: Figure, title: list[str], stats: Stats, height: float) -> None:
    text = figure.text(
        MARGIN / WIDTH,
        1 - MARGIN / height,
        "\n".join(title),
        va="top",
        size=17,
        weight="bold",
        color=INK,
        linespacing=1.25,
        parse_math=False,
    )
    room = (WIDTH - 2 * MARGIN) * figure.dpi
    text.set_fontsize(17 * min(1.0, room / text.get_window_extent().width))  # lines of wide letters
    words = [f"policy {stats.policy}", f"{stats.model_calls} of {stats.model_calls_scheduled} model calls"]
    if stats.fps_end_to_end is not None:
        words.append(f"{stats.fps_end_to_end:.1f} frames per second end to end")
    if stats.fps_denoise is not None:
        words.append(f"{stats.fps_denoise:.1f} denoise only")
    words.append(f"seed {stats.seed}")
    figure.text(
        MARGIN / WIDTH,
        1 - (MARGIN + 0.33 * len(title) + 0.08) / height,
        "   ·   ".join(words),
        va="top",
        size=12,
        color=QUIET,
        parse_math=False,
    )


def _thumbnail_grid(count: int, frames: int) -> tuple[int, int]:
    """(chunks that share a group of thumbnails, thumbnails in a group): about 21 in all, 3 per chunk."""
    if count <= 10:
        return 1, min(max(3, 12 // count), max(frames, 1))
    return math.ceil(count / 24), 1


def _thumbnails(
    axes: Axes, stats: Stats, frames: numpy.ndarray[Any, Any], group: int, picks: int, width: float
) -> None:
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    spans = stats.frame_spans()
    for first in range(0, len(spans), group):
        members = [index for span in spans[first : first + group] for index in span]
        share = len(spans[first : first + group]) / group  # the last group may be short
        shown = max(1, round(picks * share))
        left = first - 0.5 + 0.03 * group
        for pick in range(shown):
            if not members:
                continue
            frame = frames[members[int((pick + 0.5) * len(members) / shown)]]
            start = left + pick * width
            axes.imshow(
                frame, extent=(start, start + width * 0.96, 0, 1), aspect="auto", interpolation="lanczos"
            )
    axes.set_xlim(-0.5, len(spans) - 0.5)  # imshow moves the limits
    axes.set_ylim(0, 1)


def _passes(axes: Axes, stats: Stats, column: float) -> None:
    """Passes as blocks that stack up: filled when they ran, pale outlines when they were saved."""
    from matplotlib.patches import Rectangle

    most = max(chunk.passes_scheduled for chunk in stats.chunks)
    step = 1 if most <= CELLS else math.ceil(most / 5 / 5) * 5
    gap = 0.12 if most <= CELLS else 0.0
    half = min(0.3, 0.5 / column)  # half a block's width in chunks: no wider than an inch
    for chunk in stats.chunks:
        blocks = [(number, number + 1) for number in range(chunk.passes_scheduled)]
        if most > CELLS:
            blocks = [(0, chunk.passes), (chunk.passes, chunk.passes_scheduled)]
        for low, high in blocks:
            if high > low:
                ran = high <= chunk.passes
                axes.add_patch(
                    Rectangle(
                        (chunk.index - half, low + gap / 2),
                        2 * half,
                        high - low - gap,
                        linewidth=1.1,
                        facecolor=SPENT if ran else "white",
                        edgecolor=SPENT if ran else PALE,
                    )
                )
    axes.set_ylim(0, most)
    axes.set_yticks([tick - (0.5 if most <= CELLS else 0) for tick in range(step, most + 1, step)])
    axes.set_yticklabels([str(tick) for tick in range(step, most + 1, step)])
    axes.set_xticks([])
    _row_name(axes, "passes", f"{stats.passes} of {stats.passes_scheduled}")


def _confidence(axes: Axes, stats: Stats) -> None:
    """Dots: the head after the first pass; rings: after the last; dashes: the threshold for the first."""
    chunks = stats.chunks
    bars = [(chunk.index, chunk.threshold) for chunk in chunks if chunk.threshold is not None]
    bars = [bar for bar in bars if 0 < bar[1] < 1]  # 0 and 1 mean never and always: nothing to compare with
    values = [value for chunk in chunks for value in chunk.confidences if value is not None]
    values += [level for _, level in bars]
    low, high = min(values), max(values)
    pad = max(0.25 * (high - low), 0.03)
    axes.set_ylim(max(-0.02, low - pad), min(1.02, high + pad))
    axes.grid(axis="y", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=4)
    axes.set_xticks([])
    dot = 46 if len(chunks) <= 24 else 14
    handles: list[Any] = []
    if bars:
        places, levels = zip(*bars, strict=True)
        handles.append(
            axes.hlines(
                levels,
                [place - 0.3 for place in places],
                [place + 0.3 for place in places],
                color=QUIET,
                linewidth=1.6,
                linestyles=(0, (3, 2)),
                label="threshold",
            )
        )
    pairs = [
        (chunk.index, chunk.first_confidence, chunk.confidences[-1])
        for chunk in chunks
        if len(chunk.confidences) > 1
        and chunk.first_confidence is not None
        and chunk.confidences[-1] is not None
    ]
    axes.vlines(
        [pair[0] for pair in pairs],
        [pair[1] for pair in pairs],
        [pair[2] for pair in pairs],
        color=SURE,
        linewidth=1.4,
        alpha=0.55,
        zorder=2,
    )
    firsts = [(chunk.index, chunk.first_confidence) for chunk in chunks if chunk.first_confidence is not None]
    if firsts:
        handles.append(
            axes.scatter(
                [place for place, _ in firsts],
                [value for _, value in firsts],
                s=dot,
                color=SURE,
                zorder=4,
                label="first pass",
            )
        )
    lasts = [
        (chunk.index, chunk.confidences[-1])
        for chunk in chunks
        if len(chunk.confidences) > 1 and chunk.confidences[-1] is not None
    ]
    if lasts:
        handles.append(
            axes.scatter(
                [place for place, _ in lasts],
                [value for _, value in lasts],
                s=dot,
                facecolor="white",
                edgecolor=SURE,
                linewidth=1.6,
                zorder=3,
                label="last pass",
            )
        )
    legend = axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 0.99),
        ncols=3,
        frameon=False,
        fontsize=10,
        handletextpad=0.4,
        columnspacing=1.4,
        borderaxespad=0,
        borderpad=0,
    )
    for text in legend.get_texts():
        text.set_color(QUIET)
    _row_name(axes, "confidence", "")


def _chunk_names(axes: Axes, stats: Stats) -> None:
    count = len(stats.chunks)
    every = math.ceil(count / 24)
    places = list(range(0, count, every))
    spans = stats.frame_spans()
    names = [f"chunk {place + 1}" if count <= 12 else str(place + 1) for place in places]
    if count <= 12:
        names = [
            f"{name}\nframes {spans[place].start}–{spans[place].stop - 1}" if spans[place] else name
            for name, place in zip(names, places, strict=True)
        ]
    axes.set_xticks(places, names)
    axes.tick_params(axis="x", labelbottom=True, pad=8)
    if count > 12:
        axes.annotate(
            "chunk",
            (0, 0),
            (-LABELS * 72, -8),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            size=12,
            weight="bold",
            color=INK,
        )


def _row_name(axes: Axes, name: str, more: str) -> None:
    """Names the row at the left border of the picture, in line with the title."""
    offset = -LABELS * axes.figure.dpi / axes.bbox.width
    axes.text(offset, 0.97, name, transform=axes.transAxes, va="top", size=12, weight="bold", color=INK)
    axes.text(offset, 0.80, more, transform=axes.transAxes, va="top", size=10.5, color=QUIET)
