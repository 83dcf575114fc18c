"""Every kernel on a GPU: the interpreter's cases in bf16 as well, realistic sizes, capture in a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsa_rt.ops.triton import FAMILIES, function

from .cases import Case, measure
from .interpreted import CASES

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none"),
]

WAN = {"batch": 1, "heads": 12, "dim": 128}  # Wan 2.1 1.3B; 480p has 1560 tokens a latent frame, 81 frames 32760
SEGMENTS = ((3120, 0, 1560, 9360, 20000), (1570, 0, 17161, 0, 0))
TINY = {case.id: case for case in CASES} | {
    case.id: case for case in (replace(case, dtype="bfloat16") for case in CASES if case.dtype == "float16")
}


def _large() -> list[Case]:
    cases = []
    for dtype in ("bfloat16", "float16", "float32"):
        for op in ("norm_modulate", "residual_norm_modulate"):
            cases.append(Case(op, dtype, {"batch": 2, "active": 4680, "width": 1536, "table": 3}))
            cases.append(Case(op, dtype, {"batch": 1, "active": 1170, "width": 5120, "table": 1}))
        cases += [
            Case("qk_norm_rope_store", dtype, {**WAN, "active": 4680, "total": 32760}),
            Case("qk_norm_rope_store", dtype, {**WAN, "heads": 40, "active": 1171, "total": 9360, "slots": "none"}),
            Case("gather_rows", dtype, {"batch": 2, "active": 8190, "total": 32760, "shape": (1536,)}),
            Case("scatter_rows", dtype, {"batch": 2, "active": 8190, "total": 32760, "shape": (12, 128)}),
            Case("philox_normal", dtype, {"batch": 2, "active": 32760, "width": 64, "draw": 1}),
            Case("renoise", dtype, {"batch": 2, "active": 32760, "width": 64, "sigma_next": 0.4, "clean": True}),
            Case("cached_step", dtype, {"batch": 2, "total": 32760, "active": 8190, "width": 64, "score": True}),
            Case("confidence_pool", dtype, {**WAN, "active": 4680}),
            Case("active_attention", dtype, {**WAN, "active": 1170, "total": 32760}),
            Case("active_attention", dtype, {**WAN, "active": 4680, "total": 18720, "dim": 64}),
            Case("active_attention", dtype, {**WAN, "heads": 1, "active": 100, "total": 32760}),  # rows are shared
            Case("active_attention", dtype, {**WAN, "active": 4690, "total": 32760, "segments": SEGMENTS}),
            Case("active_attention_fp8", dtype, {**WAN, "active": 1170, "total": 32760}),
            Case("active_attention_fp8", dtype, {**WAN, "active": 4690, "total": 32760, "segments": SEGMENTS}),
            Case("quantize_rows", dtype, {**WAN, "active": 4680, "total": 32760}),
        ]
    return cases


LARGE = {case.id: case for case in _large()}


def check(case: Case) -> None:
    if case.op == "active_attention_fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("E4M3 needs sm_89 or newer")
    wrong = {result.output: result.error for result in measure(case, "cuda") if not result.error <= 1}
    assert not wrong, f"error over what is allowed, by output: {wrong}"


@pytest.mark.parametrize("name", TINY)
def test_tiny(name: str) -> None:
    check(TINY[name])


@pytest.mark.parametrize("name", LARGE)
def test_large(name: str) -> None:
    check(LARGE[name])


def test_large_cases_are_of_every_op() -> None:
    ops = {case.op for case in LARGE.values()}
    assert ops == {name for name in FAMILIES if not name.endswith("_scratch")} - {"exit_decision"}


def test_calls_can_be_captured() -> None:
    """Nothing is allocated and nothing waits: a graph takes the calls, and its replay has the bits of a plain call."""
    q, k, v = (torch.randn(1, rows, 2, 128, device="cuda", dtype=torch.bfloat16) for rows in (100, 9000, 9000))
    x, table = torch.randn(1, 100, 256, device="cuda", dtype=torch.bfloat16), torch.randn(1, 1, 256, device="cuda")
    attended, normed = torch.empty_like(q), torch.empty_like(x)
    scratch = torch.empty(function("active_attention_scratch")(q, k), device="cuda")
    segments = torch.tensor([[60, 0, 4000, 5000, 9000], [40, 1, 2, 0, 0]])
    assert scratch.numel()

    def calls() -> None:
        function("active_attention")(attended, q, k, v, None, None, scratch)
        function("active_attention")(attended[:, :100], q, k, v, None, segments, None)
        function("norm_modulate")(normed, x, table, table, None, 1e-6)

    calls()
    expected = [attended.clone(), normed.clone()]
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph):
        calls()
    assert torch.cuda.memory_allocated() == before
    for out in (attended, normed):
        out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(attended, expected[0]) and torch.equal(normed, expected[1])
