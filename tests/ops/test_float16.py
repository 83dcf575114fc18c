"""fp16 elements as numbers and back: all of them, every exponent, ties, strange numbers, on every path."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dsa_rt import _native
from dsa_rt.ops.linear import pack_linear

from .conftest import KERNELS, call, poison, same_bits

FP16 = torch.float16
EVERY = torch.arange(-(2**15), 2**15).to(torch.int16).view(FP16)
kernels = pytest.mark.parametrize("kernel", KERNELS)
widths = pytest.mark.parametrize("width", [1 << 12, 1 << 4])  # whole vectors, and rows that fill none


@pytest.fixture
def flush(request: pytest.FixtureRequest) -> Iterator[None]:
    """A mode of threads in which fp32 arithmetic takes its own subnormal numbers for 0; those of fp16 are none."""
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("the processor has no such mode")
    yield
    torch.set_flush_denormal(False)


def carried(kernel: str, values: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """The values, read and written by an op that changes none: -0 - 1·(-value)."""
    velocity = (-values).view(1, -1, width)
    out, rows = poison(*velocity.shape, dtype=dtype), torch.arange(velocity.shape[1])
    x = torch.full(velocity.shape, -0.0, dtype=dtype)
    call(kernel, "renoise", out, None, x, velocity, torch.zeros(1, dtype=torch.int64), rows, 1.0, 0.0, 0)
    return out.flatten()


def nearest(values: np.ndarray) -> np.ndarray:
    """fp16 by NumPy, whose conversion is integer arithmetic of its own."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


@widths
@pytest.mark.parametrize("flush", [False, True], indirect=True)
@kernels
def test_every_element_is_a_number(kernel: str, flush: None, width: int) -> None:
    assert same_bits(carried(kernel, EVERY, torch.float32, width), EVERY.float())
    back = carried(kernel, EVERY, FP16, width)
    assert same_bits(back, EVERY) and (back[EVERY.isnan()].view(torch.int16) & 0x0200 != 0).all()


@widths
@pytest.mark.parametrize("flush", [False, True], indirect=True)
@kernels
def test_every_number_has_its_nearest_element(
    kernel: str, flush: None, width: int, rng: np.random.Generator
) -> None:
    """All elements, all halves between neighbours, the fp32 numbers beside both; every exponent of fp32; infinity from
    65520 on. Quiet NaNs, with the same bits from every kernel."""
    exact = EVERY[EVERY.isfinite()].float().numpy()
    sizes = np.append(np.unique(abs(exact)), np.float32(65536))
    halves = (sizes[1:] + sizes[:-1]) / 2
    some = np.concatenate([halves, *(np.nextafter(x, np.float32(to)) for x in (exact, halves) for to in (0, 1e9))])
    words = rng.integers(0, 2**32, 1 << 14, dtype=np.uint32)
    boundaries = (np.arange(256, dtype=np.uint32) << 23)[:, None] + np.array([-1, 0, 1], np.int64).astype(np.uint32)
    strange = np.array([0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F802000, 0x7FBFFFFF, 1, 0], np.uint32)
    values = np.concatenate([exact, some, *(x.ravel().view(np.float32) for x in (words, boundaries, strange))])
    values = np.concatenate([values, -values])
    values = np.append(values, np.zeros(-len(values) % width, np.float32))
    got, generic = (carried(name, torch.from_numpy(values), FP16, width) for name in (kernel, "generic"))
    assert same_bits(got, torch.from_numpy(nearest(values)))
    assert torch.equal(got.view(torch.int16), generic.view(torch.int16))
    assert got.isinf().sum() > 100 and got.isnan().sum() > 20 and ((got != 0) & (got.abs() < 2**-14)).sum() > 4000


@kernels
def test_elements_of_products_and_of_attention(kernel: str) -> None:
    """Weights are widened as they are read, rows of x are rounded to the weights; values are packed, and results
    rounded, each in rows of many lengths."""
    finite = EVERY[EVERY.isfinite()]
    packed = pack_linear(finite[:, None], instruction_set=kernel)
    out = poison(1, 1, len(finite))
    _native.linear(out, torch.ones(1, 1, 1), packed.weight, None, "none", packed.layout, instruction_set=kernel)
    assert torch.equal(out.flatten(), finite.float())
    wide, between = poison(1, len(finite), 1), torch.nextafter(finite.float(), torch.tensor(0.0))
    one = pack_linear(torch.ones(1, 1, dtype=FP16), instruction_set=kernel)
    _native.linear(wide, between.view(1, -1, 1), one.weight, None, "none", one.layout, instruction_set=kernel)
    assert torch.equal(wide.flatten(), torch.from_numpy(nearest(between.numpy())).float())
    for dim in (1, 7, 8, 37, 64):
        heads = len(finite) // dim
        v = finite[: heads * dim].view(1, 1, heads, dim)
        got = poison(1, 1, heads, dim, dtype=FP16)
        _native.active_attention(got, None, torch.zeros_like(v), torch.zeros_like(v), v, instruction_set=kernel)
        assert torch.equal(got, v)
