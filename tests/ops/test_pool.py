"""confidence_pool against fp64 NumPy on every path: blocks of tokens and channels that do not come out even."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from .conftest import KERNELS, Guarded, call, poison, random, same_bits

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
dtypes = pytest.mark.parametrize("dtype", FLOATS)
# batch, tokens, heads, head dim
SHAPES = [(1, 1, 1, 4), (2, 37, 3, 12), (1, 300, 5, 24), (1, 129, 2, 80), (2, 260, 12, 6), (1, 40, 1, 133)]


def exact(query: Tensor, keys: Tensor, weight: Tensor, tokens: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Result [B, H, C], Σ weight·|token| and the largest Σ |q·k| / √D of a head, in fp64."""
    q, k, w, t = (x.double().numpy() for x in (query, keys, weight, tokens))
    heads, dim = q.shape
    with np.errstate(all="ignore"):
        normed = k / np.sqrt((k**2).mean(-1, keepdims=True) + EPS) * w
        split = normed.reshape(*normed.shape[:2], heads, dim)
        scores = np.einsum("hd,bahd->bha", q, split) / np.sqrt(dim)
        size = np.einsum("hd,bahd->bha", abs(q), abs(split)).max(-1) / np.sqrt(dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bha,bac->bhc", weights, t), np.einsum("bha,bac->bhc", weights, abs(t)), size


@dtypes
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, None])
def test_against_fp64(
    path: str, dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    if shape is None:
        shape = tuple(int(n) for n in rng.integers(1, (3, 400, 9, 50)))
        print(f"shape {shape}")
    batch, active, heads, dim = shape
    keys, tokens = (Guarded(random(rng, batch, active, heads * dim, dtype=dtype)) for _ in range(2))
    query, weight = random(rng, heads, dim, scale=2.0), random(rng, heads * dim, dtype=weight_dtype)
    memory = poison(batch * heads * heads * dim + 8)
    out = memory[4:-4].view(batch, heads, heads * dim)
    call(path, "confidence_pool", out, query, keys.tensor, weight, tokens.tensor, EPS, threads=2)
    result, spread, size = exact(query, keys.tensor, weight, tokens.tensor)
    relative = 2.0**-20 * size[..., None] + 4e-6
    assert (abs(out.double().numpy() - result) <= relative * spread).all()
    assert memory[:4].isnan().all() and memory[-4:].isnan().all() and keys.intact() and tokens.intact()


def test_large_scores(path: str, rng: np.random.Generator) -> None:
    """Scores of some hundreds: nothing overflows, and one token takes all the weight."""
    query, keys, tokens = random(rng, 2, 16, scale=300.0), random(rng, 1, 200, 32), random(rng, 1, 200, 32)
    out, weight = poison(1, 2, 32), torch.ones(32)
    call(path, "confidence_pool", out, query, keys, weight, tokens, EPS)
    result, spread, size = exact(query, keys, weight, tokens)
    assert size.max() > 300
    assert (abs(out.double().numpy() - result) <= (2.0**-20 * size[..., None] + 4e-6) * spread).all()


def test_one_token_is_copied(path: str, rng: np.random.Generator) -> None:
    tokens, out = random(rng, 2, 1, 36), poison(2, 3, 36)
    call(path, "confidence_pool", out, random(rng, 3, 12), random(rng, 2, 1, 36), torch.ones(36), tokens, EPS)
    assert same_bits(out, tokens.expand(2, 3, 36).contiguous())


@dtypes
def test_nan_and_infinity(path: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """In a token they reach their channel alone; in a key all of the sample, whose softmax they enter."""
    keys, tokens = (random(rng, 3, 150, 48, dtype=dtype) for _ in range(2))
    keys[1, 149, 7] = float("nan")
    tokens[2, 3, 5], tokens[2, 140, 40], tokens[2, 9, 47] = float("nan"), float("inf"), -float("inf")
    query, weight, out = random(rng, 2, 24), torch.ones(48), poison(3, 2, 48)
    call(path, "confidence_pool", out, query, keys, weight, tokens, EPS)
    assert out[0].isfinite().all() and out[1].isnan().all()
    assert out[2, :, 5].isnan().all() and (out[2, :, 40] == float("inf")).all()
    assert (out[2, :, 47] == -float("inf")).all() and out[2].isfinite().sum() == 2 * 45
    query[1, 0] = float("inf")  # scores of one head are infinite, both ways
    call(path, "confidence_pool", out, query, keys[:1].expand(3, -1, -1), weight, tokens[:1].expand(3, -1, -1), EPS)
    assert out[:, 0].isfinite().all() and out[:, 1].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@dtypes
def test_no_bit_depends_on_threads_or_company(
    kernel: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    keys, tokens = (random(rng, 2, 333, 7 * 22, dtype=dtype) for _ in range(2))
    query, weight = random(rng, 7, 22), random(rng, 7 * 22)

    def run(path: str, batch: slice, threads: int) -> Tensor:
        out = poison(len(range(2)[batch]), 7, 7 * 22)
        call(path, "confidence_pool", out, query, keys[batch], weight, tokens[batch], EPS, threads=threads)
        return out

    expected = run(kernel, slice(0, 2), 1)
    assert torch.allclose(expected, run("generic", slice(0, 2), 1), rtol=1e-5, atol=1e-5)
    for threads in (1, 2, 3, 8):
        assert same_bits(run(kernel, slice(0, 2), threads), expected)
    assert same_bits(run(kernel, slice(1, 2), 2), expected[1:])  # nor on what else is in the batch
