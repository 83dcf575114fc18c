"""The transformer ops: their definitions against loops over single numbers, and what runs against the definitions."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from dsa_rt.ops import layers as ops
from dsa_rt.reference import layers as reference

EPS = 1e-6
SHARED = ["norm_modulate", "residual_norm_modulate", "residual", "rms_norm", "qk_norm_rope", "confidence_pool"]


def naive_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor) -> Tensor:
    out = torch.full(x.shape, torch.nan, dtype=torch.float64)
    batch, active, channels = x.shape
    for b, a in product(range(batch), range(active)):
        values = x[b, a].tolist()
        mean = sum(values) / channels
        variance = sum((value - mean) ** 2 for value in values) / channels
        row = int(rows[a])
        table = b if scale.shape[0] > 1 else 0
        for c in range(channels):
            normed = (values[c] - mean) / math.sqrt(variance + EPS)
            out[b, a, c] = normed * (1 + scale[table, row, c].item()) + shift[table, row, c].item()
    return out


def naive_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.full(x.shape, torch.nan, dtype=torch.float64)
    for index in product(*map(range, x.shape[:-1])):
        values = x[index].tolist()
        size = math.sqrt(sum(value**2 for value in values) / len(values) + EPS)
        out[index] = torch.tensor([v / size * w for v, w in zip(values, weight.tolist(), strict=True)]).double()
    return out


def naive_rope(x: Tensor, angles: Tensor) -> Tensor:
    out = torch.full(x.shape, torch.nan, dtype=torch.float64)
    for b, a, h in product(*map(range, x.shape[:3])):
        for pair in range(x.shape[3] // 2):
            number = complex(x[b, a, h, 2 * pair], x[b, a, h, 2 * pair + 1])
            turned = number * complex(math.cos(angles[a, pair]), math.sin(angles[a, pair]))
            out[b, a, h, 2 * pair], out[b, a, h, 2 * pair + 1] = turned.real, turned.imag
    return out


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.full(q.shape, torch.nan, dtype=torch.float64)
    size = q.shape[-1]
    for b, a, h in product(*map(range, q.shape[:3])):
        scores = [sum(x * y for x, y in zip(q[b, a, h].tolist(), row, strict=True)) for row in k[b, :, h].tolist()]
        weights = [math.exp(score / math.sqrt(size)) for score in scores]
        for d in range(size):
            values = v[b, :, h, d].tolist()
            out[b, a, h, d] = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
    return out


@pytest.mark.parametrize("table_batch", [1, 2])
def test_norm_modulate(table_batch: int) -> None:
    x = 3 * torch.randn(2, 5, 7) + 1
    shift, scale = torch.randn(table_batch, 4, 7), torch.randn(table_batch, 4, 7)
    rows = torch.tensor([3, 0, 0, 2, 3])
    expected = naive_norm_modulate(x, shift, scale, rows)
    assert (reference.norm_modulate(x, shift, scale, rows, EPS) - expected).abs().max() < 1e-5
    one_row = torch.zeros(5, dtype=torch.int64)  # one row of modulation for all tokens
    expected = naive_norm_modulate(x, shift[:, :1], scale[:, :1], one_row)
    assert (reference.norm_modulate(x, shift[:, :1], scale[:, :1], one_row, EPS) - expected).abs().max() < 1e-5


def test_residual_and_residual_norm_modulate() -> None:
    x, y = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    gate, shift, scale = (torch.randn(2, 3, 7) for _ in range(3))
    rows = torch.tensor([2, 0, 1, 1, 2])
    expected = torch.stack(
        [torch.stack([x[b, a] + gate[b, rows[a]] * y[b, a] for a in range(5)]) for b in range(2)]
    )
    torch.testing.assert_close(reference.residual(x, y, gate, rows), expected, rtol=0, atol=1e-6)
    summed, normed = reference.residual_norm_modulate(x, y, gate, shift, scale, rows, EPS)
    torch.testing.assert_close(summed, expected, rtol=0, atol=1e-6)
    assert (normed - naive_norm_modulate(expected, shift, scale, rows)).abs().max() < 1e-5
    summed, normed = reference.residual_norm_modulate(x, y, None, shift, scale, rows, EPS)
    assert torch.equal(summed, x + y) and torch.equal(reference.residual(x, y, None, rows), x + y)
    assert (normed - naive_norm_modulate(x + y, shift, scale, rows)).abs().max() < 1e-5


def test_qk_norm_rope() -> None:
    heads, head_dim = 3, 4
    q, k = torch.randn(2, 5, heads * head_dim), torch.randn(2, 5, heads * head_dim)
    q_weight, k_weight = torch.randn(12), torch.randn(12)
    angles = 50 * torch.randn(5, head_dim // 2, dtype=torch.float64)
    cos, sin = angles.cos().float(), angles.sin().float()
    got_q, got_k = reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, heads, EPS)
    for got, x, weight in ((got_q, q, q_weight), (got_k, k, k_weight)):
        normed = naive_rms_norm(x, weight)  # over all heads together
        assert (reference.rms_norm(x, weight, EPS) - normed).abs().max() < 1e-5
        split = normed.reshape(2, 5, heads, head_dim)
        assert (got - naive_rope(split, angles)).abs().max() < 1e-5


def test_attention_definition() -> None:
    q, k, v = torch.randn(2, 3, 2, 5), torch.randn(2, 6, 2, 5), torch.randn(2, 6, 2, 5)
    assert (reference.active_attention(q, k, v) - naive_attention(q, k, v)).abs().max() < 1e-5


def test_confidence_pool_definition() -> None:
    query, keys, tokens = torch.randn(2, 5), torch.randn(3, 7, 2, 5), torch.randn(3, 7, 4)
    got = reference.confidence_pool(query, keys, tokens)
    for b, h in product(range(3), range(2)):
        weights = [math.exp(float(query[h] @ keys[b, a, h]) / math.sqrt(5)) for a in range(7)]
        pooled = sum(w * tokens[b, a] for a, w in enumerate(weights)) / sum(weights)
        assert (got[b, h] - pooled).abs().max() < 1e-5


def test_pooled_inputs_then_projection_is_attention_over_values() -> None:
    """The head's saving: W_v after pooling, since the weights of a softmax sum to one."""
    heads, head_dim, channels = 3, 4, 12
    query, keys = torch.randn(heads, head_dim), torch.randn(2, 9, heads, head_dim)
    tokens, weight, bias = torch.randn(2, 9, channels), torch.randn(channels, channels), torch.randn(channels)
    values = torch.nn.functional.linear(tokens, weight, bias).unflatten(-1, (heads, head_dim))
    expected = naive_attention(query.expand(2, 1, heads, head_dim), keys, values)[:, 0]
    pooled = reference.confidence_pool(query, keys, tokens)
    projected = torch.einsum("bhc,hdc->bhd", pooled, weight.unflatten(0, (heads, head_dim)))
    assert (projected + bias.unflatten(0, (heads, head_dim)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(2, 5, 3, 8, 11), (1, 1, 1, 24, 1), (3, 17, 2, 10, 64), (1, 33, 4, 64, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_runs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The fused kernel and the path that trains, against the definition; K and V are views of a longer cache."""
    batch, active, heads, head_dim, rows = shape
    q = torch.randn(batch, active, heads, head_dim).to(dtype)
    cache_k = torch.full((batch, rows + 9, heads, head_dim), torch.nan, dtype=dtype)
    cache_v = cache_k.clone()
    cache_k[:, :rows], cache_v[:, :rows] = torch.randn(2, batch, rows, heads, head_dim).to(dtype)
    k, v = cache_k[:, :rows], cache_v[:, :rows]
    exact = reference.active_attention(q.double(), k.double(), v.double())
    # The framework's own error in this dtype is the measure: a few roundings of values of order one.
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    assert (ops.active_attention(q, k, v).double() - exact).abs().max() < bound
    trained = ops.active_attention(q.clone().requires_grad_(), k, v)
    assert trained.requires_grad and (trained.detach().double() - exact).abs().max() < bound


def test_attention_gradients() -> None:
    leaves = [torch.randn(2, n, 2, 6, requires_grad=True) for n in (4, 7, 7)]
    weight = torch.randn(2, 4, 2, 6)
    ours = torch.autograd.grad((ops.active_attention(*leaves) * weight).sum(), leaves)
    theirs = torch.autograd.grad((reference.active_attention(*leaves) * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_ops_keep_the_dtype_of_the_rows() -> None:
    x, table, rows = torch.randn(1, 3, 4).bfloat16(), torch.randn(1, 2, 4), torch.tensor([0, 1, 1])
    cos, sin = torch.ones(3, 1), torch.zeros(3, 1)
    q, k = ops.qk_norm_rope(x, x, table[0, 0], table[0, 1], cos, sin, 2, EPS)
    summed, normed = ops.residual_norm_modulate(x, x, table, table, table, rows, EPS)
    for out in (ops.norm_modulate(x, table, table, rows, EPS), ops.residual(x, x, table, rows), summed, normed, q, k):
        assert out.dtype == torch.bfloat16
    # fp32 inside: one rounding away from the exact value, not one for every operation
    exact = naive_norm_modulate(x, table, table, rows)
    error = (ops.norm_modulate(x, table, table, rows, EPS).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-6).all()


def test_every_other_op_is_its_definition() -> None:
    """As long as that is so, the tests above speak for what runs; a native version needs tests of its own."""
    for name in SHARED:
        assert getattr(ops, name) is getattr(reference, name)
    assert set(ops.__all__) == {*SHARED, "active_attention"}
