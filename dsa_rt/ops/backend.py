"""Which backend serves an op: decided here, by device, dtype, shape and what is installed, and nowhere else.

What can serve a call is code, and so is their order, up to what :data:`MOVABLE` leaves to the table of measurements in
:mod:`dsa_rt.ops.choices`.

``native`` is the compiled module ``dsa_rt._native``; ``torch`` is the framework, running the definition of
the op in :mod:`dsa_rt.reference`; any other name is a backend that brings its own functions. A caller may ask for one
by name: it is used, or refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from dsa_rt.errors import OptionError
from dsa_rt.ops import choices, fused, triton

try:
    from dsa_rt import _native as native
except ImportError as error:  # a source tree that was never built
    raise ImportError(
        f"the native module dsa_rt._native cannot be imported ({error}); build it with 'pip install -e .'"
    ) from error

_FOUND: dict[tuple[str, str, torch.dtype, str | None], tuple[object, list[Any]]] = {}  # see candidates
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. Empty ``devices`` or ``dtypes`` mean any; ``note`` says what it is made of.

    ``yields``: for which dtypes it is left to the next one, though it could serve them, and why. ``missing``: why it
    cannot run on this machine at all. ``run``: what serves a call, with the arguments of the op's schema, where that is
    neither the native module nor the definition. ``refuses``: of the same arguments, why this one call is left to the
    next one, or None; for what device and dtype do not say. ``cpu_only``: no build has it for another device.
    """

    backend: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    note: str = ""
    yields: tuple[tuple[torch.dtype, str], ...] = ()
    missing: str = ""
    run: Callable[..., None] | None = None
    refuses: Callable[..., str | None] | None = None
    cpu_only: bool = False

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Why this cannot serve tensors of that device and dtype; None when it can."""
        if self.missing:
            return self.missing
        if self.devices and device not in self.devices:
            if self.backend == "native" and device == "cuda" and not self.cpu_only and not native.build_info()["cuda"]:
                return "the native module was built without CUDA kernels (no nvcc was found)"
            return f"{self.backend} has no kernel for device {device!r}, only for {', '.join(self.devices)}"
        if self.dtypes and dtype not in self.dtypes:
            return f"{self.backend} has no kernel for {dtype}, only for {', '.join(map(str, self.dtypes))}"
        return None

    def passed_over(self, device: str, dtype: torch.dtype) -> str | None:
        """Why this is not what serves such tensors unless asked for; None when it is."""
        return self.refusal(device, dtype) or dict(self.yields).get(dtype)


@dataclass(frozen=True)
class Choice:
    """A row of :func:`describe`: which backend serves an op on a device, and why."""

    op: str
    device: str
    backend: str
    reason: str


def _native_note() -> str:
    info = native.build_info()
    threads = "PyTorch's own threads" if info["threads"] == "openmp" else "threads of its own"
    return f"{info['instruction_sets'][0]} kernels on {threads}"


_HALVES = (torch.bfloat16, torch.float16)
_NO_HALF = (torch.float32, torch.bfloat16)
_NATIVE_DEVICES = ("cpu", "cuda") if native.build_info()["cuda"] else ("cpu",)
_DEFINITION = Implementation("torch", note="the definition in dsa_rt.reference")
_FLOAT_ROWS = (Implementation("native", _NATIVE_DEVICES, _FLOATS, _native_note()), _DEFINITION)
_ANY_ROWS = (Implementation("native", _NATIVE_DEVICES, note=_native_note()), _DEFINITION)


def _cpu_products() -> Implementation:
    """What multiplies matrices: left to the framework where that has instructions which the native kernels lack."""
    info = native.build_info()
    yields: tuple[tuple[torch.dtype, str], ...] = ()
    if info["instruction_sets"][0] == "generic":
        yields = tuple((dtype, "native has no vector kernels for this processor") for dtype in _FLOATS)
    elif info["amx_bf16"]:
        yields = ((torch.bfloat16, "native does not use this processor's matrix unit (AMX), the framework does"),)
    return Implementation("native", ("cpu",), _FLOATS, _native_note(), yields)


def _attention() -> tuple[Implementation, ...]:
    """Measured on Zen 5 (bench.ops, one core): native is 4 to 5 times as fast as the framework's fused kernel with bf16
    dot products, 2 to 2.7 times with AVX-512, 1.2 to 1.5 with AVX2, and half as fast without either."""
    rows = [_cpu_products(), *_hopper("CUDA kernel for compute capability 9.0, D 64 and 128", _HALVES)]
    rows.append(Implementation("torch", note="the framework's fused kernel"))
    others = [
        Implementation(name, ("cuda",), _HALVES, kernel.note, missing=kernel.missing, run=kernel.run,
                       refuses=kernel.refuses)
        for name, kernel in fused.KERNELS.items()
    ]  # fmt: skip
    return (*rows, *others)


def _hopper(note: str, dtypes: tuple[torch.dtype, ...]) -> tuple[Implementation, ...]:
    """Attention on compute capability 9.0, where the native module has it."""
    if not native.build_info()["cuda"]:
        return ()
    return (Implementation("native", ("cuda",), dtypes, note, refuses=_not_for_hopper),)


def _not_for_hopper(out: Tensor, *_: Any) -> str | None:
    """What the module would find too, but later."""
    if torch.cuda.get_device_capability(out.device) != (9, 0):
        return f"{torch.cuda.get_device_name(out.device)} is no device of compute capability 9.0"
    return None if out.shape[3] in (64, 128) else f"the head dimension is {out.shape[3]}, expected 64 or 128"


def _triton(op: str, **others: Any) -> Implementation:
    missing = "" if triton.installed() else "Triton is not installed"
    others = {"note": "Triton kernels"} | others
    return Implementation("triton", ("cuda",), missing=missing, run=triton.runner(op), **others)


def _fp8_attention() -> tuple[Implementation, ...]:
    """With K and V in FP8. Triton's weights are rounded with their values' scales, which fp16 might not hold."""
    on_hopper = "CUDA kernel of E4M3 products for compute capability 9.0, D 64 and 128"
    with_triton = "Triton kernels for compute capability 8.9 and later, D to 128"
    return (
        Implementation("native", ("cpu",), _FLOATS, _native_note()),
        *_hopper(on_hopper, (torch.bfloat16,)),
        _triton("active_attention_fp8", dtypes=_NO_HALF, note=with_triton, refuses=_not_in_e4m3),
        _DEFINITION,
    )


def _not_in_e4m3(out: Tensor, *_: Any) -> str | None:
    """Why Triton's kernel does not take a call with K and V in FP8."""
    if torch.cuda.get_device_capability(out.device) < (8, 9):
        return f"{torch.cuda.get_device_name(out.device)} has no E4M3, compute capability 8.9 or later has"
    return None if out.shape[3] <= 128 else f"the head dimension is {out.shape[3]}, expected at most 128"


_BEFORE_TRITON = {
    "philox_normal": _FLOAT_ROWS,
    "renoise": _FLOAT_ROWS,
    "cached_step": _FLOAT_ROWS,
    "exit_decision": _FLOAT_ROWS,
    "norm_modulate": _FLOAT_ROWS,
    "residual_norm_modulate": _FLOAT_ROWS,
    "rms_norm": _FLOAT_ROWS,
    "qk_norm_rope_store": _FLOAT_ROWS,
    "active_attention": _attention(),
    "gather_rows": _ANY_ROWS,
    "scatter_rows": _ANY_ROWS,
    "confidence_pool": _FLOAT_ROWS,
    "linear": (replace(_cpu_products(), cpu_only=True), _DEFINITION),
}
# Best first. What follows torch serves where it is asked for, or where a measurement puts it first.
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    op: (*rows, _triton(op)) if op in triton.FAMILIES else rows for op, rows in _BEFORE_TRITON.items()
} | {
    "quantize_rows": (_FLOAT_ROWS[0], _triton("quantize_rows", dtypes=_NO_HALF), _DEFINITION),
    "active_attention_fp8": _fp8_attention(),
}
# What the table of measurements may put first. Nothing on a CPU: native linear and attention keep serving there even
# where the framework is a few percent faster, since the bits of their rows do not depend on how many rows there are,
# and recorded passes hold native ops alone.
MOVABLE: dict[tuple[str, str], tuple[str, ...]] = {
    (op, "cuda"): ("native", "triton") for op in choices.SIZES
} | {("active_attention", "cuda"): ("native", *fused.KERNELS, "triton")}
MEASURED = choices.index(choices.read(choices.PATH, MOVABLE))
_DECIDED: dict[tuple[object, ...], list[Implementation]] = {}  # op, device, dtype, shapes -> what can serve, best first
_MOST_DECIDED = 4096  # active sets of ever new sizes must not fill the memory


def choose(op: str, device: str, dtype: torch.dtype, backend: str | None = None) -> str:
    """The backend that runs ``op`` for tensors of that device type and dtype; the first one, if several could, up to
    calls that a row of the table of measurements covers.

    With ``backend`` that one, or :class:`OptionError` with the reason why it cannot.
    """
    return candidates(op, device, dtype, backend)[0].backend


def candidates(op: str, device: str, dtype: torch.dtype, backend: str | None) -> list[Implementation]:
    """What can serve such tensors, best first; one at least. Kept for as long as the op's row of the table is the same
    object."""
    asked = (op, device, dtype, backend)
    if is_dynamo_compiling():  # which does not compare tuples by identity
        return _find(*asked)
    row, found = _FOUND.get(asked, (None, []))
    if row is not IMPLEMENTATIONS[op]:
        found = _find(*asked)
        _FOUND[asked] = IMPLEMENTATIONS[op], found
    return found


def _find(op: str, device: str, dtype: torch.dtype, backend: str | None) -> list[Implementation]:
    implementations = IMPLEMENTATIONS[op]
    if backend is None:
        able = [i for i in implementations if i.passed_over(device, dtype) is None]
        if able:
            return able
        reasons = "; ".join(str(i.passed_over(device, dtype)) for i in implementations)
        raise OptionError(f"{op}: no backend serves {dtype} on {device!r}: {reasons}")
    asked = [i for i in implementations if i.backend == backend]
    if not asked:
        known = ", ".join(dict.fromkeys(i.backend for i in implementations))
        raise OptionError(f"{op}: unknown backend {backend!r}, expected one of {known}")
    able = [i for i in asked if i.refusal(device, dtype) is None]
    if able:
        return able
    nearest = next((i for i in asked if device in i.devices), asked[0])
    raise OptionError(f"{op}: backend {backend!r} was asked for, but {nearest.refusal(device, dtype)}")


def for_call(op: str, decides: Tensor, call: tuple[Any, ...], backend: str | None) -> list[Implementation]:
    """:func:`candidates` for a call, by device and dtype of ``decides``. Unless one is asked for, that comes first
    which a row of the table of measurements names for this call. Remembered by shapes."""
    if backend is not None or decides.device.type not in MEASURED:
        return candidates(op, decides.device.type, decides.dtype, backend)
    if torch.compiler.is_compiling():
        return _measured_first(op, decides, call)
    key = (op, decides.device, decides.dtype, *choices.shapes(op, call))
    found = _DECIDED.get(key)
    if found is None:
        if len(_DECIDED) >= _MOST_DECIDED:
            _DECIDED.clear()
        found = _DECIDED[key] = _measured_first(op, decides, call)
    return found


def _measured_first(op: str, decides: Tensor, call: tuple[Any, ...]) -> list[Implementation]:
    able = candidates(op, decides.device.type, decides.dtype, None)
    row = choices.find(MEASURED, op, decides, call)
    return able if row is None else sorted(able, key=lambda i: i.backend != row.backend)


def has_kernel(op: str, place: torch.device, dtype: torch.dtype) -> bool:
    """Whether anything but the framework may serve such tensors, for some shape, unless asked for."""
    return choose(op, place.type, dtype) != "torch" or bool(choices.of(MEASURED, op, place, dtype))


def describe(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Choice]:
    """What serves each op on a device, and why, for ``dsa-rt doctor``. Where the table of measurements puts another
    backend first for some shapes, both are named: "native or cudnn"."""
    rows = []
    for op, implementations in IMPLEMENTATIONS.items():
        passed: dict[str, str] = {}
        for implementation in implementations:
            why_not = implementation.passed_over(device, dtype)
            if why_not is None:
                reason = implementation.note
                if device == "cuda" and "cpu" in implementation.devices:
                    reason = f"CUDA kernels for {native.build_info()['cuda']}"
                passed.pop(implementation.backend, None)  # the same one for other devices
                found = Choice(op, device, implementation.backend, "; ".join([*passed.values(), reason]))
                rows.append(_with_measured(found, dtype))
                break
            passed[implementation.backend] = why_not
    return rows


def _with_measured(found: Choice, dtype: torch.dtype) -> Choice:
    """With what rows of the table of measurements change, and why."""
    if found.device not in MEASURED or (found.device == "cuda" and not torch.cuda.is_available()):
        return found
    place = torch.device(found.device)
    if place.type == "cuda":
        place = torch.device("cuda", torch.cuda.current_device())
    backends, reasons = [found.backend], [found.reason]
    for row in choices.of(MEASURED, found.op, place, dtype):
        named = [i.passed_over(found.device, dtype) for i in IMPLEMENTATIONS[found.op] if i.backend == row.backend]
        where, why_not = row.where(), "" if None in named else f", but {named[0]}"
        reasons.append(f"{where + ': ' if where else ''}{row.backend}, {row.why()}{why_not}")
        if not why_not:
            backends = [*backends, row.backend] if where else [row.backend]
    return Choice(found.op, found.device, " or ".join(dict.fromkeys(backends)), "; ".join(reasons))
