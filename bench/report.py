"""The tables of the quality benchmark, and its verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bench import allocation, common
from bench.evaluate import DENSE
from dsa_rt.policy import parse_policy


def table(rows: Mapping[str, Mapping[str, Any]], timing: Mapping[str, Mapping[str, Any]]) -> str:
    """The main table."""
    header = [
        "policy",
        "calls",
        "score %",
        "difference",
        "all right %",
        "PSNR dB",
        "SSIM",
        "captured %",
        "oracle %",
    ]
    timed = ["FPS denoise", "with decode", "end to end", "first frame ms"] if timing else []
    keys = ("fps_denoise", "fps_with_decode", "fps_end_to_end", "first_frame_ms")[: len(timed)]

    def line(name: str, row: Mapping[str, Any]) -> list[str]:
        same = row.get("identical_clips") == row["clips"]
        figures = timing.get(name, {})
        return [
            name, common.figure(row.get("calls")), _percent(row["score"]), _difference(row),
            _percent(row["all_right"]),
            "same" if same else common.figure(row.get("psnr")), common.figure(row.get("ssim"), 3),
            _percent(row.get("captured")), _percent(row.get("oracle_at_equal_calls")),
            *(common.figure(common.median(figures.get(key))) for key in keys),
        ]  # fmt: skip

    return common.table([*header, *timed], [line(name, row) for name, row in rows.items()])


def parts(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What the score is made of, and the distance to all passes clip by clip."""

    def line(name: str, row: Mapping[str, Any]) -> list[str]:
        keys = ("colour", "shape", "motion", "ground", "score_one_object", "score_two_objects")
        median = row.get("psnr_median")
        return [
            name, *(_percent(row[key]) for key in keys),
            "same" if median == math.inf else common.figure(median), str(row.get("identical_clips", "-")),
        ]  # fmt: skip

    header = ["policy", "colour %", "shape %", "motion %", "ground %", "one object %", "two objects %",
              "PSNR median", "identical clips"]  # fmt: skip
    return common.table(header, [line(name, row) for name, row in rows.items()])


def captured(rows: Mapping[str, Mapping[str, Any]], curves: Mapping[str, Any]) -> str:
    """Share of the removable error captured, beside what else the same calls could have bought."""
    lines = [
        [name, common.figure(row["calls_replayed"]), _percent(row["captured"]),
         *(_percent(row[f"{curve}_at_equal_calls"]) for curve in curves)]
        for name, row in rows.items()
    ]  # fmt: skip
    return common.table(
        ["policy", "calls replayed", "captured %", *(f"{curve} %" for curve in curves)], lines
    )


def _percent(value: float | None) -> str:
    return common.figure(value, 1, scale=100)


def _difference(row: Mapping[str, Any]) -> str:
    if row.get("difference") is None:
        return "-"
    return f"{100 * row['difference']:+.1f}±{100 * (row['difference_error'] or 0):.1f}"


def verdicts(rows: Mapping[str, Mapping[str, Any]], bound: float = 0.9) -> list[tuple[str, bool]]:
    """What the demo must reach, as far as the rows show it: a sentence, and whether it holds."""
    found = []
    if DENSE in rows:
        dense = rows[DENSE]
        found.append(
            (f"all passes score {dense['score']:.1%}, at least {bound:.0%}", dense["score"] >= bound)
        )
        most = 0.7 * dense["calls"] + 1e-6
        near = [name for name in rows if _calibrated(name) and rows[name]["calls"] <= most]
        if near:
            name = max(near, key=lambda n: rows[n]["calls"])
            text = (
                f"{name} within 1 point of that with {rows[name]['calls']:.1f} of {dense['calls']:.0f} calls"
            )
            found.append((f"{text}: {_difference(rows[name])} points", rows[name]["difference"] >= -0.01))
    for name, row in rows.items():
        value = row.get("calibrated_at_equal_calls")
        # At the calls of these two nothing is left to decide: all passes, and a first chunk in full with nothing after.
        if value is None or name in (DENSE, "fixed-4-then-1") or allocation.family(name) == "calibrated":
            continue
        text = f"calibrated DSA captures more than {name} at its {row['calls_replayed']:.1f} calls"
        found.append((f"{text}: {value:.1%} against {row['captured']:.1%}", value > row["captured"]))
    for name, row in rows.items():
        others = {key: row.get(f"{key}_at_equal_calls") for key in ("random", "static")}
        known = {key: value for key, value in others.items() if value is not None}
        if _calibrated(name) and known:
            words = ", ".join(f"{key} {value:.1%}" for key, value in known.items())
            found.append(
                (
                    f"{name} captures {row['captured']:.1%}, more than {words}",
                    row["captured"] > max(known.values()),
                )
            )
    return found


def _calibrated(name: str) -> bool:
    """The calibrated rule as it is meant, decided after every pass."""
    return (
        allocation.family(name) == "calibrated" and getattr(parse_policy(name), "retest", None) is not False
    )
