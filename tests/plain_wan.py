"""Wan's transformer once more, as one function over a state dict in fp64: no cache, no active set, a plain mask.

Written from the paper and the original code, sharing nothing with dsa_rt but the parameter names. Slow and clear: what
the models, the cache and the rollout are held against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def token_positions(frames: list[int], height: int, width: int) -> Tensor:
    """(frame, row, column) [N, 3] of all tokens of these frames, in token order."""
    return torch.tensor([(f, r, c) for f in frames for r in range(height) for c in range(width)])


def plain_wan(
    state: Mapping[str, Tensor],
    heads: int,
    rows: Tensor,
    positions: Tensor,
    timesteps: Tensor,
    text: Tensor,
    mask: Tensor | None = None,
    *,
    taps: tuple[int, ...] = (),
    eps: float = 1e-6,
) -> tuple[Tensor, list[Tensor]]:
    """Velocity [B, N, P] in fp64 and the hidden states after the blocks of ``taps``.

    rows [B, N, P]; positions [N, 3]; timesteps [B, N], one per token; text [B, L, text_dim]; mask [N, N] bool, True
    where the query (first index) sees the key.
    """
    weights = {name: tensor.double() for name, tensor in state.items()}
    rows, timesteps, text = rows.double(), timesteps.double(), text.double()
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    dim = weights["patch_embedding.weight"].shape[0]
    head_dim = dim // heads

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def layer_norm(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)

    def rms_norm(name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def silu(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    # One complex rotation per pair of channels: first the pairs of time, then those of rows, then of columns.
    pairs = head_dim // 2
    sizes = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    turns = []
    for axis, size in enumerate(sizes):
        for pair in range(size):
            turns.append(positions[:, axis].double() / 10000.0 ** (2 * pair / (2 * size)))
    rotation = torch.polar(torch.ones(len(positions), pairs, dtype=torch.float64), torch.stack(turns, -1))

    def rotate(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], pairs, 2).contiguous()) * rotation[:, None]
        return torch.view_as_real(turned).flatten(-2)

    def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        return torch.einsum("bhqk,bkhd->bqhd", F.softmax(scores, -1), v).flatten(2)

    half = weights["time_embedding.0.weight"].shape[1] // 2
    angle = timesteps[..., None] * torch.tensor([10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    waves = torch.cat([torch.cos(angle), torch.sin(angle)], -1)
    time = linear("time_embedding.2", silu(linear("time_embedding.0", waves)))
    modulation = linear("time_projection.1", silu(time)).reshape(*timesteps.shape, 6, dim)
    context = linear("text_embedding.2", gelu(linear("text_embedding.0", text)))

    x, tapped = linear("patch_embedding", rows), []
    for layer in range(layers):
        block = f"blocks.{layer}"
        m = (modulation + weights[f"{block}.modulation"][:, None]).unbind(2)

        name, h = f"{block}.self_attn", layer_norm(x) * (1 + m[1]) + m[0]
        q = rotate(rms_norm(f"{name}.norm_q", linear(f"{name}.q", h)).unflatten(-1, (heads, head_dim)))
        k = rotate(rms_norm(f"{name}.norm_k", linear(f"{name}.k", h)).unflatten(-1, (heads, head_dim)))
        v = linear(f"{name}.v", h).unflatten(-1, (heads, head_dim))
        x = x + m[2] * linear(f"{name}.o", attention(q, k, v, mask))

        name = f"{block}.cross_attn"
        h = layer_norm(x) * weights[f"{block}.norm3.weight"] + weights[f"{block}.norm3.bias"]
        q = rms_norm(f"{name}.norm_q", linear(f"{name}.q", h)).unflatten(-1, (heads, head_dim))
        k = rms_norm(f"{name}.norm_k", linear(f"{name}.k", context)).unflatten(-1, (heads, head_dim))
        v = linear(f"{name}.v", context).unflatten(-1, (heads, head_dim))
        x = x + linear(f"{name}.o", attention(q, k, v, None))

        h = layer_norm(x) * (1 + m[4]) + m[3]
        x = x + m[5] * linear(f"{block}.ffn.2", gelu(linear(f"{block}.ffn.0", h)))
        if layer in taps:
            tapped.append(x)
    shift, scale = (time[:, :, None] + weights["head.modulation"][:, None]).unbind(2)
    return linear("head.head", layer_norm(x) * (1 + scale) + shift), tapped
