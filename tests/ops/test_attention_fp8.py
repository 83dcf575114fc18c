"""active_attention_fp8: the definition in fp64 NumPy, and bits of active_attention where scales are powers of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsa_rt import _native
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops import attention
from dsa_rt.reference import layers as reference

from .conftest import KERNELS, Guarded, poison, random, same_bits
from .refusing import refused_by
from .test_attention import SHAPES, check, exact, random_segments
from .test_quantize import E4M3, NAN, SIZES, codes

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
kernels = pytest.mark.parametrize("kernel", KERNELS)
dtypes = pytest.mark.parametrize("dtype", FLOATS)
NUMBERS = torch.from_numpy(np.concatenate([SIZES, [np.nan], -SIZES, [np.nan]])).float()  # of each code


def cache(rng: np.random.Generator, *shape: int) -> tuple[Tensor, Tensor]:
    """K or V [B, N, H, D] of any codes but NaN, and scales that differ from row to row and head to head."""
    values = torch.from_numpy(rng.integers(0, 127, shape, np.uint8) | rng.choice(np.array([0, 0x80], np.uint8), shape))
    return values.view(E4M3), torch.from_numpy(rng.uniform(0.001, 0.004, shape[:3])).float()


def wide(values: Tensor, scale: Tensor) -> Tensor:
    """What they stand for, in fp64 and exact."""
    return NUMBERS[codes(values).long()].double() * scale.double()[..., None]


def run(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, threads: int = 1,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = poison(*q.shape, dtype=q.dtype), poison(q.shape[0], q.shape[2], q.shape[1])
    _native.active_attention_fp8(
        out, lse, q, k, v, k_scale, v_scale, segments, threads=threads, instruction_set=kernel
    )
    return out, lse


@dtypes
@kernels
@pytest.mark.parametrize("shape", [*SHAPES, None])
def test_against_the_definition(
    kernel: str, dtype: torch.dtype, shape: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    """Every tensor a slice of a larger one, whose other elements are neither used nor changed."""
    if shape is None:
        shape = tuple(int(n) for n in rng.integers(1, (3, 120, 600, 4, 150)))
        print(f"shape {shape}")
    batch, active, rows, heads, dim = shape
    q = random(rng, batch, active, heads, dim, dtype=dtype)
    (k, k_scale), (v, v_scale) = (cache(rng, batch, rows, heads, dim) for _ in range(2))
    given = [Guarded(x) for x in (q, codes(k), codes(v), k_scale, v_scale)]
    out, lse = Guarded(poison(*q.shape, dtype=dtype)), Guarded(poison(batch, heads, active))
    inside = [x.tensor.view(E4M3) if x.tensor.dtype == torch.uint8 else x.tensor for x in given]
    _native.active_attention_fp8(out.tensor, lse.tensor, *inside, threads=2, instruction_set=kernel)
    check(kernel, out.tensor, lse.tensor, q, wide(k, k_scale), wide(v, v_scale))
    assert all(guarded.intact() for guarded in (out, lse, *given))
    without = poison(*q.shape, dtype=dtype)
    _native.active_attention_fp8(without, None, q, k, v, k_scale, v_scale, instruction_set=kernel)
    assert same_bits(without, out.tensor)


@dtypes
@kernels
@pytest.mark.parametrize("sizes", [(70, 301, 3, 64), (13, 65, 2, 7), (49, 600, 1, 130), (5, 1, 2, 33)])
def test_scales_that_are_powers_of_two(
    kernel: str, dtype: torch.dtype, sizes: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Such K and V are exact in every dtype, and a power of two changes no rounding: the bits of active_attention."""
    active, rows, heads, dim = sizes
    q = random(rng, 2, active, heads, dim, dtype=dtype)
    parts = []
    for low, high in ((-10, -4), (-15, 8) if dtype == torch.float16 else (-30, 30)):
        values, _ = cache(rng, 2, rows, heads, dim)
        scale = torch.exp2(torch.from_numpy(rng.integers(low, high, (2, rows, heads))).float())
        parts.append((values, scale, wide(values, scale).to(dtype)))
        assert same_bits(parts[-1][2].double(), wide(values, scale))
    (k, k_scale, plain_k), (v, v_scale, plain_v) = parts
    for segments in (None, random_segments(rng, active, rows, 3)):
        got = run(kernel, q, k, v, k_scale, v_scale, 2, segments)
        out, lse = poison(*q.shape, dtype=dtype), poison(2, heads, active)
        _native.active_attention(out, lse, q, plain_k, plain_v, segments, instruction_set=kernel)
        assert same_bits(got[0], out) and same_bits(got[1], lse)


@dtypes
@kernels
def test_every_code_is_exact(kernel: str, dtype: torch.dtype) -> None:
    """One key: its score is in the log-sum-exp, its value is the result. Each code in its own head, at any channel."""
    everything = torch.arange(256, dtype=torch.uint8)
    keys = torch.zeros(1, 1, 256, 64, dtype=torch.uint8)
    keys[0, 0, everything.long(), (everything * 7 % 64).long()] = everything
    values = everything.expand(1, 1, 256, 256).contiguous()
    scale = torch.exp2(torch.arange(256) % 9 - 4.0)[None, None]
    q = torch.ones(1, 1, 256, 64, dtype=dtype)
    _, lse = run(kernel, q, keys.view(E4M3), keys.view(E4M3), scale, scale)
    torch.testing.assert_close(lse[0, :, 0], NUMBERS * scale[0, 0] / 8, rtol=0, atol=0, equal_nan=True)
    q = torch.ones(1, 1, 256, 256, dtype=dtype)
    out, _ = run(kernel, q, torch.zeros_like(values).view(E4M3), values.view(E4M3), scale, scale)
    expected = (NUMBERS[None] * scale[0, 0, :, None]).to(dtype)
    torch.testing.assert_close(out[0, 0], expected, rtol=0, atol=0, equal_nan=True)


@dtypes
@kernels
@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_huge_and_small_rows(kernel: str, dtype: torch.dtype, size: float, rng: np.random.Generator) -> None:
    """Far outside of what E4M3 alone holds; rows of zeros among them."""
    size = size**0.08 if dtype == torch.float16 else size
    q = random(rng, 1, 21, 2, 48, dtype=dtype) / size
    rows = [random(rng, 1, 300, 2, 48) * size for _ in range(2)]
    rows[0][:, 7], rows[1][:, 9] = 0, 0
    (k, k_scale), (v, v_scale) = (reference.quantize_rows(x) for x in rows)
    out, lse = run(kernel, q, k, v, k_scale, v_scale)
    check(kernel, out, lse, q, wide(k, k_scale), wide(v, v_scale))
    assert out.abs().max() > 0.001 * size
    nothing = [torch.zeros(1, 50, 2, 48).to(E4M3), torch.full((1, 50, 2), torch.finfo(torch.float32).tiny)]
    out, lse = run(kernel, q, nothing[0], nothing[0], nothing[1], nothing[1])
    assert (out == 0).all() and (lse - np.log(50)).abs().max() < 1e-5


@dtypes
@kernels
@pytest.mark.parametrize("rows", [40, 600])
def test_nan_and_infinity(kernel: str, dtype: torch.dtype, rows: int, rng: np.random.Generator) -> None:
    """As in the definition, with NaN among the codes and the scales: a key's reaches all of its head, a value's its
    channel or, from the scale, all channels. Infinity in a query is -inf times a key that is not NaN."""
    q = random(rng, 1, 13, 6, 16, dtype=dtype)
    q[0, 5, 4, 3] = -torch.inf
    (k, k_scale), (v, v_scale) = (cache(rng, 1, rows, 6, 16) for _ in range(2))
    k, v = codes(k), codes(v)
    k[0, 11, 0, 3] = NAN
    k_scale[0, rows - 1, 1] = torch.nan
    v[0, 7, 2, 2], v[0, rows - 1, 2, 9] = NAN | 0x80, NAN
    v_scale[0, rows - 1, 3] = torch.nan
    k[0, :, 4, 3] = 0x38
    k[0, rows - 1, 4, 3] = 0xB8  # for query 5 the one score above -inf, which is +inf: a row of NaN
    out, lse = run(kernel, q, k.view(E4M3), v.view(E4M3), k_scale, v_scale, threads=2)
    expected, log_sum, *_ = exact(q, wide(k.view(E4M3), k_scale), wide(v.view(E4M3), v_scale))
    known = np.isfinite(expected)
    assert (np.isfinite(out.double().numpy()) == known).all()
    assert not known[0, :, [0, 1, 3]].any() and known[0, :, 2].sum() == 13 * 14 and known[0, :, 5].all()
    assert not known[0, 5, 4].any() and known[0, :5, 4].all()
    error = abs(out.double().numpy()[known] - expected[known])
    assert (error <= max(2.5 * torch.finfo(dtype).eps, 1e-5)).all()
    assert (abs(lse.numpy() - log_sum)[0, [2, 3, 5]] < 1e-4).all() and lse[0, [0, 1]].isnan().all()


@dtypes
@pytest.mark.parametrize("kernel", [*KERNELS, "torch"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (130, 700, 4), (60, 33, 9), (97, 520, 2)])
def test_segments(kernel: str, dtype: torch.dtype, sizes: tuple[int, int, int], rng: np.random.Generator) -> None:
    """Each segment's queries attend to its own ranges; rows that no segment attends to are never read."""
    active, rows, count = sizes
    q = random(rng, 2, active, 3, 24, dtype=dtype)
    (k, k_scale), (v, v_scale) = (cache(rng, 2, rows, 3, 24) for _ in range(2))
    segments = random_segments(rng, active, rows, count)
    seen = torch.zeros(rows, dtype=torch.bool)
    for _, begin, end, begin2, end2 in segments.tolist():
        seen[begin:end] = seen[begin2:end2] = True
    plain_k, plain_v = wide(k, k_scale), wide(v, v_scale)
    for values, scale in ((k, k_scale), (v, v_scale)):
        codes(values)[:, ~seen], scale[:, ~seen] = NAN, torch.nan
    if kernel == "torch":
        out, lse = poison(*q.shape, dtype=dtype), poison(2, 3, active)
        attention.active_attention_fp8(out, q, k, v, k_scale, v_scale, lse, segments, backend="torch")
    else:
        out, lse = run(kernel, q, k, v, k_scale, v_scale, 2, segments)
    start = 0
    for queries, begin, end, begin2, end2 in segments.tolist():
        here = slice(start, start := start + queries)
        if queries:
            keys, values = (torch.cat((x[:, begin:end], x[:, begin2:end2]), 1) for x in (plain_k, plain_v))
            check(kernel, out[:, here], lse[..., here], q[:, here], keys, values)


@dtypes
@kernels
def test_a_row_depends_on_its_query_alone(kernel: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Bit for bit the same in any active set, beside other segments and heads, for any number of threads."""
    q = random(rng, 2, 389, 3, 64, dtype=dtype)
    (k, k_scale), (v, v_scale) = (cache(rng, 2, 275, 3, 64) for _ in range(2))
    given = k, v, k_scale, v_scale
    out, lse = run(kernel, q, *given)
    for threads in (2, 3, 8):
        assert all(map(same_bits, run(kernel, q, *given, threads), (out, lse)))
    some = torch.from_numpy(rng.permutation(389)[:47])
    got = run(kernel, q[:, some], *given, 2)
    assert same_bits(got[0], out[:, some]) and same_bits(got[1], lse[..., some])
    alone = run(kernel, q[1:, :, 2:], *(x[1:, :, 2:] for x in given))
    assert same_bits(alone[0], out[1:, :, 2:]) and same_bits(alone[1], lse[1:, 2:])
    segments = torch.tensor([[200, 3, 40, 100, 275], [189, 20, 250, 0, 0]])
    parted = run(kernel, q, *given, 3, segments)
    plain = run(kernel, q[:, 200:], *(x[:, 20:250] for x in given))
    assert same_bits(parted[0][:, 200:], plain[0]) and same_bits(parted[1][..., 200:], plain[1])


def good() -> dict[str, Any]:
    rows = torch.randn(2, 9, 3, 8)
    return {
        "out": torch.randn(2, 5, 3, 8), "q": torch.randn(2, 5, 3, 8), "k": rows.to(E4M3), "v": rows.to(E4M3),
        "k_scale": torch.rand(2, 9, 3), "v_scale": torch.rand(2, 9, 3), "lse": torch.randn(2, 3, 5),
        "segments": torch.tensor([[5, 0, 9, 0, 0]]),
    }  # fmt: skip


def overlapping(name: str, other: str) -> Callable[[dict[str, Any]], None]:
    def spoil(arguments: dict[str, Any]) -> None:
        memory = torch.zeros(1000)
        for key in (name, other):
            old = arguments[key]
            arguments[key] = memory.view(old.dtype)[: old.numel()].view(old.shape)

    return spoil


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no tensor": (lambda a: a.update(k_scale=None), "k_scale is a NoneType, expected a torch.Tensor"),
    "fp64": (lambda a: a.update(out=a["out"].double()), "out has dtype torch.float64, expected float32 or bfloat16 o"),
    "bf16 and fp32": (lambda a: a.update(q=a["q"].bfloat16()), "q has dtype torch.bfloat16, expected float32 as out"),
    "k as it was": (lambda a: a.update(k=a["k"].float()), "k has dtype torch.float32, expected float8_e4m3fn"),
    "other fp8": (lambda a: a.update(v=a["v"].float().to(torch.float8_e5m2)), "v has dtype torch.float8_e5m2, expect"),
    "scale dtype": (lambda a: a.update(v_scale=a["v_scale"].bfloat16()), "v_scale has dtype torch.bfloat16, expec"),
    "scale of blocks": (lambda a: a.update(k_scale=a["k_scale"][:, :1]), "k_scale has shape [2, 1, 3], expected [B=2"),
    "scale of rows": (lambda a: a.update(v_scale=a["v_scale"][..., 0]), "v_scale has shape [2, 9], expected 3 dimens"),
    "scale of heads": (lambda a: a.update(v_scale=a["v_scale"][..., 1:]), "v_scale has shape [2, 9, 2], expected [B="),
    "rows": (lambda a: a.update(v=a["v"][:, 1:]), "v has shape [2, 8, 3, 8], expected [B=2 as in out, N=9 as in k"),
    "heads": (lambda a: a.update(k=a["k"][:, :, 1:]), "k has shape [2, 9, 2, 8]"),
    "lse shape": (lambda a: a.update(lse=a["lse"].mT.contiguous()), "lse has shape [2, 5, 3], expected [B=2 as in"),
    "no keys": (
        lambda a: a.update({n: a[n][:, :0] for n in ("k", "v", "k_scale", "v_scale")}, segments=None),
        "k holds N = 0 rows of D = 8 channels, expected at least one of each",
    ),
    "strides": (lambda a: a.update(k=a["k"].mT.contiguous().mT), "k has strides [216, 24, 1, 3], expected 1 in the la"),
    "scale strides": (lambda a: a.update(k_scale=a["k_scale"].mT.contiguous().mT), "k_scale has strides [27, 1, 9], e"),
    "device": (lambda a: a.update(v_scale=a["v_scale"].to("meta")), "v_scale is on meta, expected out's device, cpu"),
    "out and k": (overlapping("out", "k"), "out and k overlap in memory"),
    "out and v_scale": (overlapping("out", "v_scale"), "out and v_scale overlap in memory"),
    "lse and k_scale": (overlapping("lse", "k_scale"), "lse and k_scale overlap in memory"),
    "segments": (lambda a: a.update(segments=torch.tensor([[5, 0, 9, 9, 10]])), "expected ranges inside [0, 9), the"),
    "segments of blocks": (lambda a: a.update(segments=torch.zeros(1, 7, dtype=torch.int64)), "shape [1, 7], expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_bad_arguments(case: str) -> None:
    """One error that says what came and what was expected, on every backend; nothing is written."""
    spoil, message = SPOILT[case]
    arguments = good()
    spoil(arguments)
    refused_by(attention.active_attention_fp8, arguments, message)


def test_nothing_to_do() -> None:
    for kernel in KERNELS:
        for batch, active, heads in ((2, 0, 3), (0, 5, 3), (2, 5, 0)):
            k = torch.zeros(batch, 4, heads, 8).to(E4M3)
            scale = torch.ones(batch, 4, heads)
            assert run(kernel, torch.empty(batch, active, heads, 8), k, k, scale, scale)[0].numel() == 0


def test_scratch_is_for_cuda() -> None:
    a = good()
    del a["segments"]
    lse, out = a.pop("lse"), a.pop("out")
    assert _native.active_attention_fp8_scratch(out, lse, **a) == 0
    with pytest.raises(ShapeError, match="scratch is a tensor, expected None"):
        _native.active_attention_fp8(out, lse, **a, scratch=torch.empty(64))
    with pytest.raises(ShapeError, match="scratch has dtype"):
        _native.active_attention_fp8(out, lse, **a, scratch=torch.empty(64).half())


@dtypes
@pytest.mark.parametrize("served_by", [None, "native", "torch"])
def test_every_backend(dtype: torch.dtype, served_by: str | None, rng: np.random.Generator) -> None:
    """On what quantize_rows writes."""
    q, *rows = (random(rng, 1, n, 2, 30, dtype=dtype) for n in (17, 40, 40))
    (k, k_scale), (v, v_scale) = (reference.quantize_rows(x) for x in rows)
    for lse in (poison(1, 2, 17), None):
        out = poison(*q.shape, dtype=dtype)
        attention.active_attention_fp8(out, q, k, v, k_scale, v_scale, lse, backend=served_by)
        check("torch" if served_by == "torch" else KERNELS[0], out, lse, q, wide(k, k_scale), wide(v, v_scale))
    with pytest.raises(OptionError, match="not differentiable"):
        attention.active_attention_fp8(out, q.requires_grad_(), k, v, k_scale, v_scale, backend=served_by)


def test_opcheck() -> None:
    a = good()
    arguments = [a[name] for name in ("out", "lse", "q", "k", "v", "k_scale", "v_scale", "segments")]
    checks = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")  # others multiply by FP8
    torch.library.opcheck(torch.ops.dsa_rt.active_attention_fp8.default, arguments, test_utils=checks)
