"""qk_norm_rope_store against fp64 NumPy, with complex numbers for the rotation, on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from .conftest import KERNELS, Guarded, call, poison, random, rounding, same_bits

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
dtypes = pytest.mark.parametrize("dtype", FLOATS)
# batch, active, cache rows, heads, head dim
SHAPES = [(1, 1, 1, 1, 2), (2, 7, 11, 3, 12), (1, 5, 9, 2, 64), (2, 3, 3, 1, 30), (1, 4, 6, 2, 300), (1, 2, 5, 12, 128)]


def exact(x: Tensor, weight: Tensor, angles: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised and turned [B, A, H, D] in fp64, and the length of each pair of channels."""
    wide = x.double().numpy()
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * weight.double().numpy()
    pairs = normed.reshape(*normed.shape[:2], heads, -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * angles[:, None]
    both = np.stack((turned.real, turned.imag), -1).reshape(*normed.shape[:2], heads, -1)
    return both, abs(turned).repeat(2, -1)


def near(got: Tensor, expected: tuple[np.ndarray, np.ndarray]) -> None:
    """One rounding to the dtype, beside those of fp32 arithmetic."""
    result, size = expected
    assert (abs(got.double().numpy() - result) <= rounding(result, got.dtype) + 1e-6 * size + 1e-12).all()


def rotation(rng: np.random.Generator, active: int, pairs: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """cos and sin [A, D / 2] fp32, and the complex numbers they make."""
    angles = 50 * rng.standard_normal((active, pairs))
    cos, sin = (torch.from_numpy(f(angles)).float() for f in (np.cos, np.sin))
    return cos, sin, cos.double().numpy() + 1j * sin.double().numpy()


@dtypes
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, None])
def test_against_fp64(
    path: str, dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    """Everything lies in larger buffers. Rows of the cache that are not written stay as they were."""
    if shape is None:
        shape = tuple(int(n) for n in rng.integers(1, (3, 20, 10, 5, 60)))
        shape = (shape[0], shape[1], shape[1] + shape[2], shape[3], 2 * shape[4])
        print(f"shape {shape}")
    batch, active, cached, heads, dim = shape
    q, k, v = (Guarded(random(rng, batch, active, heads * dim, dtype=dtype)) for _ in range(3))
    q_weight, k_weight = (random(rng, heads * dim, dtype=weight_dtype) for _ in range(2))
    cos, sin, turn = rotation(rng, active, dim // 2)
    chosen = torch.from_numpy(rng.permutation(cached)[:active])
    for slots in (chosen, None):
        before = [random(rng, batch, cached, heads, dim, dtype=dtype) for _ in range(2)]
        k_cache, v_cache = (Guarded(value) for value in before)
        q_out = Guarded(poison(batch, active, heads, dim, dtype=dtype))
        call(
            path, "qk_norm_rope_store", q_out.tensor, k_cache.tensor, v_cache.tensor, q.tensor, k.tensor, v.tensor,
            q_weight, k_weight, cos, sin, slots, EPS, threads=2,
        )  # fmt: skip
        rows = torch.arange(active) if slots is None else slots
        near(q_out.tensor, exact(q.tensor, q_weight, turn, heads))
        near(k_cache.tensor[:, rows], exact(k.tensor, k_weight, turn, heads))
        assert same_bits(v_cache.tensor[:, rows], v.tensor.unflatten(-1, (heads, dim)))
        others = torch.ones(cached, dtype=torch.bool)
        others[rows] = False
        for cache, old in zip((k_cache, v_cache), before, strict=True):
            assert same_bits(cache.tensor[:, others], old[:, others])
        assert all(guarded.intact() for guarded in (q_out, k_cache, v_cache, q, k, v))


def test_a_layer_of_a_larger_cache(path: str, rng: np.random.Generator) -> None:
    """As in use: consecutive rows of one layer of [layers, B, N, H, D]; the other layers stay poisoned."""
    cache = poison(2, 3, 2, 10, 2, 6)  # K and V, layers
    q, k, v = (random(rng, 2, 4, 12) for _ in range(3))
    weight, q_out = torch.ones(12), poison(2, 4, 2, 6)
    cos, sin, turn = rotation(rng, 4, 3)
    here = cache[:, 1, :, 3:7]
    call(path, "qk_norm_rope_store", q_out, *here, q, k, v, weight, weight, cos, sin, None, EPS)
    near(here[0], exact(k, weight, turn, 2))
    assert same_bits(here[1], v.unflatten(-1, (2, 6)))
    here.fill_(float("nan"))
    assert cache.isnan().all()


@dtypes
def test_nan_and_infinity_stay_in_their_row(path: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    q, k, v = (random(rng, 1, 5, 24, dtype=dtype) for _ in range(3))
    q[0, 1, 3], k[0, 2, 23], v[0, 3, 7], v[0, 3, 8] = float("nan"), float("inf"), float("nan"), -float("inf")
    weight = torch.ones(24)
    k_cache, v_cache, q_out = (poison(1, 5, 2, 12, dtype=dtype) for _ in range(3))
    cos, sin, _ = rotation(rng, 5, 6)
    call(path, "qk_norm_rope_store", q_out, k_cache, v_cache, q, k, v, weight, weight, cos, sin, None, EPS)
    assert q_out[0, 1].isnan().all() and q_out[0, [0, 2, 3, 4]].isfinite().all()
    row = k_cache[0, 2].flatten()  # the row's size is infinite: its other elements vanish, its own pair has no value
    assert row[22:].isnan().all() and (row[:22] == 0).all()
    assert k_cache[0, [0, 1, 3, 4]].isfinite().all()
    assert same_bits(v_cache.flatten(2), v)


@pytest.mark.parametrize("kernel", KERNELS)
@dtypes
def test_no_bit_depends_on_threads_neighbours_or_instruction_set(
    kernel: str, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    heads, dim, active = 3, 44, 250
    q, k, v = (random(rng, 2, active, heads * dim, dtype=dtype) for _ in range(3))
    q_weight, k_weight = (random(rng, heads * dim) for _ in range(2))
    cos, sin, _ = rotation(rng, active, dim // 2)

    def run(path: str, some: Tensor, slots: Tensor | None, threads: int) -> list[Tensor]:
        made = [poison(2, len(some), heads, dim, dtype=dtype), *poison(2, 2, active, heads, dim, dtype=dtype)]
        rows = [x[:, some] for x in (q, k, v)]
        call(
            path, "qk_norm_rope_store", *made, *rows, q_weight, k_weight, cos[some], sin[some], slots, EPS,
            threads=threads,
        )  # fmt: skip
        return made

    everything = torch.arange(active)
    expected = run("generic", everything, None, 1)
    for threads in (1, 2, 3, 8):
        assert all(map(same_bits, run(kernel, everything, everything, threads), expected))
    some = torch.from_numpy(rng.permutation(active)[:37])
    made = run(kernel, some, some, 2)
    assert same_bits(made[0], expected[0][:, some])
    assert all(same_bits(a[:, some], b[:, some]) for a, b in zip(made[1:], expected[1:], strict=True))


def test_nothing_to_do(path: str) -> None:
    none, weight, cos = torch.empty(2, 0, 8), torch.ones(8), torch.empty(0, 2)
    cache = torch.ones(2, 2, 5, 2, 4)
    call(
        path, "qk_norm_rope_store", torch.empty(2, 0, 2, 4), *cache, none, none, none, weight, weight, cos, cos,
        torch.arange(0), EPS,
    )  # fmt: skip
    assert (cache == 1).all()
