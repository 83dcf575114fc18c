"""Calls that pass by torch's dispatcher: which do, that nobody misses them, and that they refuse what it sorts out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsa_rt.errors import ShapeError
from dsa_rt.ops import backend, dispatch, layers, rows, step

from .conftest import same_bits

Call = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def call() -> Call:
    """out, x and rows of gather_rows."""
    return torch.full((2, 4, 3), float("nan")), torch.randn(2, 9, 3), torch.randperm(9)[:4]


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of gather_rows that came to the native function without the dispatcher was run by it."""
    answers: list[bool] = []
    real = dispatch._DIRECT["gather_rows"]

    def watched(*arguments: Any) -> bool:
        answers.append(real(*arguments))
        return answers[-1]

    monkeypatch.setitem(dispatch._DIRECT, "gather_rows", watched)
    return answers


@pytest.mark.parametrize("name", [None, "native"])
def test_a_plain_call_needs_no_dispatcher(
    call: Call, direct: list[bool], monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    monkeypatch.setattr(torch.ops.dsa_rt, "gather_rows", lambda *_: pytest.fail("went to the dispatcher"))
    out, x, numbers = call
    rows.gather_rows(out, x, numbers, backend=name)
    assert direct == [True] and torch.equal(out, x[:, numbers])
    with torch.no_grad():
        rows.gather_rows(out, nn.Parameter(x + 1), numbers, backend=name)
    assert direct == [True] * 2 and torch.equal(out, x[:, numbers] + 1)
    with torch.inference_mode():
        rows.gather_rows(out, x, numbers, backend=name)
    assert direct == [True] * 3 and torch.equal(out, x[:, numbers])


class Watching(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def profiled(seen: list[str]) -> Iterator[None]:
    with torch.profiler.profile() as profile:
        yield
    seen += [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("watch", [Watching, WatchingFunctions, profiled])
def test_what_listens_at_the_dispatcher_sees_the_call(
    call: Call, direct: list[bool], watch: Callable[[list[str]], AbstractContextManager[object]]
) -> None:
    seen: list[str] = []
    out, x, numbers = call
    with watch(seen):
        rows.gather_rows(out, x, numbers)
    assert direct == [False] and any("gather_rows" in name for name in seen), seen
    assert torch.equal(out, x[:, numbers])


def test_a_subclass_sees_the_call(call: Call, direct: list[bool]) -> None:
    class Mine(Tensor):
        seen: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    out, x, numbers = call
    rows.gather_rows(out, x.as_subclass(Mine), numbers)
    assert direct == [False] and any("gather_rows" in name for name in Mine.seen)
    assert torch.equal(out, x[:, numbers])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_trace_holds_the_call(call: Call) -> None:
    def gathered(x: Tensor, numbers: Tensor) -> Tensor:
        out = torch.empty(2, 4, 3)
        rows.gather_rows(out, x, numbers)
        return out

    _, x, numbers = call
    traced = torch.jit.trace(gathered, (x, numbers))
    assert "dsa_rt::gather_rows" in str(traced.graph)
    assert torch.equal(traced(x + 1, numbers), x[:, numbers] + 1)


def test_a_function_transform_is_refused(call: Call, direct: list[bool]) -> None:
    """As the dispatcher does, which has no rule for the op; its wrappers are of the class Tensor too."""
    out, x, numbers = call
    with pytest.raises(RuntimeError, match=r"(?i)vmap|batch"):
        torch.vmap(lambda a, b: rows.gather_rows(b, a, numbers))(x[None], out[None].clone())
    assert direct == [False] and out.isnan().all()


@pytest.mark.parametrize(("turn", "message"), [(torch.conj, "conjugated"), (lambda x: x.conj().imag, "negated")])
def test_numbers_that_are_not_in_memory(call: Call, turn: Callable[[Tensor], Tensor], message: str) -> None:
    """Views whose sign is turned when they are read, of which the memory knows nothing."""
    numbers = torch.tensor([2, 0])
    x = turn(torch.randn(1, 3, 1, dtype=torch.complex64))
    out = torch.zeros(1, 2, 1, dtype=x.dtype)
    with pytest.raises(ShapeError, match=f"gather_rows: x is to be {message} when it is read, .*call .resolve_"):
        rows.gather_rows(out, x, numbers)
    plain = x.resolve_conj().resolve_neg()
    rows.gather_rows(out, plain, numbers)
    assert torch.equal(out, x[:, numbers])


def test_numbers_without_memory(call: Call) -> None:
    out, _, numbers = call
    with pytest.raises(ShapeError, match="x has no memory, expected numbers that lie in memory as they are"):
        rows.gather_rows(out, torch._efficientzerotensor((2, 9, 3)), numbers)


def test_arguments_of_another_type(call: Call) -> None:
    """No call is made, and nothing of it is kept."""
    out, x, numbers = call
    seeds, poisoned = torch.tensor([1, 2]), out.clone()
    held = [sys.getrefcount(t) for t in (out, x, numbers, seeds)]
    for draw in ("one", None, 1.5, 2**64):
        with pytest.raises(TypeError, match=f"philox_normal: an argument is {draw!r}, expected an integer"):
            step.philox_normal(out, seeds, numbers, draw)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="two tuples of 3 arguments"):
        dispatch._DIRECT["gather_rows"](None, x, (out, x), ())
    with pytest.raises(ShapeError, match="gather_rows: rows is a list"):
        rows.gather_rows(out, x, [0, 1, 2, 3])  # type: ignore[arg-type]
    assert same_bits(out, poisoned)
    rows.gather_rows(out, x, numbers)
    assert [sys.getrefcount(t) for t in (out, x, numbers, seeds)] == held


def test_models_ask_for_a_kernel_of_the_table_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is kept, but not longer than the row of the table that it was made from."""
    x, weight = torch.randn(1, 4, 8), torch.rand(8)
    expected = layers.rms_norm(x, weight, 1e-6)
    assert backend.choose("rms_norm", "cpu", torch.float32) == "native"
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "rms_norm", (backend.Implementation("torch"),))
    monkeypatch.setitem(dispatch._DIRECT, "rms_norm", lambda *_: pytest.fail("native is not in the table"))
    assert backend.choose("rms_norm", "cpu", torch.float32) == "torch"
    assert torch.allclose(layers.rms_norm(x, weight, 1e-6), expected, atol=1e-6)
    monkeypatch.undo()
    assert backend.choose("rms_norm", "cpu", torch.float32) == "native"


def test_without_the_exchange_api() -> None:
    """What torch has of it is a matter of its version; attributes say the same, and errors are the same."""
    program = """
import sys, torch
if sys.argv[1] == "without":
    del torch.Tensor.__dlpack_c_exchange_api__
from dsa_rt.ops import rows, step
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16):
    x, numbers = (10 * torch.randn(9, 2, 3, 4)).to(dtype).transpose(0, 1), torch.tensor([7, 0, 3])
    out = torch.empty(2, 5, 3, 4, dtype=dtype)[:, 1:4]
    rows.gather_rows(out, x, numbers)
    assert torch.equal(out, x[:, numbers])
    for bad in (x.half() if dtype != torch.float16 else x.double(), x[..., 0], x[..., ::2], x.to_sparse()):
        try:
            rows.gather_rows(out, bad, numbers)
            print("took", dtype)
        except Exception as error:
            print(dtype, type(error).__name__, str(error).splitlines()[0])
try:
    step.exit_decision(torch.empty(2), torch.empty(2), torch.empty(2), torch.empty(2))
except Exception as error:
    print(error)
"""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no exchange API")
    said = [
        subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True).stdout
        for how in ("with", "without")
    ]
    assert said[0] == said[1] and "took" not in said[0] and len(said[0].splitlines()) == 29
    assert "refine has dtype torch.float32, expected bool or uint8" in said[0]
