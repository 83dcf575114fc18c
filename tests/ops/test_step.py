"""renoise, cached_step and exit_decision against NumPy, whose fp32 operations are rounded one by one."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from dsa_rt import _native, reference

from .conftest import Guarded, call, poison, same_bits

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = list(product(FLOATS, repeat=2))  # of x and of velocities
SHAPES = [(1, 1, 1), (2, 7, 3), (3, 37, 30), (1, 108, 32), (2, 33, 517)]


def random(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(dtype)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy()


def rounded(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    assert array.dtype == np.float32
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


@pytest.mark.parametrize(("x_dtype", "velocity_dtype"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_renoise(
    path: str,
    shape: tuple[int, int, int],
    x_dtype: torch.dtype,
    velocity_dtype: torch.dtype,
    rng: np.random.Generator,
) -> None:
    batch, count, width = shape
    x, velocity = random(rng, *shape, dtype=x_dtype), random(rng, *shape, dtype=velocity_dtype)
    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, batch))
    tokens = torch.from_numpy(rng.integers(0, 2**40, count))
    sigma, sigma_next = float(rng.uniform(0.3, 1)), float(rng.uniform(0.01, 0.9))
    clean = wide(x) - np.float32(sigma) * wide(velocity)
    noise = reference.philox_normal(seeds, tokens, width, 5).numpy()
    noisy = np.float32(1 - sigma_next) * clean + np.float32(sigma_next) * noise
    for level, expected in ((sigma_next, noisy), (0.0, clean)):
        for with_x0 in (True, False):
            out = Guarded(poison(*shape, dtype=x_dtype))
            x0 = Guarded(poison(*shape, dtype=x_dtype))
            x_in, v_in = Guarded(x), Guarded(velocity)
            call(
                path, "renoise", out.tensor, x0.tensor if with_x0 else None, x_in.tensor, v_in.tensor, seeds,
                tokens, sigma, level, 5,
            )  # fmt: skip
            assert same_bits(out.tensor, rounded(expected, x_dtype))
            assert same_bits(x0.tensor, rounded(clean, x_dtype) if with_x0 else poison(*shape, dtype=x_dtype))
            assert same_bits(x_in.tensor, x) and same_bits(v_in.tensor, velocity)
            assert out.intact() and x0.intact()


@pytest.mark.parametrize("replaced", ["x", "velocity"])
def test_renoise_in_place(path: str, replaced: str, rng: np.random.Generator) -> None:
    shape, seeds, tokens = (2, 19, 45), torch.tensor([1, 2]), torch.arange(19)
    inputs = {name: random(rng, *shape, dtype=torch.float32) for name in ("x", "velocity")}
    expected = reference.renoise(inputs["x"], inputs["velocity"], 0.9, 0.4, seeds, tokens, 1)[0]
    out = inputs[replaced]
    call(path, "renoise", out, None, inputs["x"], inputs["velocity"], seeds, tokens, 0.9, 0.4, 1)
    assert same_bits(out, expected)


def test_renoise_reaches_the_next_level(path: str, rng: np.random.Generator) -> None:
    """On a straight path the clean prediction is the end of the path, and no level leaves it unchanged."""
    seeds, tokens = torch.tensor([1]), torch.arange(400)
    x0, noise = random(rng, 1, 400, 64, dtype=torch.float32), random(rng, 1, 400, 64, dtype=torch.float32)
    x = 0.25 * x0 + 0.75 * noise
    out, clean = poison(1, 400, 64), poison(1, 400, 64)
    call(path, "renoise", out, clean, x, noise - x0, seeds, tokens, 0.75, 0.5, 3)
    torch.testing.assert_close(clean, x0, rtol=0, atol=2e-6)
    left = out - 0.5 * x0
    assert abs(left.std().item() - 0.5) < 0.01
    assert abs(np.corrcoef(left.numpy().ravel(), noise.numpy().ravel())[0, 1]) < 5 / math.sqrt(left.numel())


@pytest.mark.parametrize(("x_dtype", "velocity_dtype"), PAIRS)
@pytest.mark.parametrize("active", ["none", "one", "some", "all"])
def test_cached_step(
    path: str, active: str, x_dtype: torch.dtype, velocity_dtype: torch.dtype, rng: np.random.Generator
) -> None:
    for shape, with_order in product(SHAPES, (False, True)):
        count = {"none": 0, "one": 1, "some": (shape[1] + 1) // 2, "all": shape[1]}[active]
        rows = torch.from_numpy(rng.permutation(shape[1])[:count])
        check_cached_step(path, shape, rows.sort().values if with_order else rows, x_dtype, velocity_dtype, rng)


def check_cached_step(
    path: str,
    shape: tuple[int, int, int],
    rows: Tensor,
    x_dtype: torch.dtype,
    velocity_dtype: torch.dtype,
    rng: np.random.Generator,
) -> None:
    batch, count, width = shape[0], len(rows), shape[2]
    x, old = random(rng, *shape, dtype=x_dtype), random(rng, *shape, dtype=velocity_dtype)
    fresh = random(rng, batch, count, width, dtype=velocity_dtype)
    delta = float(rng.uniform(-0.2, 0.2))
    velocity = old.clone()
    velocity[:, rows] = fresh
    expected = wide(x) + np.float32(delta) * wide(velocity)
    change = np.abs(wide(fresh).astype(np.float64) - wide(old[:, rows])).sum(-1)
    change /= np.abs(wide(fresh).astype(np.float64)).sum(-1)
    for with_score in (True, False):
        x_io, cache_io, fresh_in = Guarded(x), Guarded(old), Guarded(fresh)
        score = Guarded(poison(batch, count))
        call(
            path, "cached_step", x_io.tensor, cache_io.tensor, score.tensor if with_score else None, rows,
            fresh_in.tensor, delta,
        )  # fmt: skip
        assert same_bits(x_io.tensor, rounded(expected, x_dtype))
        assert same_bits(cache_io.tensor, velocity)
        if with_score:
            np.testing.assert_allclose(score.tensor.numpy(), change, rtol=1e-5)
        else:
            assert score.tensor.isnan().all()
        assert x_io.intact() and cache_io.intact() and score.intact()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threads", [1, 3])
def test_cached_step_of_many_dense_rows(
    path: str, dtype: torch.dtype, threads: int, rng: np.random.Generator
) -> None:
    """Rows that lie one after another, more of them than advance together, in pieces that begin anywhere."""
    batch, total, width = 3, int(rng.integers(2000, 2500)), int(rng.integers(20, 60))
    count = int(rng.integers(1, total))
    rows = torch.from_numpy(rng.permutation(total)[:count])
    x, old = (random(rng, batch, total, width, dtype=dtype) for _ in range(2))
    fresh = random(rng, batch, count, width, dtype=dtype)
    velocity = old.clone()
    velocity[:, rows] = fresh
    expected = rounded(wide(x) + np.float32(-0.1) * wide(velocity), dtype)
    change = abs(wide(fresh).astype(np.float64) - wide(old[:, rows])).sum(-1) / abs(wide(fresh)).sum(-1)
    order = rows.argsort()
    for chosen in (torch.arange(count), order):
        x_io, cache, score = x.clone(), old.clone(), poison(batch, count)
        call(path, "cached_step", x_io, cache, score, rows[chosen], fresh[:, chosen], -0.1, threads=threads)
        assert same_bits(x_io, expected) and same_bits(cache, velocity)
        np.testing.assert_allclose(score.numpy(), change[:, chosen], rtol=1e-5)


def test_cached_step_is_euler_on_a_coarser_grid(path: str, rng: np.random.Generator) -> None:
    """Skipped rows telescope: x_a + (sigma_b - sigma_a)·v_a (HSA, "Cached Euler")."""
    x = start = random(rng, 1, 10, 16, dtype=torch.float32)
    x, cache = x.clone(), torch.zeros(1, 10, 16)
    sigmas = [1.0, 0.9, 0.75, 0.5]
    first, second = (random(rng, 1, n, 16, dtype=torch.float32) for n in (10, 4))
    even = torch.arange(0, 8, 2)
    call(path, "cached_step", x, cache, None, torch.arange(10), first, sigmas[1] - sigmas[0])
    call(path, "cached_step", x, cache, None, even, second, sigmas[2] - sigmas[1])
    call(path, "cached_step", x, cache, None, even[:0], second[:, :0], sigmas[3] - sigmas[2])
    torch.testing.assert_close(x[:, 1::2], (start - 0.5 * first)[:, 1::2])
    torch.testing.assert_close(x[:, even], (start - 0.1 * first)[:, even] - 0.4 * second)


def test_score_of_rows_without_velocity(path: str) -> None:
    """No division by zero: no change at all scores 0, any change from or to nothing is large or 1."""
    cache, fresh = torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)
    cache[0, 1], fresh[0, 2] = 1, 1
    score = poison(1, 3)
    call(path, "cached_step", torch.zeros(1, 3, 5), cache, score, torch.arange(3), fresh, 0.1)
    assert score[0, 0] == 0 and score[0, 1] > 1e30 and score[0, 2] == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_pass_through(path: str, dtype: torch.dtype) -> None:
    numbers = torch.finfo(dtype)
    strange = [float("nan"), float("inf"), -float("inf"), 0.97 * numbers.max, -0.0, numbers.tiny / 64]
    x = torch.tensor(strange).repeat_interleave(6).reshape(1, 2, 18).to(dtype)
    velocity = torch.tensor(strange).repeat(6).reshape(1, 2, 18).to(dtype)
    seeds, tokens, rows = torch.tensor([1]), torch.arange(2), torch.tensor([1])
    out, x0 = poison(1, 2, 18, dtype=dtype), poison(1, 2, 18, dtype=dtype)
    call(path, "renoise", out, x0, x, velocity, seeds, tokens, -2.0, 0.5, 1)
    noisy, clean = reference.renoise(x, velocity, -2.0, 0.5, seeds, tokens, 1)
    assert same_bits(out, noisy) and same_bits(x0, clean)
    assert out.isnan().any() and out.isinf().any()
    x_io, cache, score = x.clone(), velocity.clone(), torch.zeros(1, 1)
    call(path, "cached_step", x_io, cache, score, rows, x[:, :1], 2.0)
    expected = reference.cached_step(x, velocity, rows, x[:, :1], 2.0)
    assert same_bits(x_io, expected[0]) and same_bits(cache, expected[1]) and score.isnan().all()


@pytest.mark.parametrize("instruction_set", _native.build_info()["instruction_sets"])
def test_every_exponent_rounds_to_bf16_as_defined(instruction_set: str, rng: np.random.Generator) -> None:
    """Subnormal numbers, ties, those that round up to infinity; any NaN becomes the canonical one, bit for bit."""
    words = rng.integers(0, 2**32, 32 * 1024, dtype=np.uint32)
    ties = rng.integers(0, 2**16, 4096, dtype=np.uint32) << 16 | 0x8000
    subnormal = rng.integers(0, 2**23, 4096, dtype=np.uint32)
    edges = [0, 1 << 31, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF]
    values = np.concatenate((words, ties, subnormal, np.array(edges * 5, np.uint32))).view(np.float32)
    velocity = torch.from_numpy(values).reshape(1, 1, -1)
    x = torch.full(velocity.shape, -0.0, dtype=torch.bfloat16)
    out = poison(*velocity.shape, dtype=torch.bfloat16)
    zero = torch.zeros(1, dtype=torch.int64)
    call(instruction_set, "renoise", out, None, x, -velocity, zero, zero.clone(), 1.0, 0.0, 0)
    expected = velocity.to(torch.bfloat16).view(torch.int16)
    expected[velocity.isnan()] = 0x7FC0
    assert torch.equal(out.view(torch.int16), expected)


@pytest.mark.parametrize("velocity_dtype", FLOATS)
def test_the_cache_keeps_the_bits_of_fresh_rows(
    path: str, velocity_dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """Those of NaNs too, and in rows that fill no vector."""
    integers = torch.int32 if velocity_dtype == torch.float32 else torch.int16
    limits = torch.iinfo(integers)
    for width in (5, 64, 77):
        bits = torch.from_numpy(rng.integers(limits.min, limits.max, (1, 9, width))).to(integers)
        fresh, rows = bits.view(velocity_dtype), torch.tensor([0, 2, 3, 5, 6, 7, 8, 10, 12])
        for score in (None, poison(1, 9)):
            cache = poison(1, 13, width, dtype=velocity_dtype)
            call(path, "cached_step", torch.zeros(1, 13, width), cache, score, rows, fresh, 0.5)
            assert torch.equal(cache[:, rows].view(integers), bits)


@pytest.mark.parametrize("flag", [torch.bool, torch.uint8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_exit_decision(path: str, flag: torch.dtype, dtype: torch.dtype, rng: np.random.Generator) -> None:
    values = [0.0, -0.0, 100.0, -100.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan")]
    logit = torch.cat((torch.tensor(values), random(rng, 40, dtype=torch.float32) * 5)).to(dtype)
    exact = [1 / (1 + math.exp(-v)) if v > -700 else math.nan if v != v else 0.0 for v in logit.tolist()]
    expected = torch.tensor(exact)
    threshold = expected.clone().nan_to_num(0.5)
    threshold[1::3] = torch.nextafter(threshold[1::3], torch.tensor(2.0))
    threshold[2::3] = float("nan")
    refine, confidence = Guarded(torch.full((49,), 9, dtype=torch.uint8)), Guarded(poison(49))
    call(path, "exit_decision", refine.tensor.view(flag), confidence.tensor, logit, threshold)
    assert same_bits(confidence.tensor, expected)
    below = [int(c < t) for c, t in zip(expected.tolist(), threshold.tolist(), strict=True)]
    assert refine.tensor.tolist() == below
    assert refine.tensor.unique().tolist() == [0, 1]
    assert refine.intact() and confidence.intact()


@pytest.mark.parametrize("instruction_set", _native.build_info()["instruction_sets"])
@pytest.mark.parametrize("flush", [False, True])
def test_threads_and_repeats_change_no_bit(
    instruction_set: str, flush: bool, rng: np.random.Generator
) -> None:
    """Also with denormals flushed to zero, a mode of the calling thread that its helpers must take over."""
    shape = (2, 700, 257)  # several pieces for every thread
    x, velocity = (random(rng, *shape, dtype=torch.float32) * scale for scale in (1e-38, 1.0))
    fresh = random(rng, 2, 350, 257, dtype=torch.float32) * 1e-38
    rows, seeds, tokens = (
        torch.from_numpy(rng.permutation(700)[:350]),
        torch.tensor([1, 2]),
        torch.arange(700),
    )

    def results(threads: int) -> list[Tensor]:
        noise, out = poison(*shape), poison(*shape)
        x_io, cache, score = x.clone(), velocity * 1e-38, poison(2, 350)
        call(instruction_set, "philox_normal", noise, seeds, tokens, 1, threads=threads)
        call(
            instruction_set, "renoise", out, None, x, velocity * 1e-38, seeds, tokens, 0.5, 0.0, 1,
            threads=threads,
        )  # fmt: skip
        call(instruction_set, "cached_step", x_io, cache, score, rows, fresh, 0.5, threads=threads)
        return [noise, out, x_io, cache, score]

    assert torch.set_flush_denormal(flush) or not flush
    try:
        first = results(1)
        for threads in (1, 2, 3, 8):
            assert all(same_bits(a, b) for a, b in zip(results(threads), first, strict=True))
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("instruction_set", _native.build_info()["instruction_sets"])
def test_score_has_the_same_bits_on_every_instruction_set(
    instruction_set: str, rng: np.random.Generator
) -> None:
    cache, fresh = (random(rng, 1, 50, 203, dtype=torch.float32) for _ in range(2))
    scores = []
    for name in ("generic", instruction_set):
        scores.append(poison(1, 50))
        x = torch.zeros(1, 50, 203)
        call(name, "cached_step", x, cache.clone(), scores[-1], torch.arange(50), fresh, 0.1)
    assert same_bits(*scores)
