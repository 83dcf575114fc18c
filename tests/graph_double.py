"""A CUDA graph's double for the CPU: what it computes depends on the memory that the recorded call used, alone.

:func:`record` has the face of :func:`dsa_rt.recording.record` and takes every op of torch. A replay runs the recorded
ops again, on the recorded tensors, and copies what they make into the tensors that they made then: Python does not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dsa_rt.recording import Recorded

Pool = list["Graph"]
"""Graphs that share memory: a replay of one overwrites what the others made."""


def record(device: torch.device | str, function: Callable[[], object], *, pool: Pool | None = None) -> Recorded:
    """Runs ``function`` once and returns what replays it. RuntimeError where a capture would fail: at a value that is
    read on the host, at a tensor that is made from Python's numbers."""
    assert torch.device(device).type == "cpu"
    graph = Graph([] if pool is None else pool)
    with graph:
        function()
    return Recorded("graph", function, graph.replay)


class Graph(TorchDispatchMode):
    """Records the ops inside its block."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self._pool = pool
        pool.append(self)

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        if op is torch.ops.aten.lift_fresh.default or _reads(op, args, result):
            raise RuntimeError(f"{op} cannot be captured in a graph")
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [None if _address(leaf) in given else leaf for leaf in tree_leaves(result) if leaf is not None]
        if op is torch.ops.dsa_rt.active_attention.default and len(args) > 5:
            args = (*args[:5], tree_map_only(Tensor, Tensor.clone, args[5]))  # read on the host, with the launch
        if any(tensor is not None for tensor in made) or not op.is_view:
            self._calls.append((op, args, kwargs, made))
        return result

    def replay(self) -> None:
        """Runs the ops again. What graphs of the pool made before is lost, and memory that is not written shows it."""
        with torch.inference_mode():
            for graph in self._pool:
                for *_, made in graph._calls:
                    for tensor in made:
                        if tensor is not None:
                            _poison(tensor)
            for op, args, kwargs, made in self._calls:
                if "empty" in op.name():
                    continue
                for tensor, new in zip(made, tree_leaves(op(*args, **kwargs)), strict=False):
                    if tensor is not None:
                        tensor.copy_(new)


def _reads(op: Any, args: Any, result: Any) -> bool:
    """Whether the host has to wait for a value: it is the result, or says how large the result is."""
    if any(not isinstance(leaf, Tensor) for leaf in tree_leaves(result) if leaf is not None):
        return True
    if op is torch.ops.aten.index.Tensor:
        return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1]))
    return torch.Tag.dynamic_output_shape in op.tags


def _poison(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
