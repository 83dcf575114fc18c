"""How a call of an op gets to what serves it: the door of every function in :mod:`dsa_rt.ops`.

What serves it is decided in :mod:`dsa_rt.ops.backend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, get_num_threads, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack as _functorch_stack
from torch.compiler import is_dynamo_compiling

from dsa_rt import trace
from dsa_rt.errors import OptionError
from dsa_rt.ops import backend as backends
from dsa_rt.ops.backend import native

_LIBRARY = torch.library.Library("dsa_rt", "DEF")
_DIRECT: dict[str, Callable[..., bool]] = {}  # op -> the native function for a call that needs no dispatcher


def register(schema: str, scratch: Callable[..., int] | None = None) -> None:
    """Registers ``dsa_rt::<schema>``, served by the native function of that name: a mutating op, no result.

    The schema's arguments are those of the native function, in its order. The fake does nothing, since
    outputs are arguments: the op is opaque to ``torch.compile`` and stays in its graph. ``scratch``: of the same
    arguments, how many fp32 numbers the function takes on CUDA as its argument ``scratch``.
    """
    name = schema.partition("(")[0]
    function: Callable[..., None] = getattr(native, name)
    on_cuda = function if scratch is None else _bringing_scratch(function, scratch)

    def run_cpu(*arguments: Any) -> None:
        function(*arguments, threads=get_num_threads())

    def run_cuda(*arguments: Any) -> None:
        with torch.cuda.device(arguments[0].device):
            on_cuda(*arguments, stream=torch.cuda.current_stream().cuda_stream)

    def fake(*arguments: Any) -> None:
        return None

    _DIRECT[name] = _named_on_cpu(name, getattr(native, f"direct_{name}"))
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, trace.named(name, run_cpu), "CPU")
    if native.build_info()["cuda"]:
        _LIBRARY.impl(name, trace.named(name, run_cuda), "CUDA")
    torch.library.register_fake(f"dsa_rt::{name}", fake, lib=_LIBRARY)


def _named_on_cpu(name: str, direct: Callable[..., bool]) -> Callable[..., bool]:
    """The function in a range of that name; not for tensors elsewhere, whose way has one of its own."""
    named = trace.named(name, direct)
    if named is direct:
        return direct
    return lambda backend, decides, *call: getattr(decides, "is_cpu", False) and named(backend, decides, *call)


def _bringing_scratch(function: Callable[..., None], scratch: Callable[..., int]) -> Callable[..., None]:
    """The function with scratch from the framework's allocator, which its caller need not know."""

    def run(*arguments: Any, **options: Any) -> None:
        count = scratch(*arguments)
        memory = torch.empty(count, dtype=torch.float32, device=arguments[0].device) if count else None
        function(*arguments, scratch=memory, **options)  # by name: the dispatcher leaves last arguments out

    return run


def _native_first(op: str, dtype: torch.dtype, backend: str | None) -> bool:
    """Whether the native CPU kernels serve such tensors, whatever else the arguments are."""
    if "cpu" in backends.MEASURED:
        return False
    try:
        first = backends.candidates(op, "cpu", dtype, backend)[0]
    except OptionError:  # what is wrong with the tensors comes first
        return False
    return first.backend == "native" and first.refuses is None


# What would miss a call that passes by the dispatcher, beside Dynamo's tracing: a mode, functorch, torch.jit's tracing,
# a profiler. Subclasses and gradients that are wanted are found among the arguments.
native.direct_calls(
    listeners=(
        _len_torch_dispatch_stack, _len_torch_function_stack, _functorch_stack, _get_tracing_state, _profiler_enabled,
    ),
    tables=vars(backends), native_first=_native_first, threads=get_num_threads, grad_enabled=is_grad_enabled,
)  # fmt: skip


def served(
    op: str, backend: str | None, decides: Tensor, tensors: tuple[Tensor | None, ...], others: tuple[Any, ...] = ()
) -> bool:
    """Runs the call in the backend of choice; where that is the definition, checks it, for the caller to run.

    The choice goes by device and dtype of ``decides``; ``tensors``, all on one device, and ``others``, among which
    tensors are on the CPU, are in the order of the schema. Native CPU kernels run without torch's dispatcher, which
    takes longer than small ops do, unless something listens there.
    """
    if not is_dynamo_compiling():
        try:
            if _DIRECT[op](backend, decides, tensors, others):
                return True
        except native.Unserved:
            pass
    # What is no tensor, or on another device, goes to the check, which says so: the dispatcher would complain
    # in its own words, or take a kernel by one tensor of many.
    uniform = isinstance(decides, Tensor) and all(
        t is None or (isinstance(t, Tensor) and t.device == decides.device) for t in tensors
    )
    uniform = uniform and all(not isinstance(t, Tensor) or t.is_cpu for t in others)
    if uniform and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise OptionError(f"{op}: not differentiable; use torch.no_grad(), or dsa_rt.reference to train")
    call = (*tensors, *others)
    if not uniform:
        getattr(native, f"check_{op}")(*call)
        return False
    candidates = backends.for_call(op, decides, call, backend)
    for chosen in candidates:
        why_not = None if chosen.refuses is None else chosen.refuses(*call)
        if why_not is not None:
            if chosen is candidates[-1]:
                raise OptionError(f"{op}: backend {chosen.backend!r} has no kernel for this: {why_not}")
        elif chosen.backend == "native":
            try:
                getattr(torch.ops.dsa_rt, op)(*call)
                return True
            except native.Unserved:
                if chosen is candidates[-1]:
                    raise
        else:
            if not torch.compiler.is_compiling():
                getattr(native, f"check_{op}")(*call)
            if chosen.run is None:
                return False
            chosen.run(*call)
            return True
    raise AssertionError("the last candidate serves the call or says why not")
