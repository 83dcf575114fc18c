"""The transformer ops: their definitions against loops over single numbers, and what runs against the definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_rt.ops import layers as ops
from dsa_rt.reference import layers as reference

EPS = 1e-6


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


def test_qk_norm_rope_store() -> None:
    heads, head_dim = 3, 4
    q, k, v = (torch.randn(2, 5, heads * head_dim) for _ in range(3))
    q_weight, k_weight = torch.randn(12), torch.randn(12)
    angles = 50 * torch.randn(5, head_dim // 2, dtype=torch.float64)
    cos, sin = angles.cos().float(), angles.sin().float()
    got_q, got_k, got_v = reference.qk_norm_rope_store(q, k, v, q_weight, k_weight, cos, sin, heads, EPS)
    for got, x, weight in ((got_q, q, q_weight), (got_k, k, k_weight)):
        normed = naive_rms_norm(x, weight)  # over all heads together
        assert (reference.rms_norm(x, weight, EPS) - normed).abs().max() < 1e-5
        split = normed.reshape(2, 5, heads, head_dim)
        assert (got - naive_rope(split, angles)).abs().max() < 1e-5
    assert torch.equal(got_v, v.reshape(2, 5, heads, head_dim))


def test_rows_are_rounded_once() -> None:
    """In bf16 nothing is rounded between the norm and the rotation."""
    q = torch.randn(1, 40, 12).bfloat16()
    weight, angles = torch.randn(12), torch.randn(40, 2, dtype=torch.float64)
    cos, sin = angles.cos().float(), angles.sin().float()
    exact = naive_rope(naive_rms_norm(q, weight).reshape(1, 40, 3, 4), angles)
    got = reference.qk_norm_rope_store(q, q, q, weight, weight, cos, sin, 3, EPS)[0]
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_gather_and_scatter() -> None:
    x, src, rows = torch.randn(2, 6, 3, 4), torch.randn(2, 3, 3, 4), torch.tensor([5, 0, 2])
    assert torch.equal(reference.gather_rows(x, rows), x[:, [5, 0, 2]])
    put = reference.scatter_rows(x, rows, src)
    assert torch.equal(put[:, [5, 0, 2]], src) and torch.equal(put[:, [1, 3, 4]], x[:, [1, 3, 4]])


def test_attention_definition() -> None:
    q, k, v = torch.randn(2, 3, 2, 5), torch.randn(2, 6, 2, 5), torch.randn(2, 6, 2, 5)
    assert (reference.active_attention(q, k, v) - naive_attention(q, k, v)).abs().max() < 1e-5


def test_attention_of_segments() -> None:
    q, k, v = torch.randn(2, 5, 2, 3), torch.randn(2, 9, 2, 3), torch.randn(2, 9, 2, 3)
    segments = torch.tensor([[2, 1, 4, 7, 9], [0, 0, 1, 0, 0], [3, 5, 5, 0, 6]])
    first, last = [1, 2, 3, 7, 8], [0, 1, 2, 3, 4, 5]
    expected = [naive_attention(q[:, :2], k[:, first], v[:, first]), naive_attention(q[:, 2:], k[:, last], v[:, last])]
    assert (reference.active_attention(q, k, v, segments) - torch.cat(expected, 1)).abs().max() < 1e-5
    log_sum = reference.attention_log_sum_exp(q, k, segments)
    scores = torch.einsum("bahd,bnhd->bhan", q[:, 2:], k[:, last]) / math.sqrt(3)
    assert (log_sum[..., 2:] - scores.exp().sum(-1).log()).abs().max() < 1e-5


def test_confidence_pool_definition() -> None:
    query, keys, tokens, weight = torch.randn(2, 5), torch.randn(3, 7, 10), torch.randn(3, 7, 10), torch.randn(10)
    got = reference.confidence_pool(query, keys, weight, tokens, EPS)
    normed = naive_rms_norm(keys, weight).reshape(3, 7, 2, 5)
    for b, h in product(range(3), range(2)):
        weights = [math.exp(float(query[h].double() @ normed[b, a, h]) / math.sqrt(5)) for a in range(7)]
        pooled = sum(w * tokens[b, a] for a, w in enumerate(weights)) / sum(weights)
        assert (got[b, h] - pooled).abs().max() < 1e-5


def test_pooled_inputs_then_projection_is_attention_over_values() -> None:
    """The head's saving: W_v after pooling, since the weights of a softmax sum to one."""
    heads, head_dim, channels = 3, 4, 12
    query, keys, key_weight = torch.randn(heads, head_dim), torch.randn(2, 9, channels), torch.randn(channels)
    tokens, weight, bias = torch.randn(2, 9, channels), torch.randn(channels, channels), torch.randn(channels)
    values = torch.nn.functional.linear(tokens, weight, bias).unflatten(-1, (heads, head_dim))
    normed = naive_rms_norm(keys, key_weight).unflatten(-1, (heads, head_dim))
    expected = naive_attention(query.expand(2, 1, heads, head_dim), normed, values)[:, 0]
    pooled = reference.confidence_pool(query, keys, key_weight, tokens, EPS)
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


def calls(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]]:
    """For each op: what the models call, its definition, and what may carry a gradient."""
    rows, (cos, sin) = torch.tensor([2, 0, 1, 1]), torch.randn(2, 4, 3)
    x, y, q, k, v = (torch.randn(2, 4, 12).to(dtype) for _ in range(5))
    gate, shift, scale = (torch.randn(2, 3, 12) for _ in range(3))
    q_weight, k_weight, query = torch.randn(12), torch.randn(12), torch.randn(2, 6)
    return {
        "norm_modulate": (
            lambda x, shift, scale: ops.norm_modulate(x, shift, scale, rows, EPS),
            lambda x, shift, scale: reference.norm_modulate(x, shift, scale, rows, EPS),
            [x, shift, scale],
        ),
        "residual_norm_modulate": (
            lambda *t: ops.residual_norm_modulate(*t, rows, EPS, keep=True),
            lambda *t: reference.residual_norm_modulate(*t, rows, EPS),
            [x, y, gate, shift, scale],
        ),
        "qk_norm_rope": (
            lambda *t: ops.qk_norm_rope(*t, cos, sin, 2, EPS),
            lambda *t: reference.qk_norm_rope_store(*t, cos, sin, 2, EPS),
            [q, k, v, q_weight, k_weight],
        ),
        "confidence_pool": (
            lambda *t: ops.confidence_pool(*t, EPS), lambda *t: reference.confidence_pool(*t, EPS),
            [query, k, k_weight, x],
        ),
    }  # fmt: skip


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", calls(torch.float32))
def test_what_the_models_call(op: str, dtype: torch.dtype) -> None:
    """The values of the definition, its dtypes, and a gradient of the same value wherever one is wanted."""
    run, define, leaves = calls(dtype)[op]
    defined = tensors(define(*leaves))
    for got, expected in zip(tensors(run(*leaves)), defined, strict=True):
        assert got.dtype == expected.dtype and not got.requires_grad
        bound = 2.0**-7 if dtype == got.dtype == torch.bfloat16 else 1e-5
        assert ((got - expected).abs() <= bound * (1 + expected.abs())).all()
    weights = [torch.randn(t.shape) for t in defined]
    for number, leaf in enumerate(leaves):  # also where a single one carries a gradient
        mine = [t.clone().requires_grad_(n == number) for n, t in enumerate(leaves)]
        gradients = []
        for function in (run, define):
            results = [(t * w).sum() for t, w in zip(tensors(function(*mine)), weights, strict=True) if t.requires_grad]
            assert results
            gradients.append(torch.autograd.grad(sum(results), mine[number])[0])
        assert gradients[0].shape == leaf.shape and gradients[0].abs().max() > 0
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_stored_rows(dtype: torch.dtype) -> None:
    """q is returned, k and v are in their rows, also in a dtype that no kernel has."""
    q, k, v = (torch.randn(2, 4, 12).to(dtype) for _ in range(3))
    weight, (cos, sin) = torch.randn(12).to(dtype), torch.randn(2, 4, 3)
    expected = reference.qk_norm_rope_store(q, k, v, weight, weight, cos, sin, 2, EPS)
    for slots in (torch.tensor([6, 0, 3, 1]), None):
        caches = torch.full((2, 2, 7, 2, 6), torch.nan, dtype=dtype)
        out = ops.qk_norm_rope_store(*caches, q, k, v, weight, weight, cos, sin, slots, EPS)
        rows = range(4) if slots is None else slots.tolist()
        assert out.dtype == dtype and caches.isnan().sum() == 2 * 2 * 3 * 12
        for got, want in zip((out, caches[0][:, rows], caches[1][:, rows]), expected, strict=True):
            assert ((got.float() - want.float()).abs() <= (2.0**-7 if dtype != torch.float32 else 1e-5) * 4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_that_is_kept_and_one_that_is_not(dtype: torch.dtype) -> None:
    """Where x has no further use the sum may take its place; with ``keep``, or a gradient, x stays."""
    table, rows = torch.randn(1, 1, 12), torch.zeros(4, dtype=torch.int64)
    for keep in (True, False):
        x, y = torch.randn(2, 2, 4, 12).to(dtype)
        before = x.clone()
        summed, _ = ops.residual_norm_modulate(x, y, None, table, table, rows, EPS, keep=keep)
        assert torch.equal(summed, before + y) and torch.equal(x, before) is keep
        assert (summed.data_ptr() == x.data_ptr()) is not keep
    x, y = torch.randn(1, 4, 12).requires_grad_(), torch.randn(1, 4, 12)
    before = x.detach().clone()
    ops.residual_norm_modulate(x * 1, y, None, table, table, rows, EPS)[1].sum().backward()
    assert torch.equal(x, before) and x.grad is not None


def test_a_dtype_without_kernel() -> None:
    """fp64 models run on the definitions."""
    x, y, table = torch.randn(1, 4, 12).double(), torch.randn(1, 4, 12).double(), torch.randn(1, 1, 12)
    for out in (
        ops.norm_modulate(x, table, table, None, EPS), *ops.residual_norm_modulate(x, y, table, table, table, None, EPS)
    ):  # fmt: skip
        assert out.dtype == torch.float64 and out.isfinite().all()
    assert ops.confidence_pool(torch.randn(2, 6), x, torch.ones(12).double(), y, EPS).dtype == torch.float32


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_erf", "silu"])
@pytest.mark.parametrize("given", [False, True])
def test_linear_in_one_product(activation: str, given: bool) -> None:
    """What a CUDA device runs, with the framework's CPU product, whose fused GELU is the exact one: the layer's values,
    in the memory that was given."""
    layer, x = torch.nn.Linear(7, 5).requires_grad_(False), torch.randn(2, 3, 7)
    out = torch.full((2, 3, 5), torch.nan) if given else None
    made = ops.in_one_product(x, layer.weight, layer.bias, activation, out)
    assert made.shape == (2, 3, 5) and (out is None or made.data_ptr() == out.data_ptr())
    fused = {"gelu": "gelu_erf"}.get(activation, activation)
    torch.testing.assert_close(made, reference.activate(layer(x), fused))


def test_linear_with_gelu() -> None:
    linear, x = torch.nn.Linear(5, 7), torch.randn(2, 3, 5)
    hidden = linear(x)
    inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    torch.testing.assert_close(ops.linear(linear, x, activation="gelu"), 0.5 * hidden * (1 + inner.tanh()))
