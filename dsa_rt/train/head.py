"""Stages (d) and (e): the confidence head alone, with the generator frozen, and the calibration run.

Distribution matching trains the head on the teacher's judgement of samples (DSA, section 3). What an exit decision
needs is how far a pass's prediction is from the one that all scheduled passes would have reached. Stage (d) therefore
goes on with the same loss, ``c * d - lambda * log c``, and d the squared distance of a pass's clean prediction to that
of the chunk's last pass (normalised by its mean): the refined sample takes the place of the teacher's prediction. (e)
records confidence and error of every chunk after every pass over new prompts, for the calibrated policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsa_rt.codec.text import GrammarTextEncoder
from dsa_rt.models.confidence import ConfidenceHead
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import TokenGrid
from dsa_rt.policy import Records
from dsa_rt.train.distill import confidence_loss
from dsa_rt.train.loop import EMA, Loop, autocast, cosine, set_learning_rate
from dsa_rt.train.regress import training_prompts
from dsa_rt.train.rollout import ChunkPass, chunk_frames, chunk_passes, rollout


def dense_rollout(
    student: WanModel, encoder: GrammarTextEncoder, grid: TokenGrid, sigmas: Sequence[float], taps: Sequence[int], *,
    frames: int, chunk: int, ids: Tensor, counts: Sequence[int] | None = None,
) -> list[list[ChunkPass]]:  # fmt: skip
    """All passes of every chunk for these prompts, without gradient."""
    chunks = chunk_frames(frames, chunk)
    with torch.no_grad(), autocast(ids.device):
        passes = chunk_passes(student, grid, encoder(ids), frames)
        return rollout(passes, chunks, sigmas, counts or [len(sigmas)] * len(chunks), taps=taps, keep_all=True)


def removable_error(chunk: list[ChunkPass]) -> Tensor:
    """Mean squared distance of each pass's clean prediction to the last pass's: [B, passes]; the last column is 0."""
    return torch.stack([(p.x0 - chunk[-1].x0).square().mean((1, 2)) for p in chunk], 1)


def fit_head(
    folder: Path, student: WanModel, head: ConfidenceHead, encoder: GrammarTextEncoder, grid: TokenGrid,
    sigmas: Sequence[float], *, frames: int, chunk: int, minutes: float | None = None, steps: int | None = None,
    batch: int = 16, learning_rate: float = 1e-3, scale: float = 0.2, device: str = "cpu",
) -> ConfidenceHead:  # fmt: skip
    """Train (or resume) the head on the student's own refinement; the averaged head is returned and written."""
    torch.manual_seed(4)
    done = folder / "head.safetensors"
    if not done.exists():
        head.requires_grad_(True)
        ema, optimizer = EMA(head, 0.99), torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.02)
        loop = Loop(folder, "confidence head", state={"head": head, "ema": ema, "optimizer": optimizer},
                    minutes=minutes, steps=steps)  # fmt: skip
        mean = None
        for step in loop:
            set_learning_rate(optimizer, cosine(loop.fraction, learning_rate, learning_rate / 20))
            ids = training_prompts(batch, 1 << 41 | step).to(device)
            kept = dense_rollout(student, encoder, grid, sigmas, head.config.taps, frames=frames, chunk=chunk, ids=ids)
            errors = torch.stack([removable_error(c) for c in kept], 1)[..., :-1]  # [B, chunks, passes - 1]
            mean = errors.mean() if mean is None else mean.lerp(errors.mean(), 0.05)
            total = 0.0
            for index, passes in enumerate(kept):
                taps = [torch.cat([p.taps[i].float() for p in passes[:-1]]) for i in range(len(head.config.taps))]
                logits = head(taps).unflatten(0, (len(passes) - 1, batch)).T
                loss = confidence_loss(logits, errors[:, index] / mean, scale) / len(kept)
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            loop.log(loss=total)
        save_file({k: v.contiguous() for k, v in ema.shadow.items()}, done)
    head.load_state_dict(load_file(done))
    head.requires_grad_(False).eval()
    return head


@torch.no_grad()
def calibration_records(
    student: WanModel, head: ConfidenceHead, encoder: GrammarTextEncoder, grid: TokenGrid, sigmas: Sequence[float], *,
    frames: int, chunk: int, clips: int, batch: int = 16, first_seed: int = 1 << 42, device: str = "cpu",
) -> Records:  # fmt: skip
    """Confidence and removable error [clips, chunks, passes] over prompts from ``first_seed`` on."""
    confidences, errors = [], []
    for start in range(0, clips, batch):
        ids = training_prompts(min(batch, clips - start), first_seed + start).to(device)
        kept = dense_rollout(student, encoder, grid, sigmas, head.config.taps, frames=frames, chunk=chunk, ids=ids)
        errors.append(torch.stack([removable_error(c) for c in kept], 1))
        confidences.append(
            torch.stack([torch.stack([head([t.float() for t in p.taps]).sigmoid() for p in c], 1) for c in kept], 1)
        )
    return Records(torch.cat(confidences).double().cpu().numpy(), torch.cat(errors).double().cpu().numpy())
