"""Quality against run time, and where the steps go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsa_rt.output import whole_file

STYLES = {
    "fewer steps": ("#777777", "s"), "window only": ("#2a8a57", "v"), "window only, extrapolated": ("#2a8a57", "^"),
    "TeaCache": ("#8a6d2a", "P"), "EasyCache": ("#b39a54", "X"), "RAS": ("#7a4fa3", "D"), "HSA": ("#c2571a", "o"),
    "HSA, other score": ("#e29a72", "o"), "HSA, extrapolated": ("#1f6fb4", "o"),
}  # fmt: skip


def curve(path: Path, tables: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Path:
    """PSNR and, where it was judged, score of every row against its time, a column for each regime."""
    from matplotlib.figure import Figure

    scored = any("score" in row for table in tables.values() for row in table.values())
    panels = [("psnr", "PSNR to 40 full steps (dB)", 1.0), ("ssim", "SSIM to 40 full steps", 1.0)]
    panels += [("score", "prompt score (%)", 100.0)] if scored else []
    figure = Figure((6.2 * len(tables), 4.2 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), len(tables), squeeze=False, sharex="col")
    for column, (regime, table) in enumerate(tables.items()):
        timed = all(row.get("time") is not None for row in table.values())
        for line, (key, label, scale) in enumerate(panels):
            axes = grid[line][column]
            for kind, (colour, marker) in STYLES.items():
                points = sorted(
                    (row["time"] if timed else row["share"], scale * row[key])
                    for row in table.values()
                    if row["kind"] == kind and np.isfinite(row[key]) and (key == "score" or row["share"] < 1)
                )
                if points:
                    style = f"{marker}-" if kind == "fewer steps" else marker
                    axes.plot(*zip(*points, strict=True), style, color=colour, ms=6, lw=1, alpha=0.85, label=kind)
            axes.set_ylabel(label)
            axes.grid(alpha=0.25)
        grid[0][column].set_title(regime, fontsize=10)
        grid[-1][column].set_xlabel(f"{'time' if timed else 'tokens x layers'} (share of 40 full steps)")
    grid[0][0].legend(fontsize=8)
    return _save(figure, path)


def steps_map(path: Path, frames: NDArray[np.uint8], maps: Mapping[str, NDArray[np.float64]], title: str) -> Path:
    """How many steps computed each token. frames [T, H, W, 3]; maps [F, rows, columns] by row of the table; latent
    frame f is drawn under the middle one of the frames that it stands for."""
    from matplotlib.figure import Figure

    latent = len(next(iter(maps.values())))
    every = (len(frames) - 1) / max(latent - 1, 1)
    shown = [frames[round(max(0.0, f * every - every / 2 + 0.5)) if f else 0] for f in range(latent)]
    figure = Figure((min(22.0, 1.0 * latent + 1.5), 1.25 * (1 + len(maps)) + 0.6), layout="constrained")
    grid = figure.subplots(1 + len(maps), 1, squeeze=False)[:, 0]
    height, width = frames.shape[1:3]
    grid[0].imshow(np.concatenate([_framed(frame, 255) for frame in shown], 1), aspect="equal")
    grid[0].set_title(title, fontsize=10)
    most, image = max(float(values.max()) for values in maps.values()), None
    for axes, (name, values) in zip(grid[1:], maps.items(), strict=True):
        wide = [np.repeat(np.repeat(v, height // v.shape[0], 0), width // v.shape[1], 1) for v in values]
        strip = np.concatenate([_framed(v, np.nan) for v in wide], 1)
        image = axes.imshow(strip, cmap="viridis", vmin=0, vmax=most, interpolation="nearest", aspect="equal")
        axes.set_title(f"{name}: {values.mean():.1f} steps on average", fontsize=9)
    for axes in grid:
        axes.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=list(grid[1:]), label="steps of the token", shrink=0.8)
    return _save(figure, path)


def _framed(image: NDArray[Any], fill: float) -> NDArray[Any]:
    """With a column of ``fill`` to the right, two pixels wide."""
    edge = np.full((image.shape[0], 2, *image.shape[2:]), fill, np.float64 if np.isnan(fill) else image.dtype)
    return np.concatenate([image, edge], 1)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path
