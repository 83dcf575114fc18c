"""The published Self-Forcing loop: a fixed number of passes for each chunk, a context pass, one decode at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers.plain_model import AttentionFunction, PlainWan, SliceCache, TextCache, sdpa
from dsa_rt.errors import OptionError
from dsa_rt.generate import Generate
from dsa_rt.ops import step as ops
from dsa_rt.schedule import TRAIN_TIMESTEPS

Noise = Callable[[range, int], Tensor]
"""(latent frames, draw) -> [1, C, F, h, w] fp32; draw 0 starts a chunk, p is that after its pass p."""


@dataclass(frozen=True)
class PlainClip:
    """frames [T, H, W, 3] uint8; latents [C, F, h, w]; model_calls: denoise passes and context passes."""

    frames: Tensor
    latents: Tensor
    model_calls: int


class PlainLoop:
    """A compiled function's bundle, size and schedule, run as published: eager, and with the host waiting for the
    device after every chunk. Buffers are allocated once and serve every clip, as there.

    The text encoder and the video codec are the bundle's own, so that what differs is the generator and its loop.
    :class:`OptionError` for a window that is shorter than the clip: the loop keeps all K/V.
    """

    def __init__(self, generate: Generate, attention: AttentionFunction = sdpa) -> None:
        runtime, settings = generate.runtime, generate.settings
        if not settings.causal or settings.window < settings.latent_frames:
            raise OptionError(
                f"the plain loop makes whole clips of a causal bundle; this one is "
                f"{'compiled for a window that is shorter than its clip' if settings.causal else 'bidirectional'}"
            )
        self.runtime, self.settings = runtime, settings
        self.model = PlainWan.of(runtime.model, attention)
        tokens = settings.latent_frames * settings.grid.tokens
        self.cache = SliceCache(runtime.model.config, tokens, runtime.dtype, runtime.device)

    @torch.no_grad()
    def __call__(
        self, prompt: str, noise: Noise, passes: Sequence[int] | None = None, contexts: int | None = None
    ) -> PlainClip:
        """One clip. passes: of each chunk, such as a policy took (None: all scheduled). contexts: how many chunks get a
        context pass (None: all of them, the last one too, as published; none but the next chunk would read it)."""
        settings, dtype = self.settings, self.runtime.dtype
        counts = tuple(passes) if passes is not None else (settings.passes,) * settings.chunks
        if len(counts) != settings.chunks or not all(1 <= count <= settings.passes for count in counts):
            raise OptionError(
                f"passes are {list(counts)}; expected {settings.chunks} numbers from 1 to {settings.passes}"
            )
        text = self.runtime.text_encoder.encode([prompt])
        texts: TextCache = {}
        self.cache.restart()
        # All starting noise is drawn before the first chunk, as published.
        start = noise(range(settings.latent_frames), 0).to(dtype)
        output = torch.zeros_like(start)
        for chunk, count in enumerate(counts):
            frames = range(chunk * settings.chunk_frames, (chunk + 1) * settings.chunk_frames)
            self.cache.start = frames.start * settings.grid.tokens
            x = start[:, :, frames.start : frames.stop]
            for done, sigma in enumerate(settings.sigmas[:count], 1):
                x0 = self._clean(x, sigma, text, texts, frames)
                if done < count:
                    following, fresh = settings.sigmas[done], noise(frames, done)
                    x = ((1 - following) * x0 + following * fresh).to(dtype)
            output[:, :, frames.start : frames.stop] = x0
            if contexts is None or chunk < contexts:
                self._velocity(x0, 0.0, text, texts, frames)
            self._wait()
        video = self.runtime.codec.decode(output)
        pixels = (video[0].float() * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        result = pixels.permute(1, 2, 3, 0).contiguous().cpu()
        return PlainClip(result, output[0], sum(counts) + (len(counts) if contexts is None else contexts))

    def _velocity(self, x: Tensor, sigma: float, text: Tensor, texts: TextCache, frames: range) -> Tensor:
        timesteps = torch.ones(1, len(frames), device=x.device) * (TRAIN_TIMESTEPS * sigma)
        return self.model(x, timesteps, text, self.cache, texts, frames.start)

    def _clean(self, x: Tensor, sigma: float, text: Tensor, texts: TextCache, frames: range) -> Tensor:
        """The clean prediction, in float64 as published."""
        velocity = self._velocity(x, sigma, text, texts, frames)
        return (x.double() - sigma * velocity.double()).to(x.dtype)

    def _wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)


def published_noise(generate: Generate, seed: int) -> Noise:
    """PyTorch's generator, as the published loop draws: what is timed."""
    settings, device = generate.settings, generate.runtime.device
    source = torch.Generator(device).manual_seed(seed)

    def draw(frames: range, _: int) -> Tensor:
        channels, (_, ph, pw) = generate.runtime.manifest.latent.channels, settings.grid.patch
        shape = (1, channels, len(frames), settings.grid.height * ph, settings.grid.width * pw)
        return torch.randn(shape, generator=source, device=device)

    return draw


def runtime_noise(generate: Generate, seed: int) -> Noise:
    """The runtime's own noise, so that both make the same clip: what is compared."""
    grid, device = generate.settings.grid, generate.runtime.device

    def draw(frames: range, number: int) -> Tensor:
        tokens = torch.arange(frames.start * grid.tokens, frames.stop * grid.tokens, device=device)
        rows = torch.empty(1, len(tokens), generate.runtime.model.config.velocity_dim, device=device)
        ops.philox_normal(rows, torch.tensor([seed], device=device), tokens, number)
        return grid.unpatchify(rows)

    return draw
