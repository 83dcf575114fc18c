"""DSA's confidence head: how sure the generator is of a chunk, from its own hidden states.

One learnable query per tapped block cross-attends to all visual tokens of the chunk; the results are joined into one
logit (arXiv 2606.04432, section 3; the shape follows the GAN branch of the Self-Forcing code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dsa_rt.arena import Arena
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


Get = Callable[..., Tensor]
"""A buffer by name, dtype and sizes."""


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

    def asked(self) -> Tensor:
        """The query of each head [H, dim / H] fp32; no input changes it."""
        query = ops.rms_norm(self.q(self.norm_query(self.query)).float(), self.norm_q.weight, self.eps)
        return query.unflatten(0, (self.heads, -1))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, A, dim] -> [B, dim]."""
        tokens = self.norm_tokens(tokens)
        pooled = ops.confidence_pool(self.asked(), self.k(tokens), self.norm_k.weight, tokens, self.eps)
        # W_v after pooling: the softmax weights sum to one, so V is not needed per token.
        weight = self.v.weight.unflatten(0, (self.heads, -1))
        values = torch.einsum("bhc,hdc->bhd", pooled.to(weight.dtype), weight).flatten(1) + self.v.bias
        x = self.query + self.o(values)
        return x + self.ffn(self.norm(x))

    def prepare(self) -> None:
        """See :meth:`ConfidenceHead.prepare`."""
        self._query, self._row = self.asked().contiguous(), self.query.detach()[None, None]
        self._norms = affine(self.norm_tokens), affine(self.norm)
        parts = zip(self.v.weight.chunk(self.heads), self.v.bias.chunk(self.heads), strict=True)
        values = [nn.Linear(self.v.in_features, len(bias), device="meta") for bias in self.v.bias.chunk(self.heads)]
        for value, (weight, bias) in zip(values, parts, strict=True):
            value.weight, value.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
        self._values = tuple(values)  # W_v by head; no part of the state dict
        for layer in (self.k, self.o, *self._values, self.ffn[0], self.ffn[2]):
            ops.pack(cast(nn.Linear, layer))

    def judge(self, tokens: Tensor, out: Tensor, get: Get) -> None:
        """:meth:`forward` of weights that are prepared, in given memory: tokens [1, A, dim], out [1, 1, dim]."""
        dim, first, last = tokens.shape[2], cast(nn.Linear, self.ffn[0]), cast(nn.Linear, self.ffn[2])
        tokens = ops.norm_modulate(tokens, *self._norms[0], None, self.eps, out=get("h", *tokens.shape))
        keys = ops.linear(self.k, tokens, out=get("wide", *tokens.shape))
        pooled = get("pooled", 1, self.heads, dim, dtype=torch.float32)
        ops.confidence_pool(self._query, keys, self.norm_k.weight, tokens, self.eps, out=pooled)
        values = get("values", 1, 1, dim)
        for head, value in enumerate(self._values):
            columns = slice(head * value.out_features, (head + 1) * value.out_features)
            ops.linear(value, pooled[:, head : head + 1], out=values[:, :, columns])
        y = ops.linear(self.o, values, out=get("attended", 1, 1, dim))
        x, normed = ops.residual_norm_modulate(
            self._row, y, None, *self._norms[1], None, self.eps, keep=True, sum=get("sum", 1, 1, dim),
            out=get("normed", 1, 1, dim),
        )  # fmt: skip
        hidden = ops.linear(first, normed, activation="gelu_erf", out=get("hidden", 1, 1, first.out_features))
        y = ops.linear(last, hidden, out=get("attended", 1, 1, dim))
        ops.residual_norm_modulate(  # for its sum
            x, y, None, *self._norms[1], None, self.eps, keep=True, sum=out, out=get("normed", 1, 1, dim)
        )


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

    @torch.no_grad()
    def prepare(self) -> None:
        """Work out what no input changes, and lay out weights as the kernels want them, once they do not change."""
        for block in cast("Sequence[TapBlock]", self.blocks):
            block.prepare()
        self._norm = affine(self.norm)
        for layer in (self.out[0], self.out[2]):
            ops.pack(cast(nn.Linear, layer))

    def judge(self, taps: Sequence[Tensor], arena: Arena) -> Tensor:
        """:meth:`forward` of one sample once :meth:`prepare` has run, within rounding: all its work, and the logit
        [1] in the dtype of the weights, in the arena's memory."""
        dtype, dim = taps[0].dtype, self.config.dim

        def get(name: str, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return arena.get(name, shape, dtype)

        joined = get("joined", 1, 1, dim * len(taps))
        for number, (block, tokens) in enumerate(zip(cast("Sequence[TapBlock]", self.blocks), taps, strict=True)):
            block.judge(tokens, joined[:, :, number * dim : (number + 1) * dim], get)
        normed = get("joined normed", *joined.shape)
        ops.norm_modulate(joined, *self._norm, None, self.config.eps, out=normed)
        hidden = get("judged", 1, 1, dim)
        ops.linear(cast(nn.Linear, self.out[0]), normed, activation="silu", out=hidden)
        return ops.linear(cast(nn.Linear, self.out[2]), hidden, out=get("logit", 1, 1, 1)).view(1)
