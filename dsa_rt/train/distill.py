"""Stage (c), second half: distribution matching on the student's own rollout, jointly with the confidence head.

Generator: DMD (arXiv 2405.14867) on autoregressive rollouts (Self-Forcing, arXiv 2506.08009): the gradient of a sample
is the difference of two clean predictions from its re-noised version, of a frozen real score (the many-step generator,
guided) and a trained fake score. Confidence head (DSA, arXiv 2606.04432, section 3): ``c * sg[d] - lambda * log c`` per
chunk, with d the squared distance of the student's sample to the real score's prediction; d depends mostly on the noise
level at which the teacher judges, so it is divided by its running mean per level. Prompts only, no video data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsa_rt.codec.text import GrammarTextEncoder
from dsa_rt.models.confidence import ConfidenceConfig, ConfidenceHead
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens
from dsa_rt.schedule import TRAIN_TIMESTEPS, add_noise, sample_sigmas, to_x0
from dsa_rt.train.loop import EMA, Loop, autocast, cosine, set_learning_rate
from dsa_rt.train.regress import guided_velocity, training_prompts
from dsa_rt.train.rollout import ChunkPass, chunk_frames, chunk_passes, rollout


def confidence_loss(logits: Tensor, distance: Tensor, scale: float) -> Tensor:
    """``c * sg[d] - scale * log c`` (DSA, section 3), c = sigmoid(logits); optimum c = min(1, scale / E[d])."""
    return (logits.sigmoid() * distance.detach() - scale * F.logsigmoid(logits)).mean()


class LevelMean(nn.Module):
    """Running mean of the judge's distance in ten bins of its noise level."""

    def __init__(self, decay: float = 0.98) -> None:
        super().__init__()
        self.decay = decay
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(10))

    def normalise(self, distance: Tensor, sigma: Tensor) -> Tensor:
        """distance [B, chunks] by the mean of its sample's level; sigma [B]."""
        bins = (sigma * 10).long().clamp(0, 9)
        for index in bins.unique():
            value = distance[bins == index].mean()
            old = self.mean[index]
            self.mean[index] = value if old == 0 else self.decay * old + (1 - self.decay) * value
        return distance / self.mean[bins][:, None].clamp_min(1e-8)


def _pass_counts(chunks: int, most: int) -> list[int]:
    """Passes per chunk of one rollout: one number for the whole rollout or a number per chunk, as adaptive runs mix."""
    if torch.rand(()) < 0.5:
        return [int(torch.randint(1, most + 1, ()))] * chunks
    return torch.randint(1, most + 1, (chunks,)).tolist()


def train_distillation(
    folder: Path, student: WanModel, teacher: WanModel, encoder: GrammarTextEncoder, grid: TokenGrid,
    sigmas: Sequence[float], head_config: ConfidenceConfig, *, frames: int, chunk: int, guidance: float, shift: float,
    minutes: float | None = None, steps: int | None = None, critic_steps: int = 2, batch: int = 16,
    learning_rate: float = 3e-4, critic_rate: float = 4e-4, confidence_scale: float = 0.2,
    confidence_weight: float = 0.1, device: str = "cpu",
) -> tuple[WanModel, ConfidenceHead]:  # fmt: skip
    """Train (or resume); averaged student and head are returned and written to ``folder``.

    A rollout of the student serves one generator step and, detached, the critic steps until the next one.
    """
    torch.manual_seed(3)
    pair = nn.ModuleDict({"student": student, "head": ConfidenceHead(head_config).to(device)})
    head = pair["head"]
    assert isinstance(head, ConfidenceHead)
    done = folder / "distilled.safetensors"
    if not done.exists():
        fake = WanModel(teacher.config).to(device)
        fake.load_state_dict(teacher.state_dict())
        ema, levels = EMA(pair, 0.99), LevelMean().to(device)
        optimizer = torch.optim.AdamW(
            [{"params": student.parameters()}, {"params": head.parameters()}],
            lr=learning_rate, betas=(0.0, 0.99), weight_decay=0.01,
        )  # fmt: skip
        critic = torch.optim.AdamW(fake.parameters(), lr=critic_rate, betas=(0.0, 0.99), weight_decay=0.01)
        loop = Loop(folder, "distillation", minutes=minutes, steps=steps, state={
            "pair": pair, "fake": fake, "ema": ema, "levels": levels, "optimizer": optimizer, "critic": critic,
        })  # fmt: skip
        chunks = chunk_frames(frames, chunk)
        active = frame_tokens(grid, range(frames), teacher.config.head_dim, per_frame=False, device=device)
        empty = encoder(torch.zeros(batch, encoder.config.length, dtype=torch.int64, device=device))
        recent: list[tuple[Tensor, Tensor]] = []

        def critic_loss(x: Tensor, target: Tensor, sigma: Tensor, text_rows: Tensor) -> Tensor:
            with autocast(device):
                velocity = fake(x, active, TRAIN_TIMESTEPS * sigma[:, None], fake.embed_text(text_rows)).velocity
            return (velocity.float() - target).square().mean()

        critic_loss_of = torch.compile(critic_loss, dynamic=False)
        for step in loop:
            rate = cosine(loop.fraction, 1.0, 0.1, warmup=0.02)
            set_learning_rate(optimizer, rate * learning_rate)
            optimizer.param_groups[1]["lr"] = rate * 10 * learning_rate
            set_learning_rate(critic, rate * critic_rate)
            train_generator = step % (critic_steps + 1) == 0 and loop.fraction > 0.03
            if train_generator or not recent or step % 2 == 1:
                ids = training_prompts(batch, int(torch.randint(1 << 40, ()))).to(device)
                with torch.no_grad():
                    text_rows = encoder(ids)
                with autocast(device):
                    passes = chunk_passes(student, grid, text_rows, frames)
                    kept = rollout(
                        passes, chunks, sigmas, _pass_counts(len(chunks), len(sigmas)),
                        taps=head_config.taps, gradient=train_generator,
                    )  # fmt: skip
                samples = torch.cat([c[-1].x0 for c in kept], 1)
                recent = [*recent[-3:], (samples.detach(), text_rows)]
                if train_generator:
                    generator_step(
                        loop, pair, optimizer, ema, kept, samples, teacher, fake, levels, active, text_rows, empty,
                        guidance=guidance, shift=shift, scale=confidence_scale, weight=confidence_weight,
                    )  # fmt: skip
            samples, text_rows = recent[int(torch.randint(len(recent), ()))]
            noise, sigma = torch.randn_like(samples), sample_sigmas(batch, shift).to(device)
            x = add_noise(samples, noise, sigma[:, None, None])
            loss = critic_loss_of(x, noise - samples, sigma, text_rows)
            loss.backward()
            nn.utils.clip_grad_norm_(fake.parameters(), 1.0)
            critic.step()
            critic.zero_grad()
            loop.log(critic=loss.detach())
        save_file({k: v.contiguous() for k, v in ema.shadow.items()}, done)
    pair.load_state_dict(load_file(done))
    pair.requires_grad_(False).eval()
    return student, head


compiled_guided = torch.compile(guided_velocity, dynamic=False)


def generator_step(
    loop: Loop, pair: nn.ModuleDict, optimizer: torch.optim.Optimizer, ema: EMA, kept: list[list[ChunkPass]],
    samples: Tensor, teacher: WanModel, fake: WanModel, levels: LevelMean, active: ActiveSet, text_rows: Tensor,
    empty: Tensor, *, guidance: float, shift: float, scale: float, weight: float,
) -> None:  # fmt: skip
    """One update of student and head from a rollout with gradient."""
    with torch.no_grad(), autocast(samples.device):
        sigma = sample_sigmas(len(samples), shift).to(samples.device).clamp(0.02, 0.98)
        wide = sigma[:, None, None]
        x = add_noise(samples, torch.randn_like(samples), wide)
        real = to_x0(x, compiled_guided(teacher, x, active, sigma, text_rows, empty, guidance), wide)
        velocity = fake(x, active, TRAIN_TIMESTEPS * sigma[:, None], fake.embed_text(text_rows)).velocity.float()
        difference = to_x0(x, velocity, wide) - real
        difference /= (samples - real).abs().mean((1, 2), keepdim=True).clamp_min(1e-3)
        target = samples - difference
        distance = (samples - real).square().mean(2).unflatten(1, (len(kept), -1)).mean(2)  # [B, chunks]
        distance = levels.normalise(distance, sigma)
    matching = 0.5 * (samples - target).square().mean()
    with autocast(samples.device):
        head = pair["head"]
        logits = torch.stack([head(chunk[-1].taps) for chunk in kept], 1)
    confidence = confidence_loss(logits, distance, scale)
    (matching + weight * confidence).backward()
    norm = nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    ema.update()
    c = logits.detach().sigmoid()
    loop.log(dmd=matching.detach(), confidence=confidence.detach(), mean_c=c.mean(), spread_c=c.std(), gradient=norm)
