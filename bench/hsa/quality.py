"""Quality of every row at its measured run time: the comparison, its verdicts and its pictures."""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench import common
from bench.hsa import pictures, rows
from bench.hsa.clip import STEPS, Clip, Method, Regime, Studio, measure
from bench.hsa.evaluate import Job, evaluate_all
from bench.prompts import Case, held_out_cases

HARD = Regime("guidance 6, shift 8", 6.0, 8.0)
FIT_CLIPS = 3  # other prompts, on which rivals get their knobs
LEAD = 1.0  # dB that the best setting should be ahead of every other kind of row
SLACK = 0.02  # of the dense run's time: rows within it count as equally fast
INCLUDES = [
    f"reference: the same prompt and seed with all tokens in {STEPS} steps",
    "share: tokens x layers evaluated, of the reference's; counted in the model, mean over clips",
    "time: wall clock of sampling (text encoder and video decoder left out), of the reference's: median over timed "
    "clips of the ratio within a turn; all rows take turns, alone on the machine, with all threads",
    "PSNR, SSIM: frames against the reference, mean over clips; latent PSNR: peak is the range of the reference",
    "score: mean over clips of the share of right attributes (colour, shape, motion of every object)",
    "over fewer steps: PSNR minus that of plain fewer steps at the same measured time, between the nearest step counts",
]
MAPPED = ("hsa-50", "hsa-50:selection=random", "ras@0.5", "hsa-75a")
Rows = dict[str, dict[str, Any]]


def regimes(studio: Studio) -> list[Regime]:
    """The Wan-like one first; then the bundle's own, where that is another one."""
    own = studio.own_regime("own")
    easy = Regime(f"guidance {own.guidance:g}, shift {own.shift:g} (its own)", own.guidance, own.shift)
    return [HARD] if (own.guidance, own.shift) == (HARD.guidance, HARD.shift) else [HARD, easy]


def summarise(results: Sequence[Mapping[str, Any]], regime: str, name: str) -> dict[str, Any]:
    """Means over clips of one row."""
    found = [result["regimes"][regime][name] for result in results]
    keys = [key for key in ("share", "psnr", "mse", "ssim", "latent_psnr", "score") if key in found[0]]
    return {"kind": rows.kind(name), "clips": len(found)} | {
        key: float(np.mean([entry[key] for entry in found])) for key in keys
    }


def time_rows(
    clips: Sequence[Clip], methods: Mapping[str, Method], *, quiet: bool = False
) -> dict[str, tuple[float, float]]:
    """(seconds, of the dense run's) of each row: medians over clips, all rows taking turns on each; one dense run and
    the first turn of the first row are the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    measure(methods[rows.DENSE], clips[0])
    with tqdm(total=len(clips) * len(methods), desc="timing", unit="clip", disable=True if quiet else None) as bar:
        for clip in clips:
            for name, method in methods.items():
                seconds[name].append(measure(method, clip).seconds)
                bar.update()
    dense = seconds[rows.DENSE]
    return {
        name: (statistics.median(taken), statistics.median(s / d for s, d in zip(taken, dense, strict=True)))
        for name, taken in seconds.items()
    }


def add_gains(table: Rows) -> None:
    """``over_fewer_steps`` [dB] of each row against the line through the steps-N rows at its time; None
    outside of their times. Without times, at its share."""
    plain = sorted((cost(row), row["psnr"]) for name, row in table.items() if name.startswith("steps-"))
    times, values = [time for time, _ in plain], [value for _, value in plain]
    for row in table.values():
        inside = len(plain) > 1 and times[0] <= cost(row) <= times[-1]
        row["over_fewer_steps"] = row["psnr"] - float(np.interp(cost(row), times, values)) if inside else None


def cost(row: Mapping[str, Any]) -> float:
    """Share of the dense run's time where measured, else of its tokens x layers."""
    return float(row["share"] if row.get("time") is None else row["time"])


def verdicts(table: Rows) -> list[tuple[bool, str]]:
    """(met, sentence): whether published hsa-50 is worth its time, and whether a setting leads by what it should."""
    found = []
    if "hsa-50" in table:
        gain = table["hsa-50"]["over_fewer_steps"]
        said = "no two step counts enclose its run time"
        if gain is not None:
            said = f"{gain:+.2f} dB over fewer steps at equal run time"
        found.append((gain is not None and gain > 0, f"hsa-50 as published: {said}"))
    for target in rows.TARGETS:
        near = {n: row for n, row in table.items() if abs(row["share"] - target) <= rows.NEAR and n != rows.DENSE}
        if len({row["kind"] for row in near.values()}) < 2:
            continue
        best = max(near, key=lambda name: near[name]["psnr"])
        others = {n: r["psnr"] for n, r in near.items()
                  if r["kind"] != near[best]["kind"] and cost(r) <= cost(near[best]) + SLACK}  # fmt: skip
        chosen = [row["psnr"] for row in near.values() if row["kind"].startswith("HSA")]
        skipped = [row["psnr"] for row in near.values() if row["kind"].startswith("window only")]
        if others:
            second = max(others, key=lambda name: others[name])
            lead = near[best]["psnr"] - others[second]
            ours = near[best]["kind"].startswith(("HSA", "window only"))
            sentence = f"{target:.0%}: best is {best}, {lead:+.2f} dB over {second} (no slower)"
            found.append((ours and lead >= LEAD, sentence))
        else:
            found.append((False, f"{target:.0%}: best is {best}, but all other kinds of rows are faster or missing"))
        if chosen and skipped:
            found[-1] = (found[-1][0], found[-1][1] + f"; choosing tokens against whole steps: "
                         f"{max(chosen) - max(skipped):+.2f} dB")  # fmt: skip
    return found


def report(table: Rows) -> str:
    """Markdown: the reference, then for each target the rows near it by falling PSNR, then the other step counts."""
    groups = [[name for name in table if name == rows.DENSE]]
    for target in rows.TARGETS:
        near = [n for n in table if abs(table[n]["share"] - target) <= rows.NEAR and n != rows.DENSE]
        groups.append(sorted(near, key=lambda name: -table[name]["psnr"]))
    groups.append([name for name in table if not any(name in group for group in groups)])
    header = ["row", "kind", "share", "time", "seconds", "PSNR", "over fewer steps", "SSIM", "latent PSNR", "score %"]

    def cells(name: str) -> list[str]:
        row, figure = table[name], common.figure
        return [
            name, row["kind"], figure(row["share"], 3), figure(row.get("time"), 3), figure(row.get("seconds"), 3),
            figure(row["psnr"], 2), figure(row["over_fewer_steps"], 2), figure(row["ssim"], 4),
            figure(row["latent_psnr"], 2), figure(row.get("score"), 1, scale=100),
        ]  # fmt: skip

    return common.table(header, [cells(name) for group in groups for name in group])


def main(options: Namespace) -> int:
    """Make, measure, print, write ``hsa-quality.json``, ``hsa-curve.png`` and ``hsa-map.png``; 1 where a verdict is
    that something is missed."""
    names = options.rows or (rows.QUICK if options.quick else rows.ALL)
    names = tuple(dict.fromkeys((rows.DENSE, *names)))  # times are relative to it
    rows.check(names)
    prompts, timed = (2, 1) if options.quick else (options.prompts, options.timing_clips)
    result = common.fingerprint(
        "hsa", options, included=INCLUDES, warm_up="a dense run before the timed ones, thrown away"
    )
    torch.set_num_threads(options.threads)
    studio = Studio(options.bundle, options.dtype)
    cases = held_out_cases(prompts + FIT_CLIPS)
    cases, others = cases[:prompts], cases[prompts:]
    methods: dict[Regime, dict[str, Method]] = {}
    for regime in regimes(studio):
        fit_on = [studio.clip(case.prompt, case.seed, regime) for case in others[: 1 if options.quick else None]]
        methods[regime] = rows.build(names, fit_on, print)
    times = {}
    for regime, chosen in methods.items():
        if timed:
            clips = [studio.clip(case.prompt, case.seed, regime) for case in cases[:timed]]
            times[regime] = time_rows(clips, chosen, quiet=options.quiet)
    results = list(
        tqdm(
            evaluate_all(Job(options.bundle, options.dtype), methods, cases, options.workers),
            total=len(cases), desc="quality", unit="prompt", disable=True if options.quiet else None,
        )
    )  # fmt: skip
    results.sort(key=lambda entry: entry["number"])
    tables: dict[str, Rows] = {}
    judged: dict[str, list[tuple[bool, str]]] = {}
    for regime in methods:
        table = {name: summarise(results, regime.name, name) for name in names}
        for name, (seconds, time) in times.get(regime, {}).items():
            table[name] |= {"seconds": seconds, "time": time}
        add_gains(table)
        tables[regime.name], judged[regime.name] = table, verdicts(table)
    result |= {
        "threads": torch.get_num_threads(), "bundle_name": studio.runtime.manifest.name,
        "dtype_used": str(studio.runtime.dtype), "tokens": studio.settings.latent_frames * studio.settings.grid.tokens,
        "regimes": tables,
        "methods": {regime.name: {n: repr(m) for n, m in chosen.items()} for regime, chosen in methods.items()},
        "verdicts": judged, "clips": results,
    }  # fmt: skip
    written = [common.write_json(options.out, "hsa-quality.json", result)]
    written.append(pictures.curve(options.out / "hsa-curve.png", tables))
    written.append(_map(options, studio, cases[0], next(iter(methods)), next(iter(methods.values()))))
    _print(tables, judged, result, written)
    return 0 if all(met for found in judged.values() for met, _ in found) else 1


def _map(
    options: Namespace, studio: Studio, case: Case, regime: Regime, methods: Mapping[str, Method]
) -> Any:
    """Steps of every token of the first clip, under its frames."""
    clip = studio.clip(case.prompt, case.seed, regime)
    frames = studio.decode(measure(methods[rows.DENSE], clip).rows)
    shape = (len(clip.frames), clip.grid.height, clip.grid.width)
    chosen = [name for name in MAPPED if name in methods] or [name for name in methods if name != rows.DENSE][:4]
    maps = {name: measure(methods[name], clip).steps.reshape(shape).numpy() for name in chosen}
    return pictures.steps_map(options.out / "hsa-map.png", frames.numpy(), maps, f"{case.prompt} ({regime.name})")


def _print(
    tables: Mapping[str, Rows], judged: Mapping[str, list[tuple[bool, str]]], result: Mapping[str, Any],
    written: Sequence[Any],
) -> None:  # fmt: skip
    for regime, table in tables.items():
        print(f"\n{regime}\n\n{report(table)}\n")
        for met, sentence in judged[regime]:
            print(f"{'met   ' if met else 'MISSED'} {sentence}")
    print(*(f"- {line}" for line in INCLUDES), sep="\n")
    if busy := common.warn_if_busy(result):
        print(busy)
    print("written:", ", ".join(common.show_path(path) for path in written))
