"""What each way of spending passes gives: score, likeness to all passes, model calls, captured error, speed.

    python -m bench.quality                     # 200 held-out prompts, every row
    python -m bench.quality --prompts 20 --rows "dense dsa-calibrated"

Clips are made by the runtime itself, one by one; nothing is batched or approximated. Times come last, alone
on the machine, with all threads (--timing-clips 0 leaves them out).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import dsa_rt
from bench import allocation, common, report, speed
from bench.evaluate import DENSE, Job, evaluate_all
from bench.metrics import SSIM_SIGMA, SSIM_WINDOW, psnr
from bench.prompts import Case, held_out_cases
from bench.recording import correlations
from dsa_rt.errors import OptionError
from dsa_rt.policy import Calibration, Fixed, Records, parse_policy

STATIC = ("fixed-1", "fixed-2", "fixed-3", DENSE, "fixed-4-then-1", "fixed-4-then-2")
PAPER = ("dsa-paper", "dsa-paper-retest")
TARGETS = (0.6, 0.7, 0.8)  # of the model calls of all passes: 21, 24.5 and 28 of 35
INCLUDES = [
    "score: mean over clips of the share of right attributes (colour, shape, motion of every object)",
    "all right: share of clips with every attribute and the ground right and nothing surplus",
    "difference: score minus that of all passes, in points, with the standard error of the paired difference",
    "PSNR, SSIM: frames against the run of all passes of the same seed. PSNR is of the squared error "
    "averaged over all clips: clips equal to the reference count with error 0, so that no infinity arises; "
    "its median is over clips, infinite if most are equal. SSIM: luma, gaussian windows of "
    f"{SSIM_WINDOW} x {SSIM_WINDOW} pixels, sigma {SSIM_SIGMA}, mean over windows, frames and clips",
    "calls: model evaluations of a clip, denoise and context passes, mean over the clips made",
    "captured: share of the error removable by refining, in latent space, that a policy removes, replayed on "
    "records of runs with all passes (calls_replayed: its mean model calls there). Beside it, at equal "
    "calls: oracle (the best allocation within every clip, pass by pass), random (the first chunk in full, "
    "then by chance, in passes or whole chunks, whichever captures more), static (best mix of the fixed "
    "policies), calibrated (DSA at that budget)",
    *speed.INCLUDES,
]


def default_rows(chunks: int, passes: int) -> tuple[str, ...]:
    """Static policies, the paper's rule, and the calibrated rule at three targets, decided per pass and per
    chunk.
    """
    dense_calls = chunks * (passes + 1)
    targets = [f"dsa-calibrated:calls={share * dense_calls:g}" for share in TARGETS]
    return (*STATIC, *PAPER, *(f"{target}{once}" for target in targets for once in ("", ",retest=no")))


def summarise(results: Sequence[Mapping[str, Any]], key: str, name: str) -> dict[str, Any]:
    """Means over clips of one row. key: "rows" or "bounds"."""
    found = [r[key][name] for r in results if name in r[key]]
    summary: dict[str, Any] = {"clips": len(found)}
    for field in ("score", "all_right", "colour", "shape", "motion", "ground", "calls", "ssim"):
        if field in found[0]:
            summary[field] = float(np.mean([f[field] for f in found]))
    summary["score_error"] = _standard_error([f["score"] for f in found])
    for count, label in ((1, "one_object"), (2, "two_objects")):
        some = [f["score"] for f in found if len(f["objects"]) == count]
        summary[f"score_{label}"] = float(np.mean(some)) if some else None
    summary["motion_right"] = _by_motion(found)
    if "mse" in found[0]:
        errors = [f["mse"] for f in found]
        summary |= {
            "psnr": psnr(float(np.mean(errors))),
            "psnr_median": float(np.median([psnr(e) for e in errors])),
            "identical_clips": sum(e == 0 for e in errors),
        }
    if "passes" in found[0]:
        summary["passes_by_chunk"] = np.mean([f["passes"] for f in found], 0).tolist()
    return summary


def _by_motion(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each motion asked: objects, share with the right motion, and what was seen in place of it."""
    result: dict[str, dict[str, Any]] = {}
    for item in (item for f in found for item in f["objects"]):
        motion = item["asked"].split(" ", 2)[2]
        entry = result.setdefault(motion, {"objects": 0, "right": 0.0, "seen_instead": {}})
        entry["objects"] += 1
        entry["right"] += item["right"][2]
        if not item["right"][2]:
            entry["seen_instead"][item["seen_motion"]] = entry["seen_instead"].get(item["seen_motion"], 0) + 1
    for entry in result.values():
        entry["right"] /= entry["objects"]
    return result


def _standard_error(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def add_differences(rows: dict[str, dict[str, Any]], results: Sequence[Mapping[str, Any]]) -> None:
    """Score against all passes, clip by clip, where that row was made."""
    for name, row in rows.items():
        if DENSE in rows:
            change = [r["rows"][name]["score"] - r["rows"][DENSE]["score"] for r in results]
            row |= {"difference": float(np.mean(change)), "difference_error": _standard_error(change)}


def add_captured(
    rows: dict[str, dict[str, Any]], records: Records, calibration: Calibration | None
) -> dict[str, allocation.Curve]:
    """Captured error of every row, with the value of each curve at equal calls beside it; returns the
    curves.
    """
    static = [name for name in STATIC if _fits(name, records.passes)]
    points = {
        name: allocation.captured(name, records, calibration) for name in dict.fromkeys((*rows, *static))
    }
    curves = allocation.curves(records, calibration, points)
    for name, row in rows.items():
        row["calls_replayed"], row["captured"] = points[name]
        row |= {
            f"{curve}_at_equal_calls": allocation.at(line, points[name][0]) for curve, line in curves.items()
        }
    return curves


def _fits(name: str, passes: int) -> bool:
    policy = parse_policy(name)
    return isinstance(policy, Fixed) and max(policy.first or 1, policy.passes or 1) <= passes


def main(arguments: Sequence[str] | None = None) -> int:
    """Make, measure, print, write ``quality.json``, ``quality-clips.json`` and two pictures; 1 where a bound
    is missed.
    """
    parse = common.parser(
        "quality", "Quality, model calls, captured error and speed of every policy on held-out prompts."
    )
    parse.add_argument("--prompts", type=common.positive, default=200, help="held-out prompts")
    parse.add_argument(
        "--rows", type=common.names, help="policy names, spaces between (default: the whole table)"
    )
    parse.add_argument("--frames", type=common.positive, help="length of the clips (the bundle's)")
    parse.add_argument(
        "--workers", type=int, default=2, help="processes of one thread; 0: this process alone"
    )
    parse.add_argument("--timing-clips", type=int, default=20, help="timed clips of each row, 0 for none")
    parse.add_argument(
        "--many-step", type=int, default=0, metavar="N", help="also the many-step generator, N prompts"
    )
    parse.add_argument("--many-step-bundle", default="demo-many-step", help="its bundle")
    options = parse.parse_args(arguments)
    if min(options.workers, options.timing_clips, options.many_step) < 0:
        raise OptionError("--workers, --timing-clips and --many-step are 0 or more")
    torch.set_num_threads(options.threads)
    result = common.fingerprint(
        "quality", options, included=INCLUDES,
        warm_up="compile; for times also 2 clips of each row in turns, thrown away. Quality needs none",
    )  # fmt: skip
    runtime = dsa_rt.load(options.bundle, dtype=options.dtype)
    settings = runtime.compile(frames=options.frames, policy=DENSE).settings
    generates, refused = speed.compile_all(
        runtime, options.rows or default_rows(settings.chunks, settings.passes), options.frames
    )
    cases = held_out_cases(options.prompts)
    job = Job(
        options.bundle,
        options.dtype,
        options.frames,
        tuple(generates),
        options.many_step_bundle,
        options.many_step,
    )
    bar = tqdm(evaluate_all(job, cases, options.workers), desc="quality", unit="prompt", total=len(cases),
               disable=True if options.quiet else None)  # fmt: skip
    results = sorted(bar, key=lambda r: r["number"])
    rows = {name: summarise(results, "rows", name) for name in generates}
    bounds = {
        name: summarise(results, "bounds", name)
        for name in dict.fromkeys(b for r in results for b in r["bounds"])
    }
    add_differences(rows, results)
    curves, head = _head(runtime, results, rows, cases)
    result |= {"dtype": str(runtime.dtype), "bundle_name": runtime.manifest.name, "rows": rows,
               "refused": refused, "bounds": bounds, "curves": curves, "head": head}  # fmt: skip
    timing = {}
    if options.timing_clips and generates:
        runs = speed.time_policies(generates, cases[: options.timing_clips], warm_up=2, quiet=options.quiet)
        timing = {name: speed.summarise(taken) for name, taken in runs.items()}
    result |= {"timing": timing, "timing_threads": options.threads, "verdicts": report.verdicts(rows)}
    _show(result, timing)
    _write(options, result, results, cases)
    return 0 if all(reached for _, reached in result["verdicts"]) else 1


def _head(
    runtime: dsa_rt.Runtime,
    results: Sequence[Mapping[str, Any]],
    rows: dict[str, dict[str, Any]],
    cases: Sequence[Case],
) -> tuple[dict[str, allocation.Curve], dict[str, Any]]:
    """Curves and correlations, for a bundle with a head; adds the captured error to the rows."""
    if runtime.head is None:
        return {}, {}
    records = Records(*(np.array([r["record"][key] for r in results]) for key in ("confidence", "error")))
    calibration = runtime.manifest.calibration
    curves = add_captured(
        rows, records, Calibration.from_dict(calibration) if calibration is not None else None
    )
    return curves, correlations(records, cases)


def _show(result: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
    head = result["head"]
    tables = [report.table(result["rows"], timing), report.parts(result["rows"] | result["bounds"])]
    if head:
        tables.append(report.captured(result["rows"], result["curves"]))
    print(*(f"{text}\n" for text in tables), sep="\n")
    if head:
        words = {
            "overall": head["overall"],
            "without first chunks": head["later_chunks"],
            "within clips": head["within_clips"],
        }
        words |= {motion: entry["correlation"] for motion, entry in head["by_motion"].items()}
        print("confidence against removable error, Spearman:",
              ", ".join(f"{name} {common.figure(value, 2)}" for name, value in words.items()))  # fmt: skip
    for name, reason in result["refused"].items():
        print(f"not run: {name}: {reason}")
    for text, reached in result["verdicts"]:
        print("reached: " if reached else "MISSED:  ", text)
    if timing and (busy := common.warn_if_busy(result)):
        print(busy)


def _write(
    options: Any, result: Mapping[str, Any], results: Sequence[Mapping[str, Any]], cases: Sequence[Case]
) -> None:
    paths = [
        common.write_json(options.out, "quality.json", result),
        common.write_json(options.out, "quality-clips.json", {"clips": results}, indent=None),
    ]
    if result["head"]:
        from bench import pictures

        paths += [
            pictures.scatter(options.out / "quality-scatter.png", results, cases, result["head"]),
            pictures.trade_off(options.out / "quality-calls.png", result),
        ]
    print("written:", ", ".join(map(common.show_path, paths)))


if __name__ == "__main__":
    sys.exit(common.run(main))
