"""The table of measured choices: what it may say, how it is read; it decides the calls that it covers, no others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_rt import doctor
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops import attention, backend, choices, layers, rows, step
from dsa_rt.ops.choices import Row

FIELDS: dict[str, Any] = {
    "op": "active_attention", "device": "9.0", "dtype": "bfloat16", "active": [100, 900], "cached": [1, 40000],
    "dim": [128, 128], "backend": "cudnn", "next": "native", "ratio": 1.12, "date": "2026-11-21",
    "machine": "NVIDIA H100", "commit": "abc", "source": "gpu-ops.json",
}  # fmt: skip


def table(*changes: dict[str, Any]) -> str:
    return json.dumps({"rows": [FIELDS | change for change in changes]})


def read(text: str) -> list[Row]:
    return choices.parse(text, "choices.json", backend.MOVABLE)


def on_cpu(op: str, name: str, **sizes: tuple[int, int]) -> Row:
    """A row that no file may hold, so that the path of a call can be seen without a GPU."""
    bounds = {"active": None, "cached": None, "dim": None} | sizes
    return Row(op, "cpu", "float32", **bounds, backend=name, next="native", ratio=1.5,
               date="2026-11-21", machine="Zen", commit="abc", source="x.json")  # type: ignore[arg-type]  # fmt: skip


# What is read


def test_the_table_of_the_package() -> None:
    made = choices.read(choices.PATH, backend.MOVABLE)
    assert choices.written(made) == choices.PATH.read_text(encoding="utf-8")
    assert choices.index(made) == backend.MEASURED


def test_written_and_read_again() -> None:
    text = table({}, {"active": [901, 2000], "backend": "triton"}, {"dim": None, "dtype": "float32", "ratio": 2})
    made = read(text)
    assert [row.backend for row in made] == ["cudnn", "triton", "cudnn"] and made[0].active == (100, 900)
    assert read(choices.written(made)) == made and len(choices.written(made).splitlines()) == 5
    assert read('{"rows": []}') == [] and choices.index([]) == {}


BAD: dict[str, tuple[str | list[dict[str, Any]], str]] = {
    "no JSON": ('{"rows": [', "choices.json is not valid JSON (Expecting value"),
    "key twice": ('{"rows": [], "rows": []}', "is not valid JSON (a key appears twice)"),
    "NaN": (json.dumps({"rows": [FIELDS | {"ratio": float("nan")}]}), "is not valid JSON (NaN is no number)"),
    "other members": ('{"rows": [], "about": ""}', 'is expected to hold {"rows": [...]} and nothing else'),
    "no list": ('{"rows": {}}', 'is expected to hold {"rows": [...]}'),
    "row is no object": ('{"rows": [7]}', "choices.json: row 0: 7, expected an object"),
    "missing and unknown": (json.dumps({"rows": [{"op": "renoise", "speed": 1}]}),
                            "row 0 (renoise): has no device, no dtype, no active, no cached, no dim, no backend, no "),
    "op": ([{}, {"op": "attention", "active": [901, 902]}], "row 1 (attention): op is 'attention', expected one of "),
    "op is a list": ([{"op": []}], "row 0: op is [], expected one of"),
    "device": ([{"device": "H100"}], "row 0 (active_attention): device is 'H100', expected a compute capability like"),
    "dtype": ([{"dtype": "bf16"}], "dtype is 'bf16', expected the name of a dtype of torch"),
    "no dtype": ([{"dtype": "nn"}], "dtype is 'nn', expected"),
    "bounds turned": ([{"active": [9, 8]}], "active is [9, 8], expected null, or [first, last] with 0 < first <= last"),
    "bounds of one": ([{"dim": [128]}], "dim is [128], expected null"),
    "bounds of 0": ([{"cached": [0, 8]}], "cached is [0, 8], expected null"),
    "bounds in parts": ([{"cached": [1, 8.5]}], "cached is [1, 8.5], expected null"),
    "no such size": ([{"op": "renoise", "backend": "triton"}],
                     "row 0 (renoise): cached is [1, 40000], expected null: renoise has no such size"),
    "backend": ([{"backend": "torch"}], "backend is 'torch', expected one of native, cudnn, flash, flash3, triton"),
    "of another op": ([{"op": "renoise", "cached": None}], "backend is 'cudnn', expected one of native, triton"),
    "next": ([{"next": "cudnn"}], "next is 'cudnn', expected another one of native, cudnn"),
    "ratio": ([{"ratio": 0.99}], "ratio is 0.99, expected a number of 1 or more"),
    "ratio is text": ([{"ratio": "1.2"}], "ratio is '1.2', expected a number"),
    "ratio is true": ([{"ratio": True}], "ratio is True, expected a number"),
    "date": ([{"date": "21.11.2026"}], "date is '21.11.2026', expected a day like"),
    "machine": ([{"machine": " "}], "machine is ' ', expected text"),
    "commit": ([{"commit": None}], "commit is None, expected text"),
    "two for one call": ([{}, {"active": [900, 901], "dim": None}], "row 1 (active_attention): bounds are also in row"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table(case: str) -> None:
    """The error names file, row and field."""
    text, message = BAD[case]
    with pytest.raises(OptionError) as caught:
        read(text if isinstance(text, str) else table(*text))
    assert message in str(caught.value) and str(caught.value).startswith("choices.json")


def test_the_order_on_a_cpu_is_fixed() -> None:
    """Bits of native rows do not depend on company, recorded passes hold native ops alone: no row may change that."""
    assert {device for _, device in backend.MOVABLE} == {"cuda"}
    fixed = set(backend.IMPLEMENTATIONS) - {op for op, _ in backend.MOVABLE}
    assert fixed == {"linear", "active_attention_fp8"}  # one kernel, or none but the framework's
    assert set(choices.SIZES) == {op for op, _ in backend.MOVABLE}
    for op, sizes in choices.SIZES.items():
        nothing = {name: None for name in ("active", "cached", "dim") if name not in sizes}
        with pytest.raises(OptionError, match=r"device is 'cpu', where the order of the backends is fixed"):
            read(table({"op": op, "device": "cpu", "backend": "native", "next": "triton"} | nothing))
        for name in backend.MOVABLE[op, "cuda"]:
            assert any(i.backend == name for i in backend.IMPLEMENTATIONS[op])


# What it decides


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Puts rows in force, and after the others of gather_rows and active_attention a backend on the CPU that notes its
    calls and leaves 7, but refuses more than 20 tokens."""

    def force(*made: Row) -> list[int]:
        calls: list[int] = []

        def run(out: Tensor, *_: object) -> None:
            calls.append(out.shape[1])
            out.fill_(7)

        def refuses(out: Tensor, *_: object) -> str | None:
            return "too many" if out.shape[1] > 20 else None

        other = backend.Implementation("other", ("cpu",), run=run, refuses=refuses)
        for op in ("gather_rows", "active_attention"):
            monkeypatch.setitem(backend.IMPLEMENTATIONS, op, (*backend.IMPLEMENTATIONS[op], other))
        monkeypatch.setattr(backend, "MEASURED", choices.index(made))
        monkeypatch.setattr(backend, "_DECIDED", {})
        return calls

    return force


def gathered(active: int, total: int = 50, width: int = 3, **more: Any) -> bool:
    """Whether gather_rows ran in the marking backend; if not, its result is right."""
    x, numbers = torch.randn(1, total, width, dtype=more.pop("dtype", torch.float32)), torch.randperm(total)[:active]
    out = torch.full((1, active, width), float("nan"), dtype=x.dtype)
    rows.gather_rows(out, x, numbers, **more)
    marked = bool((out == 7).all())
    assert marked or torch.equal(out, x[:, numbers])
    return marked


def test_a_row_decides_the_calls_inside_its_bounds(marked: Callable[..., list[int]]) -> None:
    calls = marked(on_cpu("gather_rows", "other", active=(5, 30), cached=(40, 60), dim=(3, 3)))
    assert [gathered(n) for n in (4, 5, 20, 21, 30, 31)] == [False, True, True, False, False, False]
    assert calls == [5, 20]
    assert not gathered(5, total=39) and gathered(5, total=40) and gathered(5, total=60) and not gathered(5, total=61)
    assert not gathered(5, width=4) and not gathered(5, dtype=torch.bfloat16)
    assert not gathered(5, backend="native") and not gathered(5, backend="torch") and gathered(4, backend="other")
    assert backend.choose("gather_rows", "cpu", torch.float32) == "native"


def test_rows_of_others_decide_nothing(marked: Callable[..., list[int]]) -> None:
    marked(on_cpu("scatter_rows", "other"), on_cpu("active_attention", "other", active=(5, 5)),
           on_cpu("gather_rows", "nobody"))  # fmt: skip
    assert not gathered(5)
    marked(dataclasses.replace(on_cpu("gather_rows", "other"), device="9.0"))
    assert not gathered(5)


def test_what_is_malformed_is_said_by_the_check(marked: Callable[..., list[int]]) -> None:
    calls = marked(on_cpu("gather_rows", "other", active=(1, 9), cached=(1, 9), dim=(1, 9)))
    with pytest.raises(ShapeError, match="out"):
        rows.gather_rows(torch.zeros(3), torch.zeros(1, 5, 3), torch.tensor([0]))
    assert not calls


def test_decisions_are_remembered_up_to_a_number(
    marked: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    marked(on_cpu("gather_rows", "other", active=(5, 9)))
    monkeypatch.setattr(backend, "_MOST_DECIDED", 3)
    looked: list[int] = []
    real = choices.find
    monkeypatch.setattr(choices, "find", lambda *given: looked.append(given[3][0].shape[1]) or real(*given))
    assert [gathered(n) for n in (5, 5, 4, 4, 5)] == [True, True, False, False, True] and looked == [5, 4]
    assert not gathered(5, dtype=torch.bfloat16) and gathered(5, total=33) and looked == [5, 4, 5, 5]
    assert len(backend._DECIDED) == 1
    assert gathered(9) and not gathered(10) and not gathered(11) and len(backend._DECIDED) <= 3


def test_models_ask_where_the_framework_comes_first(
    marked: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a native kernel, calls that a row covers go to the backend it names, others to the framework."""
    calls = marked(on_cpu("active_attention", "other", active=(5, 9)))
    table = backend.IMPLEMENTATIONS["active_attention"]
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "active_attention", table[1:])
    k = torch.randn(1, 12, 2, 8)
    for active, expected in ((5, True), (9, True), (4, False), (10, False)):
        q = torch.randn(1, active, 2, 8)
        out = torch.full_like(q, float("nan"))
        assert layers.active_attention(q, k, k, out=out) is out
        assert bool((out == 7).all()) == expected
        if not expected:
            assert (out - layers.reference.active_attention(q, k, k)).abs().max() < 1e-5
    assert calls == [5, 9]
    assert not backend.has_kernel("active_attention", torch.device("cpu"), torch.bfloat16)


def test_compiled_graphs_take_the_same_backend(marked: Callable[..., list[int]]) -> None:
    marked(on_cpu("gather_rows", "native", active=(5, 9), cached=(1, 60), dim=(3, 3)))
    x, numbers = torch.randn(1, 50, 3), torch.randperm(50)[:7]

    def gather(x: Tensor, numbers: Tensor) -> Tensor:
        out = torch.empty(1, len(numbers), 3)
        rows.gather_rows(out, x, numbers)
        return out

    compiled = torch.compile(gather, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, numbers), x[:, numbers])


def test_cuda_goes_by_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    made = choices.index(read(table({}, {"device": "12.0", "backend": "triton"})))
    capability = {0: (9, 0), 1: (12, 0), 2: (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: capability[place.index])
    monkeypatch.setattr(choices, "device_of", choices.device_of.__wrapped__)
    found = [choices.of(made, "active_attention", torch.device("cuda", n), torch.bfloat16) for n in range(3)]
    assert [[row.backend for row in rows] for rows in found] == [["cudnn"], ["triton"], []]
    assert choices.of(made, "active_attention", torch.device("cuda", 0), torch.float32) == ()


def test_sizes_are_where_the_schemas_have_them() -> None:
    """By the names of the arguments, which tell what they are."""
    held = {
        "active_attention": {"active": "q", "cached": "k", "dim": "q"},
        "qk_norm_rope_store": {"active": "q_out", "cached": "k_cache", "dim": "q_out"},
        "gather_rows": {"active": "out", "cached": "x", "dim": "out"},
        "scatter_rows": {"active": "src", "cached": "x", "dim": "x"},
        "cached_step": {"active": "fresh", "cached": "x", "dim": "x"},
        "quantize_rows": {"active": "rows", "dim": "rows"},
        "confidence_pool": {"active": "tokens", "dim": "tokens"},
        "residual_norm_modulate": {"active": "sum", "dim": "sum"},
    }
    for op, sizes in choices.SIZES.items():
        schema = getattr(torch.ops.dsa_rt, op).default._schema
        named = {size: schema.arguments[argument].name for size, (argument, _) in sizes.items()}
        assert named == (held.get(op, {"active": "out", "dim": "out"}) if sizes else {}), op


# What is told


def test_doctor_tells_what_a_row_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        on_cpu("gather_rows", "torch", active=(5, 9), dim=(3, 3)), on_cpu("renoise", "torch"),
        on_cpu("active_attention", "cudnn", active=(1, 4)),
    )  # fmt: skip
    monkeypatch.setattr(backend, "MEASURED", choices.index(made))
    told = {row.op: row for row in backend.describe("cpu", torch.float32)}
    assert told["gather_rows"].backend == "native or torch"
    assert told["gather_rows"].reason.endswith(
        "; A 5 to 9, dim 3: torch, measured: 1.50 times as fast as native, 2026-11-21, Zen"
    )
    assert told["renoise"].backend == "torch"
    assert told["renoise"].reason.endswith("; torch, measured: 1.50 times as fast as native, 2026-11-21, Zen")
    first = backend.choose("active_attention", "cpu", torch.float32)
    assert told["active_attention"].backend == first
    assert told["active_attention"].reason.endswith(", Zen, but cudnn has no kernel for device 'cpu', only for cuda")
    assert told["scatter_rows"].reason.count("measured") == 0
    shown = doctor.report(doctor.examine())
    assert "native or torch: " in shown and "A 5 to 9, dim 3: torch, measured: 1.50 times" in shown


def test_a_device_is_described_by_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table for two kinds of cards, on a machine that seems to have one of them; bf16 alone."""
    monkeypatch.setattr(backend, "MEASURED", choices.index(read(table({}, {"device": "8.0", "backend": "flash"}))))
    monkeypatch.setattr(choices, "device_of", choices.device_of.__wrapped__)
    first = backend.choose("active_attention", "cuda", torch.bfloat16)
    for capability, name in (((8, 0), "flash"), ((9, 0), "cudnn"), ((12, 0), None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place, found=capability: found)
        told = {row.op: row for row in backend.describe("cuda", torch.bfloat16)}["active_attention"]
        assert told.backend == (first if name is None else f"{first} or {name}")
        assert (f"; A 100 to 900, N 1 to 40000, dim 128: {name}, measured: 1.12 times" in told.reason) == bool(name)
        wide = {row.op: row for row in backend.describe("cuda", torch.float32)}["active_attention"]
        assert "measured" not in wide.reason


def test_doctor_tells_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.examine()
    found["choices"] = {"ok": True, "why": None, "rows": 0, "devices": []}
    assert "choices.json  empty: nothing was measured on a GPU yet" in doctor.report(found)
    monkeypatch.setattr(backend, "MEASURED", choices.index(read(table({}, {"device": "8.0"}, {"device": "12.0"}))))
    found["choices"] = doctor._choices()
    assert "choices.json  3 rows for compute capability 12.0, 8.0, 9.0" in doctor.report(found)


def test_doctor_with_a_bad_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells what is wrong with it, and all the rest."""
    import builtins

    real = builtins.__import__

    def spoilt(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if name == "dsa_rt.ops" and fromlist == ("backend",):
            raise OptionError("choices.json: row 3 (renoise): ratio is 0")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", spoilt)
    found = doctor.examine()
    assert found["backends"] == {} and not found["choices"]["ok"]
    shown = doctor.report(found)
    assert "choices.json  choices.json: row 3 (renoise): ratio is 0" in shown and "native module" in shown


def test_an_empty_table_leaves_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(choices, "find", lambda table, op, *_: asked.append(op))
    monkeypatch.setattr(backend, "MEASURED", choices.index(read(table({}))))  # of CUDA alone
    out, seeds = torch.empty(1, 5, 8), torch.tensor([1])
    step.philox_normal(out, seeds, torch.arange(5), 0)
    q = torch.randn(1, 5, 2, 8)
    attention.active_attention(torch.empty_like(q), q, q, q)
    assert not asked
