"""Records of held-out clips: the head's confidence and the error still there, after every pass of every
chunk.

Error is measured in latent space. A chunk runs all its passes in the context of earlier chunks that had all
of theirs; err_p = mean (x0_p - x0_last)^2 over the chunk's tokens, x0_p being the clean prediction of pass p.
What refining can remove is err_1; a policy that stops after pass p captures err_1 - err_p of it.

The runtime's own loop, weights, dtype and noise make the records: a pass is seen by looking over the
sampler's shoulder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.metrics import spearman
from bench.prompts import Case
from dsa_rt.demo.grammar import MOTIONS
from dsa_rt.engine import CONTEXT, Piece
from dsa_rt.generate import Generate
from dsa_rt.models.wan import Output
from dsa_rt.policy import Decider, Records
from dsa_rt.sampler.rollout import DenoisedChunk, Rollout, advance
from dsa_rt.schedule import to_x0


class _EveryPass(Decider):
    """All passes, each of them judged."""

    def wants_confidence(self, chunk: int, passes: int) -> bool:
        return True

    def _another_pass(self, chunk: int, passes: int, confidence: float | None) -> bool:
        return True


@dataclass(frozen=True)
class ClipRecord:
    """confidence, error [chunks, passes]; latents [C, F, h, w] fp32 of the clip with all passes."""

    confidence: NDArray[np.float64]
    error: NDArray[np.float64]
    latents: Tensor


class _Watched(Rollout):
    """A rollout that keeps each clean prediction of the chunk in hand."""

    x0: list[Tensor]

    def take(self, pieces: Sequence[Piece], results: Sequence[Output], began: object) -> DenoisedChunk | None:
        level = pieces[-1].level
        if level != CONTEXT:
            self.x0.append(to_x0(self.lane.rows(self.side), results[-1].velocity.float(), self.sigmas[level]))
        return super().take(pieces, results, began)


def record_clip(judged: Generate, prompt: str, seed: int) -> ClipRecord:
    """One clip with all passes, watched. judged: a function compiled for a policy that asks the head."""
    runtime, settings = judged.runtime, judged.settings
    lane = judged.lend()
    lane.engine.read_prompt(lane, runtime.text_encoder.encode([prompt]))
    rollout = _Watched(lane, _EveryPass(settings.passes), seed)
    confidences, errors, rows = [], [], []
    for _ in range(settings.chunks):
        rollout.x0, done = [], None
        while done is None:
            (done,) = advance([rollout])
        confidences.append(done.confidences)
        errors.append([float((x0 - rollout.x0[-1]).double().square().mean()) for x0 in rollout.x0])
        rows.append(done.x0.clone())
    judged.take_back(lane)
    latents = settings.grid.unpatchify(torch.cat(rows, 1))[0]
    return ClipRecord(np.array(confidences, np.float64), np.array(errors, np.float64), latents)


def correlations(records: Records, cases: Sequence[Case]) -> dict[str, Any]:
    """Spearman correlation of confidence with the error it should predict; a good head is near -1.

    overall, later_chunks (without the first), by_chunk, by_motion (later chunks of clips with that motion; a
    clip of two motions counts in both): first-pass confidence against removable error. within_clips: mean
    over clips of each clip's own correlation over its later chunks, which is what a budget per clip can use.
    by_pass: confidence after pass p against what the remaining passes remove, later chunks. mean_confidence:
    by pass.
    """
    confidence, error = records.confidence, records.error
    first, removable = confidence[..., 0], error[..., 0]
    within = [spearman(c[1:], e[1:]) for c, e in zip(first, removable, strict=True)]
    known = [value for value in within if value is not None]
    by_motion = {}
    for motion in MOTIONS:
        chosen = np.array([motion in case.motions for case in cases], bool)
        by_motion[motion] = {
            "correlation": spearman(first[chosen, 1:].ravel(), removable[chosen, 1:].ravel()),
            "clips": int(chosen.sum()),
            "removable_error": float(removable[chosen, 1:].mean()) if chosen.any() else None,
        }
    return {
        "overall": spearman(first.ravel(), removable.ravel()),
        "later_chunks": spearman(first[:, 1:].ravel(), removable[:, 1:].ravel()),
        "within_clips": float(np.mean(known)) if known else None,
        "by_chunk": [spearman(first[:, i], removable[:, i]) for i in range(records.chunks)],
        "by_motion": by_motion,
        "by_pass": [
            spearman(confidence[:, 1:, p].ravel(), error[:, 1:, p].ravel()) for p in range(records.passes - 1)
        ],
        "mean_confidence": confidence.mean((0, 1)).tolist(),
        "removable_error_by_chunk": removable.mean(0).tolist(),
        "error_by_pass": error.mean((0, 1)).tolist(),
    }
