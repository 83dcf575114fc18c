"""The demo's text encoder: words of the scene grammar through a two-layer transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_rt.bundle import Bundle
from dsa_rt.errors import OptionError


@dataclass(frozen=True)
class GrammarTextConfig:
    """Sizes of the encoder; ``words`` counts the vocabulary, row 0 is padding."""

    words: int
    length: int
    dim: int = 128
    heads: int = 4
    layers: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"text encoder {name} is {value!r}; expected a positive integer")
        if self.dim % self.heads:
            raise OptionError(f"text encoder dim {self.dim} does not split into {self.heads} heads")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class GrammarTextEncoder(nn.Module):
    """Prompts of :mod:`dsa_rt.demo.grammar` -> rows [B, length, dim]. The empty prompt is the unconditional one."""

    kind = "demo-grammar"

    def __init__(self, config: GrammarTextConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.words, config.dim)
        self.positions = nn.Parameter(torch.randn(config.length, config.dim) * 0.1)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def length(self) -> int:
        return self.config.length

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """Always fp32: it is small, and runs once a prompt."""
        return torch.float32

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    def assets(self) -> dict[str, bytes]:
        return {}

    def forward(self, ids: Tensor) -> Tensor:
        """Word numbers [B, length] int64 -> [B, length, dim]."""
        x = self.words(ids) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Rows [B, length, dim] of prompts; :class:`~dsa_rt.errors.PromptError` for what the grammar lacks."""
        from dsa_rt.demo.grammar import tokenize

        ids = torch.tensor([tokenize(p) for p in prompts], device=self.words.weight.device)
        return self(ids)


class _Layer(nn.Module):
    def __init__(self, config: GrammarTextConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.o = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.ffn(self.norm2(x))


def from_bundle(bundle: Bundle) -> GrammarTextEncoder:
    """The encoder that a bundle describes, its weights still to be loaded."""
    return GrammarTextEncoder(bundle.config("text_encoder", GrammarTextConfig))
