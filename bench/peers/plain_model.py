"""Wan's transformer in plain PyTorch modules, as the published code computes it. A baseline, not a reference.

Written after the published inference code of Wan 2.1 and Self-Forcing (arXiv 2503.20314, 2506.08009), with what makes
it cost what it costs: separate projections, LayerNorm and modulation as framework ops in the model's dtype, RMSNorm in
fp32, rotation in complex float64 from a table that is put together in every layer, K/V written to a cache slice by
slice with its end read back from the device, text embedded in every pass. Nothing is fused, and nothing is slower than
published: the K/V of the text is kept from pass to pass, as there.

tests/plain_wan.py is the oracle of results, in fp64 under a mask; it has no cache and is not for timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_rt.errors import OptionError
from dsa_rt.models.config import WanConfig
from dsa_rt.models.wan import WanModel

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
TextCache = dict[int, tuple[Tensor, Tensor]]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention; q [B, A, H, D], k and v [B, N, H, D] -> [B, A, H, D]."""
    turned = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*turned).transpose(1, 2).contiguous()


def flash_attention() -> AttentionFunction:
    """FlashAttention's kernel, same shapes; :class:`OptionError` where the package is not installed."""
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise OptionError("FlashAttention is not installed: pip install flash-attn (CUDA only)") from error
    return lambda q, k, v: flash_attn_func(q, k, v)


class KV(Protocol):
    """Where self-attention keeps K and V between passes."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k, v [B, A, H, D] of a layer; returns what is attended to, [B, n, H, D] each."""


class SliceCache:
    """K/V of a clip as the published loop keeps them: buffers for all of it, a chunk copied into its slice, and where
    the written part ends as a tensor on the device, which the host reads in every layer.

    start: the token at which the chunk begins, set by the loop.
    """

    def __init__(self, config: WanConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (1, tokens, config.heads, config.head_dim)
        self.layers = [
            {"k": torch.zeros(shape, dtype=dtype, device=device), "v": torch.zeros(shape, dtype=dtype, device=device),
             "global_end": torch.zeros(1, dtype=torch.long, device=device),
             "local_end": torch.zeros(1, dtype=torch.long, device=device)}
            for _ in range(config.layers)
        ]  # fmt: skip
        self.start = 0

    def restart(self) -> None:
        """For the next clip; buffers stay."""
        self.start = 0
        for layer in self.layers:
            layer["global_end"].zero_()
            layer["local_end"].zero_()

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        cache, stop = self.layers[layer], self.start + k.shape[1]
        # The ends differ once a window rolls, which no clip of trained length does.
        end = int(cache["local_end"].item()) + stop - int(cache["global_end"].item())
        cache["k"][:, end - k.shape[1] : end] = k
        cache["v"][:, end - k.shape[1] : end] = v
        cache["global_end"].fill_(stop)
        cache["local_end"].fill_(end)
        return cache["k"][:, :end], cache["v"][:, :end]


class PlainRMSNorm(nn.Module):
    """RMSNorm over all channels, in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class PlainAttention(nn.Module):
    """Projections and norms of self- and cross-attention."""

    def __init__(self, config: WanConfig, attention: AttentionFunction) -> None:
        super().__init__()
        self.heads, self.attention, dim = config.heads, attention, config.dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = PlainRMSNorm(dim, config.eps), PlainRMSNorm(dim, config.eps)

    def queries(self, x: Tensor) -> Tensor:
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        split = (self.heads, -1)
        return self.norm_k(self.k(x)).unflatten(-1, split), self.v(x).unflatten(-1, split)


class PlainBlock(nn.Module):
    """One transformer block; parameters have the published names."""

    def __init__(self, config: WanConfig, attention: AttentionFunction) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = PlainAttention(config, attention)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = PlainAttention(config, attention)
        self.norm2 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, modulation: Tensor, text: Tensor, rotate: Callable[[Tensor], Tensor], layer: int,
        cache: KV | None, texts: TextCache,
    ) -> Tensor:  # fmt: skip
        """x [B, A, dim]; modulation [B, F, 6, dim], the rows of A being F groups of equal size, one after the other."""
        frames = modulation.shape[1]
        e = (self.modulation.unsqueeze(1) + modulation).chunk(6, dim=2)

        def by_frame(rows: Tensor) -> Tensor:
            return rows.unflatten(1, (frames, -1))

        h = (by_frame(self.norm1(x)) * (1 + e[1]) + e[0]).flatten(1, 2)
        q, (k, v) = self.self_attn.queries(h), self.self_attn.keys_values(h)
        q, k = rotate(q), rotate(k)
        if cache is not None:
            k, v = cache.store(layer, k, v)
        y = self.self_attn.o(self.self_attn.attention(q, k, v).flatten(2))
        x = x + (by_frame(y) * e[2]).flatten(1, 2)
        h = self.norm3(x)
        if layer not in texts:
            texts[layer] = self.cross_attn.keys_values(text)
        y = self.cross_attn.attention(self.cross_attn.queries(h), *texts[layer])
        x = x + self.cross_attn.o(y.flatten(2))
        h = (by_frame(self.norm2(x)) * (1 + e[4]) + e[3]).flatten(1, 2)
        return x + (by_frame(self.ffn(h)) * e[5]).flatten(1, 2)


class PlainHead(nn.Module):
    """Final modulated norm and projection."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.velocity_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """x [B, A, dim]; embedded timesteps [B, F, dim]."""
        e = (self.modulation.unsqueeze(1) + embedded.unsqueeze(2)).chunk(2, dim=2)
        rows = self.norm(x).unflatten(1, (embedded.shape[1], -1))
        return self.head((rows * (1 + e[1]) + e[0]).flatten(1, 2))


class PlainWan(nn.Module):
    """The generator on latents [B, C, F, h, w], causal with a cache, bidirectional without."""

    def __init__(self, config: WanConfig, attention: AttentionFunction = sdpa) -> None:
        super().__init__()
        if config.image_dim is not None:
            raise OptionError("the plain model is text-to-video; its weights are those of an image-to-video generator")
        self.config, dim = config, config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch, config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(PlainBlock(config, attention) for _ in range(config.layers))
        self.head = PlainHead(config)
        pairs = config.head_dim // 2
        sizes = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        self.turns = [turns(1024, size) for size in sizes]

    @classmethod
    def of(cls, model: WanModel, attention: AttentionFunction = sdpa) -> PlainWan:
        """With the weights of a generator of ours, on its device and in its dtype. Parameters are copies."""
        with torch.device("meta"):
            plain = cls(model.config, attention)
        plain.load_state_dict(published_state(model.state_dict(), model.config), assign=True)
        return plain.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def embed_timesteps(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B, F] -> [B, F, dim] for the head and [B, F, 6, dim] for the blocks."""
        half = self.config.freq_dim // 2
        frequency = torch.pow(10000, -torch.arange(half, device=timesteps.device).double() / half)
        angle = torch.outer(timesteps.flatten().double(), frequency)
        waves = torch.cat([angle.cos(), angle.sin()], 1).to(self.dtype)
        embedded = self.time_embedding(waves).unflatten(0, timesteps.shape)
        return embedded, self.time_projection(embedded).unflatten(2, (6, -1))

    def rotation(self, frames: range, height: int, width: int) -> Callable[[Tensor], Tensor]:
        """The rotation of all tokens of consecutive frames; its table is put together in every call, as published."""
        count, device = len(frames), self.patch_embedding.weight.device
        if self.turns[0].device != device:
            self.turns = [table.to(device) for table in self.turns]

        def rotate(x: Tensor) -> Tensor:
            parts = self.turns
            table = torch.cat(
                [parts[0][frames.start : frames.stop].view(count, 1, 1, -1).expand(count, height, width, -1),
                 parts[1][:height].view(1, height, 1, -1).expand(count, height, width, -1),
                 parts[2][:width].view(1, 1, width, -1).expand(count, height, width, -1)], dim=-1,
            ).reshape(count * height * width, 1, -1)  # fmt: skip
            return turn(x, table)

        return rotate

    def embed(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] -> tokens [B, N, dim]."""
        return self.patch_embedding(latents.to(self.dtype)).flatten(2).transpose(1, 2)

    def transform(
        self, x: Tensor, timesteps: Tensor, text: Tensor, rotate: Callable[[Tensor], Tensor], cache: KV | None,
        texts: TextCache,
    ) -> Tensor:  # fmt: skip
        """Embedded tokens [B, A, dim] -> velocity rows [B, A, ph * pw * C]; text rows [B, L, text_dim], timesteps
        [B, F]; ``texts`` keeps the text's K/V of each layer, and is filled by the first pass."""
        embedded, modulation = self.embed_timesteps(timesteps)
        context = self.text_embedding(text.to(self.dtype))
        for layer, block in enumerate(self.blocks):
            x = block(x, modulation, context, rotate, layer, cache, texts)
        return self.head(x, embedded)

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, cache: KV | None = None,
        texts: TextCache | None = None, first_frame: int = 0,
    ) -> Tensor:  # fmt: skip
        """Velocity [B, C, F, h, w] of the latents of frames ``first_frame`` on."""
        frames, (_, ph, pw) = latents.shape[2], self.config.patch
        height, width = latents.shape[3] // ph, latents.shape[4] // pw
        rotate = self.rotation(range(first_frame, first_frame + frames), height, width)
        rows = self.transform(self.embed(latents), timesteps, text, rotate, cache, {} if texts is None else texts)
        return unpatchify(rows, frames, height, width, (ph, pw))


def unpatchify(rows: Tensor, frames: int, height: int, width: int, patch: tuple[int, int]) -> Tensor:
    """Rows [B, F * height * width, ph * pw * C] -> latents [B, C, F, h, w]."""
    cells = rows.view(len(rows), frames, height, width, *patch, -1)
    return torch.einsum("bfhwpqc->bcfhpwq", cells).reshape(
        len(rows), -1, frames, height * patch[0], width * patch[1]
    )


def turns(positions: int, pairs: int) -> Tensor:
    """Complex rotations [positions, pairs] of one axis, complex128."""
    frequency = 1.0 / torch.pow(10000, torch.arange(0, 2 * pairs, 2, device="cpu").double() / (2 * pairs))
    angle = torch.outer(torch.arange(positions, device="cpu").double(), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def turn(x: Tensor, table: Tensor) -> Tensor:
    """x [B, A, H, D] turned by complex ``table`` [A, 1, D / 2], sample by sample as published."""
    turned = []
    for sample in x:
        pairs = torch.view_as_complex(sample.double().unflatten(-1, (-1, 2)))
        turned.append(torch.view_as_real(pairs * table).flatten(2))
    return torch.stack(turned).type_as(x)


def published_state(state: Mapping[str, Tensor], config: WanConfig) -> dict[str, Tensor]:
    """A generator's state dict with the patch embedding as the convolution that it is in published checkpoints."""
    copied = {name: tensor.clone() for name, tensor in state.items()}
    rows = copied["patch_embedding.weight"].unflatten(1, (*config.patch, -1))
    copied["patch_embedding.weight"] = rows.permute(0, 4, 1, 2, 3).contiguous()
    return copied
