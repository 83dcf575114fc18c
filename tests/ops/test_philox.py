"""The noise: published Philox vectors, the same bits on every path, the statistics of a standard normal."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsa_rt import _native, reference

from .conftest import Guarded, call, poison, same_bits

MASK = 0xFFFFFFFF

# Random123, examples/kat_vectors, lines "philox4x32 10": counter, key, expected.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, written from the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def expected_normal(seed: int, token: int, draw: int, element: int) -> float:
    """One normal in fp64 with the functions of the mathematics library."""
    seed, token = seed & (1 << 64) - 1, token & (1 << 64) - 1
    words = philox([element // 4, draw, token & MASK, token >> 32], [seed & MASK, seed >> 32])
    first, second = words[element % 4 // 2 * 2 :][:2]
    radius = math.sqrt(-2 * math.log(float(np.float32(first | 1)) / 2**32))
    inside = (second << 2) & MASK
    angle = (second >> 30) * math.pi / 2 + (inside - (inside >> 31 << 32)) * math.pi / 2**33
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    assert reference.philox_words(torch.tensor(words[0]), torch.tensor(words[1])).tolist() == words[2]
    assert philox(words[0], words[1]) == words[2]


def test_normals_against_the_mathematics_library(path: str, rng: np.random.Generator) -> None:
    seeds = [0, -1, int(rng.integers(-(2**63), 2**63))]
    tokens = [0, 1, 2**32 + 5, -1, int(rng.integers(-(2**63), 2**63))]
    draw, width = int(rng.integers(0, 2**32)), 11
    out = poison(len(seeds), len(tokens), width)
    call(path, "philox_normal", out, torch.tensor(seeds), torch.tensor(tokens), draw)
    expected = [[[expected_normal(s, t, draw, e) for e in range(width)] for t in tokens] for s in seeds]
    np.testing.assert_allclose(out.numpy(), np.array(expected), rtol=2e-6, atol=4e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 7, 3), (3, 37, 30), (1, 108, 32), (2, 5, 1029), (1, 300, 4)]
)
def test_every_path_has_the_same_bits(
    path: str, dtype: torch.dtype, shape: tuple[int, int, int], rng: np.random.Generator
) -> None:
    batch, count, width = shape
    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, batch))
    tokens = torch.from_numpy(rng.integers(0, 2**40, count))
    out = Guarded(poison(*shape, dtype=dtype))
    call(path, "philox_normal", out.tensor, seeds, tokens, 7)
    assert same_bits(out.tensor, reference.philox_normal(seeds, tokens, width, 7).to(dtype))
    assert out.intact()


def test_many_values_have_the_same_bits(path: str) -> None:
    """Enough draws to meet the corners of the polynomials; a changed order of operations shows at once."""
    seeds, tokens = torch.tensor([3, 2**62]), torch.arange(500)
    out = poison(2, 500, 257)
    call(path, "philox_normal", out, seeds, tokens, 0, threads=2)
    assert same_bits(out, reference.philox_normal(seeds, tokens, 257, 0))


def test_noise_does_not_depend_on_what_else_is_drawn(path: str, rng: np.random.Generator) -> None:
    seeds, tokens = torch.tensor([11, 12, 13]), torch.arange(50)
    whole, part = poison(3, 50, 30), poison(1, 9, 30)
    call(path, "philox_normal", whole, seeds, tokens, 4)
    chosen = torch.from_numpy(rng.permutation(50)[:9])
    call(path, "philox_normal", part, seeds[1:2], tokens[chosen], 4)
    assert same_bits(part, whole[1:2, chosen])
    narrow = poison(3, 50, 13)  # elements too are keyed by their place
    call(path, "philox_normal", narrow, seeds, tokens, 4)
    assert same_bits(narrow, whole[..., :13])


def draws(seeds: list[int], tokens: int, width: int, draw: int) -> np.ndarray:
    out = torch.empty(len(seeds), tokens, width)
    _native.philox_normal(out, torch.tensor(seeds), torch.arange(tokens), draw)
    return out.double().numpy()


def test_moments_and_tails() -> None:
    """Within five standard errors over four million draws; the seeds are fixed, so the outcome is too."""
    n = draws([1, 2, 3, 4], 4000, 256, 0).ravel()
    count = n.size
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        double_factorial = math.prod(range(2 * power - 1, 0, -2))  # E[x^(2·power)]
        error = math.sqrt((double_factorial - moment**2) / count)
        assert abs((n**power).mean() - moment) < 5 * error, f"moment {power}"
    for edge in (0.1, 1, 2, 3, 4, 4.5):
        share = math.erfc(edge / math.sqrt(2))
        assert abs((np.abs(n) > edge).mean() - share) < 5 * math.sqrt(share / count), f"beyond {edge}"


def test_distribution_function() -> None:
    """Kolmogorov-Smirnov distance to the normal distribution."""
    n = np.sort(draws([9], 1000, 100, 2).ravel())
    cumulative = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in n])
    steps = np.arange(n.size + 1) / n.size
    distance = max((steps[1:] - cumulative).max(), (cumulative - steps[:-1]).max())
    assert distance * math.sqrt(n.size) < 1.95  # probability 0.001


def test_neighbours_are_independent() -> None:
    """Correlation of values and of squares between neighbouring elements, tokens, draws and seeds."""
    first, other_draw, other_seed = (draws([s], 2000, 64, d)[0] for s, d in ((5, 0), (5, 1), (6, 0)))
    pairs = {
        "element": (first[:, 1:], first[:, :-1]),
        "word pair": (first[:, 2:], first[:, :-2]),
        "block": (first[:, 4:], first[:, :-4]),
        "token": (first[1:], first[:-1]),
        "draw": (first, other_draw),
        "seed": (first, other_seed),
        "token and draw": (first[1:], other_draw[:-1]),
    }
    for name, (a, b) in pairs.items():
        for power in (1, 2):
            correlation = np.corrcoef((a**power).ravel(), (b**power).ravel())[0, 1]
            assert abs(correlation) < 5 / math.sqrt(a.size), f"{name}, power {power}: {correlation}"
