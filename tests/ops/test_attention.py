"""active_attention against its definition in fp64 NumPy: every kernel, odd sizes, strided caches, strange numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsa_rt import _native
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops import attention, backend, layers

from .conftest import KERNELS, Guarded, poison, random, rounding, same_bits

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
kernels = pytest.mark.parametrize("kernel", KERNELS)
dtypes = pytest.mark.parametrize("dtype", FLOATS)


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Result [B, A, H, D], log-sum-exp [B, H, A], Σ weight·|v| and the largest Σ |q·k| / √D of a query, in fp64."""
    wide = [x.double().numpy() for x in (q, k, v)]
    with np.errstate(all="ignore"):
        size = np.sqrt(q.shape[-1])
        scores = np.einsum("bahd,bnhd->bhan", wide[0], wide[1]) / size
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        result, spread = (np.einsum("bhan,bnhd->bahd", weights / total, x) for x in (wide[2], abs(wide[2])))
        size_of_scores = np.einsum("bahd,bnhd->bhan", abs(wide[0]), abs(wide[1])).max(-1) / size
        return result, (top + np.log(total))[..., 0], spread, size_of_scores


def check(kernel: str, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
    """The error is at most what the roundings of scores, weights, sums and result can make together."""
    result, log_sum, spread, size_of_scores = exact(q, k, v)
    score = 2.0**-22 * size_of_scores + 1e-6  # absolute error of a score
    assert lse is None or (abs(lse.double().numpy() - log_sum) <= score + 2e-7 * abs(log_sum)).all()
    weight = 2.0**-8 if kernel == "avx512_bf16" and q.dtype == torch.bfloat16 else 2.0**-22
    relative = 2 * score.swapaxes(1, 2)[..., None] + 1.01 * weight + 4e-6
    assert (abs(out.double().numpy() - result) <= relative * spread + rounding(result, q.dtype)).all()


def run(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, threads: int = 1, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    out, lse = poison(*q.shape, dtype=q.dtype), poison(q.shape[0], q.shape[2], q.shape[1])
    _native.active_attention(out, lse, q, k, v, segments, threads=threads, instruction_set=kernel)
    return out, lse


SHAPES = [  # batch, active, rows, heads, dim
    (1, 1, 1, 1, 64), (2, 7, 33, 3, 12), (1, 1, 700, 2, 24), (3, 50, 1, 2, 48), (1, 97, 257, 1, 128),
    (2, 49, 519, 1, 64), (1, 5, 300, 2, 1), (1, 13, 65, 1, 7), (1, 11, 70, 1, 200), (1, 720, 19, 1, 128),
]  # fmt: skip


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
    value = [random(rng, batch, n, heads, dim, dtype=dtype) for n in (active, rows, rows)]
    q, k, v = (Guarded(x) for x in value)
    out, lse = Guarded(poison(*value[0].shape, dtype=dtype)), Guarded(poison(batch, heads, active))
    _native.active_attention(out.tensor, lse.tensor, q.tensor, k.tensor, v.tensor, threads=2, instruction_set=kernel)
    check(kernel, out.tensor, lse.tensor, *value)
    assert all(guarded.intact() for guarded in (out, lse, q, k, v))
    assert all(same_bits(guarded.tensor, x) for guarded, x in zip((q, k, v), value, strict=True))
    without = Guarded(poison(*value[0].shape, dtype=dtype))
    _native.active_attention(without.tensor, None, *value, instruction_set=kernel)
    assert same_bits(without.tensor, out.tensor) and without.intact()


@dtypes
@kernels
def test_large_scores(kernel: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Scores of some hundreds, also with all of them far below 0: nothing overflows, nothing sinks to zero."""
    q, k, v = (random(rng, 1, n, 2, 48, dtype=dtype) for n in (9, 601, 601))
    q[:, 4:] = -400 * q[:, 4:].abs()
    q[:, :4] *= 60
    k[:, :, 1] = k[:, :, 1].abs() + 0.25
    out, lse = run(kernel, q, k, v)
    assert (lse[:, 1, 4:] < -200).all() and lse.abs().max() > 100
    check(kernel, out, lse, q, k, v)


@dtypes
@kernels
def test_a_row_depends_on_its_query_alone(kernel: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Bit for bit the same in any active set, at any place in it, for any number of threads and in every run."""
    q, k, v = (random(rng, 2, n, 3, 64, dtype=dtype) for n in (389, 275, 275))
    out, lse = run(kernel, q, k, v)
    for threads in (1, 2, 3, 8):
        again = run(kernel, q, k, v, threads)
        assert same_bits(again[0], out) and same_bits(again[1], lse)
    for count in (1, 2, 47, 200):
        rows = torch.from_numpy(rng.permutation(389)[:count])
        strangers = random(rng, 2, 1, 3, 64, dtype=dtype) * float("nan")
        some_out, some_lse = run(kernel, torch.cat((q[:, rows], strangers), 1), k, v, threads=2)
        assert same_bits(some_out[:, :-1], out[:, rows]) and same_bits(some_lse[..., :-1], lse[..., rows])
        assert some_out[:, -1].isnan().all()
    alone = run(kernel, q[1:, :, 2:], k[1:, :, 2:], v[1:, :, 2:])
    assert same_bits(alone[0], out[1:, :, 2:])


@dtypes
@kernels
def test_one_key_is_copied(kernel: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    q, k, v = (random(rng, 2, n, 2, 24, dtype=dtype) for n in (50, 1, 1))
    assert same_bits(run(kernel, q, k, v)[0], v.expand_as(q).contiguous())


@dtypes
@kernels
@pytest.mark.parametrize("rows", [40, 600])
def test_nan_and_infinity(kernel: str, dtype: torch.dtype, rows: int, rng: np.random.Generator) -> None:
    """As in the definition: -inf scores weigh nothing, a row of nothing else is NaN, and NaN does not leave its row."""
    q, k, v = (random(rng, 1, n, 5, 16, dtype=dtype) for n in (13, rows, rows))
    inf = float("inf")
    q[..., 3] = q[..., 3].abs() + 0.5
    k[0, : rows - 3, 0, 3] = -inf  # whole blocks of keys without a finite score
    k[0, :, 1, 3] = -inf  # no finite score at all
    k[0, 11, 2, 3] = inf
    k[0, rows - 1, 3, 5] = float("nan")
    v[0, 7, 4, 2], v[0, rows - 1, 4, 9], v[0, 0, 4, 11] = inf, -inf, float("nan")
    q[0, 5, 4, 3] = float("nan")
    out, lse = run(kernel, q, k, v, threads=2)
    expected, log_sum, *_ = exact(q, k, v)
    kind = [np.isnan, np.isposinf, np.isneginf]
    for of in kind:
        assert (of(out.double().numpy()) == of(expected)).all()
    finite = np.isfinite(expected)
    assert finite[0, :, 0].all() and not finite[0, :, 1:4].any() and finite[0, 0, 4].sum() == 13
    error = abs(out.double().numpy()[finite] - expected[finite])
    assert (error <= max(2.5 * torch.finfo(dtype).eps, 1e-5)).all()
    known = np.isfinite(log_sum)
    assert known[0, 0].all() and (abs(lse.numpy()[known] - log_sum[known]) < 1e-4).all()


@kernels
def test_steps_between_elements(kernel: str, rng: np.random.Generator) -> None:
    """Heads first, rows backwards in a cache of heads of another width: strides are free but for the last."""
    q, k, v = (random(rng, 2, 3, n, 40, dtype=torch.bfloat16).transpose(1, 2) for n in (21, 90, 90))
    k = torch.cat((k, k), -1)[..., 25:65]
    expected = run(kernel, q.contiguous(), k.contiguous(), v.contiguous())
    out, lse = poison(2, 3, 21, 40, dtype=torch.bfloat16).transpose(1, 2), poison(21, 3, 2).permute(2, 1, 0)
    with pytest.raises(ShapeError, match="lse has strides"):
        _native.active_attention(out, lse, q, k, v)
    lse = poison(3, 2, 21).transpose(0, 1)
    _native.active_attention(out, lse, q, k, v, instruction_set=kernel)
    assert same_bits(out, expected[0]) and same_bits(lse, expected[1])
    q, k = q[:, :1], k[:, :1]
    one_row = k.expand(-1, 90, -1, -1)  # inputs may overlap themselves
    assert same_bits(run(kernel, q, one_row, v)[0], run(kernel, q, one_row.contiguous(), v)[0])


def random_segments(rng: np.random.Generator, active: int, rows: int, count: int) -> Tensor:
    """Segments of one range and of two, in either order, some without queries."""
    bounds = np.sort(np.concatenate([[0, active], rng.integers(0, active + 1, count - 1)]))
    made = []
    for queries in np.diff(bounds).tolist():
        a, b, c, d = np.sort(rng.integers(0, rows + 1, 4)).tolist()
        ranges = [[a, b, c, d], [c, d, a, b], [a, a, c, d], [a, b, d, d]][rng.integers(4)]
        if ranges[0] == ranges[1] and ranges[2] == ranges[3]:
            ranges = [0, rows, rows, rows]
        made.append([queries, *ranges])
    return torch.tensor(made)


def of_segment(k: Tensor, segment: list[int]) -> Tensor:
    _, begin, end, begin2, end2 = segment
    return torch.cat((k[:, begin:end], k[:, begin2:end2]), 1)


@dtypes
@pytest.mark.parametrize("kernel", [*KERNELS, "torch"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (130, 700, 4), (60, 33, 9), (97, 520, 2)])
def test_segments(kernel: str, dtype: torch.dtype, sizes: tuple[int, int, int], rng: np.random.Generator) -> None:
    """Each segment's queries attend to its own ranges; rows that no segment attends to are never read."""
    active, rows, count = sizes
    q, k, v = (random(rng, 2, n, 3, 24, dtype=dtype) for n in (active, rows, rows))
    segments = random_segments(rng, active, rows, count)
    out, lse = Guarded(poison(2, active, 3, 24, dtype=dtype)), Guarded(poison(2, 3, active))
    seen = torch.zeros(rows, dtype=torch.bool)
    for _, begin, end, begin2, end2 in segments.tolist():
        seen[begin:end] = seen[begin2:end2] = True
    hidden_k, hidden_v = k.clone(), v.clone()
    hidden_k[:, ~seen], hidden_v[:, ~seen] = float("nan"), float("nan")
    if kernel == "torch":
        attention.active_attention(out.tensor, q, hidden_k, hidden_v, lse.tensor, segments, backend="torch")
    else:
        _native.active_attention(
            out.tensor, lse.tensor, q, hidden_k, hidden_v, segments, threads=2, instruction_set=kernel
        )
    start = 0
    for segment in segments.tolist():
        here = slice(start, start := start + segment[0])
        if segment[0]:
            keys, values = of_segment(k, segment), of_segment(v, segment)
            check(kernel, out.tensor[:, here], lse.tensor[..., here], q[:, here], keys, values)
    assert start == active and out.intact() and lse.intact()


@dtypes
@kernels
def test_a_row_does_not_see_other_segments(kernel: str, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Bit for bit as if its segment were alone, whatever others there are; one range is a slice of the rows."""
    q, k, v = (random(rng, 2, n, 2, 64, dtype=dtype) for n in (150, 600, 600))
    segments = torch.tensor([[70, 10, 300, 400, 590], [0, 0, 1, 0, 0], [49, 0, 0, 256, 513], [31, 450, 451, 3, 300]])
    out, lse = run(kernel, q, k, v, 1, segments)
    for threads in (2, 3, 8):
        assert all(map(same_bits, run(kernel, q, k, v, threads, segments), (out, lse)))
    some = run(kernel, q[:, 100:], k, v, 2, torch.tensor([[19, 0, 0, 256, 513], [31, 450, 451, 3, 300]]))
    assert same_bits(some[0], out[:, 100:]) and same_bits(some[1], lse[..., 100:])
    alone = run(kernel, q[:, 119:], k, v, 1, segments[3:])
    assert same_bits(alone[0], out[:, 119:]) and same_bits(alone[1], lse[..., 119:])
    plain = run(kernel, q[:, 70:119], k[:, 256:513], v[:, 256:513])
    assert same_bits(plain[0], out[:, 70:119]) and same_bits(plain[1], lse[..., 70:119])
    whole = run(kernel, q, k, v, 1, torch.tensor([[150, 0, 600, 7, 7]]))
    assert all(map(same_bits, whole, run(kernel, q, k, v)))


def good(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    shapes = {"out": (2, 5, 3, 8), "q": (2, 5, 3, 8), "k": (2, 9, 3, 8), "v": (2, 9, 3, 8)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} | {"lse": torch.randn(2, 3, 5)}


def overlapping(name: str, other: str) -> Callable[[dict[str, Any]], None]:
    def spoil(arguments: dict[str, Any]) -> None:
        memory = torch.randn(1000)
        for key in (name, other):
            arguments[key] = memory[: arguments[key].numel()].view(arguments[key].shape)

    return spoil


def segmented(rows: list[list[float]]) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update(segments=torch.tensor(rows))


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no tensor": (lambda a: a.update(k=[1.0]), "k is a list, expected a torch.Tensor"),
    "fp64": (lambda a: a.update(good(torch.float64)), "out has dtype torch.float64, expected float32 or bfloat16 or f"),
    "dtypes": (lambda a: a.update(v=a["v"].bfloat16()), "v has dtype torch.bfloat16, expected float32 as out"),
    "lse dtype": (lambda a: a.update(lse=a["lse"].bfloat16()), "lse has dtype torch.bfloat16, expected float32"),
    "dims": (lambda a: a.update(q=a["q"][0]), "q has shape [5, 3, 8], expected 4 dimensions [B, A, H, D]"),
    "batch": (lambda a: a.update(k=a["k"][:1]), "k has shape [1, 9, 3, 8], expected [B=2 as in out"),
    "active": (lambda a: a.update(q=a["q"][:, 1:]), "q has shape [2, 4, 3, 8], expected [B=2 as in out, A=5"),
    "heads": (lambda a: a.update(v=a["v"][:, :, :2]), "v has shape [2, 9, 2, 8]"),
    "dim": (lambda a: a.update(k=a["k"][..., 1:]), "k has shape [2, 9, 3, 7]"),
    "rows": (lambda a: a.update(v=a["v"][:, 1:]), "v has shape [2, 8, 3, 8], expected [B=2 as in out, N=9 as in k"),
    "lse shape": (lambda a: a.update(lse=a["lse"].mT.contiguous()), "lse has shape [2, 5, 3], expected [B=2 as in"),
    "no keys": (lambda a: a.update(k=a["k"][:, :0], v=a["v"][:, :0]), "k holds N = 0 rows of D = 8 channels, expected"),
    "no channels": (
        lambda a: a.update({n: a[n][..., :0] for n in ("out", "q", "k", "v")}),
        "k holds N = 9 rows of D = 0 channels, expected at least one of each",
    ),
    "strides": (lambda a: a.update(k=a["k"].mT.contiguous().mT), "k has strides [216, 24, 1, 3], expected 1 in the la"),
    "output strides": (lambda a: a.update(out=a["out"][:, :1].expand(-1, 5, -1, -1)), "elements share memory"),
    "device": (lambda a: a.update(v=a["v"].to("meta")), "v is on meta, expected out's device, cpu"),
    "out and q": (overlapping("out", "q"), "out and q overlap in memory"),
    "out and k": (overlapping("out", "k"), "out and k overlap in memory"),
    "lse and v": (overlapping("lse", "v"), "lse and v overlap in memory"),
    "out and lse": (overlapping("out", "lse"), "out and lse overlap in memory"),
    "segments dtype": (segmented([[5.0, 0, 9, 0, 0]]), "segments has dtype torch.float32, expected int64"),
    "segments shape": (segmented([[5, 0, 9]]), "segments has shape [1, 3], expected [S, 5]"),
    "segments device": (lambda a: a.update(segments=torch.zeros(1, 5, dtype=torch.int64, device="meta")),
                        "segments is on meta, expected cpu, where it is read"),
    "too few queries": (segmented([[2, 0, 9, 0, 0], [2, 0, 1, 3, 4]]), "segments hold 4 queries, expected A = 5"),
    "no segment": (lambda a: a.update(segments=torch.zeros(0, 5, dtype=torch.int64)), "segments hold 0 queries, exp"),
    "too many queries": (segmented([[6, 0, 9, 0, 0]]), "segments[0] is [6, 0, 9, 0, 0], expected 0 to A = 5 q"),
    "negative queries": (segmented([[6, 0, 9, 0, 0], [-1, 0, 9, 0, 0]]), "expected 0 to A = 5 queries first"),
    "past the end": (segmented([[5, 0, 9, 9, 10]]), "segments[0] is [5, 0, 9, 9, 10], expected ranges inside [0, 9)"),
    "before the start": (segmented([[5, -1, 9, 0, 0]]), "expected ranges inside [0, 9), the rows of k"),
    "backwards": (segmented([[5, 0, 9, 0, 0], [0, 4, 3, 0, 9]]), "segments[1] is [0, 4, 3, 0, 9], expected ranges in"),
    "no rows": (segmented([[5, 3, 3, 9, 9]]), "segments[0] is [5, 3, 3, 9, 9], expected at least one row in its"),
    "rows twice": (segmented([[5, 3, 7, 0, 4]]), "segments[0] is [5, 3, 7, 0, 4], expected ranges that do not overlap"),
}  # fmt: skip


@pytest.mark.parametrize("served_by", [None, "torch"])
@pytest.mark.parametrize("case", SPOILT)
def test_bad_arguments(case: str, served_by: str | None) -> None:
    """One error that says what came and what was expected, on every backend; nothing is written."""
    spoil, message = SPOILT[case]
    arguments = good()
    spoil(arguments)
    before = {n: x.clone() for n, x in arguments.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    with pytest.raises(ShapeError) as caught:
        attention.active_attention(**arguments, backend=served_by)
    assert str(caught.value).startswith("active_attention: ") and message in str(caught.value)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


def test_nothing_to_do() -> None:
    none = torch.empty(2, 0, 3, 8)
    for kernel in KERNELS:
        out, lse = run(kernel, none, torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8))
        assert out.shape == none.shape and lse.shape == (2, 3, 0)
        run(kernel, *(torch.empty(0, n, 3, 8) for n in (5, 4, 4)))
        run(kernel, *(torch.empty(2, n, 0, 8) for n in (5, 4, 4)))


@dtypes
@pytest.mark.parametrize("served_by", [None, "native", "torch"])
def test_every_backend(dtype: torch.dtype, served_by: str | None, rng: np.random.Generator) -> None:
    q, k, v = (random(rng, 1, n, 2, 30, dtype=dtype) for n in (17, 40, 40))
    for lse in (poison(1, 2, 17), None):
        out = poison(*q.shape, dtype=dtype)
        attention.active_attention(out, q, k, v, lse, backend=served_by)
        check("torch" if served_by == "torch" else KERNELS[0], out, lse, q, k, v)
    with pytest.raises(OptionError, match="not differentiable"):
        attention.active_attention(out, q.requires_grad_(), k, v, backend=served_by)


@pytest.mark.parametrize("lse", [torch.zeros(1, 2, 3), None])
def test_opcheck(lse: Tensor | None) -> None:
    out, q, k, v = torch.zeros(1, 3, 2, 4), torch.randn(1, 3, 2, 4), torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 4)
    segments = None if lse is None else torch.tensor([[2, 0, 3, 4, 5], [1, 1, 2, 0, 0]])
    torch.library.opcheck(torch.ops.dsa_rt.active_attention.default, (out, lse, q, k, v, segments))


@dtypes
def test_what_the_models_call(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """The native kernel where no gradient is wanted, a differentiable path of the same value where one is."""
    if backend.choose("active_attention", "cpu", dtype) != "native":
        pytest.skip("the framework is the faster one on this processor")
    q, k, v = (random(rng, 1, n, 2, 30, dtype=dtype) for n in (17, 40, 40))
    expected = run(KERNELS[0], q, k, v)[0]
    assert same_bits(layers.active_attention(q, k, v), expected)
    k.requires_grad_()
    with torch.no_grad():
        assert same_bits(layers.active_attention(q, k, v), expected)
    trained = layers.active_attention(q, k, v)
    (gradient,) = torch.autograd.grad(trained.float().square().sum(), k)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert (trained - expected).abs().max() < max(2.5 * torch.finfo(dtype).eps, 1e-5)


@pytest.mark.parametrize(
    ("sets", "amx", "chosen"),
    [
        (["avx512_bf16", "avx512", "avx2", "generic"], False, {"native"}),
        (["avx512_bf16", "avx512", "avx2", "generic"], True, {"native", "torch"}),
        (["avx2", "generic"], False, {"native"}),
        (["generic"], False, {"torch"}),
    ],
)
def test_the_faster_backend_is_chosen(
    sets: list[str], amx: bool, chosen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"instruction_sets": sets, "amx_bf16": amx, "threads": "openmp", "cuda": ""}
    monkeypatch.setattr(backend.native, "build_info", lambda: info)
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "active_attention", backend._attention())
    picks = {dtype: backend.choose("active_attention", "cpu", dtype) for dtype in FLOATS}
    assert set(picks.values()) == chosen
    assert picks[torch.float32] == "native" or sets == ["generic"]
    for dtype in FLOATS:  # what yields serves whoever asks for it, and `dsa-rt doctor` tells why it yields
        assert backend.choose("active_attention", "cpu", dtype, "native") == "native"
        (row,) = (r for r in backend.describe("cpu", dtype) if r.op == "active_attention")
        assert row.backend == picks[dtype]
        assert ("native" in row.reason) == (row.backend == "torch")
    assert backend.choose("active_attention", "cuda", torch.bfloat16) == "torch"


def test_scratch_is_for_cuda() -> None:
    """On the CPU none is wanted, and none is taken in silence."""
    q, out = torch.randn(1, 5, 2, 64), poison(1, 5, 2, 64)
    assert _native.active_attention_scratch(out, None, q, q, q) == 0
    with pytest.raises(ShapeError, match="scratch is a tensor, expected None"):
        _native.active_attention(out, None, q, q, q, None, torch.empty(100))
    assert out.isnan().all()
