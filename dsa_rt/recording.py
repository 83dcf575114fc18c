"""A pass over static buffers, recorded once and replayed: on the CPU as a program of native ops, on CUDA as a graph.

A replay reads and writes the memory that the recorded call used, whatever its Python names are by then, and takes every
number that is no tensor as it was. New work goes in through the contents of the buffers. What a recording cannot hold
is run eagerly, as the function it came from, and says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsa_rt.ops.backend import native

_WARM_UPS = 3  # as PyTorch's own documentation has it: libraries choose and allocate in the first runs


@dataclass(frozen=True)
class Recorded:
    """What :func:`record` made of a pass.

    kind: "program" (one native call), "graph" (a CUDA graph) or "eager" (the function itself, for the ``reason``).
    replay: runs the pass again. function: what was recorded; kept, so that its buffers live as long as this. ops: names
    of a program's ops, in order. bytes: memory behind the tensors that a program holds.
    """

    kind: str
    function: Callable[[], object]
    replay: Callable[[], object]
    reason: str = ""
    ops: tuple[str, ...] = ()
    bytes: int = 0


class Recorder(Protocol):
    """What makes a pass replayable: :func:`record`, or another in its place."""

    def __call__(self, device: torch.device, function: Callable[[], None], *, pool: Any = None) -> Recorded: ...


def record(device: torch.device | str, function: Callable[[], object], *, pool: Any = None) -> Recorded:
    """Runs ``function`` and returns what replays it.

    ``function`` runs one pass with the ops of :mod:`dsa_rt.ops`, on this thread, over buffers that are there before it:
    it may take views of them, and makes no tensor. It is run once on the CPU; on CUDA :data:`_WARM_UPS` times, then
    captured, which computes nothing. ``pool``: of CUDA graphs (``torch.cuda.graph_pool_handle()``), shared by passes
    whose replays do not overlap; graphs captured largest first fit best.

    On the CPU any op of torch but a view makes the recording eager, also where one comes from an op of dsa_rt that has
    no kernel for the dtype or processor. A program's replay takes the number of threads that torch has by then. It
    raises what the ops raise for row numbers and segments that have become wrong, before that op writes, and stays
    usable; :class:`dsa_rt.errors.OptionError` where another thread replays the same program, or while this one records.
    A buffer must not be resized, and what Python reads of one without an op (``tolist``, ``numpy``) stays as it was. On
    CUDA, a failed capture makes the recording eager.

    An exception of ``function`` is raised as it is, but for one of the capture; out of memory is always raised.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _record_graph(device, function, pool)
    program, guard = native.Program(), _OnlyNative()

    def guarded() -> None:
        with guard:
            function()

    program.record(guarded)
    if guard.reason:
        return Recorded("eager", function, function, guard.reason)

    def replay() -> None:
        program.replay(torch.get_num_threads())

    return Recorded("program", function, replay, "", tuple(program.ops), program.bytes)


class _OnlyNative(TorchDispatchMode):
    """Notes the first op that a program does not hold: any but dsa_rt's own and views."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if not self.reason and op.namespace != "dsa_rt" and not _is_view(op, (args, kwargs), result):
            self.reason = f"{op} is no op of dsa_rt, and no view: a program cannot hold it"
        return result


def _is_view(op: Any, arguments: Any, result: Any) -> bool:
    """Whether the result only names memory of the arguments. The schema alone does not say: ``reshape`` may copy, and
    ``lift_fresh`` names a tensor that was just made."""
    if not op.is_view or op is torch.ops.aten.lift_fresh.default:
        return False
    given = {_address(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
    return all(isinstance(leaf, Tensor) and _address(leaf) in given for leaf in tree_leaves(result))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _record_graph(device: torch.device, function: Callable[[], object], pool: Any) -> Recorded:
    """By PyTorch's notes on CUDA graphs; not run on a GPU so far."""
    stream, graph = _capture_stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
        current.wait_stream(stream)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return Recorded("eager", function, function, f"the capture failed: {error}")
    return Recorded("graph", function, graph.replay)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: graphs share the memory of a pool only on one stream."""
    return torch.cuda.Stream(device)
