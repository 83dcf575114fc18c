"""quantize_rows bit for bit against nearest numbers that NumPy finds in a list of all, on every path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsa_rt import _native
from dsa_rt.errors import OptionError
from dsa_rt.ops import rows
from dsa_rt.reference import layers as reference

from .conftest import KERNELS, Guarded, call, poison, random, same_bits
from .refusing import refused_by

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", FLOATS)
E4M3 = torch.float8_e4m3fn
TINY = np.finfo(np.float32).tiny
SIZES = np.array([np.ldexp(8 * (c >= 8) + c % 8, max(c >> 3, 1) - 10) for c in range(127)])  # of code c
NAN = 0x7F


def nearest(value: np.ndarray) -> np.ndarray:
    """The code of the nearest number, of two the even one."""
    size = abs(value.astype(np.float64))
    above = np.searchsorted(SIZES, size).clip(1, 126)
    further = (SIZES[above] - size) - (size - SIZES[above - 1])  # the number above than the one below
    code = np.where(further == 0, above - above % 2, np.where(further < 0, above, above - 1))
    return np.where(np.isfinite(value), code | np.where(np.signbit(value), 0x80, 0), NAN).astype(np.uint8)


def expected(value: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows."""
    wide = value.float().numpy()
    with np.errstate(all="ignore"):
        most = np.where(np.isfinite(wide), abs(wide), 0).max(-1)
        scale = np.maximum(most / np.float32(448), TINY)
        return torch.from_numpy(nearest(wide / scale[..., None])), torch.from_numpy(scale)


def codes(value: Tensor) -> Tensor:
    return value.view(torch.uint8)


def run(path: str, value: Tensor, threads: int = 1) -> tuple[Tensor, Tensor]:
    """Codes and scales of all rows, in order."""
    out, scale = torch.full(value.shape, torch.nan, dtype=E4M3), poison(*value.shape[:3])
    call(path, "quantize_rows", out, scale, value, None, threads=threads)
    return codes(out), scale


SHAPES = [  # batch, rows that are written, rows there are, heads, dim
    (1, 1, 1, 1, 1), (2, 5, 9, 3, 7), (1, 20, 20, 2, 64), (3, 33, 50, 1, 37), (1, 300, 700, 3, 128), (2, 3, 5, 2, 200),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, None])
def test_against_a_list_of_all_numbers(
    path: str, dtype: torch.dtype, shape: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    """Rows of all sizes into slices of larger buffers: other rows and what lies around are left alone."""
    if shape is None:
        batch, active, heads, dim = (int(n) for n in rng.integers(1, (4, 70, 5, 150)))
        shape = (batch, active, active + int(rng.integers(0, 30)), heads, dim)
        print(f"shape {shape}")
    batch, active, total, heads, dim = shape
    sizes = (-22, 13) if dtype == torch.float16 else (-100, 100)
    exponents = torch.from_numpy(rng.uniform(*sizes, (batch, active, heads, 1))).float()
    value = (random(rng, batch, active, heads, dim) * torch.exp2(exponents)).to(dtype)
    slots = torch.from_numpy(rng.permutation(total)[:active])
    old = torch.from_numpy(rng.integers(0, 256, (batch, total, heads, dim), np.uint8))
    old_scale = poison(batch, total, heads)
    out, scale, given = Guarded(old), Guarded(old_scale), Guarded(value)
    call(path, "quantize_rows", out.tensor.view(E4M3), scale.tensor, given.tensor, slots, threads=2)
    want, want_scale = expected(value)
    old[:, slots], old_scale[:, slots] = want, want_scale
    assert torch.equal(out.tensor, old) and same_bits(scale.tensor, old_scale)
    assert out.intact() and scale.intact() and given.intact() and same_bits(given.tensor, value)
    in_order = run(path, value)
    assert torch.equal(in_order[0], want) and same_bits(in_order[1], want_scale)


@pytest.mark.parametrize("factor", [1.0, 255 / 128, 61 * 2.0**40, 1989 * 2.0**-60])
def test_every_number_and_every_tie(path: str, factor: float) -> None:
    """A row whose largest element is 448 times a factor has that as its scale: its elements are numbers of E4M3, halves
    between two of them, and the fp32 numbers beside those halves. A product with 1 / scale would miss the halves."""
    halves = ((SIZES[1:] + SIZES[:-1]) / 2).astype(np.float32)
    sides = [np.nextafter(halves, np.float32(side)) for side in (0, np.inf)]
    wanted = np.concatenate([SIZES.astype(np.float32), halves, *sides])
    values = np.concatenate([wanted, -wanted]) * np.float32(factor)
    got, scale = run(path, torch.from_numpy(values)[None, None, None])
    assert scale.item() == factor
    assert np.array_equal(got.numpy().ravel(), nearest(values / np.float32(factor)))
    ups = got.numpy().ravel()[127 : 127 + 126]
    assert np.array_equal(ups, np.arange(126) + np.arange(126) % 2)  # ties go to the even code


@dtypes
def test_rows_with_strange_numbers(path: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Infinity and NaN become NaN and leave the rest of their row as it is without them; zeros keep their sign."""
    value = random(rng, 1, 9, 2, 70, dtype=dtype)
    value[0, 0] = 0
    value[0, 1, 0, ::3] = -0.0
    value[0, 2] = torch.finfo(dtype).max
    value[0, 3] = torch.finfo(dtype).tiny / 32  # subnormal
    value[0, 4] *= 2.0**-120  # the scale is the smallest there is
    plain = value.clone()
    for row, column, number in ((5, 3, torch.inf), (6, 69, -torch.inf), (7, 33, torch.nan), (8, 0, -torch.nan)):
        value[0, row, :, column], plain[0, row, :, column] = number, 0
    value[0, 5, 1], plain[0, 5, 1] = torch.inf, 0  # nothing finite
    got, scale = run(path, value)
    want, want_scale = expected(value)
    assert torch.equal(got, want) and same_bits(scale, want_scale)
    without, scale_without = run(path, plain)
    strange = ~value.isfinite()
    assert torch.equal(scale, scale_without) and torch.equal(got[~strange], without[~strange])
    assert (got[strange] == NAN).all() and strange.sum() == 70 + 7
    assert (scale[0, [0] if dtype == torch.float16 else [0, 3]] == TINY).all() and scale.isfinite().all()
    assert (got[0, 0] == 0).all() and (got[0, 2] == 0x7E).all() and (got[0, 1, 0, ::3] == 0x80).all()


@dtypes
def test_the_definition_loses_what_e4m3_loses(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Within half of a step: 1/16 of a normal number, 2^-10 of the scale below."""
    value = random(rng, 2, 90, 3, 64, dtype=dtype)
    quantized, scale = reference.quantize_rows(value)
    error = (reference.dequantize_rows(quantized, scale).double() - value.double()).abs()
    bound = torch.maximum(value.double().abs() / 16, scale.double()[..., None] * 2.0**-10)
    assert (error <= 1.0001 * bound).all() and error.max() > 0


def test_threads_and_strides(rng: np.random.Generator) -> None:
    """Heads first, rows backwards by slots: the same bits for any number of threads."""
    value = random(rng, 2, 3, 700, 40).transpose(1, 2)
    slots = torch.arange(699, -1, -1)
    want, want_scale = expected(value)
    for kernel in KERNELS:
        for threads in (1, 2, 3, 8):
            out, scale = torch.zeros(2, 3, 700, 40, dtype=E4M3).transpose(1, 2), poison(2, 800, 3)[:, 50:750]
            _native.quantize_rows(out, scale, value, slots, threads=threads, instruction_set=kernel)
            assert torch.equal(codes(out)[:, slots], want) and same_bits(scale[:, slots], want_scale)


def good() -> dict[str, Any]:
    return {
        "out": torch.zeros(2, 9, 3, 8).to(E4M3), "scale": torch.randn(2, 9, 3), "rows": torch.randn(2, 5, 3, 8),
        "slots": torch.tensor([8, 0, 3, 5, 1]),
    }  # fmt: skip


def overlapping(name: str, other: str) -> Callable[[dict[str, Any]], None]:
    def spoil(arguments: dict[str, Any]) -> None:
        memory = torch.zeros(1000, dtype=torch.int64)
        for key in (name, other):
            old = arguments[key]
            arguments[key] = memory.view(old.dtype)[: old.numel()].view(old.shape)
        arguments["slots"][:] = torch.arange(5)

    return spoil


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no tensor": (lambda a: a.update(rows=[1.0]), "rows is a list, expected a torch.Tensor"),
    "out dtype": (lambda a: a.update(out=torch.zeros(2, 9, 3, 8)), "out has dtype torch.float32, expected float8_e4m"),
    "other fp8": (lambda a: a.update(out=a["out"].to(torch.float8_e5m2)), "torch.float8_e5m2, expected float8_e4m"),
    "bytes": (lambda a: a.update(out=codes(a["out"])), "out has dtype torch.uint8, expected float8_e4m3fn"),
    "scale dtype": (lambda a: a.update(scale=a["scale"].bfloat16()), "scale has dtype torch.bfloat16, expected float"),
    "fp64": (lambda a: a.update(rows=a["rows"].double()), "rows has dtype torch.float64, expected float32 or bfloat"),
    "slots dtype": (lambda a: a.update(slots=a["slots"].int()), "slots has dtype torch.int32, expected int64"),
    "dims": (lambda a: a.update(rows=a["rows"].flatten(2)), "rows has shape [2, 5, 24], expected 4 dimensions [B, A"),
    "batch": (lambda a: a.update(rows=a["rows"][:1]), "rows has shape [1, 5, 3, 8], expected [B=2 as in out"),
    "heads": (lambda a: a.update(rows=a["rows"][:, :, 1:]), "rows has shape [2, 5, 2, 8], expected [B=2 as in out, A,"),
    "dim": (lambda a: a.update(rows=a["rows"][..., 1:]), "rows has shape [2, 5, 3, 7]"),
    "scale rows": (lambda a: a.update(scale=a["scale"][:, 1:]), "scale has shape [2, 8, 3], expected [B=2 as in out, "),
    "slots shape": (lambda a: a.update(slots=a["slots"][:4]), "slots has shape [4], expected [A=5 as in rows]"),
    "no channels": (lambda a: a.update(out=a["out"][..., :0], rows=a["rows"][..., :0]), "out has D = 0 channels, expe"),
    "too many rows": (
        lambda a: a.update(slots=None, out=a["out"][:, :4], scale=a["scale"][:, :4]),
        "out has N = 4 rows, expected at least A = 5 where slots is None",
    ),
    "slot past the end": (lambda a: a["slots"].__setitem__(4, 9), "slots[4] is 9, expected 0 to 8"),
    "negative slot": (lambda a: a["slots"].__setitem__(0, -1), "slots[0] is -1, expected 0 to 8"),
    "slot twice": (lambda a: a["slots"].__setitem__(3, 0), "slots[3] is 0 like slots[1], expected distinct rows"),
    "strides": (lambda a: a.update(rows=a["rows"].mT.contiguous().mT), "rows has strides [120, 24, 1, 3], expected 1"),
    "output strides": (lambda a: a.update(scale=a["scale"][:1].expand(2, -1, -1)), "elements share memory"),
    "device": (lambda a: a.update(rows=a["rows"].to("meta")), "rows is on meta, expected out's device, cpu"),
    "out and scale": (overlapping("out", "scale"), "out and scale overlap in memory"),
    "out and rows": (overlapping("out", "rows"), "out and rows overlap in memory"),
    "scale and rows": (overlapping("scale", "rows"), "scale and rows overlap in memory"),
    "scale and slots": (overlapping("scale", "slots"), "scale and slots overlap in memory"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_bad_arguments(case: str) -> None:
    """One error that says what came and what was expected, before anything is written."""
    spoil, message = SPOILT[case]
    arguments = good()
    spoil(arguments)
    refused_by(rows.quantize_rows, arguments, message)


def test_gradients_are_refused() -> None:
    arguments = good()
    arguments["rows"].requires_grad_()
    refused_by(rows.quantize_rows, arguments, "not differentiable", error=OptionError)
    with torch.no_grad():
        rows.quantize_rows(**arguments)


def test_nothing_to_do(path: str) -> None:
    out, scale = torch.ones(2, 3, 2, 4).to(E4M3), torch.ones(2, 3, 2)
    call(path, "quantize_rows", out, scale, torch.empty(2, 0, 2, 4), torch.arange(0))
    call(path, "quantize_rows", out, scale, torch.empty(2, 0, 2, 4), None)
    call(path, "quantize_rows", out[:0], scale[:0], torch.empty(0, 2, 2, 4), torch.tensor([1, 0]))
    call(path, "quantize_rows", out[:, :, :0], scale[..., :0], torch.empty(2, 2, 0, 4), torch.tensor([1, 0]))
    assert (codes(out) == 0x38).all() and (scale == 1).all()


@pytest.mark.parametrize("slots", [torch.tensor([4, 1, 0]), None])
def test_opcheck(slots: Tensor | None) -> None:
    arguments = (torch.zeros(1, 5, 2, 4).to(E4M3), torch.zeros(1, 5, 2), torch.randn(1, 3, 2, 4), slots)
    checks = ("test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")  # others multiply by FP8
    torch.library.opcheck(torch.ops.dsa_rt.quantize_rows.default, arguments, test_utils=checks)
