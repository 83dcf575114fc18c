"""One timed clip, taken as a player takes it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, cast

from dsa_rt.generate import Generate
from dsa_rt.media import Video
from dsa_rt.progress import Event
from dsa_rt.stats import Stats
from dsa_rt.suite.cases import Case
from dsa_rt.suite.device import Energy
from dsa_rt.suite.operations import run_work

INCLUDED = (
    "fps_denoise: frames / (denoise passes + context passes)",
    "fps_with_decode: frames / (the same + decoding latents to pixels)",
    "a batch that shares passes: denoise and context time of the clip that took longest",
    "fps_end_to_end: frames / wall clock from the call to the last frame in the caller's hands, text encoder included",
    "first_frame_ms: from the call to the first chunk in the caller's hands; gaps_ms: from one chunk to the next",
    "deadline_misses: chunks that came after a player which starts with the first one, plays at the bundle's rate and "
    "never waits would have needed them; stall_ms: how long one that does wait would have waited in all",
    "nfe: evaluations of the generator, denoise and context passes, both branches of guidance",
    "active_token_share: tokens computed in denoise passes, of the full schedule's",
    "tflop_s: operations of all passes (counted, dsa_rt/suite/operations.py) / denoise and context time",
    "energy_j: what the device took from the call to the last frame, idle power included; CUDA with NVML only",
    "excluded everywhere: loading, compiling, warm-up, writing files",
)


def run_clip(case: Case, generate: Generate, energy: Energy, events: list[Event] | None = None) -> dict[str, Any]:
    """A record of one clip, JSON-ready. events: filled where given."""
    seen: list[Event] = []
    before, start = energy.joules(), time.perf_counter()
    if case.batch == 1:
        handed_out, stats = _streamed(case, generate, seen if events is not None else None, start)
    else:
        handed_out, stats = _batched(case, generate, start)
    after = energy.joules()
    if events is not None:
        events[:] = seen
    record = _record(generate, stats, handed_out, case.batch)
    record["energy_j"] = None if before is None or after is None else after - before
    return record


def _streamed(
    case: Case, generate: Generate, seen: list[Event] | None, start: float
) -> tuple[list[float], list[Stats]]:
    """Milliseconds at which chunks came, and what they cost."""
    session = generate.session(case.prompt, case.seed, on_event=None if seen is None else seen.append)
    handed_out = []
    for chunk in session:
        chunk.frames.cpu()  # frames that are still being computed are in nobody's hands
        handed_out.append(1000 * (time.perf_counter() - start))
    return handed_out, [session.stats()]


def _batched(case: Case, generate: Generate, start: float) -> tuple[list[float], list[Stats]]:
    """All prompts of a call; they come when the call ends."""
    videos = cast(list[Video], generate([case.prompt] * case.batch, seed=case.seed))
    return [1000 * (time.perf_counter() - start)], [cast(Stats, video.stats) for video in videos]


def _record(generate: Generate, stats: Sequence[Stats], handed_out: Sequence[float], batch: int) -> dict[str, Any]:
    runtime, settings, first = generate.runtime, generate.settings, stats[0]
    frames, total_ms = sum(s.frames for s in stats), handed_out[-1]
    together = max if settings.sessions > 1 else sum  # clips that share passes all report the time of these
    denoise, decode = together([s.denoise_ms + s.context_ms for s in stats]), sum(s.decode_ms for s in stats)
    itemsize = runtime.dtype.itemsize
    works = [run_work(runtime.model.config, settings, s.chunks, itemsize) for s in stats]
    operations, moved = sum(work.operations for work in works), sum(work.bytes for work in works)
    misses, stall = player(handed_out, [chunk.frames for chunk in first.chunks], first.video_fps)
    streamed = batch == 1
    return {
        "fps_denoise": 1000 * frames / denoise, "fps_with_decode": 1000 * frames / (denoise + decode),
        "fps_end_to_end": 1000 * frames / total_ms, "first_frame_ms": handed_out[0],
        "gaps_ms": [b - a for a, b in itertools.pairwise(handed_out)] if streamed else [],
        "deadlines": len(handed_out) - 1, "deadline_misses": misses if streamed else 0,
        "stall_ms": stall if streamed else 0.0, "nfe": sum(s.model_calls for s in stats),
        "active_token_share": first.active_token_share, "text_ms": sum(s.text_ms for s in stats),
        "denoise_ms": together([s.denoise_ms for s in stats]), "context_ms": together([s.context_ms for s in stats]),
        "decode_ms": decode, "total_ms": total_ms, "tflop": operations / 1e12,
        "tflop_s": operations / denoise / 1e9, "gbytes": moved / 1e9, "frames": frames,
        "chunk_frames": [chunk.frames for chunk in first.chunks],
    }  # fmt: skip


def player(arrived_ms: Sequence[float], frames: Sequence[int], fps: float) -> tuple[int, float]:
    """(chunks that came late for a player which never waits, milliseconds that one which waits would have waited).

    It starts with the first chunk and plays ``fps`` frames a second. arrived_ms, frames: of each chunk.
    """
    misses, due, waited, due_waiting = 0, arrived_ms[0], 0.0, arrived_ms[0]
    for arrived, count in zip(arrived_ms, frames, strict=False):
        misses += arrived > due
        late = max(0.0, arrived - due_waiting)
        waited += late
        due += 1000 * count / fps
        due_waiting += late + 1000 * count / fps
    return misses, waited
