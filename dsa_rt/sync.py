"""K/V of a many-step run in which steps compute some of the tokens (HSA, section "K/V synchronisation").

Rows are in the order of :attr:`dsa_rt.policy.StepPlan.layout`: conditions, then the groups from the smallest
budget to the baseline. A partial step makes fresh K and V for its own rows and reads the others as they were left.
K is kept after qk-norm and RoPE, V as it is.

On the device all rows of all layers are kept where attention reads them, and fresh ones are written there; in FP8
they are rounded on the way, and only partial passes read them so. In host memory only parts that some partial step
skips are stored, as the baseline is fresh in every pass; stored and fresh rows meet in one pair of buffers
[B, N, H, D], those for K and V of a pass that keeps none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dsa_rt.arena import Arena
from dsa_rt.cache import destination
from dsa_rt.errors import OptionError
from dsa_rt.host_rows import HostRows
from dsa_rt.ops import layers as ops
from dsa_rt.ops import rows as moves
from dsa_rt.plan import ActiveSet
from dsa_rt.policy.steps import StepPlan

STORAGES = ("model", "fp8", "host")
"""Where K/V is kept between steps: in the model's dtype, as FP8, or in host memory in the model's dtype."""


def sync_caches(
    plan: StepPlan, branches: int, layers: int, heads: int, head_dim: int, dtype: torch.dtype,
    device: torch.device | str = "cpu", storage: str = "model", arena: Arena | None = None,
) -> list[SyncCache]:  # fmt: skip
    """A cache for each guidance branch; none where no step of the plan is partial.

    dtype: of the model, and of K and V as attention reads them. storage: one of :data:`STORAGES`. arena: where K/V on
    the device lie, and what passes work in, of which caches take :func:`spare_bytes`.
    """
    _check(storage)
    if not plan.kept_rows:
        return []
    shape, arena = (1, plan.tokens, heads, head_dim), arena or Arena(device)
    if storage == "host":
        return [
            HostKV(plan, HostRows(layers, 1, plan.kept_rows, heads, head_dim, dtype, device), arena, shape, dtype)
            for _ in range(branches)
        ]
    if storage == "fp8":
        return [Float8KV(plan, layers, shape, dtype, arena, branch) for branch in range(branches)]
    return [PlacedKV(plan, layers, shape, dtype, arena, branch) for branch in range(branches)]


def sync_bytes(
    plan: StepPlan, branches: int, layers: int, heads: int, head_dim: int, dtype: torch.dtype, storage: str = "model",
    device: torch.device | str = "cpu",
) -> int:  # fmt: skip
    """Bytes that :func:`sync_caches` allocates on the device, but for :func:`spare_bytes`."""
    return _bytes(plan, branches, layers, heads, head_dim, dtype, storage, device)[0]


def spare_bytes(plan: StepPlan, heads: int, head_dim: int, dtype: torch.dtype, storage: str = "model") -> int:
    """Bytes of an arena's working buffers that caches take between passes, and inside of them in place of K and V."""
    if not plan.kept_rows:
        return 0
    layers = {"model": plan.captures, "fp8": 2, "host": 2 + 2 * plan.captures}[storage]
    return layers * plan.tokens * heads * head_dim * dtype.itemsize


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
    if storage == "model":
        return 2 * layers * branches * plan.tokens * row, 0
    if storage == "fp8":
        return 2 * layers * branches * plan.tokens * heads * (head_dim + 4), 0
    layer = 2 * branches * plan.kept_rows * row
    beside = torch.device(device).type == "cuda"
    return (layer, layers * layer) if beside else ((layers + 1) * layer, 0)


def _check(storage: str) -> None:
    if storage not in STORAGES:
        raise OptionError(f"K/V storage is {storage!r}; expected one of {', '.join(STORAGES)}")


class SyncCache(ABC):
    """Self-attention K/V of one guidance branch; what the model calls a cache.

    Two states: before tokens have groups, full passes in token order; after :meth:`arrange` rows are in the order of
    the plan's layout.
    """

    @abstractmethod
    def restart(self) -> None:
        """Begin a clip: tokens have no groups."""

    @abstractmethod
    def arrange(self, order: Tensor) -> None:
        """Groups are known: rows kept in token order go to the parts of their groups. order [N] int64: the token of
        each row."""

    @abstractmethod
    def destination(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where the active rows of a layer go: K and V [B, N, H, D] and the row in them of each token, None for rows 0
        to A - 1."""

    @abstractmethod
    def attended(self, layer: int, active: ActiveSet) -> tuple[Tensor, ...]:
        """K and V [B, N, H, D], once the active rows are written; with their scales, where they are in FP8."""


class PlacedKV(SyncCache):
    """In the model's dtype, all rows of all layers [layers, B, N, H, D] where attention reads them."""

    def __init__(
        self, plan: StepPlan, layers: int, shape: tuple[int, ...], dtype: torch.dtype, arena: Arena, branch: int
    ) -> None:
        self.k, self.v = (arena.get(f"{name} of branch {branch}", (layers, *shape), dtype) for name in ("K", "V"))
        # Working memory of passes, which are over when groups are formed.
        self._spare = arena.get("keys", shape, dtype) if plan.captures else None

    def restart(self) -> None:
        """Nothing: what the last clip left is overwritten before it is read."""

    def arrange(self, order: Tensor) -> None:
        if self._spare is None:
            return
        for kept in (*self.k, *self.v):
            moves.gather_rows(self._spare, kept, order)
            kept.copy_(self._spare)

    def destination(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
        return destination(self.k[layer], self.v[layer], active)

    def attended(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor]:
        return self.k[layer], self.v[layer]


class Float8KV(SyncCache):
    """As E4M3 with an fp32 scale for each row and head, all rows of all layers [layers, B, N, H, D] where attention
    reads them. A layer's fresh rows are made in working memory, and a pass of all tokens attends to them there: rounded
    ones would move the velocity of every token (25 dB on the demo)."""

    def __init__(
        self, plan: StepPlan, layers: int, shape: tuple[int, ...], dtype: torch.dtype, arena: Arena, branch: int
    ) -> None:
        self._captures = plan.captures
        self.k, self.v, self.k_scale, self.v_scale = (
            arena.get(f"{name} of branch {branch}", (layers, *sizes), kind)
            for name, sizes, kind in (
                ("K", shape, torch.float8_e4m3fn), ("V", shape, torch.float8_e4m3fn),
                ("scales of K", shape[:-1], torch.float32), ("scales of V", shape[:-1], torch.float32),
            )
        )  # fmt: skip
        self._fresh = arena.get("keys", shape, dtype), arena.get("values", shape, dtype)

    def restart(self) -> None:
        """Nothing: what the last clip left is overwritten before it is read."""

    def arrange(self, order: Tensor) -> None:
        if not self._captures:
            return
        memory = self._fresh[0].view(torch.uint8).flatten()  # of passes, which are over when groups are formed
        for kept in (*self.k, *self.v, *self.k_scale, *self.v_scale):
            plain = kept.view(torch.uint8) if kept.dtype == torch.float8_e4m3fn else kept
            spare = memory[: plain.nbytes].view(plain.dtype).view(plain.shape)
            moves.gather_rows(spare, plain, order)
            plain.copy_(spare)

    def destination(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
        count = len(active.tokens)
        return self._fresh[0][:, :count], self._fresh[1][:, :count], None

    def attended(self, layer: int, active: ActiveSet) -> tuple[Tensor, ...]:
        """K and V [B, N, H, D] as E4M3, and their scales [B, N, H]; in a pass of all tokens as they were made."""
        kept = self.k[layer], self.v[layer], self.k_scale[layer], self.v_scale[layer]
        for fresh, values, scales in zip(self._fresh, kept[:2], kept[2:], strict=True):
            rows = fresh[:, : len(active.tokens)]
            if active.slot_range is None:
                ops.quantize_rows(values, scales, rows, active.slots)
            else:
                begin, end = active.slot_range
                ops.quantize_rows(values[:, begin:end], scales[:, begin:end], rows)
        return self._fresh if len(active.tokens) == self.k.shape[2] else kept


class HostKV(SyncCache):
    """In the model's dtype, parts that some partial step skips in host memory; all rows of one layer meet in
    ``scratch``. Before tokens have groups, a full pass in token order is kept whole."""

    def __init__(
        self, plan: StepPlan, rows: HostRows, arena: Arena, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.rows, self._plan = rows, plan
        self.scratch = arena.get("keys", shape, dtype), arena.get("values", shape, dtype)
        # Working memory of passes, which are over when groups are formed.
        self._spare = [arena.get(name, shape, dtype) for name in ("q", "h")] if plan.captures else []
        self._parts = tuple(part for _, part in plan.layout)
        stale = [(number, group) for number, (group, _) in enumerate(plan.layout) if group in plan.stale]
        self._stored = {number: index for index, (number, _) in enumerate(stale)}
        self._lengths = [len(self._parts[number]) for number, _ in stale]
        self.restart()

    def restart(self) -> None:
        self._capturing = self._plan.captures
        self.rows.arrange([self._plan.tokens] if self._capturing else self._lengths)

    def arrange(self, order: Tensor) -> None:
        if not self._capturing:
            return
        k, v = self.scratch
        for layer in range(self.rows.layers):
            self.rows.arrange([k.shape[1]])
            self.rows.read_into(layer, 0, k, v)
            self.rows.arrange(self._lengths)
            for number, index in self._stored.items():
                part = order[self._parts[number].start : self._parts[number].stop]
                parts = [spare[:, : len(part)] for spare in self._spare]
                for to, rows in zip(parts, (k, v), strict=True):
                    moves.gather_rows(to, rows, part)
                self.rows.write(layer, index, *parts)
        self._capturing = False

    def destination(self, layer: int, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor | None]:
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
