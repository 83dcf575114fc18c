"""The synchronized K/V cache against a dictionary of tokens, in plans and storage of any kind; rows in host memory."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import make_model
from torch import Tensor

from dsa_rt.errors import OptionError
from dsa_rt.host_rows import HostRows
from dsa_rt.ops import layers
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens
from dsa_rt.policy import HSA, StepPlan
from dsa_rt.reference import layers as reference
from dsa_rt.sync import (
    STORAGES,
    Float8KV,
    HostKV,
    SyncCache,
    spare_bytes,
    sync_bytes,
    sync_caches,
    sync_host_bytes,
)

LAYERS, HEADS, HEAD_DIM = 3, 2, 5


def random_plan(draw: random.Random) -> StepPlan:
    steps = draw.choice([8, 12, 20])
    budgets = draw.sample([n for n in range(1, steps) if steps % n == 0], draw.randint(1, 3))
    shares = [draw.randint(5, 30) for _ in budgets]
    groups = ((100 - sum(shares)) / 100, steps), *((s / 100, b) for s, b in zip(shares, budgets, strict=True))
    window = draw.choice([0.3, 0.5, 0.77, 1.0])
    selection = "dynamic" if window <= 0.5 and draw.random() < 0.6 else "random"
    policy = HSA(groups, window=window, selection=selection)
    full = tuple(draw.sample(range(steps), draw.randint(0, 2)))
    return policy.plan(steps, draw.randint(15, 150), 3, fixed=draw.choice([0, 0, 4]), full=full)


def active_set(tokens: Tensor, parts: tuple[range, ...]) -> ActiveSet:
    slots = torch.cat([torch.arange(part.start, part.stop) for part in parts]) if parts else None
    return ActiveSet(tokens, tokens, tokens, tokens, slots, parts=parts)


def write(cache: SyncCache, layer: int, k: Tensor, v: Tensor, active: ActiveSet) -> tuple[Tensor, Tensor]:
    """k, v [B, A, H, D] into the rows of the active set; the attended K and V, from FP8 by their scales."""
    to_k, to_v, slots = cache.destination(layer, active)
    for to, rows in ((to_k, k), (to_v, v)):
        to.index_copy_(1, torch.arange(k.shape[1]) if slots is None else slots, rows)
    keys, values, *scales = cache.attended(layer, active)
    if not scales:
        return keys, values
    return keys.float() * scales[0][..., None], values.float() * scales[1][..., None]


def make_caches(plan: StepPlan, branches: int, storage: str = "model") -> list[SyncCache]:
    """Everything that is allocated starts as NaN, so that a row read before it was written shows."""
    caches = sync_caches(plan, branches, LAYERS, HEADS, HEAD_DIM, torch.float32, storage=storage)
    for cache in caches:
        for tensor in held(cache):
            tensor.copy_(torch.full_like(tensor, torch.nan, dtype=torch.float32))
    return caches


def held(cache: SyncCache) -> list[Tensor]:
    """All tensors of a cache."""
    own = [*vars(cache).values(), *getattr(cache, "_fresh", ())]
    if isinstance(cache, HostKV):
        own += [*cache.scratch, *cache._spare, *vars(cache.rows).values()]
    return [tensor for tensor in own if isinstance(tensor, Tensor)]


class Late:
    """Copies beside the computation, as late as they may be: those up to the one that somebody waits for."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[Tensor, Tensor], ...]] = []
        self.done = 0

    def start(self, *pairs: tuple[Tensor, Tensor]) -> int:
        self.asked.append(pairs)
        return len(self.asked)

    def wait(self, copy: int | None) -> None:
        while self.done < (copy or 0):
            for to, source in self.asked[self.done]:
                to.copy_(source)
            self.done += 1


@pytest.mark.parametrize("storage", [*STORAGES, "host, late"])
@pytest.mark.parametrize("trial", range(12))
def test_against_a_dictionary(trial: int, storage: str) -> None:
    """Two branches, each of whose tokens have the K and V that they were last computed with, whatever the plan."""
    draw = random.Random(trial)
    plan = random_plan(draw)
    branches = make_caches(plan, 2, storage.split(",")[0])
    for cache in branches if storage == "host, late" else []:
        cache.rows.copies = Late()  # type: ignore[attr-defined]
    held: list[dict[tuple[int, int], tuple[Tensor, Tensor]]] = [{}, {}]
    order: Tensor | None = None
    own = torch.arange(plan.tokens)
    partial = 0

    def choose() -> Tensor:
        chosen = torch.randperm(plan.tokens)  # who is where makes no difference to a cache
        for cache in branches:
            cache.arrange(chosen)
        return chosen

    if not plan.scoring:
        order = choose()
    for step in range(plan.steps):
        kept = plan.is_partial(step) or plan.keeps(step)
        if plan.counts[step] and (kept or not plan.is_full(step)):
            groups = [part for group, part in plan.layout if plan.is_full(step) or group in plan.active[step]]
            tokens = own if order is None else torch.cat([order[p.start : p.stop] for p in groups])
            active = active_set(tokens, () if order is None else tuple(groups))
            seen = own if order is None else order
            for number, cache in enumerate(branches):
                for layer in range(LAYERS):
                    k, v = torch.randn(2, 1, len(tokens), HEADS, HEAD_DIM).unbind(0)
                    attended = write(cache, layer, k, v, active)
                    for row, token in enumerate(tokens.tolist()):
                        held[number][layer, token] = k[:, row].clone(), v[:, row].clone()
                    for index in (0, 1):
                        expected = torch.stack([held[number][layer, t][index] for t in seen.tolist()], 1)
                        assert attended[index].shape == expected.shape and attended[index].is_contiguous()
                        if storage != "fp8":
                            assert torch.equal(attended[index], expected)
                        else:  # half a step of 3 bits, or of the smallest number beside a row's largest
                            error, largest = (attended[index] - expected).abs(), expected.abs().amax(-1, keepdim=True)
                            assert (error <= expected.abs() / 15 + largest / 448 / 1000).all()
            partial += plan.is_partial(step)
        if plan.scoring and step == plan.scoring[-1]:
            order = choose()
    assert partial or not branches


def test_a_full_pass_attends_to_what_it_brings() -> None:
    plan = HSA(((0.5, 8), (0.5, 2)), selection="random").plan(8, 20, 5)
    (cache,) = make_caches(plan, 1)
    k, v = torch.randn(2, 1, 20, HEADS, HEAD_DIM).unbind(0)
    parts = tuple(part for _, part in plan.layout)
    assert sum(map(len, parts)) == 20 and len(parts) > 1
    attended = write(cache, 0, k, v, active_set(torch.arange(20), parts))
    assert torch.equal(attended[0], k) and torch.equal(attended[1], v)


@pytest.mark.parametrize("storage", STORAGES)
def test_bytes_are_what_is_allocated(storage: str) -> None:
    for trial in range(20):
        plan = random_plan(random.Random(trial))
        for dtype in (torch.float32, torch.bfloat16):
            for branches in (1, 2):
                caches = sync_caches(plan, branches, LAYERS, HEADS, HEAD_DIM, dtype, storage=storage)
                tensors = {t.data_ptr(): t for cache in caches for t in held(cache)}
                taken = sum(t.nbytes for t in tensors.values())
                sizes = (plan, branches, LAYERS, HEADS, HEAD_DIM, dtype, storage)
                spare = spare_bytes(plan, HEADS, HEAD_DIM, dtype, storage)
                assert sync_bytes(*sizes) + spare == taken and sync_host_bytes(*sizes) == 0
                beside = sum(t.nbytes for t in tensors.values() if t.ndim == 5) if storage == "host" else 0
                assert sync_host_bytes(*sizes, "cuda") == beside
                assert sync_bytes(*sizes, "cuda") == sync_bytes(*sizes) - beside


def test_only_what_some_step_skips_is_stored() -> None:
    """hsa-50: all but the baseline where storage is elsewhere; window only and dense: nothing."""
    plan = HSA().plan(40, 1000, 10)
    bf16 = sync_bytes(plan, 2, 30, 12, 128, torch.bfloat16)
    assert bf16 == 2 * 2 * 30 * 1000 * 1536 * 2
    assert sync_host_bytes(plan, 2, 30, 12, 128, torch.bfloat16, "host", "cuda") == 2 * 2 * 30 * 840 * 1536 * 2
    assert sync_bytes(plan, 2, 30, 12, 128, torch.bfloat16, "fp8") < 0.52 * bf16
    for policy in (HSA(((1, 10),)), HSA(((1, 40),))):
        assert sync_bytes(policy.plan(40, 1000, 10), 2, 30, 12, 128, torch.bfloat16) == 0
        assert sync_caches(policy.plan(40, 1000, 10), 2, 30, 12, 128, torch.bfloat16) == []


def test_host_rows_are_fetched_one_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next layer's rows set out before a layer attends; after the last layer the first one's, for the next pass.
    A pass that brings all rows fetches none, and what was fetched before it counts no more."""
    plan = HSA(((0.3, 12), (0.3, 6), (0.4, 3)), window=1.0, selection="random").plan(12, 30, 5)
    (cache,) = sync_caches(plan, 1, LAYERS, HEADS, HEAD_DIM, torch.float32, storage="host")
    cache.rows.copies = Late()  # type: ignore[attr-defined]
    events: list[tuple[str, int, int]] = []
    fetch = HostRows.fetch

    def record(self: HostRows, layer: int, part: int) -> None:
        events.append(("fetch", layer, part))
        fetch(self, layer, part)

    monkeypatch.setattr(HostRows, "fetch", record)
    parts = dict(plan.layout)
    stored: dict[tuple[int, int], Tensor] = {}

    def run(*groups: int) -> list[tuple[str, int, int]]:
        events.clear()
        here = [part for group, part in plan.layout if group in groups]
        rows = torch.cat([torch.arange(part.start, part.stop) for part in here])
        for layer in range(LAYERS):
            k, v = torch.randn(2, 1, len(rows), HEADS, HEAD_DIM).unbind(0)
            stored.update({(layer, row): k[:, number] for number, row in enumerate(rows.tolist())})
            attended, _ = write(cache, layer, k, v, active_set(rows, tuple(here)))
            assert torch.equal(attended, torch.stack([stored[layer, row] for row in range(30)], 1))
            events.append(("attend", layer, -1))
        return list(events)

    def attends(*before: list[tuple[int, int]]) -> list[tuple[str, int, int]]:
        return [event for layer, fetched in enumerate(before)
                for event in [*(("fetch", *at) for at in fetched), ("attend", layer, -1)]]  # fmt: skip

    assert [*parts] == [2, 1, 0]  # rows of group 2 are part 0 of the storage, those of group 1 part 1
    assert run(0, 1, 2) == attends([], [], [])
    assert run(0) == attends([(0, 0), (1, 0), (0, 1), (1, 1)], [(2, 0), (2, 1)], [(0, 0), (0, 1)])
    assert run(0, 1) == attends([(1, 0)], [(2, 0)], [(0, 0)])
    assert run(0) == attends([(1, 0), (0, 1), (1, 1)], [(2, 0), (2, 1)], [(0, 0), (0, 1)])
    assert run(0, 1, 2) == attends([], [], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_in_every_dtype_of_a_model(dtype: torch.dtype) -> None:
    """One rounding to E4M3 of the value over its row's scale, in layouts of any kind; attention to what that stands
    for."""
    plan = HSA(((0.3, 12), (0.3, 6), (0.4, 3)), window=1.0, selection="random").plan(12, 30, 5)
    (cache,) = sync_caches(plan, 1, LAYERS, HEADS, HEAD_DIM, dtype, storage="fp8")
    assert isinstance(cache, Float8KV)
    held = torch.full((2, 1, 30, HEADS, HEAD_DIM), torch.nan)
    for groups in ((0, 1, 2), (0, 2), (0,), (1,)):
        here = [part for group, part in plan.layout if group in groups]
        rows = torch.cat([torch.arange(part.start, part.stop) for part in here])
        given = (30 * torch.randn(2, 1, len(rows), HEADS, HEAD_DIM)).to(dtype)
        active = active_set(rows, tuple(here))
        k, v, _ = cache.destination(1, active)
        k.copy_(given[0])
        v.copy_(given[1])
        attended = cache.attended(1, active)
        scale = given.float().abs().amax(-1, keepdim=True) / 448
        held[:, :, rows] = (given.float() / scale).to(torch.float8_e4m3fn).float() * scale
        if len(rows) == 30:
            assert len(attended) == 2 and torch.equal(attended[0], given[0]) and torch.equal(attended[1], given[1])
            continue
        k, v, *scales = attended
        for index, values in enumerate((k, v)):
            assert torch.equal(values.float() * scales[index][..., None], held[index])
        q = torch.randn(1, 7, HEADS, HEAD_DIM).to(dtype)
        expected = reference.active_attention(q.float(), held[0], held[1])
        error = (layers.active_attention(q, *attended).float() - expected).abs().max()
        assert error <= (1e-4 if dtype == torch.float32 else 2e-2) * expected.abs().max()


def test_storage_that_is_unknown() -> None:
    plan = HSA().plan(40, 100, 10)
    with pytest.raises(OptionError, match="storage is 'disk'; expected one of model, fp8, host"):
        sync_caches(plan, 1, 1, 1, 8, torch.float32, storage="disk")


def test_no_gradient_goes_through_it() -> None:
    """A cache of inference keeps none, and says so."""
    plan = HSA(((0.5, 8), (0.5, 2)), selection="random").plan(8, 12, 6)
    (cache,) = sync_caches(plan, 1, 2, 2, 24, torch.float32)
    model = make_model().requires_grad_(True)
    active = frame_tokens(TokenGrid(2, 3), range(2), 24, per_frame=False)
    text = model.embed_text(torch.randn(1, 7, 20))
    arguments = torch.randn(1, 12, 12), active, torch.full((1, 1), 500.0), text, cache
    with pytest.raises(OptionError, match=r"no gradient goes through a PlacedKV; use torch.no_grad\(\)"):
        model(*arguments)
