"""Attention and linear layers on given shapes for :mod:`bench.ops`: the native kernel and the framework's ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_rt.ops import attention as attention_op
from dsa_rt.ops import linear as linear_op
from dsa_rt.reference import layers as reference

AttentionShape = tuple[int, int, int, int, int]  # batch, active queries, cache rows, heads, head dim
LinearShape = tuple[int, int, int, str]  # rows, K, N, activation


@dataclass(frozen=True)
class Product:
    """One product on one shape: how many operations it takes, and its ways, "native" and "torch" among them.

    error: the native way's largest error, once it has run, over some 16 rows; above ``tolerance`` it is wrong.
    """

    operations: int
    ways: dict[str, Callable[[], object]]
    error: Callable[[], float]
    tolerance: float


def attention(shape: AttentionShape, dtype: torch.dtype) -> Product:
    """Against scaled_dot_product_attention on the same tensors."""
    _, active, rows, *_ = shape
    q, k, v = _queries_and_rows(shape, dtype)
    out, turned = torch.empty_like(q), [x.transpose(1, 2) for x in (q, k, v)]

    def error() -> float:
        few = _few(active)
        return float((out[:, few].float() - reference.active_attention(q[:, few].float(), k, v)).abs().max())

    ways: dict[str, Callable[[], object]] = {
        "native": lambda: attention_op.active_attention(out, q, k, v, backend="native"),
        "torch": lambda: F.scaled_dot_product_attention(*turned),
    }
    return Product(2 * q.numel() * rows * 2, ways, error, _attention_tolerance(dtype))


def attention_fp8(shape: AttentionShape, dtype: torch.dtype) -> Product:
    """K and V in FP8, against what makes them of ``dtype`` again and scaled_dot_product_attention."""
    _, active, rows, *_ = shape
    q, *wide = _queries_and_rows(shape, dtype)
    (k, k_scale), (v, v_scale) = (reference.quantize_rows(x) for x in wide)
    out, turned = torch.empty_like(q), q.transpose(1, 2)

    def by_hand() -> Tensor:
        pairs = ((k, k_scale), (v, v_scale))
        kv = (torch.mul(x.to(dtype), scale.to(dtype)[..., None]).transpose(1, 2) for x, scale in pairs)
        return F.scaled_dot_product_attention(turned, *kv)

    def error() -> float:
        few = _few(active)
        exact = reference.active_attention_fp8(q[:, few].float(), k, v, k_scale, v_scale)
        return float((out[:, few].float() - exact).abs().max())

    ways: dict[str, Callable[[], object]] = {
        "native": lambda: attention_op.active_attention_fp8(out, q, k, v, k_scale, v_scale, backend="native"),
        "torch": by_hand,
    }
    return Product(2 * q.numel() * rows * 2, ways, error, _attention_tolerance(dtype))


def linear(shape: LinearShape, dtype: torch.dtype) -> Product:
    """Packed weights against F.linear (and F.gelu), whose weights are as they are. "prepacked" is what the framework's
    compiler uses, where this build of it has that. The error is relative to 1 + a value."""
    count, k, n, activation = shape
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((1, count, k), (n, k), (n,)))
    weight *= k**-0.5
    out, packed = torch.empty(1, count, n, dtype=dtype), linear_op.pack_linear(weight, bias)
    gelu = activation == "gelu"

    def by_hand() -> Tensor:
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y

    def error() -> float:
        few = _few(count)
        exact = reference.linear(x[:, few], weight, bias, activation)
        return float(((out[:, few].float() - exact).abs() / (1 + exact.abs())).max())

    ways: dict[str, Callable[[], object]] = {
        "native": lambda: linear_op.linear(out, x, packed, activation, backend="native"), "torch": by_hand,
    }  # fmt: skip
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn
        ready = onednn._reorder_linear_weight(weight, count)
        fused = ("gelu", [], "tanh") if gelu else ("none", [], "")
        ways["prepacked"] = lambda: onednn._linear_pointwise(x, ready, bias, *fused)
    return Product(2 * count * k * n, ways, error, 2.0**-7 if dtype == torch.bfloat16 else 1e-5)


def _queries_and_rows(shape: AttentionShape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, active, rows, heads, dim = shape
    q, k, v = (torch.randn(batch, n, heads, dim).to(dtype) for n in (active, rows, rows))
    return q, k, v


def _attention_tolerance(dtype: torch.dtype) -> float:
    return 2e-2 if dtype == torch.bfloat16 else 1e-5


def _few(count: int) -> slice:
    """Some 16 of so many rows."""
    return slice(None, None, max(count // 16, 1))
