"""One clip by every method: sampled, decoded, scored and held against the dense run. Worker's side.

Workers are processes of one thread each; a clip's result does not depend on which worker makes it.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.hsa.allocated import Allocated
from bench.hsa.clip import STEPS, Clip, Method, Regime, Studio, measure
from bench.metrics import mean_squared_error, psnr, ssim
from bench.prompts import Case
from dsa_rt.demo.score import score

Methods = Mapping[Regime, Mapping[str, Method]]


@dataclass(frozen=True)
class Job:
    """What a worker loads. scored: also judge clips against their prompts."""

    bundle: str
    dtype: str
    scored: bool = True


def evaluate(job: Job, methods: Methods, case: Case) -> dict[str, Any]:
    """JSON-ready: by regime and row."""
    studio, threads = _studio(job), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = {
            regime.name: _rows(studio, studio.clip(case.prompt, case.seed, regime), chosen, case, job.scored)
            for regime, chosen in methods.items()
        }
    finally:
        torch.set_num_threads(threads)
    return {"number": case.number, "prompt": case.prompt, "seed": case.seed, "regimes": rows}


def _rows(
    studio: Studio, clip: Clip, methods: Mapping[str, Method], case: Case, scored: bool
) -> dict[str, dict[str, float]]:
    reference = measure(Allocated(STEPS), clip).rows
    frames, rows = studio.decode(reference), {}
    for name, method in methods.items():
        run = measure(method, clip)
        made = studio.decode(run.rows)
        error = mean_squared_error(made, frames)
        rows[name] = {
            "share": run.share, "psnr": psnr(error), "mse": error, "ssim": ssim(made, frames),
            "latent_psnr": latent_psnr(run.rows, reference),
        }  # fmt: skip
        if scored:
            rows[name]["score"] = score(made.numpy(), case.scene).attributes
    return rows


def latent_psnr(rows: Tensor, reference: Tensor) -> float:
    """In decibels, its peak the range of the reference's values."""
    error = float((rows - reference).double().square().mean())
    peak = float(reference.max() - reference.min())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


@functools.lru_cache(maxsize=1)
def _studio(job: Job) -> Studio:
    return Studio(job.bundle, job.dtype)


def evaluate_all(job: Job, methods: Methods, cases: Sequence[Case], workers: int) -> Iterator[dict[str, Any]]:
    """Every case, in the order they are done. workers: processes; 0: this one."""
    if workers == 0:
        for case in cases:
            yield evaluate(job, methods, case)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = [pool.submit(evaluate, job, methods, case) for case in cases]
        try:
            for done in as_completed(pending):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)
