"""One clip under every policy: made by the runtime, scored, and compared with the run of all passes. Worker's
side.

Workers are processes of one thread each, so that two cores make two clips at a time. A clip's result does not
depend on which worker makes it.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dsa_rt
from bench.metrics import mean_squared_error, ssim
from bench.prompts import Case
from bench.recording import record_clip
from dsa_rt.demo.score import SceneScore, score
from dsa_rt.demo.world import render
from dsa_rt.media import Video
from dsa_rt.stats import Stats

DENSE = "dense"


@dataclass(frozen=True)
class Job:
    """What a worker loads. rows: policies that the bundle can run. many_step: another bundle, made for the
    first ``many_step_clips`` cases only.
    """

    bundle: str
    dtype: str
    frames: int | None
    rows: tuple[str, ...]
    many_step: str = "demo-many-step"
    many_step_clips: int = 0


class Evaluator:
    """A loaded bundle and its compiled policies."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.runtime = dsa_rt.load(job.bundle, dtype=job.dtype, verify_hashes=False)
        self.dense = self.runtime.compile(frames=job.frames, policy=DENSE)
        self.generates = {name: self.runtime.compile(frames=job.frames, policy=name) for name in job.rows}
        self.many_step = None
        if job.many_step_clips:
            self.many_step = dsa_rt.load(job.many_step, dtype=job.dtype).compile(frames=job.frames)

    def __call__(self, case: Case) -> dict[str, Any]:
        """JSON-ready: "rows" by policy, "bounds" by name, and "record" where the bundle has a head."""
        settings = self.dense.settings
        truth = torch.from_numpy(render(case.scene, case.seed, settings.frames, settings.height))
        reference, stats = self._make(self.dense, case)
        known = {stats.frames_sha256: _judge(reference.frames, case, reference.frames)}
        rows: dict[str, Any] = {}
        for name, generate in self.generates.items():
            video, spent = (reference, stats) if name == DENSE else self._make(generate, case)
            sha = spent.frames_sha256
            if sha not in known:  # the same passes make the same frames, which need no second look
                known[sha] = _judge(video.frames, case, reference.frames)
            rows[name] = known[sha] | {
                "passes": [chunk.passes for chunk in spent.chunks],
                "calls": spent.passes + len(spent.chunks),  # as published: a context pass for the last chunk too
            }
        bounds = {
            "ground truth": _judge(truth, case),
            "codec round trip": _judge(self._round_trip(truth), case, truth),
        }
        if self.many_step is not None and case.number < self.job.many_step_clips:
            video, spent = self._make(self.many_step, case)
            bounds["many steps"] = _judge(video.frames, case) | {"calls": spent.model_calls}
        result = {
            "number": case.number, "prompt": case.prompt, "seed": case.seed, "rows": rows, "bounds": bounds,
        }  # fmt: skip
        if self.runtime.head is not None:
            record = record_clip(self.dense, case.prompt, case.seed)
            if reference.latents is None or not torch.equal(record.latents, reference.latents):
                raise RuntimeError(f"the watched run of {case.prompt!r} differs from the runtime's")
            result["record"] = {"confidence": record.confidence.tolist(), "error": record.error.tolist()}
        return result

    @staticmethod
    def _make(generate: dsa_rt.Generate, case: Case) -> tuple[Video, Stats]:
        video = generate(case.prompt, case.seed)
        assert isinstance(video, Video) and video.stats is not None
        return video, video.stats

    @torch.no_grad()
    def _round_trip(self, frames: Tensor) -> Tensor:
        codec = self.runtime.codec
        pixels = (frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(self.runtime.dtype)
        decoded = codec.decode(codec.encode(pixels))[0].float()
        return decoded.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)


def _judge(frames: Tensor, case: Case, reference: Tensor | None = None) -> dict[str, Any]:
    """Score against the prompt, and distance to the reference where there is one."""
    judged = summary(score(frames.numpy(), case.scene))
    if reference is None:
        return judged
    same = torch.equal(frames, reference)
    return judged | {
        "mse": 0.0 if same else mean_squared_error(frames, reference),
        "ssim": 1.0 if same else ssim(frames, reference),
    }


def summary(found: SceneScore) -> dict[str, Any]:
    """The parts of a score that tables show. objects: per object asked what was right, and what was seen."""
    attributes = {
        name: sum(getattr(item, name) for item in found.objects) / len(found.objects)
        for name in ("colour", "shape", "motion")
    }
    objects = [
        {
            "asked": f"{item.asked.colour} {item.asked.shape} {item.asked.motion}",
            "right": list(item.attributes), "seen_shape": item.seen_shape, "seen_motion": item.seen_motion,
        }
        for item in found.objects
    ]  # fmt: skip
    return {
        "score": found.attributes, "all_right": found.all_right, **attributes, "ground": found.ground,
        "surplus": len(found.surplus), "objects": objects,
    }  # fmt: skip


@functools.lru_cache(maxsize=1)
def _evaluator(job: Job) -> Evaluator:
    return Evaluator(job)


def evaluate(job: Job, case: Case) -> dict[str, Any]:
    """One case in this process; what the job needs is loaded at the first call and kept."""
    return _evaluator(job)(case)


def evaluate_all(job: Job, cases: Sequence[Case], workers: int) -> Iterator[dict[str, Any]]:
    """Every case, in the order they are done. workers: processes of one thread; 0: one thread of this
    process.
    """
    if workers == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for case in cases:
                yield evaluate(job, case)
        finally:
            torch.set_num_threads(threads)
            _evaluator.cache_clear()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = [pool.submit(evaluate, job, case) for case in cases]
        try:
            for done in as_completed(pending):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)
