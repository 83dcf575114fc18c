"""Wan's video transformer in token space, causal and bidirectional.

The model gets rows, the active set (their RoPE, modulation rows and cache rows), timesteps and caches. It knows nothing
of policies, chunks or guidance. Parameter names are those of the original Wan code, except that ``patch_embedding`` is
the equivalent linear layer over rows ``(ph, pw, channel)``. Architecture: Wan 2.1 (arXiv 2503.20314); per-frame
timesteps as in Self-Forcing (arXiv 2506.08009).

One class serves the family; :class:`dsa_rt.models.config.WanConfig` says which member it is. Image-to-video takes
the condition as further input channels (``in_channels`` 36 = 16 noise + 4 mask + 16 condition), in Wan 2.1 also as
CLIP rows that the cross-attention reads beside the text (``image_dim``). TI2V 5B gives clean tokens modulation rows of
timestep 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from dsa_rt.arena import Arena, Room
from dsa_rt.cache import KVCache, TextKV
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.models.config import WanConfig
from dsa_rt.ops import layers as ops
from dsa_rt.plan import ActiveSet


class AttentionCache(Protocol):
    """Where self-attention keeps K and V between passes. A layer writes its active rows, then reads."""

    def destination(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
        """K and V [B, N, H, D] to write to, and the row in them of each active token; None: rows 0 to A - 1."""

    def attended(self, layer: int, active: ActiveSet) -> tuple[Tensor, ...]:
        """K and V [B, n, H, D], once the active rows are written: all attended, or those ``active.segments`` names. In
        FP8 with their scales [B, n, H], see :func:`dsa_rt.ops.attention.active_attention_fp8`."""


class Output(NamedTuple):
    """velocity [B, A, ph * pw * out_channels]; taps: hidden states [B, A, dim] after the blocks asked for."""

    velocity: Tensor
    taps: list[Tensor]


class Modulation(NamedTuple):
    """What a forward pass reads of its timesteps, for R of them: tables [B, R, dim] fp32.

    blocks: for each block shift, scale and gate of self-attention, then of the feed-forward network; affine: shift and
    scale [1, 1, dim] of each block's norm before cross-attention; head: shift and scale.
    """

    blocks: list[tuple[Tensor, ...]]
    affine: list[tuple[Tensor, Tensor]]
    head: tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Weight of an RMSNorm over all channels; the arithmetic is in :mod:`dsa_rt.ops`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Projections that Wan's self- and cross-attention share, RMSNorm on q and k over the full width."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class SelfAttention(Attention):
    """Attention of the active rows to the rows of a cache, with RoPE."""

    fused: nn.Linear | None = None
    """q, k and v as one layer, once :meth:`WanModel.prepare` has made it; no part of the state dict."""

    def fuse(self) -> None:
        """One matmul for q, k and v. Where their weights are packed for it, that is a copy; else their parameters
        become views of its own."""
        three = (self.q, self.k, self.v)
        fused = nn.Linear(self.q.in_features, 3 * self.q.out_features, device="meta")
        object.__setattr__(self, "fused", fused)
        if ops.pack(fused, three):
            return
        weight, bias = (torch.cat([getattr(part, name) for part in three]) for name in ("weight", "bias"))
        fused.weight, fused.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
        for part, own, own_bias in zip(three, weight.chunk(3), bias.chunk(3), strict=True):
            part.weight, part.bias = (nn.Parameter(t, requires_grad=False) for t in (own, own_bias))

    def forward(self, x: Tensor, active: ActiveSet, layer: int, cache: AttentionCache | None, room: Room) -> Tensor:
        """x [B, A, dim], which is overwritten where there is room; cache None makes the active rows attend to each
        other."""
        q, k, v = self._project(x, room)
        weights = self.norm_q.weight, self.norm_k.weight
        norms = *weights, active.cos, active.sin
        shape = (self.heads, q.shape[-1] // self.heads)
        if ops.wants_gradient(q, k, v, *weights):
            q, k, v = ops.qk_norm_rope(q, k, v, *norms, self.heads, self.eps)
            if cache is not None:
                if not isinstance(cache, KVCache):
                    raise OptionError(f"no gradient goes through a {type(cache).__name__}; use torch.no_grad()")
                k, v = cache.update(layer, k, v, active)
            return ops.linear(self.o, ops.active_attention(q, k, v).flatten(-2))
        if cache is None:
            keys, values = (_or_empty(room(name, *shape), q, shape) for name in ("keys", "values"))
            slots = None
        else:
            keys, values, slots = cache.destination(layer, active)
        q = ops.qk_norm_rope_store(keys, values, q, k, v, *norms, slots, self.eps, out=room("q", *shape))
        kv = (keys, values) if cache is None else cache.attended(layer, active)
        y = ops.active_attention(q, *kv, segments=active.segments, out=room("h", *shape))
        return ops.linear(self.o, y.flatten(-2), out=room("y", x.shape[-1]))

    def _project(self, x: Tensor, room: Room) -> Sequence[Tensor]:
        """q, k, v [B, A, dim]."""
        if self.fused is not None:
            return ops.linear(self.fused, x, out=room("wide", 3 * x.shape[-1])).chunk(3, -1)
        return [ops.linear(part, x) for part in (self.q, self.k, self.v)]


def _or_empty(given: Tensor | None, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    return rows.new_empty(*rows.shape[:2], *shape) if given is None else given


class CrossAttention(Attention):
    """Attention to text and, with ``images``, to CLIP image rows: one query, two softmaxes, one sum."""

    def __init__(self, dim: int, heads: int, eps: float, images: bool) -> None:
        super().__init__(dim, heads, eps)
        if images:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim)

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [B, L, H, D] of embedded text rows [B, L, dim]."""
        k = ops.rms_norm(ops.linear(self.k, text), self.norm_k.weight, self.eps)
        return self._split(k), self._split(ops.linear(self.v, text))

    def image_kv(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [B, I, H, D] of embedded image rows [B, I, dim]."""
        k = ops.rms_norm(ops.linear(self.k_img, image), self.norm_k_img.weight, self.eps)
        return self._split(k), self._split(ops.linear(self.v_img, image))

    def forward(
        self, x: Tensor, text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor] | None, segments: Tensor | None,
        room: Room,
    ) -> Tensor:  # fmt: skip
        """x [B, A, dim], which is overwritten where there is room; segments: of text rows, see
        :class:`dsa_rt.plan.ActiveSet`."""
        dim = x.shape[-1]
        projected = ops.linear(self.q, x, out=room("q", dim))
        q = self._split(ops.rms_norm(projected, self.norm_q.weight, self.eps, out=room("q", dim)))
        y = ops.active_attention(q, *text, segments=segments, out=room("h", *q.shape[2:]))
        if image is not None:
            y = y + ops.active_attention(q, *image, out=room("wide", *q.shape[2:]))
        return ops.linear(self.o, y.flatten(-2), out=room("y", dim))


class FeedForward(nn.Sequential):
    """Linear, GELU in its tanh form, Linear. The original's names of parameters make it a sequence."""

    def __init__(self, dim: int, wide: int) -> None:
        super().__init__(nn.Linear(dim, wide), nn.GELU("tanh"), nn.Linear(wide, dim))

    def forward(self, x: Tensor, room: Room) -> Tensor:  # type: ignore[override]  # takes where to work, too
        first, last = cast(nn.Linear, self[0]), cast(nn.Linear, self[2])
        hidden = ops.linear(first, x, activation="gelu", out=room("wide", first.out_features))
        return ops.linear(last, hidden, out=room("y", x.shape[-1]))


class Block(nn.Module):
    """One transformer block: self-attention, cross-attention, feed-forward, modulated by six vectors."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.dim, config.heads, config.eps)
        self.cross_attn = CrossAttention(config.dim, config.heads, config.eps, config.image_dim is not None)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)


class Head(nn.Module):
    """Final modulated norm and projection to velocity rows."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.dim, config.velocity_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)


class ImageEmbedding(nn.Module):
    """CLIP image rows [B, I, image_dim] -> rows [B, I, dim]; its norms have the framework's eps of 1e-5, as in Wan."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim), nn.GELU(), nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image)


class WanModel(nn.Module):
    """The generator: rows of noisy latents in, velocity rows out."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Linear(config.patch_dim, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def embed_text(self, text: Tensor, image: Tensor | None = None, out: TextKV | None = None) -> TextKV:
        """Text encoder rows [B, text_length, text_dim] -> the cross-attention K/V of every layer.

        image [B, I, image_dim]: rows of the CLIP vision encoder's last but one layer, for a generator with image_dim
        and for no other; :class:`OptionError` or :class:`ShapeError` where that does not fit. out: where the K/V go.
        """
        self._check_image(image, len(text))
        blocks = cast("Sequence[Block]", self.blocks)
        embedded = self.text_embedding(text.to(self.dtype))
        layers = _placed((block.cross_attn.text_kv(embedded) for block in blocks), None if out is None else out.layers)
        if image is None:
            return TextKV(layers)
        embedded = self.img_emb(image.to(self.dtype))
        made = (block.cross_attn.image_kv(embedded) for block in blocks)
        return TextKV(layers, _placed(made, None if out is None else out.image_layers))

    def _check_image(self, image: Tensor | None, batch: int) -> None:
        width = self.config.image_dim
        if width is None:
            if image is not None:
                raise OptionError(
                    "image rows were given, but this generator has no image embedder (image_dim is None): leave them "
                    "out; the condition goes into its input channels or first-frame tokens alone"
                )
        elif image is None:
            raise OptionError(
                f"this image-to-video generator also reads CLIP rows of its first frame; give image [B, I, {width}], "
                "for the empty prompt too"
            )
        elif image.ndim != 3 or image.shape[0] != batch or image.shape[1] < 1 or image.shape[2] != width:
            raise ShapeError(f"image rows have shape {list(image.shape)}; expected [{batch}, 1 or more, {width}]")

    def embed_timesteps(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B, R] (1000 sigma) -> head modulation [B, R, dim] and block modulation [B, R, 6, dim], fp32."""
        half = self.config.freq_dim // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
        angle = timesteps.float()[..., None] * frequency
        embedding = self.time_embedding(torch.cat((angle.cos(), angle.sin()), -1).to(self.dtype))
        return embedding.float(), self.time_projection(embedding).float().unflatten(-1, (6, -1))

    def modulation(self, timesteps: Tensor) -> Modulation:
        """Of timesteps [B, R] (1000 sigma)."""
        head, block = self.embed_timesteps(timesteps)
        blocks = cast("Sequence[Block]", self.blocks)
        return Modulation(
            [(block + b.modulation.float()).unbind(2) for b in blocks], [affine(b.norm3) for b in blocks],
            cast("tuple[Tensor, Tensor]", (head[:, :, None] + self.head.modulation.float()).unbind(2)),
        )  # fmt: skip

    def forward(
        self,
        rows: Tensor,
        active: ActiveSet,
        timesteps: Tensor | Modulation,
        text: TextKV,
        cache: AttentionCache | None = None,
        taps: Sequence[int] = (),
        arena: Arena | None = None,
    ) -> Output:
        """Velocity of the active rows.

        rows [B, A, patch_dim]; timesteps [B, R] fp32, or their :meth:`modulation`, indexed by
        ``active.modulation_rows``; text from :meth:`embed_text`; cache None makes the active rows attend to each other;
        taps: block indices whose output is returned for the confidence head. arena: where to work, and where the result
        will lie until the next pass in it; None: in new memory.
        """
        tables = timesteps if isinstance(timesteps, Modulation) else self.modulation(timesteps)
        eps, dim, index, tapped = self.config.eps, self.config.dim, active.modulation_rows, []
        room = Room(arena, rows.shape[:2], self.dtype)
        x = ops.linear(self.patch_embedding, rows, out=room("x", dim))
        y = gate = None
        for layer, block in enumerate(cast("Sequence[Block]", self.blocks)):
            m = tables.blocks[layer]
            if y is None:
                h = ops.norm_modulate(x, m[0], m[1], index, eps, out=room("h", dim))
            else:
                x, h = ops.residual_norm_modulate(x, y, gate, m[0], m[1], index, eps, out=room("h", dim))
            keep = layer - 1 in taps
            if keep:
                tapped.append(x)
            y = block.self_attn(h, active, layer, cache, room)
            x, h = ops.residual_norm_modulate(
                x, y, m[2], *tables.affine[layer], index, eps, keep=keep, out=room("h", dim),
                sum=room(f"x after {len(tapped)} taps", dim) if keep else None,
            )  # fmt: skip
            image = None if text.image_layers is None else text.image_layers[layer]
            y = block.cross_attn(h, text.layers[layer], image, active.text_segments, room)
            x, h = ops.residual_norm_modulate(x, y, None, m[3], m[4], index, eps, out=room("h", dim))
            y, gate = block.ffn(h, room), m[5]
        assert y is not None  # WanConfig has a layer or more
        x, h = ops.residual_norm_modulate(x, y, gate, *tables.head, index, eps, out=room("h", dim))
        if self.config.layers - 1 in taps:
            tapped.append(x)
        return Output(ops.linear(self.head.head, h, out=room("velocity", self.config.velocity_dim)), tapped)

    def prepare(self) -> WanModel:
        """Lay out weights that no longer change as the kernels want them: q, k and v as one layer, and on the CPU all
        layers of a pass packed, beside the parameters themselves (:func:`dsa_rt.ops.layers.packed_bytes`)."""
        for block in cast("Sequence[Block]", self.blocks):
            block.self_attn.fuse()
            cross = [module for module in block.cross_attn.children() if isinstance(module, nn.Linear)]
            ffn = [module for module in block.ffn if isinstance(module, nn.Linear)]
            for layer in (block.self_attn.o, *cross, *ffn):
                ops.pack(layer)
        for layer in (self.patch_embedding, self.head.head):
            ops.pack(layer)
        return self


def _placed(
    made: Iterable[tuple[Tensor, Tensor]], held: list[tuple[Tensor, Tensor]] | None
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of K and V, in the memory of others where there are such; then they are made one by one."""
    if held is None:
        return list(made)
    for into, pair in zip(held, made, strict=True):
        for to, tensor in zip(into, pair, strict=True):
            to.copy_(tensor)
    return held


def affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """An affine norm as tables of modulation [1, 1, C]: shift and scale of all tokens."""
    return norm.bias.float()[None, None], norm.weight.float()[None, None] - 1
