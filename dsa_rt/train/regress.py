"""Stage (c), first half: the causal student learns by regression from solutions of the many-step generator's ODE.

As in CausVid and Self-Forcing: the ODE's states at the student's noise levels are the inputs, its end point the target.
Chunks see the clean earlier chunks through the cache, exactly as at inference. A short warm-up on data at random levels
teaches the bidirectional weights to work causally first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsa_rt.codec.text import GrammarTextEncoder
from dsa_rt.demo.grammar import format_scene, sample_scene, tokenize
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens
from dsa_rt.schedule import TRAIN_TIMESTEPS, add_noise, euler_sigmas, sample_sigmas
from dsa_rt.train.data import LatentClips
from dsa_rt.train.loop import EMA, Loop, autocast, cosine, set_learning_rate
from dsa_rt.train.rollout import chunk_frames, chunk_passes


def training_prompts(count: int, seed: int) -> Tensor:
    """Word numbers [count, length] of random training prompts."""
    source = np.random.default_rng(seed)
    return torch.tensor([tokenize(format_scene(sample_scene(source, held_out=False))) for _ in range(count)])


def guided_velocity(
    model: WanModel, x: Tensor, active: ActiveSet, sigma: Tensor, text: Tensor, empty: Tensor, guidance: float
) -> Tensor:
    """``v_empty + guidance (v_text - v_empty)`` in one batch of two; sigma [B]; text, empty [B, L, text_dim]."""
    both = torch.cat((x, x)), active, TRAIN_TIMESTEPS * torch.cat((sigma, sigma))[:, None]
    conditional, unconditional = model(*both, model.embed_text(torch.cat((text, empty)))).velocity.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def ode_solutions(
    path: Path, model: WanModel, encoder: GrammarTextEncoder, grid: TokenGrid, frames: int, sigmas: Sequence[float],
    *, count: int, steps: int, shift: float, guidance: float, batch: int = 8, device: str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Euler solutions of the guided ODE: states [count, levels + 1, N, patch_dim] bf16 (the last is x0), ids.

    ``steps`` must put every level of ``sigmas`` on the grid. Written to ``path`` as it grows; resumes.
    """
    from tqdm import tqdm

    levels = euler_sigmas(steps, shift)
    stops = [min(range(steps), key=lambda i, s=s: abs(levels[i] - s)) for s in sigmas]  # type: ignore[misc]
    if any(not math.isclose(levels[i], s, abs_tol=1e-6) for i, s in zip(stops, sigmas, strict=True)):
        raise ValueError(f"{steps} steps with shift {shift} do not pass the levels {list(sigmas)}")
    active = frame_tokens(grid, range(frames), model.config.head_dim, per_frame=False, device=device)
    done = load_file(path) if path.exists() else {}
    parts = [done] if done else []
    have = len(done["ids"]) if done else 0
    guided = torch.compile(guided_velocity, dynamic=False)
    empty = encoder(torch.zeros(batch, encoder.config.length, dtype=torch.int64, device=device))
    with tqdm(total=count, initial=have, desc="ODE solutions", disable=None) as bar:
        while have < count:
            ids = training_prompts(batch, 10_000 + have).to(device)
            generator = torch.Generator().manual_seed(have)
            x = torch.randn(batch, len(active.tokens), model.config.patch_dim, generator=generator).to(device)
            text, states = encoder(ids), []
            with autocast(device):
                for i in range(steps):
                    if i in stops:
                        states.append(x)
                    sigma = torch.full((batch,), levels[i], device=device)
                    v = guided(model, x, active, sigma, text, empty, guidance)
                    x = x + (levels[i + 1] - levels[i]) * v
            parts.append({"states": torch.stack([*states, x], 1).bfloat16().cpu(), "ids": ids.cpu()})
            have += batch
            bar.update(batch)
            if (have // batch) % 10 == 0 or have >= count:
                parts = [{k: torch.cat([p[k] for p in parts]) for k in ("states", "ids")}]
                partial = path.with_suffix(".partial")
                save_file(parts[0], partial)
                partial.replace(path)
    return load_file(path)


def train_regression(
    folder: Path, teacher: WanModel, encoder: GrammarTextEncoder, clips: LatentClips, grid: TokenGrid,
    sigmas: Sequence[float], *, chunk: int, solutions: int, ode_steps: int, shift: float, guidance: float,
    minutes: float | None = None, steps: int | None = None, data_share: float = 0.35, batch: int = 8,
    learning_rate: float = 4e-4, device: str = "cpu",
) -> WanModel:  # fmt: skip
    """Causal student initialised from the teacher and trained by regression; averaged weights in ``folder``."""
    torch.manual_seed(2)
    student = WanModel(WanConfig(**teacher.config.to_dict() | {"form": "causal"})).to(device)
    done = folder / "regression.safetensors"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        all_frames = clips.rows.shape[1] // grid.tokens
        pairs = ode_solutions(
            folder / "ode.safetensors", teacher, encoder, grid, all_frames, sigmas,
            count=solutions, steps=ode_steps, shift=shift, guidance=guidance, device=device,
        )  # fmt: skip
        student.load_state_dict(teacher.state_dict())
        ema = EMA(student, 0.99)
        optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        state: dict[str, nn.Module | torch.optim.Optimizer | EMA] = {
            "student": student, "ema": ema, "optimizer": optimizer,
        }  # fmt: skip
        loop = Loop(folder, "regression", state=state, minutes=minutes, steps=steps)
        chunks = chunk_frames(all_frames, chunk)
        for _ in loop:
            set_learning_rate(optimizer, cosine(loop.fraction, learning_rate, learning_rate / 20))
            on_data = loop.fraction < data_share
            if on_data:
                x0, ids = clips.batch(batch, device)
            else:
                pick = torch.randint(len(pairs["ids"]), (batch,))
                states, ids = pairs["states"][pick].float().to(device), pairs["ids"][pick].to(device)
                x0 = states[:, -1]
            total = 0.0
            with torch.no_grad():
                text_rows = encoder(ids)
            with autocast(device):
                for frames in chunks:
                    # A graph per chunk: text K/V is made again so that its gradient is not freed with the last one.
                    if frames.start == 0:
                        passes = chunk_passes(student, grid, text_rows, all_frames)
                    else:
                        passes.text = student.embed_text(text_rows)
                    active = passes.active(frames)
                    span = slice(frames.start * grid.tokens, frames.stop * grid.tokens)
                    target = x0[:, span]
                    if on_data:
                        sigma = float(sample_sigmas(1, shift))
                        x = add_noise(target, torch.randn_like(target), sigma)
                    else:
                        level = int(torch.randint(len(sigmas), ()))
                        sigma, x = sigmas[level], states[:, level, span]
                    velocity = passes.denoise(x, active, sigma).velocity.float()
                    loss = (velocity - (x - target) / sigma).square().mean() / len(chunks)
                    loss.backward()
                    passes.write_context(target, active)
                    total += float(loss.detach())
            norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            loop.log(**{"data" if on_data else "ode": total}, gradient=norm)
        save_file({k: v.contiguous() for k, v in ema.shadow.items()}, done)
    student.load_state_dict(load_file(done))
    return student


