"""Autoregressive few-step sampling of one clip, chunk by chunk, under any policy (DSA, Algorithm 1, is one)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsa_rt.models.confidence import ConfidenceHead
from dsa_rt.ops import step as ops
from dsa_rt.policy.base import Decider
from dsa_rt.sampler.passes import ChunkPasses

OnPass = Callable[[int, float | None], None]


@dataclass(frozen=True)
class DenoisedChunk:
    """A chunk before decoding. frames: its latent frames; x0 [1, A, patch_dim] fp32; times in milliseconds."""

    index: int
    frames: range
    x0: Tensor
    passes: int
    confidences: tuple[float | None, ...]
    threshold: float | None
    denoise_ms: float
    context_ms: float


class Rollout:
    """One clip in the making. Holds the position in the clip; everything it reads or writes is passed in.

    sigmas: the level of each scheduled pass, highest first. Noise is keyed by seed, token position in the clip and
    draw (0 for a chunk's start, p for the renoising after pass p), so it depends on nothing else.
    """

    def __init__(
        self,
        passes: ChunkPasses,
        head: ConfidenceHead | None,
        sigmas: Sequence[float],
        decider: Decider,
        seed: int,
        chunk_frames: int,
    ) -> None:
        self.passes, self.head, self.sigmas, self.decider = passes, head, list(sigmas), decider
        self.chunk_frames, self.index = chunk_frames, 0
        self.seeds = torch.tensor([seed], dtype=torch.int64, device=passes.cache.k.device)

    @torch.no_grad()
    def next_chunk(self, on_pass: OnPass, check: Callable[[], None]) -> DenoisedChunk:
        """Denoise the next chunk and write its context; ``check`` runs before every pass and may raise."""
        start, index = time.perf_counter(), self.index
        frames = range(index * self.chunk_frames, (index + 1) * self.chunk_frames)
        active = self.passes.active(frames)
        shape = (1, len(active.tokens), self.passes.model.config.patch_dim)
        x, x0 = (torch.empty(shape, device=active.tokens.device) for _ in range(2))
        ops.philox_normal(x, self.seeds, active.tokens, 0)
        confidences: list[float | None] = []
        threshold = None
        for done, sigma in enumerate(self.sigmas, 1):
            check()
            wanted = self.decider.wants_confidence(index, done)
            taps = self.head.config.taps if wanted and self.head is not None else ()
            out = self.passes.denoise(x, active, sigma, taps)
            confidence = self._confidence(out.taps) if taps else None
            again = self.decider.another_pass(index, done, confidence)
            threshold = self.decider.threshold if threshold is None else threshold
            confidences.append(confidence)
            following = self.sigmas[done] if again else 0.0
            ops.renoise(x, x, out.velocity.float(), sigma, following, self.seeds, active.tokens, done, x0=x0)
            on_pass(done, confidence)
            if not again:
                break
        denoised = time.perf_counter()
        check()
        self.passes.write_context(x0, active)
        self.index += 1
        ended = time.perf_counter()
        return DenoisedChunk(
            index, frames, x0, done, tuple(confidences), threshold, 1000 * (denoised - start), 1000 * (ended - denoised)
        )

    def _confidence(self, taps: list[Tensor]) -> float:
        assert self.head is not None
        logit = self.head(taps)
        # Which threshold applies is the decider's business; the op serves the sigmoid.
        confidence, refine = torch.empty_like(logit), torch.empty(logit.shape, dtype=torch.bool, device=logit.device)
        ops.exit_decision(refine, confidence, logit, torch.ones_like(logit))
        return float(confidence[0])
