"""cuDNN, FlashAttention and FlashAttention-3 as backends of active_attention: their calls, slices, copies and refusals.

Without a GPU the framework's CPU kernel, which has the same arguments, stands in for theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops import attention, backend, fused
from dsa_rt.reference import layers as reference

from .conftest import Guarded, poison, random

BF16 = torch.bfloat16
NAMES = list(fused.KERNELS)
names = pytest.mark.parametrize("name", NAMES)
Calls = list[tuple[tuple[int, ...], tuple[int, ...]]]


@pytest.fixture(params=NAMES)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Calls]:
    """A backend that may serve the CPU, through its own code up to the call of the foreign kernel, and the shapes of q
    and k in each such call."""
    calls: Calls = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        assert rest in ((), (None, False))  # no bias, no log-sum-exp
        calls.append((tuple(q.shape), tuple(k.shape)))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)

    def attend3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        calls.append((tuple(turned[0].shape), tuple(turned[1].shape)))
        return F.scaled_dot_product_attention(*turned).transpose(1, 2)

    name = str(request.param)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", attend)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", attend)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=attend3))
    kernel = fused.KERNELS[name]
    able = fused.Kernel(kernel.note, kernel.attend, lambda *_: None)
    here = backend.Implementation(name, ("cpu",), (BF16,), run=able.run, refuses=able.refuses)
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "active_attention", (here, backend.Implementation("torch")))
    return name, calls


def close(out: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None) -> bool:
    """Within bf16's roundings of weights and result; a row too many or too few is far outside."""
    want = reference.active_attention(q.float(), k.float(), v.float(), segments)
    return bool(((out.float() - want).abs() <= 0.01 * want.abs() + 0.01).all())


@pytest.mark.parametrize("shape", [(1, 17, 41, 3, 40), (2, 5, 7, 1, 128), (3, 1, 2, 2, 8), None])
def test_against_the_definition(
    shape: tuple[int, ...] | None, stand_in: tuple[str, Calls], rng: np.random.Generator
) -> None:
    """Rows of a larger cache, an output inside sentinels, one call."""
    if shape is None:
        b, a, n, h, d = (int(x) for x in rng.integers(1, (4, 70, 90, 5, 20)))
        shape = (b, a, n, h, 8 * d)
        print(f"shape {shape}")
    batch, active, rows, heads, dim = shape
    q = random(rng, batch, active, heads, dim, dtype=BF16)
    k, v = (random(rng, batch, rows + 9, heads, dim, dtype=BF16)[:, 4 : rows + 4] for _ in range(2))
    out = Guarded(poison(*q.shape, dtype=BF16), gap=8)
    attention.active_attention(out.tensor, q, k, v, backend=stand_in[0])
    assert close(out.tensor, q, k, v) and out.intact()
    assert stand_in[1] == [((batch, heads, active, dim), (batch, heads, rows, dim))]


SEGMENTS: dict[str, tuple[list[list[int]], list[tuple[int, int]]]] = {  # A = 11, N = 30 -> (queries, rows) of each call
    "one for all": ([[11, 3, 20, 0, 0]], [(11, 17)]),
    "the second range": ([[11, 7, 7, 2, 25]], [(11, 23)]),
    "ranges that touch": ([[11, 3, 9, 9, 20]], [(11, 17)]),
    "ranges that touch, turned": ([[11, 9, 20, 3, 9]], [(11, 17)]),
    "alike": ([[4, 5, 30, 0, 0], [7, 5, 12, 12, 30]], [(11, 25)]),
    "several": ([[4, 0, 30, 0, 0], [0, 1, 2, 0, 0], [6, 2, 3, 0, 0], [1, 0, 30, 30, 30]], [(4, 30), (6, 1), (1, 30)]),
}


@pytest.mark.parametrize("case", SEGMENTS)
def test_segments(case: str, stand_in: tuple[str, Calls], rng: np.random.Generator) -> None:
    """Few ranges are as many calls over slices; rows outside of them are not read."""
    rows, expected = SEGMENTS[case]
    segments = torch.tensor(rows)
    q = random(rng, 2, 11, 3, 16, dtype=BF16)
    k, v = (random(rng, 2, 30, 3, 16, dtype=BF16) for _ in range(2))
    seen = torch.zeros(30, dtype=torch.bool)
    for count, *ends in rows:
        for begin, end in (ends[:2], ends[2:]):
            seen[begin:end] |= count > 0
    dark_k, dark_v = (x.masked_fill(~seen[:, None, None], float("nan")) for x in (k, v))
    out = poison(*q.shape, dtype=BF16)
    attention.active_attention(out, q, dark_k, dark_v, segments=segments, backend=stand_in[0])
    assert close(out, q, k, v, segments)
    assert [(q_shape[2], k_shape[2]) for q_shape, k_shape in stand_in[1]] == expected


def test_refusals(stand_in: tuple[str, Calls], rng: np.random.Generator) -> None:
    """With the reason where it was asked for; else the next backend serves the call."""
    name, calls = stand_in
    q, k = random(rng, 1, 5, 2, 16, dtype=BF16), random(rng, 1, 9, 2, 16, dtype=BF16)
    lse = torch.empty(1, 2, 5)
    odd = random(rng, 1, 5, 2, 17, dtype=BF16)[..., 1:]
    skewed = random(rng, 1, 5, 2, 24, dtype=BF16)[..., 4:20]
    apart = torch.tensor([[5, 0, 3, 4, 9]])
    many = torch.tensor([[1, 0, end, 0, 0] for end in range(1, 6)])
    cases: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None, str]] = [
        (q, k, lse, None, "it leaves no log-sum-exp"),
        (q[..., :12], k[..., :12], None, None, "the head dimension is 12, expected a multiple of 8 up to 256"),
        (odd, k, None, None, "rows of q, k or v do not begin at multiples of 16 bytes"),
        (skewed, k, None, None, "rows of q, k or v do not begin at multiples of 16 bytes"),
        (q, k, None, apart, r"segments\[0\] has two ranges of rows that are not one"),
        (q, k, None, many, "its segments would take 5 calls, expected at most 4"),
    ]
    for queries, rows, log, segments, why in cases:
        out = poison(*queries.shape, dtype=BF16)
        with pytest.raises(OptionError, match=f"backend '{name}' has no kernel for this: {why}"):
            attention.active_attention(out, queries, rows, rows, log, segments, backend=name)
        assert out.isnan().all()
        attention.active_attention(out, queries, rows, rows, log, segments)
        assert close(out, queries, rows, rows, segments)
    with pytest.raises(OptionError, match=f"'{name}' was asked for, but {name} has no kernel for torch.float32"):
        attention.active_attention(q.float(), q.float(), k.float(), k.float(), backend=name)
    wide = random(rng, 1, 5, 2, 264, dtype=BF16)
    with pytest.raises(OptionError, match="the head dimension is 264"):
        attention.active_attention(torch.empty_like(wide), wide, wide, wide, backend=name)
    assert not calls


def test_what_is_malformed_is_said_by_the_check(stand_in: tuple[str, Calls]) -> None:
    q, k = torch.randn(1, 5, 2, 16).to(BF16), torch.randn(1, 9, 2, 16).to(BF16)
    out = torch.empty_like(q)
    for change, message in [
        ({"q": q[0]}, "q has shape"),
        ({"v": None}, "v is a NoneType"),
        ({"segments": torch.tensor([[5.0, 0, 9, 0, 0]])}, "segments"),
        ({"k": k[:, :, :1]}, "H"),
        ({"segments": torch.tensor([[4, 0, 9, 0, 0]])}, "segments hold 4 queries"),
        ({"segments": torch.tensor([[5, 0, 10, 0, 0]])}, "expected ranges inside"),
        ({"segments": torch.tensor([[6, 0, 9, 0, 0], [-1, 0, 9, 0, 0]])}, "expected 0 to A = 5 queries"),
        ({"segments": torch.tensor([[5, 3, 3, 9, 9]])}, "expected at least one row"),
        ({"segments": torch.tensor([5, 3, 3, 9, 9])}, "segments"),
    ]:
        with pytest.raises(ShapeError, match=message):
            attention.active_attention(**({"out": out, "q": q, "k": k, "v": k} | change), backend=stand_in[0])
    assert not stand_in[1]


def test_nothing_to_do(stand_in: tuple[str, Calls]) -> None:
    for batch, active, heads in [(2, 0, 3), (0, 5, 3), (2, 5, 0)]:
        q, k = (torch.empty(batch, n, heads, 16, dtype=BF16) for n in (active, 9))
        attention.active_attention(torch.empty_like(q), q, k, k, backend=stand_in[0])
    assert not stand_in[1]


def test_flash_attention_3_with_a_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first versions return a pair."""
    pair = SimpleNamespace(flash_attn_func=lambda q, k, v: (q + 1, torch.zeros(1)))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", pair)
    q = torch.randn(1, 5, 2, 16)
    assert torch.equal(fused.KERNELS["flash3"].attend(q, q, q), q + 1)


@pytest.mark.parametrize("attend", [fused._cudnn, fused._flash])
def test_the_framework_takes_such_calls(attend: Callable[..., Tensor]) -> None:
    """Its own operators, on tensors without memory: arguments as their schemas have them, the layout that is copied."""
    q, k = (torch.empty(2, n, 3, 64, dtype=BF16, device="meta") for n in (5, 9))
    made = attend(q, k, k)
    assert made.shape == q.shape and made.dtype == BF16 and made.is_contiguous()


@names
def test_on_a_machine_without_them(name: str) -> None:
    q = torch.randn(1, 5, 2, 16, dtype=BF16)
    with pytest.raises(OptionError, match=f"backend '{name}' was asked for, but .*(only for cuda|is not installed)"):
        attention.active_attention(torch.empty_like(q), q, q, q, backend=name)
    if not torch.cuda.is_available() and name != "flash3":
        why = fused.KERNELS[name].refuses(torch.empty_like(q), None, q, q, q, None)
        assert why and "for 5 queries, 5 rows and head dimension 16 here (torch.backends.cuda.can_use_" in why


def test_not_through_a_switch_of_the_process(stand_in: tuple[str, Calls], monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of the framework is switched off for other threads meanwhile."""
    changed: list[object] = []
    for switch in ("flash", "math", "cudnn", "mem_efficient"):
        monkeypatch.setattr(torch._C, f"_set_sdp_use_{switch}", changed.append)
    q = torch.randn(1, 5, 2, 16, dtype=BF16)
    attention.active_attention(torch.empty_like(q), q, q, q, backend=stand_in[0])
    assert stand_in[1] and not changed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@names
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_gpu(name: str, dim: int) -> None:
    """Against the definition, with segments; skipped where the card or its libraries lack the kernel."""
    q = torch.randn(2, 300, 3, dim, device="cuda").to(BF16)
    k, v = (torch.randn(2, 1000, 3, dim, device="cuda").to(BF16)[:, 7:900] for _ in range(2))
    for segments in (None, torch.tensor([[100, 0, 500, 0, 0], [200, 3, 400, 400, 893]])):
        out = torch.full_like(q, float("nan"))
        try:
            attention.active_attention(out, q, k, v, segments=segments, backend=name)
        except OptionError as error:
            pytest.skip(str(error))
        assert close(out, q, k, v, segments)


@names
def test_dtypes_that_it_takes(name: str) -> None:
    (row,) = (i for i in backend.IMPLEMENTATIONS["active_attention"] if i.backend == name)
    assert row.dtypes == (torch.bfloat16, torch.float16)
