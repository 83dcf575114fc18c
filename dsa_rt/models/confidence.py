"""DSA's confidence head: how sure the generator is of a chunk, from its own hidden states.

One learnable query per tapped block cross-attends to all visual tokens of the chunk; the results are joined into one
logit (arXiv 2606.04432, section 3; the shape follows the GAN branch of the Self-Forcing code).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsa_rt.errors import OptionError
from dsa_rt.models.wan import RMSNorm
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
        self.query = nn.Parameter(torch.randn(dim) * 0.02)
        self.norm_tokens, self.norm_query = nn.LayerNorm(dim, config.eps), nn.LayerNorm(dim, config.eps)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        self.norm = nn.LayerNorm(dim, config.eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU(), nn.Linear(config.ffn_dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, A, dim] -> [B, dim]."""
        tokens = self.norm_tokens(tokens)
        query = ops.rms_norm(self.q(self.norm_query(self.query)).float(), self.norm_q.weight, self.eps)
        query = query.unflatten(0, (self.heads, -1))
        pooled = ops.confidence_pool(query, self.k(tokens), self.norm_k.weight, tokens, self.eps)
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

    def forward(self, taps: list[Tensor]) -> Tensor:
        """taps: one [B, A, dim] per tapped block -> logits [B] fp32."""
        joined = torch.cat([block(tokens) for block, tokens in zip(self.blocks, taps, strict=True)], -1)
        return self.out(self.norm(joined)).squeeze(-1).float()

