"""linear against fp64 NumPy on every path: odd sizes, strides, strange numbers, bits that depend on nothing else."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsa_rt import _native
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops import backend
from dsa_rt.ops.linear import PackedLinear, linear, pack_linear

from .conftest import KERNELS, PATHS, Guarded, poison, random, rounding, same_bits
from .refusing import refused_by

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(FP32, FP32, FP32), *((w, *rows) for w in (BF16, FP16) for rows in product((FP32, w), repeat=2))]  # W, x, out
kernels = pytest.mark.parametrize("kernel", KERNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def run(path: str, out: Tensor, x: Tensor, packed: PackedLinear, activation: str = "none", threads: int = 1) -> None:
    if path == "torch":
        return linear(out, x, packed, activation, backend="torch")
    arguments = (out, x, packed.weight, packed.bias, activation, packed.layout)
    return _native.linear(*arguments, threads=threads, instruction_set=path)


def pack(path: str, weight: Any, bias: Any = None) -> PackedLinear:
    return pack_linear(weight, bias, instruction_set="" if path == "torch" else path)


def among_nan(value: Tensor) -> Tensor:
    """A slice of a larger buffer: to read beyond it shows."""
    buffer = torch.full([size + 3 for size in value.shape], float("nan"), dtype=value.dtype)
    inside = buffer[tuple(slice(1, 1 + size) for size in value.shape)]
    return inside.copy_(value)


def gelu(y: np.ndarray) -> np.ndarray:
    """Its tanh form, 0.5·y·(1 + tanh u), without the cancellation of that sum."""
    with np.errstate(all="ignore"):
        return y / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))


def gelu_erf(y: np.ndarray) -> np.ndarray:
    return y * 0.5 * np.vectorize(math.erfc)(-y / np.sqrt(2))


def silu(y: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return y / (1 + np.exp(-y))


def check(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """An fp32 sum of K terms is off by at most K units of 2^-24 of their sizes; then bias, activation, a rounding."""
    left, right = x.to(weight.dtype).double().numpy(), weight.double().numpy().T
    result, size = left @ right, abs(left) @ abs(right)
    if bias is not None:
        result, size = result + bias.double().numpy(), size + abs(bias.double().numpy())
    error = (weight.shape[1] + 2) * 2.0**-24 * size
    if activation != "none":
        result = {"gelu": gelu, "gelu_erf": gelu_erf, "silu": silu}[activation](result)
        error = 1.13 * error + 2e-6 * abs(result) + (5e-7 if activation == "gelu_erf" else 0)  # slopes are below 1.13
    assert (abs(out.double().numpy() - result) <= rounding(abs(result) + error, out.dtype) + error + 1e-30).all()


SHAPES = [  # batch, active, K, N
    (1, 1, 1, 1), (2, 7, 3, 5), (1, 6, 64, 64), (3, 5, 33, 70), (1, 13, 200, 131), (2, 50, 192, 192), (1, 3, 1701, 17),
    (1, 97, 7, 300), (1, 200, 500, 24),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [*SHAPES, None])
def test_against_fp64(
    path: str, dtype: tuple[torch.dtype, ...], shape: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    """x lies among NaN, out in a larger buffer whose other elements are left alone."""
    if shape is None:
        shape = tuple(int(n) for n in rng.integers(1, (4, 60, 900, 400)))
        print(f"shape {shape}")
    batch, active, k, n = shape
    weight = random(rng, n, k, dtype=dtype[0], scale=k**-0.5)
    biases = (None, random(rng, n), random(rng, n, dtype=BF16))
    chosen = ("none", "gelu", "gelu_erf", "silu", "none", "gelu")
    for bias, activation in zip((*biases, None, *biases[1:]), chosen, strict=True):
        packed = pack(path, weight, bias)
        x = among_nan(random(rng, batch, active, k, dtype=dtype[1]))
        out = Guarded(poison(batch, active, n, dtype=dtype[2]))
        run(path, out.tensor, x, packed, activation, threads=2)
        check(out.tensor, x, weight, bias, activation)
        assert out.intact()


@kernels
def test_gelu(kernel: str) -> None:
    """Within 1e-6 of its value down to -4, where that is -7e-5; within 1e-5 down to -8; then as good as 0."""
    x = torch.cat((torch.linspace(-8, 9, 20001), torch.linspace(-60, -8, 501), torch.tensor([1e3, 1e20, -1e3, -1e20])))
    out = poison(1, len(x), 1)
    run(kernel, out, x.view(1, -1, 1), pack(kernel, torch.ones(1, 1)), "gelu")
    x, got = x.double().numpy(), out.flatten().double().numpy()
    exact = gelu(x)
    relative = np.where(x >= -4, 1e-6, 1e-5)
    assert (abs(got - exact) <= np.where(x >= -8, relative * abs(exact), 1e-15)).all()
    assert got[-4] == 1e3 and got[-3] == np.float32(1e20) and got[-2] == 0 and got[-1] == 0


@kernels
@pytest.mark.parametrize(("activation", "exact", "bound"), [("gelu_erf", gelu_erf, 5e-7), ("silu", silu, 1e-6)])
def test_other_activations(kernel: str, activation: str, exact: Any, bound: float) -> None:
    """Within the bound of its value's size or of 1, whichever is larger; NaN and infinities as they should be."""
    x = torch.cat((torch.linspace(-12, 12, 20001), torch.tensor([-1e3, 1e3, -1e20, 1e20, math.inf, math.nan])))
    out = poison(1, len(x), 1)
    run(kernel, out, x.view(1, -1, 1), pack(kernel, torch.ones(1, 1)), activation)
    got, wanted = out.flatten().double().numpy(), exact(x.double().numpy())
    finite = slice(0, -2)
    assert (abs(got[finite] - wanted[finite]) <= bound * np.maximum(1, abs(wanted[finite]))).all()
    assert got[-2] == math.inf and math.isnan(got[-1])


@dtypes
@kernels
def test_a_row_depends_on_itself_alone(kernel: str, dtype: tuple[torch.dtype, ...], rng: np.random.Generator) -> None:
    """Bit for bit: alone, among 5, among 333, beside NaN, in a batch, for any number of threads and in every run."""
    k, n = 901, 330
    packed = pack(kernel, random(rng, n, k, dtype=dtype[0]), random(rng, n))
    x = random(rng, 1, 333, k, dtype=dtype[1])
    expected = poison(1, 333, n, dtype=dtype[2])
    run(kernel, expected, x, packed, "gelu")

    def same(x: Tensor, of: Tensor, threads: int) -> bool:
        out = poison(*x.shape[:2], n, dtype=dtype[2])
        run(kernel, out, x, packed, "gelu", threads)
        return same_bits(out, of)

    for threads in (1, 2, 3, 16):
        assert same(x, expected, threads) and same(x, expected, threads)
    for count in (1, 2, 5, 48, 200):
        rows = torch.from_numpy(rng.permutation(333)[:count])
        assert same(x[:, rows], expected[:, rows], 1 + count % 3)
    stranger = torch.full((1, 1, k), float("nan"), dtype=dtype[1])
    nan = torch.full((1, 1, n), float("nan"), dtype=dtype[2])
    assert same(torch.cat((x[:, :4], stranger), 1), torch.cat((expected[:, :4], nan), 1), 1)
    assert same(x.view(3, 111, k), expected.view(3, 111, n), 2)
    assert same(x.view(111, 3, k).transpose(0, 1), expected.view(111, 3, n).transpose(0, 1), 2)


@dtypes
@kernels
def test_what_another_call_left_is_not_used(
    kernel: str, dtype: tuple[torch.dtype, ...], rng: np.random.Generator
) -> None:
    """NaN in the thread's scratch, also where a row of odd K ends."""
    weight, out = random(rng, 70, 33, dtype=dtype[0]), poison(1, 7, 70, dtype=dtype[2])
    x = random(rng, 1, 7, 33, dtype=dtype[1])
    run(kernel, out, torch.full((1, 7, 34), float("nan")), pack(kernel, torch.ones(70, 34, dtype=dtype[0])))
    assert out.isnan().all()
    run(kernel, out, x, pack(kernel, weight))
    check(out, x, weight, None, "none")


@dtypes
@kernels
def test_weights_that_share_their_input(kernel: str, dtype: tuple[torch.dtype, ...], rng: np.random.Generator) -> None:
    """Packed as one they make the bits that each makes alone, and may be written into columns of a wider buffer."""
    sizes, k = (70, 17, 130), 77
    weights = [random(rng, n, k, dtype=dtype[0]) for n in sizes]
    biases = [random(rng, 70), None, random(rng, 130, dtype=BF16)]
    x, out = random(rng, 2, 9, k, dtype=dtype[1]), poison(2, 9, 217, dtype=dtype[2])
    run(kernel, out, x, pack(kernel, weights, biases))
    beside = Guarded(poison(2, 9, 217, dtype=dtype[2]))
    first = 0
    for weight, bias in zip(weights, biases, strict=True):
        alone = poison(2, 9, len(weight), dtype=dtype[2])
        run(kernel, alone, x, pack(kernel, weight, bias))
        part = slice(first, first + len(weight))
        assert same_bits(out[..., part].contiguous(), alone)
        run(kernel, beside.tensor[..., part], x, pack(kernel, weight, bias))
        first += len(weight)
    assert same_bits(beside.tensor.contiguous(), out) and beside.intact()


@kernels
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rows_of_fp32_are_rounded_to_the_weights(kernel: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    x, packed = random(rng, 1, 50, 190), pack(kernel, random(rng, 100, 190, dtype=dtype))
    wide, rounded = poison(2, 1, 50, 100)
    run(kernel, wide, x, packed)
    run(kernel, rounded, x.to(dtype), packed)
    assert same_bits(wide, rounded)


@dtypes
@pytest.mark.parametrize("path", PATHS)
def test_nan_and_infinity(path: str, dtype: tuple[torch.dtype, ...], rng: np.random.Generator) -> None:
    """They go where products take them: into a row of out from x, into a column from the weights."""
    x, weight = random(rng, 1, 9, 40, dtype=dtype[1]), random(rng, 75, 40, dtype=dtype[0])
    bias = random(rng, 75)
    nan, inf = float("nan"), float("inf")
    x[0, 2, 39], x[0, 4, 7], weight[11, 3], weight[74, 39], bias[30] = nan, inf, nan, -inf, inf
    out = poison(1, 9, 75, dtype=dtype[2])
    run(path, out, x, pack(path, weight, bias))
    with np.errstate(all="ignore"):
        expected = x[0].double().numpy() @ weight.double().numpy().T + bias.double().numpy()
    got = out[0].double().numpy()
    for kind in (np.isnan, np.isposinf, np.isneginf):
        assert (kind(got) == kind(expected)).all()
    assert np.isnan(got[2]).all() and np.isnan(got[:, 11]).all() and np.isfinite(got[0]).sum() == 72


@pytest.mark.parametrize("path", PATHS)
def test_nothing_to_do(path: str) -> None:
    for batch, active, n in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        run(path, torch.empty(batch, active, n), torch.empty(batch, active, 4), pack(path, torch.ones(n, 4)))
    out, bias = poison(2, 3, 5), torch.arange(5.0)
    run(path, out, torch.empty(2, 3, 0), pack(path, torch.empty(5, 0), bias))
    assert torch.equal(out, bias.expand(2, 3, 5))


@kernels
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_pack_holds_the_weights(kernel: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    for n, k in ((1, 1), (64, 48), (70, 33), (16, 5), (129, 2)):
        weight = random(rng, n, k, dtype=dtype)
        packed = pack(kernel, weight)
        assert packed.weight.dtype == dtype and packed.bias is None
        assert torch.equal(packed.unpacked(), weight)


def good() -> dict[str, Any]:
    weight = pack_linear(torch.randn(6, 4), torch.randn(6))
    return {"out": torch.randn(2, 5, 6), "x": torch.randn(2, 5, 4), "weight": weight, "activation": "none"}


def narrow() -> PackedLinear:
    return pack_linear(torch.randn(6, 4).bfloat16())


MEMORY = torch.randn(200)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": [1.0]}, "x is a list, expected a torch.Tensor"),
    ({"x": torch.randn(5, 4)}, "x has shape [5, 4], expected 3 dimensions [B, A, K]"),
    ({"x": torch.randn(2, 4, 4)}, "x has shape [2, 4, 4], expected [B=2 as in out, A=5 as in out, K]"),
    ({"x": torch.randn(2, 5, 4).double()}, "x has dtype torch.float64, expected float32 or bfloat16 or float16"),
    ({"x": torch.randn(2, 5, 4).half(), "weight": narrow()}, "x has dtype torch.float16, expected float32 or bfloat16"),
    ({"x": torch.randn(2, 5, 4).bfloat16()}, "x has dtype torch.bfloat16, expected float32 as weight"),
    ({"out": torch.randn(2, 5, 6).bfloat16()}, "out has dtype torch.bfloat16, expected float32 as weight"),
    ({"out": torch.randn(2, 5, 6).long(), "weight": narrow()}, "out has dtype torch.int64, expected float32 or bf"),
    ({"out": torch.randn(2, 6, 5).mT}, "out has strides [30, 1, 5], expected 1 in the last dimension"),
    ({"out": torch.randn(2, 1, 6).expand(2, 5, 6)}, "elements share memory"),
    ({"out": MEMORY[:60].view(2, 5, 6), "x": MEMORY[50:90].view(2, 5, 4)}, "out and x overlap in memory"),
    ({"x": torch.randn(2, 5, 4, device="meta")}, "x is on meta, expected out's device, cpu"),
    ({"x": torch.randn(2, 5, 700)}, "weight holds "),
    ({"out": torch.randn(2, 5, 7)}, "bias has shape [6], expected [N=7 as in out]"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments(case: int) -> None:
    spoilt, message = BAD[case]
    refused_by(linear, good() | spoilt, message)


def test_options_that_are_refused() -> None:
    expected = "activation is 'relu', expected 'none', 'gelu'"
    refused_by(linear, good() | {"activation": "relu"}, expected, error=OptionError)
    x = torch.randn(2, 5, 4).requires_grad_()
    refused_by(linear, good() | {"x": x}, "not differentiable", error=OptionError)


def test_weights_packed_for_another_kernel() -> None:
    """Each layout is for one kernel; weights as they are, which devices without one have, go to the definition."""
    out, x, weight = torch.empty(1, 3, 6), torch.randn(1, 3, 4), torch.randn(6, 4)
    for made, runs in product(KERNELS, repeat=2):
        packed = pack(made, weight)
        if packed.layout == pack(runs, weight).layout:
            run(runs, out, x, packed)
        else:
            with pytest.raises(OptionError, match=f"packed for '{packed.layout}', expected .*; pack it with"):
                run(runs, out, x, packed)
    plain = PackedLinear(weight.flatten(), None, 6, 4, "rows")
    with pytest.raises(OptionError, match="weight is packed for 'rows', expected"):
        linear(out, x, plain, backend="native")
    linear(out, x, plain, backend="torch")
    assert (out - x @ weight.T).abs().max() < 1e-5
    with pytest.raises(OptionError, match="instruction set 'cray' does not run here"):
        linear(out, x, PackedLinear(weight.flatten(), None, 6, 4, "cray"))


def test_pack_linear_refuses() -> None:
    weight = torch.randn(6, 4)
    for arguments, message in (
        (([],), "0 weights and 0 biases"),
        (([weight, weight], [None]), "2 weights and 1 biases"),
        ((weight[0],), r"weight has shape \[4\] and dtype torch.float32, expected a floating dtype and \[N, K\]"),
        ((weight.long(),), "dtype torch.int64, expected a floating dtype"),
        (([weight, weight[:, 1:]],), r"weight has shape \[6, 3\].*\[N, K=4 as in the first\]"),
        (([weight, weight.bfloat16()],), "weight is torch.bfloat16 on cpu, expected torch.float32 on cpu as the first"),
        ((weight, weight[0]), r"bias has shape \[4\] on cpu, expected \[N=6\] on cpu"),
    ):
        with pytest.raises(ShapeError, match=message):
            pack_linear(*arguments)
    with pytest.raises(OptionError, match="instruction set 'cray' does not run here"):
        pack_linear(weight, instruction_set="cray")


def test_opcheck() -> None:
    """The schema says which arguments change, the fake agrees with the op, also with dynamic shapes."""
    for bias in (None, torch.randn(6)):
        packed = pack_linear(torch.randn(6, 4), bias)
        arguments = (torch.zeros(2, 5, 6), torch.randn(2, 5, 4), packed.weight, packed.bias, "gelu", packed.layout)
        torch.library.opcheck(torch.ops.dsa_rt.linear.default, arguments)


def test_the_native_kernel_is_chosen_by_the_processor() -> None:
    info = _native.build_info()
    best = info["instruction_sets"][0]
    for dtype in (FP32, FP16):
        assert backend.choose("linear", "cpu", dtype) == ("torch" if best == "generic" else "native")
    assert backend.choose("linear", "cpu", BF16) == ("torch" if best == "generic" or info["amx_bf16"] else "native")
