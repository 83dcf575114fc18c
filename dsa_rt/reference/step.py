"""The step family: counter-based noise, renoising, the cached Euler step and the exit decision.

Every operation is one that IEEE 754 rounds exactly (``+``, ``*``, ``sqrt``, conversions, no fused
multiply-add), in an order that is written out, and each stored value is rounded once. An implementation that
keeps to this order has the same bits on any device; the sum inside the change score and the sigmoid are the
two exceptions. Python scalars (sigmas) enter as their nearest fp32 value.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# Minimax fits over the ranges that `_log_uniform` and `_sin_cos` reduce to; highest power first.
_LOG = (  # (log(1 + z) - z) / z², sqrt(1/2) - 1 ≤ z < sqrt(2) - 1
    0.08979375660419464,
    -0.1442677527666092,
    0.1488369256258011,
    -0.16551804542541504,
    0.19963477551937103,
    -0.25002583861351013,
    0.3333393335342407,
    -0.4999998211860657,
)
# (sin a - a) / a³ and (cos a - 1 + a²/2) / a⁴ as functions of a², |a| ≤ π/4
_SIN = (-0.00019520237401593477, 0.0083322050049901, -0.16666655242443085)
_COS = (2.4461030989186838e-05, -0.0013887593522667885, 0.041666653007268906)
_LN2 = 0.6931471824645996
_QUARTER_TURN = 3.65729529994141e-10  # π / 2^33: a signed 32-bit fraction of a quarter turn, in radians
_SQRT_HALF_BITS = 0x3F3504F3


def philox_words(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11).

    counter [..., 4] and key [..., 2] hold 32-bit words in int64 and broadcast; returns [..., 4] words in
    int64.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for round_index in range(_ROUNDS):
        if round_index:
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        # int64 products wrap around, which keeps all their bits; the mask takes the sign off the high half.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def philox_normal(seeds: Tensor, tokens: Tensor, width: int, draw: int) -> Tensor:
    """Standard normals that depend on (seed, token, draw, element) alone, not on which tokens are asked for.

    seeds [B] int64, tokens [A] int64 (positions in the whole clip), draw in [0, 2^32) (0 = the initial noise,
    then one per renoising of a token). Returns fp32 [B, A, width]. Element 4j+i comes from word i of the
    Philox block with counter (j, draw, token low, token high) and key (seed low, seed high): words 0 and 1
    give elements 0 and 1 by Box-Muller, words 2 and 3 the other two.
    """
    blocks = torch.arange((width + 3) // 4, device=seeds.device)
    token_low, token_high = tokens & _MASK, (tokens >> 32) & _MASK
    counter = torch.stack(
        torch.broadcast_tensors(
            blocks[None, None, :],
            torch.full_like(blocks, draw)[None, None, :],
            token_low[None, :, None],
            token_high[None, :, None],
        ),
        -1,
    )
    key = torch.stack((seeds & _MASK, (seeds >> 32) & _MASK), -1)[:, None, None, :]
    words = philox_words(counter, key)  # [B, A, blocks, 4]
    # PyTorch's fp32 square root on a CPU is off by one in the last place at times; fp64 rounded to fp32 is
    # exact.
    radius = (-2.0 * _log_uniform(words[..., 0::2])).double().sqrt().float()
    sin, cos = _sin_cos(words[..., 1::2])
    normals = torch.stack((radius * cos, radius * sin), -1)  # [B, A, blocks, 2, 2]
    return normals.flatten(2)[..., :width]


def renoise(
    x: Tensor,
    velocity: Tensor,
    sigma: float,
    sigma_next: float,
    seeds: Tensor,
    tokens: Tensor,
    draw: int,
) -> tuple[Tensor, Tensor]:
    """The clean prediction of a pass, and that prediction taken to the next noise level with fresh noise.

    x, velocity [B, A, P] (fp32, bf16 or fp16); seeds [B], tokens [A] int64. Returns (next x, x0), both in x's
    dtype: x0 = x - sigma·velocity; next = (1 - sigma_next)·x0 + sigma_next·noise from the unrounded x0; with
    sigma_next = 0 nothing is drawn and next = x0.
    """
    x0 = x.float() - sigma * velocity.float()
    if sigma_next == 0:
        return x0.to(x.dtype), x0.to(x.dtype)
    noise = philox_normal(seeds, tokens, x.shape[-1], draw)
    noisy = (1.0 - sigma_next) * x0 + sigma_next * noise
    return noisy.to(x.dtype), x0.to(x.dtype)


def cached_step(
    x: Tensor, velocity_cache: Tensor, rows: Tensor, fresh: Tensor, delta_sigma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cached Euler (HSA, section "Cached Euler"): fresh rows enter the velocity cache, then all rows advance.

    x [B, N, P]; velocity_cache [B, N, P] and fresh [B, A, P] of one dtype; rows [A] int64, distinct, may be
    empty. Returns (x + delta_sigma·cache, cache, score): score [B, A] fp32 is the relative change of each
    fresh row, ‖fresh - cached‖₁ / ‖fresh‖₁, with the denominator held at the smallest normal fp32 number or
    above.
    """
    cached = velocity_cache[:, rows].float()
    norm = fresh.float().abs().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    score = (fresh.float() - cached).abs().sum(-1) / norm
    velocity_cache = velocity_cache.index_copy(1, rows, fresh)
    x = (x.float() + delta_sigma * velocity_cache.float()).to(x.dtype)
    return x, velocity_cache, score


def exit_decision(logit: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence of a chunk and whether to refine it (DSA, Algorithm 1).

    logit [B] (fp32, bf16 or fp16), threshold [B] fp32. Returns (refine bool, confidence fp32): the sigmoid is taken
    in fp64 and rounded to fp32, refine = confidence < threshold. A NaN confidence does not refine.
    """
    confidence = logit.double().sigmoid().float()
    return confidence < threshold, confidence


def _log_uniform(words: Tensor) -> Tensor:
    """fp32 log(u) of u = words·2^-32 in (0, 1], int64 words taken as odd so that u is never 0."""
    scaled = (words | 1).float()
    bits = scaled.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23  # u·2^32 = (1 + z)·2^exponent, 1 + z in [sqrt(1/2), sqrt(2))
    z = (bits - (exponent << 23)).view(torch.float32) - 1.0
    log_mantissa = z + z * z * _polynomial(_LOG, z)
    return (exponent - 32).float() * _LN2 + log_mantissa


def _sin_cos(words: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of a uniform angle: the top two bits give the quadrant, the others an angle in ±π/4."""
    fraction = (words << 2) & _MASK
    fraction = torch.where(fraction >= 1 << 31, fraction - (1 << 32), fraction)
    angle = fraction.float() * _QUARTER_TURN
    square = angle * angle
    sin = angle + angle * square * _polynomial(_SIN, square)
    cos = (1.0 - 0.5 * square) + square * square * _polynomial(_COS, square)
    quadrant = words >> 30
    odd = (quadrant & 1).bool()
    turned_sin, turned_cos = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    sin = torch.where(quadrant >= 2, -turned_sin, turned_sin)
    cos = torch.where((quadrant == 1) | (quadrant == 2), -turned_cos, turned_cos)
    return sin, cos


def _polynomial(coefficients: tuple[float, ...], z: Tensor) -> Tensor:
    """Horner's rule; each product and each sum is rounded to fp32."""
    value = torch.full_like(z, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * z + coefficient
    return value
