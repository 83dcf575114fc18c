"""Record and replay of a pass: the bits of calling the ops anew, on what is in the buffers by then."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ops.conftest import same_bits
from recorded_pass import ACTIVE, CACHED, EPS, TABLE, WIDTH, WRITTEN, clones, contents, fill, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsa_rt import _native
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops import backend, layers, norm, rows
from dsa_rt.recording import record

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
Buffers = dict[str, Tensor]


@pytest.fixture(autouse=True)
def native_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a processor where the framework's attention is the faster one."""
    native = backend.Implementation("native", ("cpu",), tuple(FLOATS))
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "active_attention", (native,))


def same(got: Buffers, expected: Buffers) -> None:
    different = [name for name in expected if not same_bits(got[name], expected[name])]
    assert not different


def recorded(buffers: Buffers) -> _native.Program:
    """A program that alone knows the buffers."""
    program = _native.Program()
    program.record(lambda: run(buffers))
    return program


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_replay_has_the_bits_of_new_calls(dtype: torch.dtype) -> None:
    """In every buffer, for other rows, slots and segments too, whatever the number of threads."""
    buffers = contents(dtype)
    expected = clones(buffers)
    run(expected)
    found = record("cpu", lambda: run(buffers))
    assert (found.kind, found.reason) == ("program", "")
    same(buffers, expected)  # recording is one run
    for threads in (1, 2, 3, 1):
        expected = contents(dtype)
        fill(buffers, expected)
        run(expected)
        torch.set_num_threads(threads)
        found.replay()
        torch.set_num_threads(1)
        same(buffers, expected)


def test_a_program_says_what_it_holds() -> None:
    buffers = contents()
    found = record(torch.device("cpu"), lambda: run(buffers))
    assert found.ops == tuple(WRITTEN)
    assert set(WRITTEN) <= set(backend.IMPLEMENTATIONS)
    assert found.bytes == sum(tensor.untyped_storage().nbytes() for tensor in buffers.values())
    out, x, chosen = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.arange(3)
    views = record("cpu", lambda: [rows.gather_rows(out[i:][:1], x[i:][:1], chosen) for i in (0, 1, 0)])
    assert views.bytes == out.nbytes + x.nbytes + chosen.nbytes
    empty = record("cpu", lambda: None)
    assert (empty.kind, empty.ops, empty.bytes) == ("program", (), 0)
    empty.replay()


BAD = [
    ("table_rows", 2, TABLE, "norm_modulate", r"rows\[2\] is 4, expected 0 to 3"),
    ("picked_rows", 0, -1, "gather_rows", r"rows\[0\] is -1, expected 0 to 4"),
    ("placed_rows", 1, ACTIVE, "scatter_rows", r"rows\[1\] is 5, expected 0 to 4"),
    ("placed_rows", 2, None, "scatter_rows", r"rows\[2\] is . like rows\[0\], expected distinct rows"),
    ("slots", 4, CACHED, "qk_norm_rope_store", r"slots\[4\] is 9, expected 0 to 8"),
    ("slots", 3, None, "qk_norm_rope_store", r"slots\[3\] is . like slots\[0\], expected distinct rows"),
    ("segments", (0, 0), ACTIVE, "active_attention", r"segments hold . queries, expected A = 5"),
    ("segments", (1, 2), CACHED + 1, "active_attention", r"segments\[1\] is .*, expected ranges inside \[0, 9\)"),
    ("quantized_slots", 2, CACHED, "quantize_rows", r"slots\[2\] is 9, expected 0 to 8"),
    ("quantized_slots", 1, None, "quantize_rows", r"slots\[1\] is . like slots\[0\], expected distinct rows"),
    ("velocity_rows", 1, -3, "cached_step", r"rows\[1\] is -3, expected 0 to 8"),
    ("velocity_rows", 1, None, "cached_step", r"rows\[1\] is . like rows\[0\], expected distinct rows"),
]


@pytest.mark.parametrize(("buffer", "at", "value", "op", "message"), BAD)
def test_numbers_that_became_wrong(buffer: str, at: Any, value: int | None, op: str, message: str) -> None:
    """The op that reads them refuses, as a call of it would; it and later ones write nothing. Right ones run again."""
    buffers = contents()
    program = recorded(buffers)
    expected = contents()
    fill(buffers, expected)
    before = clones(buffers)
    buffers[buffer][at] = buffers[buffer][0] if value is None else value
    for _ in range(2):
        with pytest.raises(ShapeError, match=f"^{op}: {message}"):
            program.replay()
    with pytest.raises(ShapeError, match=f"^{op}: {message}"):
        run(clones(buffers))
    run(expected)
    order = list(WRITTEN)
    for writer, names in WRITTEN.items():
        earlier = order.index(writer) < order.index(op)
        same({name: buffers[name] for name in names}, {name: (expected if earlier else before)[name] for name in names})
    fill(buffers, before)
    program.replay()
    same(buffers, expected)


def test_rows_that_the_pass_itself_moves_are_checked_when_they_are_read() -> None:
    numbers, chosen, found = torch.tensor([[5, 1, 2]]), torch.tensor([1, 2]), torch.zeros(1, 2, dtype=torch.int64)
    x, out = torch.randn(1, 3, 4), torch.zeros(1, 2, 4)
    program = _native.Program()

    def two_moves() -> None:
        rows.gather_rows(found, numbers, chosen)
        rows.gather_rows(out, x, found[0])

    program.record(two_moves)
    assert torch.equal(out, x[:, [1, 2]])
    numbers[0, 2] = 0
    program.replay()
    assert torch.equal(out, x[:, [1, 0]])
    chosen[0] = 0
    with pytest.raises(ShapeError, match=r"gather_rows: rows\[0\] is 5, expected 0 to 2"):
        program.replay()
    assert torch.equal(out, x[:, [1, 0]]) and found.tolist() == [[5, 0]]


# Memory


def test_a_program_keeps_the_memory_and_lets_it_go() -> None:
    """Other tensors would take the place of freed ones; NaN in them would show."""
    buffers = contents()
    program = recorded(buffers)
    values = contents()
    fill(buffers, values)
    results = {name: buffers[name] for names in WRITTEN.values() for name in names}
    del buffers
    gc.collect()
    others = [torch.full_like(value.float(), float("nan")) for value in values.values() for _ in range(20)]
    program.replay()
    run(values)
    same(results, {name: values[name] for name in results})
    del others

    memory = np.zeros((1, 3, 4), np.float32)
    alive, x, out = weakref.ref(memory), torch.from_numpy(memory), torch.ones(1, 2, 4)
    program = _native.Program()
    program.record(lambda: rows.gather_rows(out, x, torch.tensor([0, 1])))
    x.data = torch.ones(1, 3, 4)  # the tensor lets go of its memory, the program does not
    del memory
    gc.collect()
    assert alive() is not None
    program.replay()
    assert (out == 0).all()
    del program
    gc.collect()
    assert alive() is None


def test_a_replay_runs_no_op_of_torch() -> None:
    ran = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(op)
            return op(*args, **(kwargs or {}))

    buffers = contents()
    found = record("cpu", lambda: run(buffers))
    with Count():
        found.replay()
        assert not ran
        run(buffers)
    assert len(ran) > len(WRITTEN)


# Use


def test_an_exception_while_recording_leaves_the_program_empty() -> None:
    buffers = contents()
    program = _native.Program()

    def stops() -> None:
        run(buffers)
        raise ZeroDivisionError("as the function says it")

    with pytest.raises(ZeroDivisionError, match="as the function says it"):
        program.record(stops)
    assert program.ops == [] and program.bytes == 0
    with pytest.raises(ZeroDivisionError, match="as the function says it"):
        record("cpu", stops)
    run(buffers)
    assert program.ops == []  # nothing records any more
    program.record(lambda: run(buffers))
    assert program.ops == list(WRITTEN)


def test_a_refused_call_is_not_recorded() -> None:
    buffers = contents()
    program = _native.Program()

    def with_a_mistake() -> None:
        with pytest.raises(ShapeError, match="norm_modulate"):
            norm.norm_modulate(buffers["x"], buffers["q"], buffers["shift"], buffers["scale"], None, EPS)
        with pytest.raises(OptionError, match="instruction set 'none' does not run here"):
            _native.gather_rows(buffers["picked"], buffers["x"], buffers["picked_rows"], instruction_set="none")
            _native.norm_modulate(buffers["normed"], buffers["x"], buffers["shift"], buffers["scale"],
                                  buffers["table_rows"], EPS, instruction_set="none")  # fmt: skip
        run(buffers)

    program.record(with_a_mistake)
    assert program.ops == ["gather_rows", *WRITTEN]  # moving rows needs no instruction set


def test_what_a_program_refuses() -> None:
    buffers = contents()
    program, other = recorded(buffers), _native.Program()
    with pytest.raises(OptionError, match="program: it holds 13 ops already; make a new one"):
        program.record(lambda: None)
    with pytest.raises(OptionError, match="program: another one records on this thread; end that one first"):
        other.record(lambda: _native.Program().record(lambda: None))
    with pytest.raises(OptionError, match="program: a replay cannot be recorded"):
        other.record(program.replay)
    out, x, numbers = (t.to("meta") for t in (torch.zeros(1, 2, 0), torch.zeros(1, 5, 0), torch.tensor([4, 0])))
    with pytest.raises(OptionError, match="gather_rows: a program takes tensors on the CPU, this one is on meta"):
        other.record(lambda: _native.gather_rows(out, x, numbers))
    assert other.ops == []
    program.replay()


# Threads


def test_only_the_recording_thread_records() -> None:
    """And a program that is in use is refused to others meanwhile."""
    buffers, elsewhere = contents(), contents()
    program, refused = _native.Program(), []

    def meddle() -> None:
        run(elsewhere)
        for use in (program.replay, lambda: program.record(lambda: None)):
            with pytest.raises(OptionError, match="another thread records or replays it; give each thread") as caught:
                use()
            refused.append(caught)

    def function() -> None:
        worker = threading.Thread(target=meddle)
        worker.start()
        worker.join()
        run(buffers)

    program.record(function)
    assert program.ops == list(WRITTEN) and len(refused) == 2


def test_replays_on_several_threads() -> None:
    """Each program on a thread of its own; one program on two threads at once is refused to one of them."""
    sets = [contents() for _ in range(4)]
    programs = [recorded(buffers) for buffers in sets]
    starts, expected = [contents() for _ in sets], []
    for start, buffers in zip(starts, sets, strict=True):
        fill(buffers, start)
        run(start)
        for _ in range(20):
            run(start)
        expected.append(start)

    def work(program: _native.Program) -> None:
        for _ in range(21):
            program.replay()

    workers = [threading.Thread(target=work, args=(program,)) for program in programs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for buffers, values in zip(sets, expected, strict=True):
        same(buffers, values)

    out, seeds, tokens = torch.empty(1, 5000, 512), torch.tensor([1]), torch.arange(5000)
    slow = _native.Program()
    slow.record(lambda: _native.philox_normal(out, seeds, tokens, 0, instruction_set="generic"))
    refusals, done = [], threading.Event()

    def again_and_again() -> None:
        while not done.is_set():
            try:
                slow.replay()
            except OptionError as error:
                refusals.append(str(error))
                done.set()

    workers = [threading.Thread(target=again_and_again) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    done.set()
    assert refusals and "another thread records or replays it" in refusals[0]
    slow.replay()


# What cannot be a program


EAGER: list[tuple[Callable[[Buffers], object], str]] = [
    (lambda b: b["x"].add_(1), "aten.add_.Tensor"),
    (lambda b: b["x"].copy_(b["x0"]), "aten.copy_.default"),
    (lambda b: torch.empty(3), "aten.empty.memory_format"),
    (lambda b: torch.tensor([1.0]), "aten.lift_fresh.default"),
    (lambda b: b["logit"][0].item(), "aten.(_local_scalar_dense|item).default"),
    (lambda b: b["x"].transpose(1, 2).contiguous(), "aten.(clone|contiguous).default"),
    (lambda b: b["x"].transpose(1, 2).reshape(-1), "aten.(clone|reshape).default"),
    (lambda b: b["x"].to(torch.float64), "aten.(_to_copy.default|to.dtype)"),
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("other", "name"), EAGER)
def test_another_op_of_torch_makes_it_eager(mode: Any, other: Callable[[Buffers], object], name: str) -> None:
    """The reason names the first; the function was run once, and is what replays."""
    buffers, calls = contents(), []

    def function() -> None:
        run(buffers)
        other(buffers)
        buffers["x"].neg()
        calls.append(1)

    with mode():
        found = record("cpu", function)
        assert len(calls) == 1 and found.kind == "eager" and found.ops == ()
        assert (message := found.reason).endswith(" is no op of dsa_rt, and no view: a program cannot hold it")
        assert re.match(name, message), message
        expected = contents()
        fill(buffers, expected)
        run(expected)
        other(expected)
        found.replay()
    same(buffers, expected)
    assert len(calls) == 2


def test_a_dtype_or_processor_without_kernels_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    x, shift, scale = torch.randn(1, 3, 4).double(), torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    found = record("cpu", lambda: layers.norm_modulate(x, shift, scale, None, EPS))
    assert found.kind == "eager" and found.reason.startswith("aten.")
    monkeypatch.setitem(backend.IMPLEMENTATIONS, "active_attention", (backend.Implementation("torch"),))
    buffers = contents()
    found = record("cpu", lambda: run(buffers))
    assert found.kind == "eager" and found.reason.startswith("aten.")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_views_are_no_ops(mode: Any) -> None:
    """Whatever way they are taken, as long as nothing is copied."""
    x, out, chosen = torch.randn(6, 4, WIDTH), torch.zeros(2, 2, WIDTH), torch.tensor([1, 0, 3])

    def function() -> None:
        halves = x.unflatten(0, (2, 3)).flatten(1, 2).split(6, dim=1)[1]
        picked = halves.transpose(0, 1).mT.mT.transpose(0, 1).detach().view(2, 6, -1).reshape(2, 6, WIDTH)
        narrow = picked.to(x.dtype)[:, None].expand(2, 1, 6, WIDTH).squeeze(1).select(0, 1)[None]
        rows.gather_rows(out[:1], narrow, chosen[:2])

    with mode():
        function()
        expected, kept = out.clone(), x.clone()
        found = record("cpu", function)
        assert (found.kind, found.reason) == ("program", "")
        assert torch.equal(out, expected)
        x.mul_(2)
        found.replay()
        assert torch.equal(out, 2 * expected) and torch.equal(x, 2 * kept)
