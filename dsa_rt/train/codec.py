"""Trains the demo's video codec on clips of its synthetic world, rendered while it trains.

The pool holds a few hundred rendered clips and swaps one for a new one every few steps, so the codec never sees a
finite data set. A sample is a window of a few latent frames. Some windows open with the first frame of their clip
(alone in its latent frame, with no history); the others open with a real group of four that only fills the causal
history and carries no loss.

Loss: L1 + squared error + L1 of the differences to the next pixel and the next frame (crisp edges, no flicker),
and a penalty that holds each latent channel's second moment at one. With that scale fixed, Gaussian noise on the
latents makes neighbouring latents decode alike, so that a generator's small errors stay small.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_rt.codec.conv import TIME, ConvCodec, ConvCodecConfig
from dsa_rt.errors import OptionError

RenderClip = Callable[[int], np.ndarray]
HELD_OUT_SEED = 1 << 40  # seeds from here on are never trained on


@dataclass(frozen=True)
class CodecTraining:
    """Knobs of the recipe. ``window`` counts latent frames, ``refresh_every`` counts steps per new clip."""

    batch: int = 5
    window: int = 4
    first_frame_share: float = 0.35
    pool: int = 600
    refresh_every: int = 2
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    latent_noise: float = 0.05
    moment_weight: float = 0.02
    difference_weight: float = 1.0
    colour_weight: float = 3.0
    motion_weight: float = 3.0
    seed: int = 0


def render_world_clip(seed: int) -> np.ndarray:
    """The training world's clip number ``seed``: uint8 [81, 64, 64, 3]; scenes held out for scoring never occur."""
    from dsa_rt.demo.grammar import sample_scene
    from dsa_rt.demo.world import render

    return render(sample_scene(np.random.default_rng(seed)), seed)


class ClipPool:
    """Rendered clips uint8 [pool, T, H, W, 3] on the training device, with windows cut at random."""

    def __init__(
        self, render: RenderClip, recipe: CodecTraining, device: torch.device, first_seed: int
    ) -> None:
        from tqdm import tqdm

        self.render = render
        self.recipe = recipe
        self.next_seed = first_seed
        numbers = tqdm(range(recipe.pool), desc="rendering clips", unit="clip", leave=False)
        self.clips = torch.stack([self._next_clip() for _ in numbers]).to(device)

    def _next_clip(self) -> Tensor:
        clip = torch.from_numpy(np.ascontiguousarray(self.render(self.next_seed)))
        self.next_seed += 1
        return clip

    def refresh(self, rng: np.random.Generator) -> None:
        """Replace one clip by a new one."""
        self.clips[int(rng.integers(len(self.clips)))] = self._next_clip().to(self.clips.device)

    def windows(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(frames [B, 3, 4w, H, W] in [-1, 1], frames that carry loss [B, 1, 4w, 1, 1] as 0 or 1)."""
        batch, length = self.recipe.batch, TIME * self.recipe.window
        groups = (self.clips.shape[1] - 1) // TIME
        from_start = rng.random(batch) < self.recipe.first_frame_share
        start = np.where(
            from_start, 1 - TIME, 1 + TIME * rng.integers(groups - self.recipe.window + 1, size=batch)
        )
        # Indices below zero become zero: the first frame four times, then real groups.
        index = np.maximum(start[:, None] + np.arange(length), 0)
        carries_loss = np.arange(length) >= np.where(from_start, TIME - 1, TIME)[:, None]
        device = self.clips.device
        chosen = torch.from_numpy(rng.integers(len(self.clips), size=batch)).to(device)
        frames = self.clips[chosen[:, None], torch.from_numpy(index).to(device)]
        frames = frames.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)
        return frames, torch.from_numpy(carries_loss).to(device).float()[:, None, :, None, None]


class _PixelLoss(torch.autograd.Function):
    """L1 + squared error + ``weight`` x L1 of the differences along time, rows and columns, of an error tensor.

    Written with its gradient, because the plain version spends more time in element-wise autograd on full-size
    frames than the codec spends in convolutions.
    """

    @staticmethod
    def forward(ctx: Any, error: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gradient = error.sign()
        l1 = torch.linalg.vector_norm(error, ord=1)
        mse = torch.linalg.vector_norm(error).square()
        difference = torch.zeros_like(l1)
        for dim in (2, 3, 4):
            step = error.diff(dim=dim)
            difference += torch.linalg.vector_norm(step, ord=1)
            step.sign_().mul_(weight)
            gradient.narrow(dim, 1, step.shape[dim]).add_(step)
            gradient.narrow(dim, 0, step.shape[dim]).sub_(step)
        gradient.add_(error, alpha=2)
        count = error.numel()
        ctx.save_for_backward(gradient.div_(count))
        total = l1 + mse + weight * difference
        ctx.mark_non_differentiable(l1, mse, difference)
        return total / count, l1 / count, mse / count, difference / count

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None


def codec_loss(
    codec: ConvCodec, frames: Tensor, weight: Tensor, recipe: CodecTraining, bf16: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one batch of windows and its parts, see the module's docstring."""
    with torch.autocast(frames.device.type, dtype=torch.bfloat16, enabled=bf16):
        latents = codec.encode_groups(frames)
        level = torch.rand(len(frames), 1, 1, 1, 1, device=frames.device) * (2 * recipe.latent_noise)
        decoded = codec.decode_groups(latents + level * torch.randn_like(latents, dtype=torch.float32))
    error = (decoded - frames) * (weight * _emphasis(frames, recipe))
    pixels, l1, mse, difference = _PixelLoss.apply(error, recipe.difference_weight)
    moment = (latents.float().square().mean(dim=(0, 2, 3, 4)) - 1).square().mean()
    parts = {"l1": l1, "mse": mse, "difference": difference, "moment": moment}
    return pixels + recipe.moment_weight * moment, parts


def _emphasis(frames: Tensor, recipe: CodecTraining) -> Tensor:
    """Weight of each pixel [B, 1, 4w, H, W]: more where it has a colour and where its group of four frames moves.

    Without the second, still pixels are so many that the decoder gives four equal frames and motion stutters.
    """
    saturation = frames.amax(dim=1, keepdim=True) - frames.amin(dim=1, keepdim=True)
    groups = frames.unflatten(2, (-1, TIME))
    motion = (groups.amax(dim=3) - groups.amin(dim=3)).amax(dim=1, keepdim=True)
    return 1 + recipe.colour_weight * saturation + recipe.motion_weight * motion.repeat_interleave(TIME, dim=2)


@torch.no_grad()
def psnr(codec: ConvCodec, clips: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip [N] for clips uint8 [N, T, H, W, 3], coded and decoded whole."""
    values = []
    for clip in clips:
        frames = clip.permute(3, 0, 1, 2)[None].float().div(127.5).sub(1).to(codec.latent_mean.device)
        decoded = codec.decode(codec.encode(frames)).float()
        mse = ((decoded - frames) / 2).square().mean()
        values.append(-10 * torch.log10(mse))
    return torch.stack(values).cpu()


@torch.no_grad()
def measure_latents(codec: ConvCodec, clips: Tensor) -> None:
    """Set the codec's per-channel mean and deviation to those of its raw latents on clips uint8 [N, T, H, W, 3]."""
    codec.latent_mean.zero_()
    codec.latent_std.fill_(1)
    raw = [
        codec.encode(clip.permute(3, 0, 1, 2)[None].float().div(127.5).sub(1).to(codec.latent_mean.device))
        for clip in clips
    ]
    latents = torch.cat(raw).float().transpose(0, 1).flatten(1)
    codec.latent_mean.copy_(latents.mean(dim=1))
    codec.latent_std.copy_(latents.std(dim=1))


@torch.no_grad()
def start_at_principal_components(codec: ConvCodec, render: RenderClip, clips: int = 60) -> None:
    """Set the linear paths to the whitened principal components of cells (8x8 pixels of four frames), coloured cells
    weighted up as in the loss, for clips uint8 [T, H, W, 3] of seeds 0, 1, …"""
    size, fold = codec.spatial_factor, codec.spatial_factor // 2
    width = codec.temporal_factor * 3 * size**2
    total, weights = torch.zeros(width, width), 0.0
    for seed in range(clips):
        frames = torch.from_numpy(render(seed)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        frames = torch.cat([frames[:, :, :1].expand(-1, -1, 4, -1, -1), frames[:, :, 1:]], 2)
        stacked = frames.unflatten(2, (-1, 4)).permute(0, 2, 3, 1, 4, 5).flatten(0, 1).flatten(1, 2)
        cells = torch.nn.functional.pixel_unshuffle(stacked, size).permute(0, 2, 3, 1).reshape(-1, width)
        pixels = cells.view(len(cells), 4, 3, -1)
        weight = 1 + 20 * (pixels.amax(2) - pixels.amin(2)).mean((1, 2))
        total += (cells * weight[:, None]).T @ cells
        weights += float(weight.sum())
    values, vectors = torch.linalg.eigh(total / weights)
    scale = values[-codec.config.z :].flip(0).clamp(min=1e-8).sqrt()  # a world may have fewer components than z
    # [z, channels, 8, 8] in the order of pixel_unshuffle by 8; the paths work on pixels folded by 4 in cells of 2x2.
    components = vectors[:, -codec.config.z :].flip(1).T.unflatten(1, (-1, 2, fold, 2, fold)).permute(0, 1, 3, 5, 2, 4)
    kernel = components.reshape(codec.config.z, -1, 2, 2)
    codec.encoder.linear.weight.copy_(kernel / scale[:, None, None, None])
    codec.decoder.linear.weight.copy_((kernel * scale[:, None, None, None]).flatten(1).T[..., None, None])


def save_codec(codec: ConvCodec, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in codec.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors.part")
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"kind": codec.kind, **codec.to_dict()}, indent=2) + "\n")


def load_codec(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ConvCodec:
    """Read what :func:`save_codec` wrote."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    config.pop("kind")
    codec = ConvCodec.from_dict(config)
    codec.load_state_dict(load_file(folder / "model.safetensors"))
    return codec.to(device, dtype).eval()


def train_codec(
    out_dir: str | Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "cpu",
    resume: bool = True,
    config: ConvCodecConfig | None = None,
    recipe: CodecTraining | None = None,
    bf16: bool = True,
    render: RenderClip = render_world_clip,
    checkpoint_seconds: float = 60.0,
    stats_clips: int = 100,
    decoder_of: str | Path | None = None,
) -> ConvCodec:
    """Train a codec for a number of ``steps`` or for ``minutes`` (exactly one of them) and write it to ``out_dir``.

    Writes ``state.pt`` on the way, from which a later call goes on when ``resume``; ``losses.jsonl``, a line per 20
    steps; and at the end ``model.safetensors`` + ``config.json`` (fp32, latents normalised over ``stats_clips``
    clips) and ``result.json`` with the PSNR on clips never trained on. ``render`` makes the clip of a seed, uint8
    [T, H, W, 3]. Minutes count training steps alone, over all resumed calls. Raises :class:`OptionError`.

    ``decoder_of``, a folder that holds a trained codec: train that codec's decoder alone. Its encoder and the latents'
    mean and deviation stay as they are, bit for bit, and with them every generator trained on its latents. The codec
    is then written at every checkpoint.
    """
    if (minutes is None) == (steps is None):
        raise OptionError("train_codec needs either minutes or steps: one of them, not both.")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    trained = None if decoder_of is None else load_codec(Path(decoder_of))
    run = _Run(out, trained.config if trained else config, recipe or CodecTraining(), device, minutes, steps)
    if trained:
        run.codec.load_state_dict(trained.state_dict())
        run.codec.encoder.requires_grad_(False)
        run.usable = True
    if resume and (out / "state.pt").exists():
        run.restore()
    else:
        (out / "losses.jsonl").unlink(missing_ok=True)
        if not trained:
            start_at_principal_components(run.codec, render)
    if run.progress() < 1:
        run.train(render, bf16, checkpoint_seconds)
    held_out = torch.stack([torch.from_numpy(render(HELD_OUT_SEED + index)) for index in range(stats_clips)])
    if not trained:
        measure_latents(run.codec, held_out)
    save_codec(run.codec, out)
    quality = psnr(run.codec, held_out[:32])
    result = {"steps": run.step, "minutes": run.spent / 60, "psnr_mean": float(quality.mean())}
    (out / "result.json").write_text(
        json.dumps({**result, "psnr_min": float(quality.min())}, indent=2) + "\n"
    )
    return run.codec.eval()


class _Run:
    """One training: the codec, its optimizer, and how far it has come."""

    def __init__(
        self,
        out: Path,
        config: ConvCodecConfig | None,
        recipe: CodecTraining,
        device: str,
        minutes: float | None,
        steps: int | None,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.out, self.recipe, self.minutes, self.steps = out, recipe, minutes, steps
        self.codec = ConvCodec(config).to(device)
        self.optimizer = torch.optim.AdamW(
            self.codec.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3
        )
        self.device = torch.device(device)
        self.step = 0
        self.spent = 0.0
        self.usable = False  # the codec is whole at any time: each checkpoint writes it too

    def progress(self) -> float:
        """Share of the budget that is used up."""
        if self.steps is not None:
            return self.step / self.steps
        assert self.minutes is not None
        return self.spent / (60 * self.minutes)

    def restore(self) -> None:
        state = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        if state["sizes"] != self.codec.to_dict():
            raise OptionError(
                f"{self.out}/state.pt was trained with sizes {state['sizes']}, but {self.codec.to_dict()} was asked "
                "for: use those sizes, another folder, or resume=False."
            )
        self.codec.load_state_dict(state["codec"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.spent = state["step"], state["spent"]

    def checkpoint(self) -> None:
        state: dict[str, Any] = {
            "sizes": self.codec.to_dict(),
            "codec": self.codec.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": self.spent,
        }
        torch.save(state, self.out / "state.pt.part")
        os.replace(self.out / "state.pt.part", self.out / "state.pt")
        if self.usable:
            save_codec(self.codec, self.out)

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to zero at the end of the budget."""
        warmup = min(1.0, (self.step + 1) / self.recipe.warmup_steps)
        return self.recipe.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress())))

    def train(self, render: RenderClip, bf16: bool, checkpoint_seconds: float) -> None:
        from tqdm import tqdm

        # Resumed runs draw other windows and other clips than the run they continue.
        rng = np.random.default_rng([self.recipe.seed, self.step])
        torch.manual_seed(int(rng.integers(2**31)))
        pool = ClipPool(render, self.recipe, self.device, first_seed=int(rng.integers(HELD_OUT_SEED // 2)))
        self.codec.train()
        saved = time.monotonic()
        bar = tqdm(total=100.0, initial=100 * min(1.0, self.progress()), desc="codec", unit="%",
                   bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}")  # fmt: skip
        with bar, (self.out / "losses.jsonl").open("a") as log:
            while self.progress() < 1:
                begun = time.monotonic()
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate()
                frames, weight = pool.windows(rng)
                loss, parts = codec_loss(self.codec, frames, weight, self.recipe, bf16)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
                self.optimizer.step()
                if self.step % self.recipe.refresh_every == 0:
                    pool.refresh(rng)
                if self.step % 20 == 0:
                    values = {name: float(part.detach()) for name, part in parts.items()}
                    line = {"step": self.step, "seconds": self.spent, "lr": self.learning_rate(), **values}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    bar.set_postfix_str(f"step {self.step} l1 {values['l1']:.4f} mse {values['mse']:.5f}")
                self.step += 1
                self.spent += time.monotonic() - begun
                bar.update(100 * min(1.0, self.progress()) - bar.n)
                if time.monotonic() - saved > checkpoint_seconds:
                    self.checkpoint()
                    saved = time.monotonic()
        self.checkpoint()
