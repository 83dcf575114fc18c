"""Bad arguments: one error that names op, argument, what came and what was expected; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops import step

from .refusing import refused_by

Arguments = dict[str, Any]


def philox_normal() -> Arguments:
    return {"out": torch.randn(2, 5, 8), "seeds": torch.tensor([1, 2]), "tokens": torch.arange(5), "draw": 1}


def renoise() -> Arguments:
    return {
        "out": torch.randn(2, 5, 8), "x0": torch.randn(2, 5, 8), "x": torch.randn(2, 5, 8),
        "velocity": torch.randn(2, 5, 8), "sigma": 0.9, "sigma_next": 0.5, "seeds": torch.tensor([1, 2]),
        "tokens": torch.arange(5), "draw": 1,
    }  # fmt: skip


def cached_step() -> Arguments:
    return {
        "x": torch.randn(2, 9, 8), "velocity_cache": torch.randn(2, 9, 8), "rows": torch.arange(5),
        "fresh": torch.randn(2, 5, 8), "delta_sigma": -0.1, "score": torch.randn(2, 5),
    }  # fmt: skip


def exit_decision() -> Arguments:
    return {
        "refine": torch.zeros(3, dtype=torch.bool), "confidence": torch.randn(3), "logit": torch.randn(3),
        "threshold": torch.randn(3),
    }  # fmt: skip


OPS: dict[str, Callable[[], Arguments]] = {
    "philox_normal": philox_normal,
    "renoise": renoise,
    "cached_step": cached_step,
    "exit_decision": exit_decision,
}
OUTPUTS = {
    "philox_normal": ("out",),
    "renoise": ("out", "x0"),
    "cached_step": ("x", "velocity_cache", "score"),
    "exit_decision": ("refine", "confidence"),
}
TENSORS = [
    (op, name) for op, make in OPS.items() for name, value in make().items() if isinstance(value, Tensor)
]


def refused(op: str, arguments: Arguments, *fragments: str, error: type[Exception] = ShapeError) -> None:
    refused_by(getattr(step, op), arguments, *fragments, error=error)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [None, "native", "torch"])
def test_the_arguments_these_tests_spoil_are_good(op: str, backend: str | None) -> None:
    getattr(step, op)(**OPS[op](), backend=backend)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_type(op: str, name: str) -> None:
    arguments = OPS[op]() | {name: [1.0, 2.0]}
    refused(op, arguments, f"{name} is a list, expected a torch.Tensor")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_dtype(op: str, name: str) -> None:
    arguments = OPS[op]()
    wrong = torch.float64 if arguments[name].is_floating_point() else torch.int32
    arguments[name] = arguments[name].to(wrong)
    refused(op, arguments, f"{name} has dtype {wrong}, expected ")


@pytest.mark.parametrize(
    ("op", "name", "other"),
    [("renoise", "x", "out"), ("renoise", "x0", "out"), ("cached_step", "fresh", "velocity_cache")],
)
def test_dtypes_that_must_agree(op: str, name: str, other: str) -> None:
    arguments = OPS[op]()
    arguments[name] = arguments[name].bfloat16()
    if name == "x":  # the first of the two is bound first
        arguments["x0"] = None
    refused(op, arguments, f"{name} has dtype torch.bfloat16, expected float32 as {other}")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_number_of_dimensions(op: str, name: str) -> None:
    arguments = OPS[op]()
    arguments[name] = arguments[name][None]
    refused(op, arguments, f"{name} has shape [1, ", "expected ", "dimension")


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, name in TENSORS if name != next(iter(OPS[op]()))]
)
@pytest.mark.parametrize("change", [-1, 1])
def test_sizes_that_do_not_agree(op: str, name: str, change: int) -> None:
    """Each dimension of each argument but the first, which binds the sizes; `rows` binds A itself."""
    for dim in range(OPS[op]()[name].ndim):
        arguments = OPS[op]()
        size = arguments[name].shape[dim] + change
        arguments[name] = torch.ones_like(arguments[name]).narrow(dim, 0, 1).repeat_interleave(size, dim)
        if name == "rows":
            arguments[name] = torch.arange(size)
        blamed = "fresh" if name == "rows" else name
        refused(op, arguments, f"{blamed} has shape [", "expected [", "=", " as in ")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_strides(op: str, name: str) -> None:
    arguments = OPS[op]()
    value = arguments[name]
    arguments[name] = value.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(arguments[name], value)
    refused(op, arguments, f"{name} has strides [", "expected 1 in the last dimension")


@pytest.mark.parametrize("op", ["philox_normal", "renoise", "cached_step"])
def test_outputs_that_share_memory_with_themselves(op: str) -> None:
    for name in OUTPUTS[op]:
        arguments = OPS[op]()
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
        refused(op, arguments, f"{name} has strides [0, ", "elements share memory")
    overlapping = OPS[op]()
    name = OUTPUTS[op][0]
    batch, count, width = overlapping[name].shape
    overlapping[name] = torch.randn(1000).as_strided((batch, count, width), (count * width, width - 1, 1))
    refused(op, overlapping, f"{name} has strides [", "elements share memory")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_device(op: str, name: str) -> None:
    arguments = OPS[op]()
    arguments[name] = arguments[name].to("meta")
    refused(op, arguments, " is on ", "expected ")


@pytest.mark.parametrize(
    ("op", "first", "second"),
    [(op, a, b) for op in OPS for a in OUTPUTS[op] for b in OPS[op]() if a != b and (op, b) in TENSORS],
)
def test_outputs_that_share_memory_with_others(op: str, first: str, second: str) -> None:
    """The two start in the same byte; elements of different sizes are laid over each other."""
    arguments = OPS[op]()
    a, b = arguments[first], arguments[second]
    if {first, second} in ({"out", "x"}, {"out", "velocity"}):
        memory = torch.randn(2, 6, 8)  # the very same tensor is allowed here, one that is shifted is not
        arguments[first], arguments[second] = memory[:, :5], memory[:, 1:]
    else:
        memory = torch.zeros(2000, dtype=torch.int64)
        for name, value in ((first, a), (second, b)):
            arguments[name] = memory.view(value.dtype)[: value.numel()].view(value.shape)
        if "rows" in (first, second):
            memory[: a.numel()] = torch.arange(a.numel()) % 5
    refused(op, arguments, first, second, "overlap in memory")


def test_rows_between_rows_do_not_overlap() -> None:
    """Outputs may be slices of one buffer as long as no element is shared."""
    buffer = torch.randn(2, 20, 8)
    expected = step_of(buffer[:, :9].clone(), buffer[:, 9:18].clone())
    x, cache = buffer[:, :9], buffer[:, 9:18]
    step.cached_step(x, cache, torch.arange(5), torch.ones(2, 5, 8), 0.1)
    assert torch.equal(x, expected[0]) and torch.equal(cache, expected[1])


def step_of(x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    cache[:, :5] = 1
    return x + 0.1 * cache, cache


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1, 2, 3, 9], "rows[4] is 9, expected 0 to 8"),
        ([0, -1, 2, 3, 4], "rows[1] is -1, expected 0 to 8"),
        ([0, 1, 2**40, 3, 4], "rows[2] is 1099511627776, expected 0 to 8"),
        ([0, 1, 7, 3, 7], "rows[4] is 7 like rows[2], expected distinct rows"),
    ],
)
def test_bad_rows(rows: list[int], message: str) -> None:
    refused("cached_step", cached_step() | {"rows": torch.tensor(rows)}, message)


def test_misaligned_memory() -> None:
    raw = torch.zeros(2 * 5 * 8 * 4 + 1, dtype=torch.uint8)
    shifted = torch.frombuffer(bytearray(raw.numpy().tobytes()), dtype=torch.float32, offset=1, count=80)
    refused("philox_normal", philox_normal() | {"out": shifted.view(2, 5, 8)}, "out starts at an address")


@pytest.mark.parametrize("draw", [-1, 2**32])
@pytest.mark.parametrize("op", ["philox_normal", "renoise"])
def test_draw_out_of_range(op: str, draw: int) -> None:
    refused(op, OPS[op]() | {"draw": draw}, f"draw is {draw}, expected 0 to 2^32 - 1", error=OptionError)


@pytest.mark.parametrize(("op", "name"), [t for t in TENSORS if OPS[t[0]]()[t[1]].is_floating_point()])
def test_gradients_are_refused(op: str, name: str) -> None:
    arguments = OPS[op]()
    arguments[name].requires_grad_()
    refused(op, arguments, "not differentiable", error=OptionError)
    with torch.no_grad():
        getattr(step, op)(**arguments)


def test_empty_tensors() -> None:
    """Nothing to do is no error."""
    step.philox_normal(torch.empty(0, 5, 8), torch.empty(0, dtype=torch.int64), torch.arange(5), 0)
    step.philox_normal(torch.empty(2, 0, 8), torch.tensor([1, 2]), torch.arange(0), 0)
    step.philox_normal(torch.empty(2, 5, 0), torch.tensor([1, 2]), torch.arange(5), 0)
    step.exit_decision(torch.empty(0, dtype=torch.bool), torch.empty(0), torch.empty(0), torch.empty(0))
