"""DSA's confidence head: how sure the generator is of a chunk, from its own hidden states.

One learnable query per tapped block cross-attends to all visual tokens of the chunk; the results are joined into one
logit (arXiv 2606.04432, section 3; the shape follows the GAN branch of the Self-Forcing code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dsa_rt.arena import Arena, Room
from dsa_rt.errors import OptionError
from dsa_rt.models.wan import RMSNorm, affine
from dsa_rt.ops import layers as ops


@dataclass(frozen=True)
class ConfidenceConfig:
    """Sizes of the head: generator width, tapped blocks (0-based, rising), heads and feed-forward width."""

    dim: int
    heads: int
    ffn_dim: int
    taps: tuple[int, ...]
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or self.taps[0] < 0:
            raise OptionError(f"confidence head taps are {self.taps}; expected rising block indices")
        if self.dim % self.heads:
            raise OptionError(f"confidence head dim {self.dim} does not split into {self.heads} heads")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"taps": list(self.taps)}


class TapBlock(nn.Module):
    """One query token reading one tapped block's output."""

    def __init__(self, config: ConfidenceConfig) -> None:
        super().__init__()
        self.heads, self.eps, dim = config.heads, config.eps, config.dim
        self._query: Tensor | None = None  # what asked() gives, once weights do not change
        self.query = nn.Parameter(torch.randn(dim) * 0.02)
        self.norm_tokens, self.norm_query = nn.LayerNorm(dim, config.eps), nn.LayerNorm(dim, config.eps)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        self.norm = nn.LayerNorm(dim, config.eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU(), nn.Linear(config.ffn_dim, dim))

    def asked(self) -> Tensor:
        """The query of each head [H, dim / H] fp32; no input changes it."""
        query = ops.rms_norm(self.q(self.norm_query(self.query)).float(), self.norm_q.weight, self.eps)
        return query.unflatten(0, (self.heads, -1))

    def forward(self, tokens: Tensor, room: Room) -> Tensor:
        """tokens [B, A, dim] -> [B, dim]."""
        if ops.wants_gradient(tokens, *self.parameters()):
            tokens = self.norm_tokens(tokens)
        else:
            shift, scale = affine(self.norm_tokens)
            tokens = ops.norm_modulate(tokens, shift, scale, None, self.eps, out=room("h", tokens.shape[-1]))
        query = self.asked() if self._query is None else self._query
        keys = ops.linear(self.k, tokens, out=room("wide", tokens.shape[-1]))
        pooled = ops.confidence_pool(query, keys, self.norm_k.weight, tokens, self.eps)
        # W_v after pooling: the softmax weights sum to one, so V is not needed per token.
        weight = self.v.weight.unflatten(0, (self.heads, -1))
        values = torch.einsum("bhc,hdc->bhd", pooled.to(weight.dtype), weight).flatten(1) + self.v.bias
        x = self.query + self.o(values)
        return x + self.ffn(self.norm(x))


class ConfidenceHead(nn.Module):
    """Hidden states of the tapped blocks -> one logit per sample; confidence is its sigmoid."""

    def __init__(self, config: ConfidenceConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(TapBlock(config) for _ in config.taps)
        wide = config.dim * len(config.taps)
        self.norm = nn.LayerNorm(wide, config.eps)
        self.out = nn.Sequential(nn.Linear(wide, config.dim), nn.SiLU(), nn.Linear(config.dim, 1))

    @torch.no_grad()
    def prepare(self) -> None:
        """Work out what no input changes, and lay out weights as the kernels want them, once they do not change."""
        for block in cast("Sequence[TapBlock]", self.blocks):
            block._query = block.asked()
            ops.pack(block.k)

    def forward(self, taps: list[Tensor], arena: Arena | None = None) -> Tensor:
        """taps: one [B, A, dim] per tapped block -> logits [B] fp32. arena: where to work, see
        :class:`dsa_rt.models.wan.WanModel`."""
        room = Room(arena, taps[0].shape[:2], taps[0].dtype)
        joined = torch.cat([block(tokens, room) for block, tokens in zip(self.blocks, taps, strict=True)], -1)
        return self.out(self.norm(joined)).squeeze(-1).float()

