"""What policies would have done in a recorded run, beside the best and a random allocation of the same cost.

Share captured: error removed by the passes that ran / error removed by all, summed over clips and chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsa_rt.errors import PolicyError
from dsa_rt.policy.base import Policy
from dsa_rt.policy.calibration import Calibration
from dsa_rt.policy.names import parse_policy
from dsa_rt.policy.records import Records
from dsa_rt.policy.targets import Cost

Passes = NDArray[np.int64]


def simulate(
    policy: str | Policy, records: Records, calibration: Calibration | None = None, cost: Cost | None = None
) -> dict[str, Any]:
    """A policy run over recorded confidences, clip by clip; the summary of :func:`summarise`, and "policy".

    The error of a chunk is taken as recorded after as many passes, whatever the chunks before it got.
    """
    policy = parse_policy(policy)
    confidence = records.confidence.tolist()
    passes = np.empty((records.clips, records.chunks), np.int64)
    for clip in range(records.clips):
        decider = policy.begin(records.passes, records.chunks, calibration, has_head=True, cost=cost)
        for chunk in range(records.chunks):
            done, more = 0, True
            while more:
                done += 1
                wanted = decider.wants_confidence(chunk, done)
                more = decider.another_pass(
                    chunk, done, confidence[clip][chunk][done - 1] if wanted else None
                )
            passes[clip, chunk] = done
    return {"policy": policy.name} | summarise(passes, records)


def summarise(passes: Passes, records: Records) -> dict[str, Any]:
    """JSON-ready; passes [clips, chunks].

    passes_per_chunk: mean. model_calls, model_calls_max: per clip, context passes counted. captured: see
    above. refined: share of chunks with more than one pass. passes_by_chunk: mean of each chunk.
    histogram: chunks by passes, from 1. passes: as given.
    """
    gain = records.gain()
    captured = np.take_along_axis(gain, passes[..., None] - 1, -1).sum() / gain[..., -1].sum()
    calls = passes.sum(1) + records.chunks
    return {
        "passes_per_chunk": float(passes.mean()),
        "model_calls": float(calls.mean()),
        "model_calls_max": int(calls.max()),
        "captured": float(captured),
        "refined": float((passes > 1).mean()),
        "passes_by_chunk": passes.mean(0).tolist(),
        "histogram": np.bincount(passes.ravel(), minlength=records.passes + 1)[1:].tolist(),
        "passes": passes.tolist(),
    }


def oracle(
    records: Records, model_calls: float, *, all_or_nothing: bool = False, refine_first: bool = False
) -> dict[str, Any]:
    """The best any policy could do with at most ``model_calls`` in every clip, found with the true errors.

    all_or_nothing: chunks get one pass or all. refine_first: the first chunk gets all.
    """
    options = _options(records, all_or_nothing)
    budget = _extra(records, model_calls, refine_first)
    gain = records.gain()
    clips = np.arange(records.clips)
    best = np.zeros((records.clips, budget + 1))  # [clip, extra passes allowed], over the chunks seen so far
    choices: list[Passes] = []
    for chunk in range(records.chunks):
        allowed = options[-1:] if refine_first and chunk == 0 else options
        values = np.full((len(allowed), records.clips, budget + 1), -np.inf)
        for row, extra in enumerate(option - 1 for option in allowed):
            if extra <= budget:
                values[row, :, extra:] = best[:, : budget + 1 - extra] + gain[:, chunk, extra, None]
        choice = values.argmax(0)
        best = np.take_along_axis(values, choice[None], 0)[0]
        choices.append(np.array(allowed)[choice])
    passes = np.empty((records.clips, records.chunks), np.int64)
    left = np.full(records.clips, budget)
    for chunk in reversed(range(records.chunks)):
        passes[:, chunk] = choices[chunk][clips, left]
        left -= passes[:, chunk] - 1
    return {"policy": "oracle"} | summarise(passes, records)


def random_allocation(
    records: Records, model_calls: float, *, all_or_nothing: bool = False, seed: int = 0, repeats: int = 64
) -> dict[str, Any]:
    """The first chunk in full and the rest of the budget at random: what spending it without a head gives.

    Means over ``repeats`` draws; "passes" are those of the last.
    """
    unit = records.passes - 1 if all_or_nothing else 1
    steps = (_extra(records, model_calls, True) - (records.passes - 1)) // unit
    slots = np.repeat(np.arange(1, records.chunks), (records.passes - 1) // unit)
    generator = np.random.default_rng(seed)
    draws: list[dict[str, Any]] = []
    for _ in range(repeats):
        passes = np.ones((records.clips, records.chunks), np.int64)
        passes[:, 0] = records.passes
        for clip in range(records.clips):
            np.add.at(passes[clip], generator.permutation(slots)[:steps], unit)
        draws.append(summarise(passes, records))
    means = {key: float(np.mean([draw[key] for draw in draws])) for key in ("captured", "refined")}
    return {"policy": "random"} | draws[-1] | means


def _options(records: Records, all_or_nothing: bool) -> Sequence[int]:
    return [1, records.passes] if all_or_nothing else range(1, records.passes + 1)


def _extra(records: Records, model_calls: float, refine_first: bool) -> int:
    """Passes beyond one per chunk, for at most so many model calls in a clip."""
    least = 2 * records.chunks + (records.passes - 1 if refine_first else 0)
    if not model_calls >= least:
        raise PolicyError(f"{model_calls:g} model calls; {records.chunks} chunks take at least {least}")
    extra = math.floor(model_calls + 1e-9) - 2 * records.chunks
    return min(extra, records.chunks * (records.passes - 1))
