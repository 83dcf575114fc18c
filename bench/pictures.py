"""The pictures of the quality benchmark: confidence against error, and what each policy gets for its model
calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import allocation
from bench.prompts import Case
from dsa_rt.demo.grammar import MOTIONS
from dsa_rt.output import whole_file

FAMILIES = {"static": ("#777777", "s"), "paper": ("#c2571a", "^"), "calibrated": ("#1f6fb4", "o")}


def scatter(
    path: Path, results: Sequence[Mapping[str, Any]], cases: Sequence[Case], head: Mapping[str, Any]
) -> Path:
    """First-pass confidence against removable error: all chunks, then one panel for each motion."""
    from matplotlib.figure import Figure

    confidence = np.array([r["record"]["confidence"] for r in results])[..., 0]
    error = np.array([r["record"]["error"] for r in results])[..., 0]
    floor = error[error > 0].min() if (error > 0).any() else 1.0
    error = np.maximum(error, floor)  # a log axis has no zero
    figure = Figure((11, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    groups = [("all clips", np.ones(len(cases), bool), head["later_chunks"])]
    for motion in MOTIONS:
        chosen = np.array([motion in case.motions for case in cases])
        groups.append((motion, chosen, head["by_motion"][motion]["correlation"]))
    for axes, (name, chosen, rho) in zip(panels.flat, groups, strict=True):
        axes.scatter(
            confidence[chosen, 0], error[chosen, 0], s=9, c="#c2571a", alpha=0.6, lw=0, label="first chunk"
        )
        axes.scatter(
            confidence[chosen, 1:], error[chosen, 1:], s=9, c="#1f6fb4", alpha=0.5, lw=0, label="later chunks"
        )
        value = "-" if rho is None else f"{rho:.2f}"
        axes.set_title(f"{name}: {chosen.sum()} clips, later chunks ρ = {value}", fontsize=10)
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel("confidence after the first pass")
    figure.supylabel("error that the other passes remove (latent mean square)")
    return _save(figure, path)


def trade_off(path: Path, result: Mapping[str, Any]) -> Path:
    """Captured error and score against model calls, and score against frames per second where that was
    measured.
    """
    from matplotlib.figure import Figure

    rows, timing = result["rows"], result["timing"]
    panels: list[tuple[str, str, dict[str, tuple[float | None, float | None]]]] = [
        ("model calls per clip (replayed)", "removable error captured (%)",
         {name: (row["calls_replayed"], _percent(row["captured"])) for name, row in rows.items()}),
        ("model calls per clip", "score (%)",
         {name: (row["calls"], _percent(row["score"])) for name, row in rows.items()}),
    ]  # fmt: skip
    if timing:
        speeds = {
            name: ((timing[name]["fps_end_to_end"] or {}).get("median"), _percent(row["score"]))
            for name, row in rows.items()
        }
        panels.append(("frames per second, end to end", "score (%)", speeds))
    figure = Figure((5.2 * len(panels), 4.6), layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (across, up, points) in zip(drawn, panels, strict=True):
        known = {name: (x, y) for name, (x, y) in points.items() if x is not None and y is not None}
        for name, (x, y) in known.items():
            colour, marker = FAMILIES[allocation.family(name)]
            hollow = name.endswith("retest=no")
            axes.plot(x, y, marker, color=colour, mfc="white" if hollow else colour, ms=6)
        last = max((x for x, _ in known.values()), default=0.0)
        for names in _together(known):
            right = len(names) > 1 and known[names[0]][0] == last  # there is no room beyond
            axes.annotate(
                "\n".join(map(_short, names)), known[names[0]], textcoords="offset points", va="top",
                xytext=(-6, -3) if right else (5, -3), ha="right" if right else "left", fontsize=7,
                color=FAMILIES[allocation.family(names[0])][0],
            )  # fmt: skip
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(alpha=0.25)
    for name, style in (("oracle", "-"), ("static", ":"), ("random", "--"), ("calibrated", "-.")):
        line = np.array(result["curves"].get(name, [])).reshape(-1, 2)
        drawn[0].plot(
            line[:, 0],
            100 * line[:, 1],
            style,
            color="#1f6fb4" if name == "calibrated" else "#999999",
            lw=1,
            label=name,
            zorder=0,
        )
    drawn[0].legend(fontsize=8)
    return _save(figure, path)


def _together(points: Mapping[str, tuple[float, float]], near: float = 0.02) -> list[list[str]]:
    """The names of points that lie so close that one label must do for them. near: of the axes' lengths."""
    places = np.array(list(points.values())).reshape(-1, 2)
    reach = near * np.maximum(np.ptp(places, axis=0), 1e-9) if len(places) else places
    groups: list[list[str]] = []
    for name, place in points.items():
        for group in groups:
            if (abs(np.array(place) - points[group[0]]) <= reach).all():
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _short(name: str) -> str:
    return name.replace("dsa-calibrated:", "").replace("fixed-", "").replace(",retest=no", " once")


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path
