"""The ops as a layer of Wan 1.3B and the sampler call them: tensors, calls by backend, bytes and operations.

Sizes: B = 1, H = 12, D = 128, C = 1536, N = 32760 rows of 64 latent values, A active ones; bf16 rows, fp32 latents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsa_rt.ops import attention, norm, pool, rope, rows, step
from dsa_rt.ops.backend import native
from dsa_rt.reference import layers as reference

QUERIES = 256  # that the definition of attention takes at a time


@dataclass(frozen=True)
class Sizes:
    """What a case is made of."""

    active: int
    cached: int = 32760
    heads: int = 12
    dim: int = 128
    latent: int = 64
    frames: int = 21
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def width(self) -> int:
        return self.heads * self.dim


@dataclass
class Inputs:
    """One set of tensors. call: the op with a backend's name; outputs: what it writes; others: other ways to do the
    same, by name; expected: the outputs another way, where the definition would take too much memory."""

    call: Callable[[str], None]
    outputs: tuple[Tensor, ...]
    others: dict[str, Callable[[], object]] = field(default_factory=dict)
    expected: Callable[[], tuple[Tensor, ...]] | None = None


@dataclass(frozen=True)
class Op:
    """nbytes: each operand read or written once; operations: of matrix products. make: a fresh set of tensors. dim: the
    last dimension of what :mod:`dsa_rt.ops.choices` goes by; wide: that is fp32, whatever the rows of the model are."""

    make: Callable[[Sizes, torch.device], Inputs]
    nbytes: Callable[[Sizes], int]
    operations: Callable[[Sizes], int] = lambda sizes: 0
    dim: Callable[[Sizes], int] = lambda sizes: sizes.width
    wide: bool = False

    def dtype(self, sizes: Sizes) -> str:
        """Of the rows, as torch names it."""
        return str(torch.float32 if self.wide else sizes.dtype).removeprefix("torch.")


class Random:
    """Random tensors on a device, made there."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device

    def rows(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.sizes.dtype)

    def wide(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def some(self, total: int) -> Tensor:
        """Rows in rising order, as an active set has them."""
        return torch.randperm(total, device=self.device)[: self.sizes.active].sort().values

    def tables(self, count: int) -> tuple[Tensor, list[Tensor]]:
        """Rows of a table for each token, frame after frame, and tables."""
        s = self.sizes
        of_token = torch.arange(s.active, device=self.device) * s.frames // s.active
        return of_token, [0.1 * self.wide(s.batch, s.frames, s.width) for _ in range(count)]


def norm_modulate(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    x = r.rows(s.batch, s.active, s.width)
    out, (of_token, (shift, scale)) = torch.empty_like(x), r.tables(2)
    return Inputs(
        lambda name: norm.norm_modulate(out, x, shift, scale, of_token, 1e-6, backend=name), (out,),
        {"compiled": lambda: compiled("norm_modulate")(x, shift, scale, of_token, 1e-6)},
    )  # fmt: skip


def residual_norm_modulate(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    x, y = (r.rows(s.batch, s.active, s.width) for _ in range(2))
    total, out = torch.empty_like(x), torch.empty_like(x)
    of_token, tables = r.tables(3)
    return Inputs(
        lambda name: norm.residual_norm_modulate(total, out, x, y, *tables, of_token, 1e-6, backend=name), (total, out),
        {"compiled": lambda: compiled("residual_norm_modulate")(x, y, *tables, of_token, 1e-6)},
    )  # fmt: skip


def rms_norm(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    x, weight = r.rows(s.batch, s.active, s.width), r.rows(s.width)
    out = torch.empty_like(x)
    return Inputs(
        lambda name: norm.rms_norm(out, x, weight, 1e-6, backend=name), (out,),
        {"compiled": lambda: compiled("rms_norm")(x, weight, 1e-6)},
    )  # fmt: skip


def qk_norm_rope_store(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    q, k, v = (r.rows(s.batch, s.active, s.width) for _ in range(3))
    out = torch.empty(s.batch, s.active, s.heads, s.dim, dtype=s.dtype, device=device)
    caches = [torch.zeros(s.batch, s.cached, s.heads, s.dim, dtype=s.dtype, device=device) for _ in range(2)]
    weights, angle = [r.wide(s.width) for _ in range(2)], r.wide(s.active, s.dim // 2)
    tables, slots = (angle.cos(), angle.sin()), r.some(s.cached)
    # Without the copies into the cache, which the compiled function leaves to its caller.
    return Inputs(
        lambda name: rope.qk_norm_rope_store(out, *caches, q, k, v, *weights, *tables, slots, 1e-6, backend=name),
        (out, *caches),
        {"compiled, no store": lambda: compiled("qk_norm_rope_store")(q, k, v, *weights, *tables, s.heads, 1e-6)},
    )  # fmt: skip


def gather_rows(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    x, chosen = r.rows(s.batch, s.cached, s.width), r.some(s.cached)
    out = torch.empty(s.batch, s.active, s.width, dtype=s.dtype, device=device)
    return Inputs(lambda name: rows.gather_rows(out, x, chosen, backend=name), (out,))


def scatter_rows(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    x, chosen = r.rows(s.batch, s.cached, s.width), r.some(s.cached)
    source = r.rows(s.batch, s.active, s.width)
    return Inputs(lambda name: rows.scatter_rows(x, chosen, source, backend=name), (x,))


def quantize_rows(s: Sizes, device: torch.device) -> Inputs:
    source = Random(s, device).rows(s.batch, s.active, s.heads, s.dim)
    out, scale = torch.empty_like(source, dtype=torch.float8_e4m3fn), torch.empty(source.shape[:3], device=device)
    return Inputs(
        lambda name: rows.quantize_rows(out, scale, source, backend=name), (out, scale),
        {"compiled": lambda: compiled("quantize_rows")(source)},
    )  # fmt: skip


def confidence_pool(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    keys, tokens = (r.rows(s.batch, s.active, s.width) for _ in range(2))
    query, weight = r.wide(s.heads, s.dim), r.wide(s.width)
    out = torch.empty(s.batch, s.heads, s.width, device=device)
    return Inputs(
        lambda name: pool.confidence_pool(out, query, keys, weight, tokens, 1e-6, backend=name), (out,),
        {"compiled": lambda: compiled("confidence_pool")(query, keys, weight, tokens, 1e-6)},
    )  # fmt: skip


def active_attention(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    q = r.rows(s.batch, s.active, s.heads, s.dim)
    k, v = (r.rows(s.batch, s.cached, s.heads, s.dim) for _ in range(2))
    out = torch.empty_like(q)

    def by_parts() -> tuple[Tensor]:  # so that few of the definition's scores are there at a time
        return (torch.cat([reference.active_attention(some, k, v) for some in q.split(QUERIES, 1)], 1),)

    others = attention_rivals(q, k, v)
    if q.is_cuda and native.active_attention_scratch(out, None, q, k, v):
        # without scratch it splits nothing
        others["native, keys whole"] = lambda: native.active_attention(
            out, None, q, k, v, stream=torch.cuda.current_stream().cuda_stream
        )
    return Inputs(
        lambda name: attention.active_attention(out, q, k, v, backend=name), (out,), others, by_parts
    )


def active_attention_fp8(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    q = r.rows(s.batch, s.active, s.heads, s.dim)
    kept = [reference.quantize_rows(r.rows(s.batch, s.cached, s.heads, s.dim)) for _ in range(2)]
    (k, k_scale), (v, v_scale) = kept
    out = torch.empty_like(q)

    plain = [reference.dequantize_rows(values, scale).to(s.dtype) for values, scale in kept]
    room = torch.empty_like(q)

    def dequantised_first() -> tuple[Tensor]:
        wide = [values.to(s.dtype) * scale.to(s.dtype)[..., None] for values, scale in kept]
        heads_first = (x.transpose(1, 2) for x in (q, *wide))
        return (torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2),)

    others: dict[str, Callable[[], object]] = {
        "dequantised, sdpa": dequantised_first,
        "K and V as the model's rows": lambda: attention.active_attention(room, q, *plain),
    }
    if q.is_cuda and native.active_attention_fp8_scratch(out, None, q, k, v, k_scale, v_scale):
        others["native, keys whole"] = lambda: native.active_attention_fp8(
            out, None, q, k, v, k_scale, v_scale, stream=torch.cuda.current_stream().cuda_stream
        )
    return Inputs(
        lambda name: attention.active_attention_fp8(out, q, k, v, k_scale, v_scale, backend=name), (out,), others,
        dequantised_first,
    )  # fmt: skip


def attention_rivals(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """cuDNN's and the default fused attention of the framework, and FlashAttention where it is installed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention

    def on(kind: SDPBackend) -> object:
        with sdpa_kernel(kind):
            return attend(*heads_first)

    if not q.is_cuda:
        return {"sdpa": lambda: attend(*heads_first)}
    found: dict[str, Callable[[], object]] = {
        "sdpa, cuDNN": lambda: on(SDPBackend.CUDNN_ATTENTION), "sdpa, flash": lambda: on(SDPBackend.FLASH_ATTENTION),
    }  # fmt: skip
    try:
        from flash_attn_interface import flash_attn_func as third  # type: ignore[import-not-found]

        found["FlashAttention-3"] = lambda: third(q, k, v)
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_func as second  # type: ignore[import-not-found]

        found["FlashAttention-2"] = lambda: second(q, k, v)
    except ImportError:
        pass
    return found


def philox_normal(s: Sizes, device: torch.device) -> Inputs:
    out = torch.empty(s.batch, s.active, s.latent, device=device)
    seeds, tokens = (torch.arange(n, device=device) for n in (s.batch, s.active))
    return Inputs(
        lambda name: step.philox_normal(out, seeds, tokens, 1, backend=name), (out,),
        {"torch's generator": lambda: out.normal_()},
    )  # fmt: skip


def renoise(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    x, velocity = (r.wide(s.batch, s.active, s.latent) for _ in range(2))
    out, x0 = torch.empty_like(x), torch.empty_like(x)
    seeds, tokens = (torch.arange(n, device=device) for n in (s.batch, s.active))
    return Inputs(
        lambda name: step.renoise(out, x, velocity, 0.9375, 0.8333, seeds, tokens, 1, x0=x0, backend=name), (out, x0)
    )


def cached_step(s: Sizes, device: torch.device) -> Inputs:
    r = Random(s, device)
    x, cache = (r.wide(s.batch, s.cached, s.latent) for _ in range(2))
    fresh, chosen = r.wide(s.batch, s.active, s.latent), r.some(s.cached)
    score = torch.empty(s.batch, s.active, device=device)
    return Inputs(
        lambda name: step.cached_step(x, cache, chosen, fresh, -0.01, score=score, backend=name), (x, cache, score)
    )


def exit_decision(s: Sizes, device: torch.device) -> Inputs:
    logit, threshold = torch.randn(s.batch, device=device), torch.rand(s.batch, device=device)
    refine = torch.empty(s.batch, dtype=torch.bool, device=device)
    confidence = torch.empty(s.batch, device=device)
    return Inputs(
        lambda name: step.exit_decision(refine, confidence, logit, threshold, backend=name), (refine, confidence)
    )


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """The definition through torch.compile."""
    return torch.compile(getattr(reference, name), dynamic=False)


def _of_rows(count: int) -> Callable[[Sizes], int]:
    return lambda s: count * s.batch * s.active * s.width * s.dtype.itemsize


def _tables(count: int) -> Callable[[Sizes], int]:
    return lambda s: 8 * s.active + 4 * count * s.batch * s.frames * s.width


OPS: dict[str, Op] = {
    "norm_modulate": Op(norm_modulate, lambda s: _of_rows(2)(s) + _tables(2)(s)),
    "residual_norm_modulate": Op(residual_norm_modulate, lambda s: _of_rows(4)(s) + _tables(3)(s)),
    "rms_norm": Op(rms_norm, lambda s: _of_rows(2)(s) + s.dtype.itemsize * s.width),
    "qk_norm_rope_store": Op(
        qk_norm_rope_store, lambda s: _of_rows(6)(s) + 8 * s.active + 4 * (s.active * s.dim + 2 * s.width),
        dim=lambda s: s.dim,
    ),
    "gather_rows": Op(gather_rows, lambda s: _of_rows(2)(s) + 8 * s.active),
    "scatter_rows": Op(scatter_rows, lambda s: _of_rows(2)(s) + 8 * s.active),
    "quantize_rows": Op(
        quantize_rows, lambda s: s.batch * s.active * (s.width * (s.dtype.itemsize + 1) + 4 * s.heads),
        dim=lambda s: s.dim,
    ),
    "confidence_pool": Op(confidence_pool, lambda s: _of_rows(2)(s) + 4 * s.batch * s.heads * s.width),
    "active_attention": Op(
        active_attention,
        lambda s: _of_rows(2)(s) + 2 * s.batch * s.cached * s.width * s.dtype.itemsize,
        lambda s: 4 * s.batch * s.active * s.cached * s.width,
        dim=lambda s: s.dim,
    ),
    "active_attention_fp8": Op(
        active_attention_fp8,
        lambda s: _of_rows(2)(s) + 2 * s.batch * s.cached * (s.width + 4 * s.heads),
        lambda s: 4 * s.batch * s.active * s.cached * s.width,
        dim=lambda s: s.dim,
    ),
    "philox_normal": Op(
        philox_normal, lambda s: s.batch * s.active * (8 + 4 * s.latent), dim=lambda s: s.latent, wide=True
    ),
    "renoise": Op(renoise, lambda s: s.batch * s.active * (8 + 16 * s.latent), dim=lambda s: s.latent, wide=True),
    "cached_step": Op(
        # x read and written, the cache read once; fresh rows: read, and written into the cache
        cached_step,
        lambda s: 4 * s.batch * s.latent * (3 * s.cached + 2 * s.active) + 12 * s.active,
        dim=lambda s: s.latent, wide=True,
    ),
    "exit_decision": Op(exit_decision, lambda s: 13 * s.batch, wide=True),
}  # fmt: skip
