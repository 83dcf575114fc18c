"""Which backend serves an op: decided here, by device, dtype and what is installed, and nowhere else.

``native`` is the compiled module ``dsa_rt._native``; ``torch`` is the framework, running the definition of
the op in :mod:`dsa_rt.reference`. A caller may ask for one by name: it is used, or refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_rt.errors import OptionError

try:
    from dsa_rt import _native as native
except ImportError as error:  # a source tree that was never built
    raise ImportError(
        f"the native module dsa_rt._native cannot be imported ({error}); build it with 'pip install -e .'"
    ) from error

_LIBRARY = torch.library.Library("dsa_rt", "DEF")
_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. Empty ``devices`` or ``dtypes`` mean any; ``note`` says what it is made of.

    ``yields``: for which dtypes it is left to the next one, though it could serve them, and why.
    """

    backend: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    note: str = ""
    yields: tuple[tuple[torch.dtype, str], ...] = ()

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Why this cannot serve tensors of that device and dtype; None when it can."""
        if self.devices and device not in self.devices:
            if self.backend == "native" and device == "cuda" and not native.build_info()["cuda"]:
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


_NATIVE_DEVICES = ("cpu", "cuda") if native.build_info()["cuda"] else ("cpu",)
_STEP = (
    Implementation("native", _NATIVE_DEVICES, _FLOATS, _native_note()),
    Implementation("torch", note="the definition in dsa_rt.reference"),
)
_FRAMEWORK = (Implementation("torch", note="the framework's kernels; no native version yet"),)


def _attention() -> tuple[Implementation, ...]:
    """Measured on Zen 5 (bench.ops, one core): native is 4 to 5 times as fast as the framework's fused kernel with bf16
    dot products, 2 to 2.7 times with AVX-512, 1.2 to 1.5 with AVX2, and half as fast without either."""
    info = native.build_info()
    yields: tuple[tuple[torch.dtype, str], ...] = ()
    if info["instruction_sets"][0] == "generic":
        yields = tuple((dtype, "native has no vector kernels for this processor") for dtype in _FLOATS)
    elif info["amx_bf16"]:
        yields = ((torch.bfloat16, "native does not use this processor's matrix unit (AMX), the framework does"),)
    return (
        Implementation("native", ("cpu",), _FLOATS, _native_note(), yields),
        Implementation("torch", note="the framework's fused kernel"),
    )


# Best first. Rows are added here as native versions come in.
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "philox_normal": _STEP,
    "renoise": _STEP,
    "cached_step": _STEP,
    "exit_decision": _STEP,
    "norm_modulate": _FRAMEWORK,
    "residual_norm_modulate": _FRAMEWORK,
    "qk_norm_rope": _FRAMEWORK,
    "active_attention": _attention(),
    "confidence_pool": _FRAMEWORK,
}


def choose(op: str, device: str, dtype: torch.dtype, backend: str | None = None) -> str:
    """The backend that runs ``op`` for tensors of that device type and dtype.

    With ``backend`` that one, or :class:`OptionError` with the reason why it cannot.
    """
    implementations = IMPLEMENTATIONS[op]
    if backend is None:
        for implementation in implementations:
            if implementation.passed_over(device, dtype) is None:
                return implementation.backend
        reasons = "; ".join(str(i.passed_over(device, dtype)) for i in implementations)
        raise OptionError(f"{op}: no backend serves {dtype} on {device!r}: {reasons}")
    for implementation in implementations:
        if implementation.backend == backend:
            reason = implementation.refusal(device, dtype)
            if reason is None:
                return backend
            raise OptionError(f"{op}: backend {backend!r} was asked for, but {reason}")
    known = ", ".join(i.backend for i in implementations)
    raise OptionError(f"{op}: unknown backend {backend!r}, expected one of {known}")


def describe(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Choice]:
    """What serves each op on a device, and why, for ``dsa-rt doctor``."""
    rows = []
    for op, implementations in IMPLEMENTATIONS.items():
        passed: list[str] = []
        for implementation in implementations:
            why_not = implementation.passed_over(device, dtype)
            if why_not is None:
                reason = implementation.note
                if device == "cuda" and implementation.backend == "native":
                    reason = f"CUDA kernels for {native.build_info()['cuda']}"
                rows.append(Choice(op, device, implementation.backend, "; ".join([*passed, reason])))
                break
            passed.append(why_not)
    return rows


def register(schema: str) -> None:
    """Registers ``dsa_rt::<schema>``, served by the native function of that name: a mutating op, no result.

    The schema's arguments are those of the native function, in its order. The fake does nothing, since
    outputs are arguments: the op is opaque to ``torch.compile`` and stays in its graph.
    """
    name = schema.partition("(")[0]
    function: Callable[..., None] = getattr(native, name)

    def run_cpu(*arguments: Any) -> None:
        function(*arguments, threads=torch.get_num_threads())

    def run_cuda(*arguments: Any) -> None:
        with torch.cuda.device(arguments[0].device):
            function(*arguments, stream=torch.cuda.current_stream().cuda_stream)

    def fake(*arguments: Any) -> None:
        return None

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run_cpu, "CPU")
    if native.build_info()["cuda"]:
        _LIBRARY.impl(name, run_cuda, "CUDA")
    torch.library.register_fake(f"dsa_rt::{name}", fake, lib=_LIBRARY)


def ran_native(
    op: str, backend: str | None, decides: Tensor, tensors: tuple[Tensor | None, ...], *scalars: float
) -> bool:
    """Runs the call in the native module where that is the choice; else checks it, for the caller to run.

    The choice goes by device and dtype of ``decides``; tensors and scalars are in the order of the schema.
    """
    # What is no tensor, or on another device, goes to the check, which says so: the dispatcher would complain
    # in its own words, or take a kernel by one tensor of many.
    uniform = isinstance(decides, Tensor) and all(
        t is None or (isinstance(t, Tensor) and t.device == decides.device) for t in tensors
    )
    if uniform and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise OptionError(f"{op}: not differentiable; use torch.no_grad(), or dsa_rt.reference to train")
    if uniform and choose(op, decides.device.type, decides.dtype, backend) == "native":
        getattr(torch.ops.dsa_rt, op)(*tensors, *scalars)
        return True
    if not torch.compiler.is_compiling():
        getattr(native, f"check_{op}")(*tensors, *scalars)
    return False
