"""A result as Markdown, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsa_rt.suite.records import figure, table, warn_if_busy


def report(result: Mapping[str, Any]) -> str:
    """Three tables (speed, latency, cost), what did not run and why, and what the figures mean."""
    cases = result["cases"]
    parts = []
    if cases:
        parts = [_speed(result), _latency(result), _cost(result)]
    parts += ["\n".join(f"- not run: {name}: {reason}" for name, reason in result["not_run"].items())]
    notes = [f"warm-up: {result['warm_up']}", *_peaks(result), *_notes(result)]
    if busy := warn_if_busy(result):
        notes.append(busy.removeprefix("note: "))
    return "\n\n".join(part for part in [*parts, "\n".join(f"- {note}" for note in notes)] if part)


def _spread(case: Mapping[str, Any], metric: str, form: str = ".1f") -> str:
    entry = case["figures"][metric]
    if entry is None:
        return "-"
    return f"{entry['median']:{form}} ({entry['p20']:{form}}-{entry['p80']:{form}})"


def _name(case: Mapping[str, Any]) -> str:
    return case["name"] + (" (random weights)" if case["random_weights"] else "")


def _speed(result: Mapping[str, Any]) -> str:
    header = ["frames per second: median (p20-p80)", "policy", "denoise", "with decode", "end to end", "plays at",
              "model calls", "active tokens %", "n"]  # fmt: skip
    rows = [
        [_name(case), case["made"]["policy"], *(_spread(case, f"fps_{part}") for part in
         ("denoise", "with_decode", "end_to_end")), figure(case["made"]["fps"], 0), _median(case, "nfe", 0),
         _median(case, "active_token_share", 1, 100), str(len(case["runs"]))]
        for case in result["cases"]
    ]  # fmt: skip
    return table(header, rows)


def _latency(result: Mapping[str, Any]) -> str:
    header = ["latency in ms", "first frame", "between chunks p50", "p95", "p99", "n", "deadlines missed", "stall"]
    rows = []
    for case in result["cases"]:
        gaps = case["between_chunks_ms"] or {}
        points = [figure(gaps.get(key)) for key in ("p50", "p95", "p99")]
        missed = f"{case['deadlines']['misses']} of {case['deadlines']['n']}"
        rows.append([
            _name(case), _spread(case, "first_frame_ms"), *points, str(gaps.get("n", "-")), missed,
            _spread(case, "stall_ms"),
        ])  # fmt: skip
    return table(header, rows)


def _cost(result: Mapping[str, Any]) -> str:
    header = ["cost", "TFLOP a clip", "TFLOP/s", "of the roofline %", "FLOP/byte", "planned MB", "peak MB", "of",
              "load s", "compile s", "energy J"]  # fmt: skip
    rows = [
        [_name(case), f"{case['runs'][0]['tflop']:.3g}", _spread(case, "tflop_s", ".3g"),
         figure(case["roofline"]["share"], 1, scale=100), figure(case["roofline"]["flop_per_byte"], 0),
         figure(case["memory"]["planned_bytes"], 1, scale=1e-6), figure(case["memory"]["peak_bytes"], 1, scale=1e-6),
         case["memory"]["of"], figure(case["load_s"], 2), figure(case["compile_s"], 2), _spread(case, "energy_j")]
        for case in result["cases"]
    ]  # fmt: skip
    return table(header, rows)


def _median(case: Mapping[str, Any], metric: str, digits: int, scale: float = 1.0) -> str:
    entry = case["figures"][metric]
    return figure(None if entry is None else entry["median"], digits, scale=scale)


def _peaks(result: Mapping[str, Any]) -> list[str]:
    return [
        f"roofline of {name}: the best of {peak['n']} products of {peak['matmul'][0]} x {peak['matmul'][1]} x "
        f"{peak['matmul'][2]} reached {peak['tflop_s']:.3g} TFLOP/s and of {peak['n']} copies of "
        f"{peak['copy_bytes'] / 1e6:.0f} MB {peak['gb_s']:.1f} GB/s, in this run"
        for name, peak in result["peaks"].items()
    ]


def _notes(result: Mapping[str, Any]) -> list[str]:
    missing = sorted({case["energy_missing"] for case in result["cases"]} - {None})
    memory = sorted({case["memory"]["missing"] for case in result["cases"]} - {None})
    process = any(case["memory"]["of"] == "process" for case in result["cases"])
    notes = [f"no energy: {reason}" for reason in missing] + [f"no peak memory: {reason}" for reason in memory]
    if process:
        notes.append("peak MB of a process: interpreter, torch and the weights of all cases included; planned MB: the "
                     "case's own weights and buffers")  # fmt: skip
    return notes
