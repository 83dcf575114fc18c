"""Pictures of a result: throughput by policy, the roofline, and the timeline of one run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsa_rt.output import whole_file

BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#c2571a", "#3c8d53", "#777777"
STAGES = {"text": GREY, "pass": BLUE, "context": ORANGE, "decode": GREEN}
_WORDS = {"text": "text", "pass": "denoise pass", "context": "context pass", "decode": "decode"}


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """``throughput.png``, ``roofline.png`` and ``timeline.png`` in a folder, those there is something for."""
    written = []
    if result["cases"]:
        written = [throughput(result, folder / "throughput.png"), roofline(result, folder / "roofline.png")]
    if result["timeline"] is not None and result["timeline"]["events"]:
        written.append(timeline(result, folder / "timeline.png"))
    return written


def throughput(result: Mapping[str, Any], path: Path) -> Path:
    """Frames per second three ways, case by case, with the 20th to 80th percentile; a panel for each group of cases,
    since their speeds do not compare."""
    from matplotlib.figure import Figure

    groups: dict[str, list[Mapping[str, Any]]] = {}
    for case in result["cases"]:
        groups.setdefault(_group(case), []).append(case)
    rows = sum(map(len, groups.values()))
    figure = Figure((9, 1.4 + 0.75 * rows + 0.6 * len(groups)), layout="constrained")
    panels = figure.subplots(
        len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": [len(cases) for cases in groups.values()]}
    )[:, 0]
    parts = (("denoise", BLUE), ("with_decode", GREEN), ("end_to_end", ORANGE))
    for axes, (group, cases) in zip(panels, groups.items(), strict=True):
        longest = max(case["figures"][f"fps_{part}"]["p80"] for case in cases for part, _ in parts)
        for row, case in enumerate(cases):
            for number, (part, colour) in enumerate(parts):
                entry, y = case["figures"][f"fps_{part}"], row + 0.26 * (number - 1)
                whiskers = [[entry["median"] - entry["p20"]], [entry["p80"] - entry["median"]]]
                label = part.replace("_", " ") if row == 0 else None
                axes.barh(y, entry["median"], 0.24, color=colour, label=label)
                axes.errorbar(entry["median"], y, xerr=whiskers, color="#222222", lw=0.9, capsize=2)
                axes.text(
                    max(entry["p80"], entry["median"]) + 0.01 * longest, y, f"{entry['median']:.1f}", va="center",
                    fontsize=7,
                )  # fmt: skip
        fps = cases[0]["made"]["fps"]
        if fps <= 1.15 * longest:
            axes.axvline(fps, color=GREY, ls=":", lw=1)
            side = "left" if fps < 0.15 * longest else "right"
            axes.text(fps, -0.62, f" plays at {fps:g} ", fontsize=7, color=GREY, ha=side, va="center")
        calls = [case["figures"]["nfe"]["median"] for case in cases]
        labels = [f"{case['made']['policy']}\n{n:.0f} model calls" for case, n in zip(cases, calls, strict=True)]
        axes.set_yticks(range(len(cases)), labels, fontsize=8)
        axes.set_ylim(len(cases) - 0.4, -0.8)
        axes.set_xlim(0, 1.08 * longest)
        axes.set_title(group, fontsize=9, loc="left")
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    panels[0].legend(fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    panels[-1].set_xlabel(f"frames per second (median of {len(result['cases'][0]['runs'])} runs, bars p20 to p80)")
    return _save(figure, path)


def roofline(result: Mapping[str, Any], path: Path) -> Path:
    """Achieved TFLOP/s of every case against its operations per byte, under what the machine reached in this run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    cases = result["cases"]
    figure = Figure((10, 5), layout="constrained")
    axes = figure.subplots()
    points = [(case["roofline"]["flop_per_byte"], case["figures"]["tflop_s"]["median"], case) for case in cases]
    low, high = min(x for x, _, _ in points) / 4, max(x for x, _, _ in points) * 4
    for colour, (name, peak) in zip((GREY, "#aa8800", "#884488", "#448888"), result["peaks"].items(), strict=False):
        ridge = 1e3 * peak["tflop_s"] / peak["gb_s"]
        xs = sorted({min(low, ridge / 4), ridge, max(high, 4 * ridge)})
        axes.plot(xs, [min(peak["tflop_s"], x * peak["gb_s"] / 1e3) for x in xs], color=colour, lw=1.5)
        axes.annotate(
            f"{name}: {peak['tflop_s']:.3g} TFLOP/s", (xs[-1], peak["tflop_s"]), xytext=(-4, 5),
            textcoords="offset points", ha="right", fontsize=8, color=colour,
        )  # fmt: skip
    for colour, marker, (x, y, case) in zip(_cycle(), _markers(), points, strict=False):
        share = f"{case['roofline']['share']:.0%}"
        axes.plot(x, y, marker, color=colour, ms=9, label=f"{case['name']}: {share} of its roof", mec="white", mew=0.6)
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("operations per byte that must be moved (weights and K/V, once a pass)")
    axes.set_ylabel("TFLOP/s, denoise and context passes")
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return _save(figure, path)


def timeline(result: Mapping[str, Any], path: Path) -> Path:
    """One run: a bar for everything that an event reported, from the event before it to its own. A context pass and the
    next chunk's first pass that ran as one have the same bar, in either row."""
    from matplotlib.figure import Figure

    line = result["timeline"]
    case = next(case for case in result["cases"] if case["name"] == line["case"])
    events = [event for event in line["events"] if event["kind"] in STAGES]
    chunks = 1 + max(event["chunk"] for event in events)
    figure = Figure((12, 1.5 + 0.4 * chunks), layout="constrained")
    axes = figure.subplots()
    last, drawn = 1000 * line["events"][-1]["seconds"], set()
    for event, begin, end in _spans(line["events"]):
        kind, row = event["kind"], event["chunk"]
        label = _WORDS[kind] if kind not in drawn else None
        axes.barh(row, end - begin, 0.75, left=begin, color=STAGES[kind], label=label, ec="white", lw=0.8)
        if kind == "pass" and end - begin > 0.012 * last:
            axes.text((begin + end) / 2, row, str(event["passes"]), ha="center", va="center", color="white", fontsize=7)
        drawn.add(kind)
    due, fps = _due(line["events"], case), case["made"]["fps"]
    for chunk, at in enumerate(due):
        label = f"needed by a player at {fps:g} frames/s" if chunk == 0 else None
        axes.plot([at, at], [chunk - 0.45, chunk + 0.45], color="#aa0000", lw=1.5, label=label)
    axes.set_yticks(range(chunks), [f"chunk {chunk}" for chunk in range(chunks)], fontsize=8)
    axes.set_ylim(chunks - 0.4, -0.6)
    axes.set_xlim(0, 1.02 * last)
    axes.set_xlabel("milliseconds since the call; the number in a bar counts the passes of its chunk")
    axes.set_title(f"{line['case']}: policy {case['made']['policy']}, {case['made']['device']}", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    return _save(figure, path)


def _spans(events: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float, float]]:
    """(event, begin, end) in milliseconds of everything that took time."""
    spans, before = [], 0.0
    for number, event in enumerate(events):
        end = 1000 * event["seconds"]
        following = events[number + 1] if number + 1 < len(events) else None
        joint = (
            following is not None and event["kind"] == "context" and following["kind"] == "pass"
            and following["chunk"] == event["chunk"] + 1
            and 1000 * following["seconds"] - end < 0.1 * (end - before)  # reported one after the other
        )  # fmt: skip
        if event["kind"] in STAGES:
            spans.append((event, before, end))
        if not joint:
            before = end
    return spans


def _due(events: list[Mapping[str, Any]], case: Mapping[str, Any]) -> list[float]:
    """When a player that starts with the first chunk needs each [ms]."""
    done = [1000 * event["seconds"] for event in events if event["kind"] == "chunk"]
    played, due = 0, []
    for frames in case["runs"][0]["chunk_frames"]:
        due.append(done[0] + 1000 * played / case["made"]["fps"])
        played += frames
    return [at for at in due if at <= done[-1]]


def _group(case: Mapping[str, Any]) -> str:
    made = case["made"]
    words = "random weights" if case["random_weights"] else ""
    bundle = re.sub(", random weights$", "", made["bundle"])
    size = f"{made['width']}x{made['height']}, {made['frames']} frames"
    return ", ".join(part for part in (bundle, words, size, made["device"], made["dtype"]) if part)


def _cycle() -> list[str]:
    return [BLUE, ORANGE, GREEN, "#8a4fa0", "#b48b1f", "#2a9aa0", "#a03060", "#505050"] * 4


def _markers() -> list[str]:
    return [marker for marker in "os^DvPX*" for _ in range(8)]


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path
