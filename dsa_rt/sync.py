"""K/V of a many-step run in which steps compute some of the tokens (HSA, section "K/V synchronisation").

Rows are in the order of :attr:`dsa_rt.policy.StepPlan.layout`: conditions, then the groups from the smallest
budget to the baseline. A partial step makes fresh K and V for its own rows and reads the others as they were left.
Only parts that some partial step skips are stored; the baseline is fresh in every pass. Stored and fresh rows meet in
one pair of buffers [B, N, H, D] that all layers and both guidance branches share, so that attention reads contiguous
memory and fresh rows are written where they are read. K is kept after qk-norm and RoPE, V as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_rt.cache import destination
from dsa_rt.errors import OptionError
from dsa_rt.kv_rows import Float8Rows, HostRows, ModelRows, Rows, fp8_blocks
from dsa_rt.plan import ActiveSet
from dsa_rt.policy.steps import StepPlan

STORAGES = ("model", "fp8", "host")
"""Where K/V is kept between steps: in the model's dtype, as FP8, or in host memory in the model's dtype."""


def sync_caches(
    plan: StepPlan, branches: int, layers: int, heads: int, head_dim: int, dtype: torch.dtype,
    device: torch.device | str = "cpu", storage: str = "model",
) -> list[SyncCache]:  # fmt: skip
    """A cache for each guidance branch, sharing one scratch; none where no step of the plan is partial.

    dtype: of the model, and of K and V as attention reads them. storage: one of :data:`STORAGES`.
    """
    _check(storage)
    if not plan.kept_rows:
        return []
    shape = (1, plan.tokens, heads, head_dim)
    scratch = (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
    caches = []
    for _ in range(branches):
        rows: Rows
        if storage == "fp8":
            rows = Float8Rows(layers, 1, plan.kept_rows, heads, head_dim, len(plan.layout), device)
        else:
            kind = HostRows if storage == "host" else ModelRows
            rows = kind(layers, 1, plan.kept_rows, heads, head_dim, dtype, device)
        caches.append(SyncCache(plan, rows, scratch))
    return caches


def sync_bytes(
    plan: StepPlan, branches: int, layers: int, heads: int, head_dim: int, dtype: torch.dtype, storage: str = "model",
    device: torch.device | str = "cpu",
) -> int:  # fmt: skip
    """Bytes that :func:`sync_caches` allocates on the device."""
    return _bytes(plan, branches, layers, heads, head_dim, dtype, storage, device)[0]


def sync_host_bytes(
    plan: StepPlan, branches: int, layers: int, heads: int, head_dim: int, dtype: torch.dtype, storage: str = "model",
    device: torch.device | str = "cpu",
) -> int:  # fmt: skip
    """Bytes that :func:`sync_caches` allocates in host memory beside a CUDA device; with the CPU as the device those
    are in :func:`sync_bytes`."""
    return _bytes(plan, branches, layers, heads, head_dim, dtype, storage, device)[1]


def _bytes(
    plan: StepPlan, branches: int, layers: int, heads: int, head_dim: int, dtype: torch.dtype, storage: str,
    device: torch.device | str,
) -> tuple[int, int]:  # fmt: skip
    _check(storage)
    if not plan.kept_rows:
        return 0, 0
    row = heads * head_dim * dtype.itemsize
    scratch, layer = 2 * plan.tokens * row, 2 * branches * plan.kept_rows * row
    if storage == "fp8":
        scales = 4 * fp8_blocks(plan.kept_rows, len(plan.layout))
        return scratch + 2 * branches * layers * heads * (plan.kept_rows * head_dim + scales), 0
    if storage == "model":
        return scratch + layers * layer, 0
    beside = torch.device(device).type == "cuda"
    return (scratch + layer, layers * layer) if beside else (scratch + (layers + 1) * layer, 0)


def _check(storage: str) -> None:
    if storage not in STORAGES:
        raise OptionError(f"K/V storage is {storage!r}; expected one of {', '.join(STORAGES)}")


class SyncCache:
    """Self-attention K/V of one guidance branch; what the model calls a cache.

    Two states: in *capture*, before tokens have groups, a full pass in token order is kept whole; after
    :meth:`arrange` rows are in the order of the plan's layout.
    """

    def __init__(self, plan: StepPlan, rows: Rows, scratch: tuple[Tensor, Tensor]) -> None:
        self.rows, self.scratch = rows, scratch
        self._parts = tuple(part for _, part in plan.layout)
        stale = [(number, group) for number, (group, _) in enumerate(plan.layout) if group in plan.stale]
        self._stored = {number: index for index, (number, _) in enumerate(stale)}
        self._lengths = [len(self._parts[number]) for number, _ in stale]
        self._capturing = plan.captures
        if self._capturing:
            rows.arrange([plan.tokens])
        else:
            rows.arrange(self._lengths)

    def arrange(self, order: Tensor) -> None:
        """Groups are known: rows captured in token order go to the parts of their groups. order [N] int64: the token of
        each row."""
        if not self._capturing:
            return
        k, v = self.scratch
        for layer in range(self.rows.layers):
            self.rows.arrange([k.shape[1]])
            self.rows.read_into(layer, 0, k, v)
            self.rows.arrange(self._lengths)
            for number, index in self._stored.items():
                part = order[self._parts[number].start : self._parts[number].stop]
                self.rows.write(layer, index, k.index_select(1, part), v.index_select(1, part))
        self._capturing = False

    def destination(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where the active rows of a layer go: K and V [B, N, H, D] and the row in them of each token, None for rows 0
        to A - 1."""
        return destination(*self.scratch, active)

    def attended(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor]:
        """K and V [B, N, H, D], once the active rows are written: the parts that ``active`` has none of are read from
        where they were stored, its own are stored if other steps will need them."""
        k, v = self.scratch
        if self._capturing:
            self.rows.write(layer, 0, k, v)
            return k, v
        for number, part in enumerate(self._parts):
            here = slice(part.start, part.stop)
            if part not in active.parts:
                self.rows.read_into(layer, self._stored[number], k[:, here], v[:, here])
            elif number in self._stored:
                self.rows.write(layer, self._stored[number], k[:, here], v[:, here])
        return k, v
