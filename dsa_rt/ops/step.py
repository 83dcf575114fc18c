"""The step family: noise from counters, renoising, the cached Euler step and the exit decision.

Rows are [B, A, P]: batch, active tokens, elements of a token; the last dimension contiguous, other strides
free. Outputs are arguments and must not share memory with other arguments unless stated. Every function
raises :class:`dsa_rt.errors.ShapeError` for a wrong shape, dtype, device, stride or overlap, before anything
is written, and :class:`dsa_rt.errors.OptionError` for a ``backend`` that cannot serve the call. Results have
the same bits on every backend and for every number of threads (the score of :func:`cached_step` within
rounding). None is differentiable: training uses :mod:`dsa_rt.reference`.
"""

from __future__ import annotations

from torch import Tensor

from dsa_rt import reference
from dsa_rt.ops.dispatch import register, served

register("philox_normal(Tensor(a!) out, Tensor seeds, Tensor tokens, int draw) -> ()")
register(
    "renoise(Tensor(a!) out, Tensor(b!)? x0, Tensor x, Tensor velocity, Tensor seeds, Tensor tokens, "
    "float sigma, float sigma_next, int draw) -> ()"
)
register(
    "cached_step(Tensor(a!) x, Tensor(b!) velocity_cache, Tensor(c!)? score, Tensor rows, Tensor fresh, "
    "float delta_sigma) -> ()"
)
register("exit_decision(Tensor(a!) refine, Tensor(b!) confidence, Tensor logit, Tensor threshold) -> ()")


def philox_normal(
    out: Tensor, seeds: Tensor, tokens: Tensor, draw: int, *, backend: str | None = None
) -> None:
    """Fills ``out`` with standard normals that depend on (seed, token, draw, element) alone.

    out [B, A, P] fp32, bf16 or fp16; seeds [B] int64; tokens [A] int64, positions in the whole clip; draw 0 to
    2^32 - 1 (0 is the initial noise). bf16 and fp16 are the fp32 value rounded once.
    """
    if served("philox_normal", backend, out, (out, seeds, tokens), (draw,)):
        return
    out.copy_(reference.philox_normal(seeds, tokens, out.shape[-1], draw))


def renoise(
    out: Tensor,
    x: Tensor,
    velocity: Tensor,
    sigma: float,
    sigma_next: float,
    seeds: Tensor,
    tokens: Tensor,
    draw: int,
    x0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """The clean prediction x0 = x - sigma·velocity, taken to the next noise level.

    ``out = (1 - sigma_next)·x0 + sigma_next·noise`` from the unrounded x0, with the noise of
    :func:`philox_normal`; with sigma_next = 0 nothing is drawn and out = x0. ``x0`` receives the clean
    prediction. out, x, x0 [B, A, P] of one dtype, velocity [B, A, P]: fp32, bf16 or fp16; seeds [B],
    tokens [A] int64. ``out`` may be ``x`` or ``velocity`` itself.
    """
    if served("renoise", backend, x, (out, x0, x, velocity, seeds, tokens), (sigma, sigma_next, draw)):
        return
    noisy, clean = reference.renoise(x, velocity, sigma, sigma_next, seeds, tokens, draw)
    out.copy_(noisy)
    if x0 is not None:
        x0.copy_(clean)


def cached_step(
    x: Tensor,
    velocity_cache: Tensor,
    rows: Tensor,
    fresh: Tensor,
    delta_sigma: float,
    score: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Cached Euler, in place: ``velocity_cache[:, rows] = fresh``, then ``x += delta_sigma·velocity_cache``.

    x [B, N, P]; velocity_cache [B, N, P] and fresh [B, A, P] alike: fp32, bf16 or fp16; rows [A]
    int64, distinct, may be empty. A row outside [0, N) or given twice is an error and nothing is written (on
    CUDA, where reading them would stall the queue, a row out of range stops the kernel and duplicates are the
    caller's to avoid). ``score`` [B, A] fp32 receives the relative change of each fresh row, ‖fresh -
    cached‖₁ / ‖fresh‖₁.
    """
    if served("cached_step", backend, x, (x, velocity_cache, score, rows, fresh), (delta_sigma,)):
        return
    new_x, new_cache, change = reference.cached_step(x, velocity_cache, rows, fresh, delta_sigma)
    x.copy_(new_x)
    velocity_cache.copy_(new_cache)
    if score is not None:
        score.copy_(change)


def exit_decision(
    refine: Tensor, confidence: Tensor, logit: Tensor, threshold: Tensor, *, backend: str | None = None
) -> None:
    """DSA's decision (Algorithm 1): confidence = sigmoid(logit); refine = confidence < threshold.

    refine [B] bool or uint8; confidence [B] fp32; logit [B] fp32, bf16 or fp16; threshold [B] fp32.
    """
    if served("exit_decision", backend, logit, (refine, confidence, logit, threshold)):
        return
    decision, value = reference.exit_decision(logit, threshold)
    refine.copy_(decision)
    confidence.copy_(value)
