"""Stage (b): the bidirectional many-step generator, trained by flow matching, with its text encoder.

Loss: mean squared error of the velocity ``noise - x0`` at levels drawn uniformly under the timestep shift. One prompt
in ten is replaced by the empty one, so that guidance has an unconditional branch. The first part of the budget
trains on the first latent frames of the clips alone (cheaper), the rest on whole clips; weights that are trained on see
whole clips from the start, at 0.7 of the rate.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsa_rt.codec.text import GrammarTextConfig, GrammarTextEncoder
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens
from dsa_rt.schedule import TRAIN_TIMESTEPS, add_noise, sample_sigmas
from dsa_rt.train.data import LatentClips
from dsa_rt.train.loop import EMA, Loop, autocast, cosine, matrix_optimizers, set_learning_rate


def train_flow(
    folder: Path,
    clips: LatentClips,
    config: WanConfig,
    text_config: GrammarTextConfig,
    grid: TokenGrid,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    short_frames: int = 9,
    short_share: float = 0.3,
    batch_tokens: int = 6048,
    learning_rate: float = 2e-3,
    shift: float = 3.0,
    empty_prompts: float = 0.1,
    device: str = "cpu",
    start: tuple[WanModel, GrammarTextEncoder] | None = None,
) -> tuple[WanModel, GrammarTextEncoder]:
    """Train (or resume) and return the averaged generator and text encoder; also written to ``folder``.

    start: weights to go on from, in place of random ones.
    """
    torch.manual_seed(1)
    pair = nn.ModuleDict({"model": WanModel(config), "text": GrammarTextEncoder(text_config)}).to(device)
    model, encoder = pair["model"], pair["text"]
    assert isinstance(model, WanModel) and isinstance(encoder, GrammarTextEncoder)
    done = folder / "flow.safetensors"
    if not done.exists():
        if start is None:
            nn.init.zeros_(model.head.head.weight)  # the first prediction is no velocity at all
        else:
            model.load_state_dict(start[0].state_dict())
            encoder.load_state_dict(start[1].state_dict())
            short_share, learning_rate = 0.0, 0.7 * learning_rate
        ema = EMA(pair, 0.998)
        optimizers = matrix_optimizers(pair, learning_rate)
        state: dict[str, nn.Module | torch.optim.Optimizer | EMA] = {
            "pair": pair, "ema": ema, "matrices": optimizers[0], "others": optimizers[1],
        }  # fmt: skip
        loop = Loop(folder, "flow", state=state, minutes=minutes, steps=steps)
        all_frames = clips.rows.shape[1] // grid.tokens

        def velocity_loss(active: ActiveSet, x0: Tensor, noise: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
            with autocast(device):
                text = model.embed_text(encoder(ids))
                x = add_noise(x0, noise, sigma[:, None, None])
                velocity = model(x, active, TRAIN_TIMESTEPS * sigma[:, None], text).velocity
            return (velocity.float() - (noise - x0)).square().mean()

        loss_of = torch.compile(velocity_loss, dynamic=False)  # a third faster; two shapes, half a minute each
        for _ in loop:
            for optimizer in optimizers:
                set_learning_rate(optimizer, cosine(loop.fraction, learning_rate, learning_rate / 30))
            short = loop.fraction < short_share
            frames = min(short_frames, all_frames) if short else all_frames
            active = frame_tokens(grid, range(frames), config.head_dim, per_frame=False, device=device)
            count = max(1, batch_tokens // len(active.tokens))
            x0, ids = clips.batch(count, device)
            x0 = x0[:, : len(active.tokens)]
            ids = torch.where(torch.rand(count, 1, device=device) < empty_prompts, 0, ids)
            noise = torch.randn_like(x0)
            sigma = sample_sigmas(count, shift).to(device)
            loss = loss_of(active, x0, noise, sigma, ids)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            pair.zero_grad()
            ema.update()
            loop.log(loss=loss.detach(), gradient=norm)
        save_file({k: v.contiguous() for k, v in ema.shadow.items()}, done)
    pair.load_state_dict(load_file(done))
    pair.requires_grad_(False).eval()
    return model, encoder
