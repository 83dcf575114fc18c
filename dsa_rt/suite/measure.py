"""Measuring cases: prepared one after the other, warmed up by rule, then timed in turns run by run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from dsa_rt.errors import DsaRtError, OptionError
from dsa_rt.generate import Generate
from dsa_rt.memory import free_memory
from dsa_rt.progress import Event
from dsa_rt.runtime import DTYPES, Runtime, load
from dsa_rt.suite import clip, device, records
from dsa_rt.suite.cases import Case
from dsa_rt.suite.random_weights import random_runtime, weight_bytes
from dsa_rt.suite.schema import SCHEMA
from dsa_rt.suite.scripted import suite_policy
from dsa_rt.suite.turns import WARM_UP_RULE, in_turns, warm_up

LEAST_RUNS = 5
SUMMARISED = (
    "fps_denoise", "fps_with_decode", "fps_end_to_end", "first_frame_ms", "stall_ms", "nfe", "active_token_share",
    "text_ms", "denoise_ms", "context_ms", "decode_ms", "total_ms", "tflop_s", "energy_j",
)  # fmt: skip
Progress = Callable[[str], None]


@dataclass
class Ready:
    """A case that can run. peak: key into the result's peaks."""

    case: Case
    generate: Generate
    energy: device.Energy
    load_s: float
    compile_s: float
    peak: str


def measure(
    cases: Sequence[Case], *, place: str = "cpu", runs: int = 7, warm_up_seconds: float = 60.0,
    settings: dict[str, Any] | None = None, progress: Progress = lambda _: None, small_peaks: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A result as :mod:`dsa_rt.suite.schema` describes it. place: the device of cases that run anywhere. settings: for
    the fingerprint. progress: gets a line before every step. small_peaks: for tests of the suite itself.

    Cases that cannot run are in ``not_run`` with the reason. :class:`OptionError` for fewer than 5 runs.
    """
    if runs < LEAST_RUNS:
        raise OptionError(f"runs is {runs}; expected {LEAST_RUNS} or more, since nothing is said from less")
    result: dict[str, Any] = {"schema": SCHEMA} | records.fingerprint(
        "dsa-rt bench", {"device": place, "runs": runs, "threads": torch.get_num_threads()} | (settings or {}),
        warm_up=WARM_UP_RULE, included=clip.INCLUDED,
    )  # fmt: skip
    ready, not_run = prepare(cases, place, progress)
    result["peaks"] = {}
    for one in ready.values():
        runtime = one.generate.runtime
        if one.peak not in result["peaks"]:
            progress(f"what {one.peak} does at best")
            result["peaks"][one.peak] = device.peaks(runtime.device, runtime.dtype, small=small_peaks)
    rows = {name: _warm(one, warm_up_seconds, progress) for name, one in ready.items()}
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in ready}
    ways = {
        name: (lambda _, one=one: clip.run_clip(one.case, one.generate, one.energy)) for name, one in ready.items()
    }
    for name, number, record in in_turns(ways, runs):
        progress(f"run {number + 1} of {runs}: {name}")
        taken[name].append(record)
    result["cases"] = [rows[name] | summarise(taken[name], result["peaks"][ready[name].peak]) for name in ready]
    result["not_run"], result["gpu"] = not_run, _gpu(ready.values())
    result["timeline"] = _timeline(ready, progress)
    return result


def refusal(case: Case, place: str) -> str | None:
    """Why a case cannot run here, before anything is loaded; None where it can."""
    where = torch.device("cuda" if case.device == "cuda" else place)
    if where.type == "cuda" and not torch.cuda.is_available():
        return "it needs a CUDA device, and torch sees none"
    if case.size is None:
        return None
    dtype = DTYPES.get(case.dtype, torch.bfloat16)
    need, free = weight_bytes(case.size, dtype), free_memory(where)
    if free is not None and need > free:
        return f"its weights need {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on {where}"
    return None


def prepare(
    cases: Iterable[Case], place: str, progress: Progress = lambda _: None
) -> tuple[dict[str, Ready], dict[str, str]]:
    """What can run, by name, and why the rest cannot. Cases of one bundle share its weights."""
    ready: dict[str, Ready] = {}
    not_run: dict[str, str] = {}
    runtimes: dict[tuple[object, ...], tuple[Runtime, float]] = {}
    for case in cases:
        reason = refusal(case, place)
        if reason is None:
            progress(f"compiling {case.name}")
            try:
                ready[case.name] = _ready(case, place, runtimes)
            except DsaRtError as error:
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            not_run[case.name] = reason
    return ready, not_run


def _ready(case: Case, place: str, runtimes: dict[tuple[object, ...], tuple[Runtime, float]]) -> Ready:
    where = torch.device("cuda" if case.device == "cuda" else place)
    key = (case.bundle, case.size, case.form, str(where), case.dtype)
    if key not in runtimes:
        start = time.perf_counter()
        if case.bundle is not None:
            runtime = load(case.bundle, device=where, dtype=case.dtype)
        else:
            runtime = random_runtime(cast(str, case.size), cast(str, case.form), where, case.dtype)
        device.wait(where)
        runtimes[key] = runtime, time.perf_counter() - start
    runtime, load_s = runtimes[key]
    start = time.perf_counter()
    generate = runtime.compile(
        height=case.height, width=case.width, frames=case.frames, policy=suite_policy(case.policy), steps=case.steps,
        sessions=case.batch,
    )  # fmt: skip
    device.wait(where)
    compiled = time.perf_counter() - start
    peak = f"{where}, {str(runtime.dtype).removeprefix('torch.')}"
    return Ready(case, generate, device.Energy(where), load_s, compiled, peak)


def _warm(one: Ready, seconds: float, progress: Progress) -> dict[str, Any]:
    """Everything about a case but its timed runs."""
    case, generate = one.case, one.generate
    progress(f"warming up {case.name}")
    warmed = warm_up(lambda: clip.run_clip(case, generate, one.energy), seconds=seconds)
    with device.PeakMemory(generate.runtime.device) as peak:
        clip.run_clip(case, generate, one.energy)
    settings, runtime = generate.settings, generate.runtime
    return {
        "name": case.name, "case": case.to_dict(), "random_weights": case.random_weights,
        "made": {"bundle": runtime.manifest.name, "device": str(runtime.device), "policy": settings.policy.name,
                 "dtype": str(runtime.dtype).removeprefix("torch."), "height": settings.height,
                 "width": settings.width, "frames": settings.frames, "fps": runtime.manifest.fps,
                 "passes_scheduled": settings.passes, "chunks": settings.chunks if settings.causal else 1},
        "peak": one.peak, "load_s": one.load_s, "compile_s": one.compile_s, "warm_up": warmed.to_dict(),
        "memory": {"planned_bytes": generate.plan.total, "planned_weights_bytes": generate.plan.weights,
                   "peak_bytes": peak.bytes, "before_bytes": peak.before, "of": peak.kind, "missing": peak.missing},
        "energy_missing": one.energy.missing,
    }  # fmt: skip


def summarise(runs: Sequence[dict[str, Any]], peaks: dict[str, Any]) -> dict[str, Any]:
    """Figures of a case's runs: medians with their spread and n, percentiles of the gaps between chunks, deadlines, and
    the share of the roofline."""
    gaps = torch.tensor([gap for run in runs for gap in run["gaps_ms"]], dtype=torch.float64)
    percentiles = None
    if len(gaps):
        points = gaps.quantile(torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)).tolist()
        percentiles = dict(zip(("p50", "p95", "p99"), points, strict=True)) | {"n": len(gaps)}
    intensity = sum(run["tflop"] for run in runs) * 1e3 / sum(run["gbytes"] for run in runs)
    roof = min(peaks["tflop_s"], intensity * peaks["gb_s"] / 1e3)
    figures = {name: records.spread(run[name] for run in runs) for name in SUMMARISED}
    return {
        "runs": list(runs), "figures": figures, "between_chunks_ms": percentiles,
        "deadlines": {"misses": sum(run["deadline_misses"] for run in runs),
                      "n": sum(run["deadlines"] for run in runs)},
        "roofline": {"flop_per_byte": intensity, "roof_tflop_s": roof,
                     "share": (records.median(figures["tflop_s"]) or 0.0) / roof},
    }  # fmt: skip


def _gpu(ready: Iterable[Ready]) -> dict[str, Any] | None:
    places = [one.generate.runtime.device for one in ready if one.generate.runtime.device.type == "cuda"]
    return device.facts(places[0]) if places else None


def _timeline(ready: dict[str, Ready], progress: Progress) -> dict[str, Any] | None:
    """Events of one more run, of the first streaming case that has a policy; it is in no figure."""
    streaming = [one for one in ready.values() if one.generate.settings.causal and one.case.batch == 1]
    one = next((one for one in streaming if one.case.policy != "dense"), next(iter(streaming), None))
    if one is None:
        return None
    progress(f"the timeline of {one.case.name}")
    events: list[Event] = []
    clip.run_clip(one.case, one.generate, one.energy, events)
    return {
        "case": one.case.name,
        "events": [{"kind": e.kind, "chunk": e.chunk, "passes": e.passes, "seconds": e.seconds} for e in events],
    }
