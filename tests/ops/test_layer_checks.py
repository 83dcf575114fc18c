"""Bad arguments of the transformer ops: one error that says what came and what was expected; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.ops import norm, pool, rope, rows

from .refusing import refused_by

Arguments = dict[str, Any]


def norm_modulate() -> Arguments:
    return {
        "out": torch.randn(2, 5, 8), "x": torch.randn(2, 5, 8), "shift": torch.randn(2, 3, 8),
        "scale": torch.randn(1, 3, 8), "rows": torch.tensor([0, 2, 1, 1, 0]), "eps": 1e-6,
    }  # fmt: skip


def residual_norm_modulate() -> Arguments:
    added = {"sum": torch.randn(2, 5, 8), "y": torch.randn(2, 5, 8), "gate": torch.randn(2, 3, 8)}
    return added | norm_modulate()


def rms_norm() -> Arguments:
    return {"out": torch.randn(2, 5, 8), "x": torch.randn(2, 5, 8), "weight": torch.randn(8), "eps": 1e-6}


def qk_norm_rope_store() -> Arguments:
    caches = {name: torch.randn(2, 9, 2, 4) for name in ("k_cache", "v_cache")}
    given = {name: torch.randn(2, 5, 8) for name in ("q", "k", "v")}
    weights = {name: torch.randn(8) for name in ("q_weight", "k_weight")}
    return {"q_out": torch.randn(2, 5, 2, 4)} | caches | given | weights | {
        "cos": torch.randn(5, 2), "sin": torch.randn(5, 2), "slots": torch.tensor([8, 0, 3, 4, 7]), "eps": 1e-6
    }  # fmt: skip


def gather_rows() -> Arguments:
    return {"out": torch.randn(2, 5, 3, 4), "x": torch.randn(2, 9, 3, 4), "rows": torch.tensor([8, 0, 3, 3, 7])}


def scatter_rows() -> Arguments:
    return {"x": torch.randn(2, 9, 3, 4), "rows": torch.tensor([8, 0, 3, 4, 7]), "src": torch.randn(2, 5, 3, 4)}


def confidence_pool() -> Arguments:
    return {
        "out": torch.randn(2, 2, 8), "query": torch.randn(2, 4), "keys": torch.randn(2, 5, 8),
        "key_weight": torch.randn(8), "tokens": torch.randn(2, 5, 8), "eps": 1e-6,
    }  # fmt: skip


MAKE: dict[str, Callable[[], Arguments]] = {
    make.__name__: make
    for make in (
        norm_modulate, residual_norm_modulate, rms_norm, qk_norm_rope_store, gather_rows, scatter_rows, confidence_pool,
    )
}
FUNCTIONS = {op: next(getattr(f, op) for f in (norm, pool, rope, rows) if hasattr(f, op)) for op in MAKE}
OUTPUTS = {
    "norm_modulate": ("out",), "residual_norm_modulate": ("sum", "out"), "rms_norm": ("out",), "gather_rows": ("out",),
    "qk_norm_rope_store": ("q_out", "k_cache", "v_cache"), "scatter_rows": ("x",), "confidence_pool": ("out",),
}  # fmt: skip
TENSORS = [(op, name) for op, make in MAKE.items() for name, value in make().items() if isinstance(value, Tensor)]


def refused(op: str, arguments: Arguments, *fragments: str, error: type[Exception] = ShapeError) -> None:
    refused_by(FUNCTIONS[op], arguments, *fragments, error=error)


@pytest.mark.parametrize("op", MAKE)
@pytest.mark.parametrize("backend", [None, "native", "torch"])
def test_the_arguments_these_tests_spoil_are_good(op: str, backend: str | None) -> None:
    FUNCTIONS[op](**MAKE[op](), backend=backend)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_type(op: str, name: str) -> None:
    refused(op, MAKE[op]() | {name: [1.0, 2.0]}, f"{name} is a list, expected a torch.Tensor")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_device(op: str, name: str) -> None:
    arguments = MAKE[op]()
    arguments[name] = arguments[name].to("meta")
    refused(op, arguments, " is on ", "expected ")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_dtype(op: str, name: str) -> None:
    """Ops that move rows take any dtype, but the same for all."""
    arguments = MAKE[op]()
    wrong = torch.float64 if arguments[name].is_floating_point() else torch.int32
    arguments[name] = arguments[name].to(wrong)
    moves = op in ("gather_rows", "scatter_rows") and name != "rows"
    refused(op, arguments, "expected float" if moves else f"{name} has dtype {wrong}, expected ")


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_wrong_strides(op: str, name: str) -> None:
    arguments = MAKE[op]()
    value = arguments[name]
    arguments[name] = value.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(arguments[name], value)
    refused(op, arguments, f"{name} has strides [", "call .contiguous()")


@pytest.mark.parametrize(("op", "name"), [t for t in TENSORS if MAKE[t[0]]()[t[1]].is_floating_point()])
def test_gradients_are_refused(op: str, name: str) -> None:
    arguments = MAKE[op]()
    arguments[name].requires_grad_()
    refused(op, arguments, "not differentiable", error=OptionError)
    with torch.no_grad():
        FUNCTIONS[op](**arguments)


@pytest.mark.parametrize(
    ("op", "first", "second"),
    [(op, a, b) for op in MAKE for a in OUTPUTS[op] for b in MAKE[op]() if a != b and (op, b) in TENSORS],
)
def test_outputs_that_share_memory_with_others(op: str, first: str, second: str) -> None:
    """The two start in the same byte; elements of different sizes are laid over each other."""
    arguments = MAKE[op]()
    a, b = arguments[first], arguments[second]
    if {first, second} == {"sum", "x"} or (op, second) == ("rms_norm", "x"):
        memory = torch.randn(2, 6, 8)  # the very same tensor is allowed here, one that is shifted is not
        arguments[first], arguments[second] = memory[:, :5], memory[:, 1:]
    else:
        memory = torch.zeros(2000, dtype=torch.int64)
        for name, value in ((first, a), (second, b)):
            arguments[name] = memory.view(value.dtype)[: value.numel()].view(value.shape)
        if second in ("rows", "slots"):
            memory[: b.numel()] = b
    refused(op, arguments, first, second, "overlap in memory")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in MAKE for name in OUTPUTS[op]])
def test_outputs_that_share_memory_with_themselves(op: str, name: str) -> None:
    arguments = MAKE[op]()
    arguments[name] = arguments[name][:1].expand_as(arguments[name])
    refused(op, arguments, f"{name} has strides [0, ", "elements share memory")


def rand(**shapes: tuple[int, ...]) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update({name: torch.randn(shape) for name, shape in shapes.items()})


def given(**values: object) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update(values)


X = (2, 5, 8)
SPOILT: dict[str, list[tuple[Callable[[Arguments], None], str]]] = {
    "norm_modulate": [
        (rand(x=(2, 5)), "x has shape [2, 5], expected 3 dimensions [B, A, C]"),
        (rand(x=(2, 4, 8)), "x has shape [2, 4, 8], expected [B=2 as in out, A=5 as in out, C=8 as in out]"),
        (rand(shift=(3, 3, 8)), "shift has shape [3, 3, 8], expected [B=2 as in out or 1, R or 1, C=8"),
        (rand(scale=(2, 2, 8)), "scale has shape [2, 2, 8], expected [B=2 as in out or 1, R=3 as in shift"),
        (rand(scale=(2, 3, 1)), "scale has shape [2, 3, 1], expected"),
        (given(rows=None), "rows is None, expected a row for each token, as the tables have R = 3"),
        (given(rows=torch.arange(3)), "rows has shape [3], expected [A=5 as in out]"),
        (given(rows=torch.tensor([0, 1, 2, 3, 0])), "rows[3] is 3, expected 0 to 2"),
        (given(rows=torch.tensor([0, 1, 2, 0, -1])), "rows[4] is -1, expected 0 to 2"),
    ],
    "residual_norm_modulate": [
        (rand(gate=(2, 4, 8)), "shift has shape [2, 3, 8], expected [B=2 as in sum or 1, R=4 as in"),
        (rand(y=(1, 5, 8)), "y has shape [1, 5, 8], expected [B=2 as in sum"),
        (given(sum=torch.randn(X).bfloat16()), "out has dtype torch.float32, expected bfloat16 as"),
        (given(rows=torch.full((5,), 3)), "rows[0] is 3, expected 0 to 2"),
    ],
    "rms_norm": [
        (rand(x=(2, 4, 8)), "x has shape [2, 4, 8], expected [B=2 as in out, A=5 as in out, C=8 as in out]"),
        (rand(weight=(7,)), "weight has shape [7], expected [C=8 as in out]"),
        (given(x=torch.randn(X).bfloat16()), "x has dtype torch.bfloat16, expected float32 as out"),
    ],
    "qk_norm_rope_store": [
        (rand(q_out=(2, 5, 2, 3), k_cache=(2, 9, 2, 3), v_cache=(2, 9, 2, 3)),
         "q_out has D = 3, expected an even number"),
        (rand(k=(2, 5, 9)), "k has shape [2, 5, 9], expected [B=2 as in q_out, A=5 as in q_out, C=8"),
        (rand(v_cache=(2, 8, 2, 4)), "v_cache has shape [2, 8, 2, 4], expected [B=2 as in q_out, N=9"),
        (rand(k_cache=(2, 9, 4, 2)), "k_cache has shape [2, 9, 4, 2]"),
        (rand(k_weight=(4,)), "k_weight has shape [4], expected [C=8 as in q_out]"),
        (rand(sin=(5, 4)), "sin has shape [5, 4], expected [A=5 as in q_out, D/2=2 as in q_out]"),
        (lambda a: a.update(cos=torch.randn(5, 4)[:, :2]), "cos has strides [4, 1] for shape [5, 2], exp"),
        (given(slots=torch.tensor([8, 0, 9, 4, 7])), "slots[2] is 9, expected 0 to 8"),
        (given(slots=torch.tensor([8, 0, 3, 8, 7])), "slots[3] is 8 like slots[0], expected distinct"),
        (lambda a: a.update(slots=None, k_cache=a["k_cache"][:, :4], v_cache=a["v_cache"][:, :4]),
         "k_cache has N = 4 rows, expected at least A = 5 where slots is None"),
        (given(k_weight=torch.ones(8).bfloat16()), "k_weight has dtype torch.bfloat16, expected float32"),
    ],
    "gather_rows": [
        (rand(x=(9,)), "x has shape [9], expected 2 or more dimensions [B, N, ...]"),
        (rand(x=(2, 9, 12)), "x has shape [2, 9, 12], expected [B=2 as in out, N, ...[3, 4] as in out]"),
        (given(rows=torch.tensor([0, 1, 2, 3, 9])), "rows[4] is 9, expected 0 to 8"),
        (lambda a: a.update(x=torch.randn(2, 9, 4, 3).mT),
         "x has strides [108, 12, 1, 3] for shape [2, 9, 3, 4], expected rows without gaps from dimension 2 on"),
    ],
    "scatter_rows": [
        (given(rows=torch.tensor([0, 1, 2, 3, 1])), "rows[4] is 1 like rows[1], expected distinct rows"),
        (given(rows=torch.tensor([0, 1, 2, 3, 2**40])), "rows[4] is 1099511627776, expected 0 to 8"),
        (rand(src=(2, 4, 3, 4)), "src has shape [2, 4, 3, 4], expected [B=2 as in x, A=5 as in rows, ...[3, 4]"),
    ],
    "confidence_pool": [
        (rand(query=(2, 3)), "query has shape [2, 3], expected [H=2 as in out, D=4 as in out]"),
        (rand(out=(2, 3, 8)), "out has C = 8, expected a multiple of H = 3"),
        (rand(tokens=(2, 4, 8)), "tokens has shape [2, 4, 8], expected [B=2 as in out, A=5 as in keys"),
        (rand(keys=(2, 0, 8), tokens=(2, 0, 8)), "keys and tokens hold A = 0 rows, expected at least one"),
        (lambda a: a.update(query=torch.randn(2, 5)[:, :4]), "query has strides [5, 1] for shape [2, 4], exp"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in SPOILT.items() for case in range(len(cases))])
def test_bad_arguments(op: str, case: int) -> None:
    spoil, message = SPOILT[op][case]
    arguments = MAKE[op]()
    spoil(arguments)
    refused(op, arguments, message)


def test_rows_that_are_not_used_are_not_read() -> None:
    """With tables of one row nothing depends on them."""
    arguments = norm_modulate() | {name: torch.randn(1, 1, 8) for name in ("shift", "scale")}
    norm.norm_modulate(**arguments | {"rows": torch.full((5,), 99)})
    expected = arguments["out"].clone()
    norm.norm_modulate(**arguments | {"rows": None})
    assert torch.equal(arguments["out"], expected)
