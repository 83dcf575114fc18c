"""The choice of a backend, the registration with torch, and how the native module shares a process."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import Tensor

from dsa_rt import _native
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops import backend, dispatch, rows, step, triton
from dsa_rt.ops.backend import IMPLEMENTATIONS, choose

FP8 = ("quantize_rows", "active_attention_fp8")


def test_native_serves_every_op_on_cpu() -> None:
    for op in backend.IMPLEMENTATIONS:
        if op in ("active_attention", "linear"):  # by the processor, see their tests
            continue
        for dtype in (torch.float32, torch.bfloat16):
            assert backend.choose(op, "cpu", dtype) == "native"
            assert backend.choose(op, "cpu", dtype, "torch") == "torch"


def test_a_backend_is_used_or_refused_with_the_reason() -> None:
    assert backend.choose("cached_step", "cpu", torch.float64) == "torch"
    with pytest.raises(
        OptionError, match=r"'native' was asked for, but native has no kernel for torch.float64"
    ):
        backend.choose("cached_step", "cpu", torch.float64, "native")
    with pytest.raises(
        OptionError, match=r"'native' was asked for, but native has no kernel for device 'mps'"
    ):
        backend.choose("cached_step", "mps", torch.float32, "native")
    with pytest.raises(OptionError, match=r"unknown backend 'cudnn', expected one of native, torch"):
        backend.choose("cached_step", "cpu", torch.float32, "cudnn")


def test_a_backend_that_brings_its_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the checked call in the order of the schema, leaves calls that it refuses, and says what is missing."""
    ran: list[tuple[object, ...]] = []

    def run(out: Tensor, x: Tensor, numbers: Tensor) -> None:
        ran.append((out, x, numbers))
        out.fill_(7)

    def refuses(out: Tensor, x: Tensor, numbers: Tensor) -> str | None:
        return "wide rows are not for it" if x.shape[2] > 3 else None

    other = backend.Implementation("other", ("cpu",), run=run, refuses=refuses)
    table = (other, *backend.IMPLEMENTATIONS["gather_rows"])
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "gather_rows", table)
    out, x, numbers = torch.zeros(1, 2, 3), torch.randn(1, 5, 3), torch.tensor([4, 0])
    rows.gather_rows(out, x, numbers)
    assert len(ran) == 1 and (out == 7).all()
    with pytest.raises(ShapeError, match="expected 0 to 4"):
        rows.gather_rows(out, x, numbers + 1, backend="other")
    rows.gather_rows(out, x, numbers, backend="native")
    assert len(ran) == 1 and torch.equal(out, x[:, numbers])
    wide_out, wide = torch.zeros(1, 2, 4), torch.randn(1, 5, 4)
    rows.gather_rows(wide_out, wide, numbers)
    assert len(ran) == 1 and torch.equal(wide_out, wide[:, numbers])
    with pytest.raises(OptionError, match="'other' has no kernel for this: wide rows are not for it"):
        rows.gather_rows(wide_out, wide, numbers, backend="other")
    gone = backend.Implementation("other", missing="it is not installed")
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "gather_rows", (gone, *table[1:]))
    assert backend.choose("gather_rows", "cpu", torch.float32) == "native"
    with pytest.raises(OptionError, match="'other' was asked for, but it is not installed"):
        backend.choose("gather_rows", "cpu", torch.float32, "other")
    (row,) = (r for r in backend.describe() if r.op == "gather_rows")
    assert row.backend == "native" and row.reason.startswith("it is not installed; ")


def test_a_call_that_no_kernel_takes_goes_to_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device and dtype do not say all: a kernel may find out from the arguments, and nothing is lost."""
    out, x, numbers = (t.to("meta") for t in (torch.zeros(1, 2, 0), torch.zeros(1, 5, 0), torch.tensor([4, 0])))
    with pytest.raises(_native.Unserved, match="gather_rows: backend 'native' has no kernel for this: it was built wi"):
        _native.gather_rows(out, x, numbers)
    assert issubclass(_native.Unserved, OptionError)

    def unserved(*_: object) -> None:
        raise _native.Unserved("too wide")

    monkeypatch.setattr(torch.ops.dsa_rt, "gather_rows", unserved)
    monkeypatch.setitem(dispatch._DIRECT, "gather_rows", unserved)
    out, x, numbers = torch.zeros(1, 2, 3), torch.randn(1, 5, 3), torch.tensor([4, 0])
    rows.gather_rows(out, x, numbers)
    assert torch.equal(out, x[:, numbers])
    with pytest.raises(OptionError, match="too wide"):
        rows.gather_rows(out, x, numbers, backend="native")


def test_cuda_is_native_where_it_was_compiled() -> None:
    expected = "native" if _native.build_info()["cuda"] else "torch"
    assert backend.choose("renoise", "cuda", torch.bfloat16) == expected
    assert backend.choose("renoise", "cuda", torch.bfloat16, "torch") == "torch"


def test_an_explicit_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(step.reference, "philox_normal", lambda *a: ran.append(a) or torch.zeros(1, 2, 4))
    out, seeds, tokens = torch.ones(1, 2, 4), torch.tensor([1]), torch.arange(2)
    step.philox_normal(out, seeds, tokens, 0, backend="native")
    assert not ran and not (out == 0).any() and not (out == 1).any()
    step.philox_normal(out, seeds, tokens, 0, backend="torch")
    assert len(ran) == 1 and (out == 0).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_describe_agrees_with_choose(device: str) -> None:
    rows = backend.describe(device, torch.bfloat16)
    assert [row.op for row in rows] == list(backend.IMPLEMENTATIONS)
    for row in rows:
        assert row.backend == backend.choose(row.op, device, torch.bfloat16)
        assert row.device == device and row.reason


CALLS = {
    "philox_normal": (torch.zeros(2, 5, 8), torch.tensor([1, 2]), torch.arange(5), 3),
    "renoise": (
        torch.zeros(2, 5, 8), torch.zeros(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8),
        torch.tensor([1, 2]), torch.arange(5), 0.9, 0.5, 3,
    ),
    "cached_step": (
        torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.zeros(2, 5), torch.arange(5), torch.randn(2, 5, 8),
        0.1,
    ),
    "exit_decision": (torch.zeros(3, dtype=torch.bool), torch.zeros(3), torch.randn(3), torch.rand(3)),
    "norm_modulate": (
        torch.zeros(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 3, 8), torch.randn(1, 3, 8), torch.arange(5) % 3,
        1e-6,
    ),
    "residual_norm_modulate": (
        *torch.zeros(2, 2, 5, 8), *torch.randn(2, 2, 5, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8),
        torch.randn(1, 1, 8), torch.arange(5), 1e-6,
    ),
    "rms_norm": (torch.zeros(2, 5, 8), torch.randn(2, 5, 8), torch.randn(8), 1e-6),
    "qk_norm_rope_store": (
        torch.zeros(2, 5, 2, 4), *torch.zeros(2, 2, 9, 2, 4), *torch.randn(3, 2, 5, 8), *torch.randn(2, 8),
        *torch.randn(2, 5, 2), torch.arange(5), 1e-6,
    ),
    "gather_rows": (torch.zeros(2, 5, 3, 4), torch.randn(2, 9, 3, 4), torch.arange(5)),
    "scatter_rows": (torch.zeros(2, 9, 3, 4), torch.arange(5), torch.randn(2, 5, 3, 4)),
    "confidence_pool": (
        torch.zeros(2, 2, 8), torch.randn(2, 4), torch.randn(2, 5, 8), torch.randn(8), torch.randn(2, 5, 8), 1e-6,
    ),
}  # fmt: skip


OPTIONAL = {"renoise": 1, "cached_step": 2, "residual_norm_modulate": 4, "qk_norm_rope_store": 10}


@pytest.mark.parametrize(("op", "optional"), [*((op, True) for op in CALLS), *((op, False) for op in OPTIONAL)])
def test_opcheck(op: str, optional: bool) -> None:
    """The schema says which arguments change, the fake agrees with the op, also with dynamic shapes."""
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in CALLS[op]]
    if not optional:
        arguments[OPTIONAL[op]] = None
    torch.library.opcheck(getattr(torch.ops.dsa_rt, op).default, tuple(arguments))


def test_scratch_is_brought_to_the_argument_of_its_name() -> None:
    """Also where the dispatcher leaves out a last argument that has its default."""
    got: list[tuple[Tensor | None, Tensor | None, int]] = []

    def function(
        out: Tensor, segments: Tensor | None = None, scratch: Tensor | None = None, stream: int = 0
    ) -> None:
        got.append((segments, scratch, stream))

    def numbers(out: Tensor, segments: Tensor | None = None) -> int:
        return 6 if segments is None else 0

    bringing = dispatch._bringing_scratch(function, numbers)
    library = torch.library.Library("dsa_rt_scratch_test", "DEF")
    library.define("op(Tensor(a!) out, Tensor? segments=None) -> ()")
    library.impl("op", lambda *arguments: bringing(*arguments, stream=7), "CPU")
    segments = torch.tensor([1])
    for given in (None, segments):
        torch.ops.dsa_rt_scratch_test.op(torch.empty(3, dtype=torch.bfloat16), given)
    (none, scratch, stream), (kept, no_scratch, _) = got
    assert none is None and no_scratch is None and stream == 7
    assert kept is not None and torch.equal(kept, segments)
    assert scratch is not None and scratch.shape == (6,) and scratch.dtype == torch.float32


def test_compiled_graphs_hold_the_ops() -> None:
    """One graph without breaks that calls the native ops, with the same bits as eager, for two sizes."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    def two_steps(
        x: Tensor, cache: Tensor, fresh: Tensor, rows: Tensor, seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, cache = x * 1, cache * 1
        score, out = torch.empty(fresh.shape[:2]), torch.empty_like(fresh)
        step.cached_step(x, cache, rows, fresh, -0.25, score)
        step.renoise(out, x[:, : fresh.shape[1]], fresh, 0.5, 0.25, seeds, rows, 1)
        return out, score

    compiled = torch.compile(two_steps, backend=keep, fullgraph=True)
    through_aot = torch.compile(two_steps, backend="aot_eager", fullgraph=True)
    for count in (5, 7):
        seeds, rows = torch.tensor([1, 2]), torch.randperm(9)[:count]
        arguments = (torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.randn(2, count, 8), rows, seeds)
        with torch.no_grad():
            expected = two_steps(*arguments)
            for function in (compiled, through_aot):
                for got, want in zip(function(*arguments), expected, strict=True):
                    assert torch.equal(got, want)
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert any("dsa_rt" in name and "cached_step" in name for name in called), called
    assert any("dsa_rt" in name and "renoise" in name for name in called), called


def test_the_interpreter_is_free_while_a_kernel_runs() -> None:
    """Another Python thread gets to run in the middle of a call, not only before and after it."""
    out, seeds, tokens = torch.empty(1, 20000, 512), torch.tensor([1]), torch.arange(20000)
    for _ in range(10):  # a busy machine may leave the other thread waiting for a processor
        span: list[float] = []

        def work(span: list[float] = span) -> None:
            span.append(time.perf_counter())
            _native.philox_normal(out, seeds, tokens, 0, instruction_set="generic")
            span.append(time.perf_counter())

        worker, seen = threading.Thread(target=work), []
        worker.start()
        while worker.is_alive():
            seen.append(time.perf_counter())
            time.sleep(0.001)
        margin = (span[1] - span[0]) / 4
        if any(span[0] + margin < moment < span[1] - margin for moment in seen):
            return
    pytest.fail("no other Python thread ran during a call")


def test_two_threads_do_not_see_each_other() -> None:
    seeds = [torch.tensor([seed]) for seed in range(4)]
    tokens = torch.arange(600)
    expected = [torch.empty(1, 600, 64) for _ in seeds]
    got = [torch.empty(1, 600, 64) for _ in seeds]
    for out, seed in zip(expected, seeds, strict=True):
        step.philox_normal(out, seed, tokens, 0)

    def work(index: int) -> None:
        for draw in (1, 2, 0):
            step.philox_normal(got[index], seeds[index], tokens, draw)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_no_second_openmp_runtime() -> None:
    program = """
import torch
from dsa_rt.ops import step
from dsa_rt import _native
torch.set_num_threads(4)
torch.randn(512, 512) @ torch.randn(512, 512)
step.philox_normal(torch.empty(2, 4000, 64), torch.tensor([1, 2]), torch.arange(4000), 0)
files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
runtimes = sorted(f for f in files if any(name in f for name in ("libgomp", "libomp", "libiomp")))
print(len(runtimes), _native.build_info()["threads"], *runtimes)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, threads, *_ = result.stdout.split()
    assert int(count) <= 1, result.stdout
    assert threads == ("openmp" if count == "1" else "threads")


# Triton


def test_triton_serves_only_where_asked_for_and_only_cuda() -> None:
    assert set(IMPLEMENTATIONS) - set(triton.FAMILIES) == {"linear"}
    for op, implementations in IMPLEMENTATIONS.items():
        if op not in triton.FAMILIES:
            continue
        with pytest.raises(OptionError, match=r"triton.*(only for cuda|not installed)"):
            choose(op, "cpu", torch.float32, "triton")
        if op in FP8:
            continue
        assert implementations[-1].backend == "triton"
        assert choose(op, "cuda", torch.float16) != "triton"


@pytest.mark.parametrize("op", FP8)
def test_fp8_on_cuda_is_triton_where_it_can_be(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As built without nvcc; without Triton or E4M3, and in fp16, it is the definition."""
    native, *others = (i for i in IMPLEMENTATIONS[op] if i.backend != "native" or "cpu" in i.devices)
    assert native.backend == "native"
    native = dataclasses.replace(native, devices=("cpu",))
    monkeypatch.setitem(IMPLEMENTATIONS, op, (native, *others))
    monkeypatch.setattr(backend.native, "build_info", lambda: {"cuda": ""})
    with pytest.raises(OptionError, match="'native' was asked for, but .*was built without CUDA kernels"):
        choose(op, "cuda", torch.bfloat16, "native")
    monkeypatch.undo()
    installed = [dataclasses.replace(i, missing="") if i.backend == "triton" else i for i in others]
    monkeypatch.setitem(IMPLEMENTATIONS, op, (native, *installed))
    for dtype in (torch.float32, torch.bfloat16):
        assert choose(op, "cuda", dtype) == "triton"
    assert choose(op, "cuda", torch.float16) == "torch"
    gone = [dataclasses.replace(i, missing="Triton is not installed") if i.run else i for i in installed]
    monkeypatch.setitem(IMPLEMENTATIONS, op, (native, *gone))
    assert choose(op, "cuda", torch.bfloat16) == "torch"


def test_rows_into_fp8_are_native_where_that_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    native, triton_rows, definition = IMPLEMENTATIONS["quantize_rows"]
    built = dataclasses.replace(native, devices=("cpu", "cuda"))
    row = (built, dataclasses.replace(triton_rows, missing=""), definition)
    monkeypatch.setitem(IMPLEMENTATIONS, "quantize_rows", row)
    assert choose("quantize_rows", "cuda", torch.bfloat16) == "native"
    assert choose("quantize_rows", "cuda", torch.bfloat16, "triton") == "triton"


@pytest.mark.parametrize("op", ["active_attention", "active_attention_fp8"])
def test_what_the_hopper_kernels_serve(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the module has them they come first, for bf16; other cards and head dimensions are left to the next."""
    monkeypatch.setattr(backend.native, "build_info", lambda: {"cuda": "90a"})
    (found,) = backend._hopper("of Hopper", (torch.bfloat16,))
    cpu, *others = (i for i in IMPLEMENTATIONS[op] if i.backend != "native" or "cpu" in i.devices)
    monkeypatch.setitem(IMPLEMENTATIONS, op, (cpu, found, *others))
    assert choose(op, "cuda", torch.bfloat16) == choose(op, "cuda", torch.bfloat16, "native") == "native"
    assert found.refusal("cuda", torch.float32) is not None and found.refuses is not None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert found.refuses(torch.empty(1, 2, 3, 128), None) is None
    assert "80, expected 64 or 128" in str(found.refuses(torch.empty(1, 2, 3, 80), None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert "a card is no device" in str(found.refuses(torch.empty(1, 2, 3, 128), None))


@pytest.mark.parametrize(
    ("capability", "dim", "why"),
    [((9, 0), 128, None), ((8, 9), 1, None), ((8, 6), 64, "has no E4M3"), ((12, 0), 129, "head dimension is 129")],
)
def test_what_triton_refuses_of_attention_in_fp8(
    capability: tuple[int, int], dim: int, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    (found,) = (i for i in IMPLEMENTATIONS["active_attention_fp8"] if i.backend == "triton")
    assert found.refuses is not None
    said = found.refuses(torch.empty(1, 2, 3, dim), None)
    assert said is None if why is None else why in str(said)


def test_triton_gets_its_arguments_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schema's arguments arrive under the names that Triton's functions have for them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    import inspect

    for op in set(IMPLEMENTATIONS) & set(triton.FAMILIES):
        real = triton.function(op)
        schema = getattr(torch.ops.dsa_rt, op).default._schema
        given = {argument.name: torch.zeros(1, 1, 1, 1) for argument in schema.arguments}
        seen: dict[str, object] = {}

        def recorder(name: str, real: object = real, seen: dict[str, object] = seen) -> object:
            if name.endswith("_scratch"):
                return lambda *_: 3
            return lambda *arguments: seen.update(inspect.signature(real).bind(*arguments).arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(triton, "function", recorder)
        triton.runner(op)(*given.values())
        monkeypatch.undo()
        for name, value in given.items():
            assert seen[name] is value, (op, name)
