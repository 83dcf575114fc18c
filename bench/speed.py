"""How fast the demo clip is made, policy by policy: frames per second three ways, latency, and whether it
keeps up.

    python -m bench.speed

Every figure is the median over runs with the 20th and 80th percentile, after warm-up. Policies take turns run
by run, so that a change of the machine's clock meets all of them alike.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

import dsa_rt
from bench import common
from bench.prompts import Case, held_out_cases
from dsa_rt.errors import PolicyError
from dsa_rt.generate import Generate
from dsa_rt.progress import Event
from dsa_rt.stats import INCLUDED, Stats
from dsa_rt.suite.clip import player

POLICIES = (
    "dense fixed-1 fixed-2 fixed-3 fixed-4-then-1 fixed-4-then-2 dsa-paper dsa-paper-retest "
    "dsa-calibrated:retest=no dsa-calibrated"
)
INCLUDES = [
    *INCLUDED,
    "time to first frame: from the call to the first chunk's frames in the caller's hands, text included",
    "time between chunks: from one chunk in the caller's hands to the next; the caller keeps nothing waiting",
    "first frames early: chunk 0 was handed out before the context pass of chunk 1, by the order of events",
    "stall: how long a player that starts with the first chunk and plays on would have waited in all",
]


@dataclass(frozen=True)
class Run:
    """One timed clip. gaps_ms: between chunks handed out. passes_before_first_frame: denoise passes of the
    second chunk that had run when the first was handed out; early: that was before the second chunk was
    denoised.
    """

    stats: Stats
    first_frame_ms: float
    gaps_ms: tuple[float, ...]
    stall_ms: float
    passes_before_first_frame: int
    early: bool


def time_clip(generate: Generate, prompt: str, seed: int) -> Run:
    """Stream one clip as a player would, and keep only times."""
    order: list[tuple[str, int]] = []
    handed_out: list[float] = []

    def on_event(event: Event) -> None:
        order.append((event.kind, event.chunk))

    start = time.perf_counter()
    session = generate.session(prompt, seed, on_event=on_event)
    for chunk in session:
        handed_out.append(1000 * (time.perf_counter() - start))
        order.append(("out", chunk.index))
    stats = session.stats()
    before = order[: order.index(("out", 0))]
    _, stall = player(handed_out, [chunk.frames for chunk in stats.chunks], stats.video_fps)
    return Run(
        stats, handed_out[0], tuple(b - a for a, b in itertools.pairwise(handed_out)),
        stall, before.count(("pass", 1)), ("context", 1) not in before,
    )  # fmt: skip


def time_policies(
    generates: Mapping[str, Generate], cases: Sequence[Case], *, warm_up: int, quiet: bool = False
) -> dict[str, list[Run]]:
    """Each policy on each case, in turns; ``warm_up`` clips of each come first and are thrown away."""
    runs: dict[str, list[Run]] = {name: [] for name in generates}
    total = (warm_up + len(cases)) * len(generates)
    with tqdm(total=total, desc="timing", unit="clip", disable=True if quiet else None) as bar:
        for turn in range(-warm_up, len(cases)):
            case = cases[turn % len(cases)]
            for name, generate in generates.items():
                run = time_clip(generate, case.prompt, case.seed)
                if turn >= 0:
                    runs[name].append(run)
                bar.update()
    return runs


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """JSON-ready figures of one policy's runs."""
    stats = [run.stats for run in runs]
    slowest = min((s.fps_end_to_end or 0.0) for s in stats)
    return {
        "fps_denoise": common.spread(s.fps_denoise for s in stats),
        "fps_with_decode": common.spread(s.fps_with_decode for s in stats),
        "fps_end_to_end": common.spread(s.fps_end_to_end for s in stats),
        "fps_end_to_end_slowest": slowest,
        "first_frame_ms": common.spread(run.first_frame_ms for run in runs),
        "between_chunks_ms": _percentiles([gap for run in runs for gap in run.gaps_ms]),
        "text_ms": common.spread(s.text_ms for s in stats),
        "denoise_ms": common.spread(s.denoise_ms for s in stats),
        "context_ms": common.spread(s.context_ms for s in stats),
        "decode_ms": common.spread(s.decode_ms for s in stats),
        "model_calls": common.spread(float(s.model_calls) for s in stats),
        "model_calls_mean": sum(s.model_calls for s in stats) / len(stats),
        "stall_ms_worst": max(run.stall_ms for run in runs),
        "plays_at": stats[0].video_fps,
        "faster_than_it_plays": slowest > stats[0].video_fps,
        "first_frames_early": all(run.early for run in runs),
        "passes_before_first_frame": max(run.passes_before_first_frame for run in runs),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None  # a clip of one chunk
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"p50": float(tensor.quantile(0.5)), "p95": float(tensor.quantile(0.95)), "n": len(values)}


def compile_all(
    runtime: dsa_rt.Runtime, policies: Sequence[str], frames: int | None
) -> tuple[dict[str, Generate], dict[str, str]]:
    """Compiled functions by policy name, and why the others cannot run on this bundle."""
    generates: dict[str, Generate] = {}
    refused: dict[str, str] = {}
    for name in policies:
        try:
            generates[name] = runtime.compile(frames=frames, policy=name)
        except PolicyError as error:
            refused[name] = str(error)
    return generates, refused


def report(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table for people."""

    def cells(name: str, row: Mapping[str, Any]) -> list[str]:
        def three(key: str) -> str:
            entry = row[key]
            return f"{entry['median']:.1f} ({entry['p20']:.1f}-{entry['p80']:.1f})"

        gaps = row["between_chunks_ms"] or {}
        return [
            name, common.figure(row["model_calls_mean"]), three("fps_denoise"), three("fps_with_decode"),
            three("fps_end_to_end"), three("first_frame_ms"), common.figure(gaps.get("p50")),
            common.figure(gaps.get("p95")), "yes" if row["faster_than_it_plays"] else "NO",
            "yes" if row["first_frames_early"] else "NO",
        ]  # fmt: skip

    header = ["policy", "calls", "FPS denoise", "FPS with decode", "FPS end to end", "first frame ms",
              "gap p50 ms", "gap p95 ms", "faster than it plays", "first frames early"]  # fmt: skip
    return common.table(header, [cells(name, row) for name, row in rows.items()])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``speed.json``; 1 where the default policy does not reach what it must."""
    parse = common.parser("speed", "Frames per second, latency and pace of the demo clip under each policy.")
    parse.add_argument(
        "--policies", type=common.names, default=common.names(POLICIES), help="names, spaces between"
    )
    parse.add_argument("--runs", type=common.positive, default=12, help="timed clips of each policy")
    parse.add_argument(
        "--warm-up", type=common.positive, default=2, help="clips of each policy that are thrown away"
    )
    parse.add_argument("--frames", type=common.positive, help="length of the clip (the bundle's)")
    options = parse.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = common.fingerprint(
        "speed", options, included=INCLUDES,
        warm_up=f"compile, then {options.warm_up} clips of each policy in turns, thrown away",
    )  # fmt: skip
    runtime = dsa_rt.load(options.bundle, dtype=options.dtype)
    generates, refused = compile_all(runtime, options.policies, options.frames)
    if not generates:
        print(*(f"not run: {name}: {reason}" for name, reason in refused.items()), sep="\n", file=sys.stderr)
        return 2
    cases = held_out_cases(options.runs)
    runs = time_policies(generates, cases, warm_up=options.warm_up, quiet=options.quiet)
    rows = {name: summarise(taken) for name, taken in runs.items()}
    result |= {
        "threads": torch.get_num_threads(), "dtype": str(runtime.dtype), "bundle_name": runtime.manifest.name,
        "backends": dict(next(iter(runs.values()))[0].stats.backends), "rows": rows, "refused": refused,
    }  # fmt: skip
    print(report(rows))
    for name, reason in refused.items():
        print(f"not run: {name}: {reason}")
    print(f"median (p20-p80) of {options.runs} clips, {torch.get_num_threads()} threads")
    print(f"faster than it plays: the slowest clip, end to end, against {runtime.manifest.fps:g} frames/s")
    if busy := common.warn_if_busy(result):
        print(busy)
    print("written:", common.show_path(common.write_json(options.out, "speed.json", result)))
    return 0 if all(row["faster_than_it_plays"] and row["first_frames_early"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(common.run(main))
