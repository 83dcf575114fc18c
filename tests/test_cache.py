"""The K/V ring against a list of frames that is kept by hand, and its gradient path."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dsa_rt.cache import KVCache, cache_bytes
from dsa_rt.errors import OptionError
from dsa_rt.plan import ActiveSet


def make_cache(window: int, sink: int, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(
        layers=2, batch=batch, window=window, sink=sink, tokens_per_frame=tokens, heads=2, head_dim=3, dtype=dtype
    )
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache


def active_set(cache: KVCache, frames: range) -> ActiveSet:
    nothing = torch.empty(0)
    return ActiveSet(nothing, nothing, nothing, nothing, cache.slots(frames), cache.valid(frames.stop))


def write(cache: KVCache, layer: int, k: Tensor, v: Tensor, active: ActiveSet) -> tuple[Tensor, Tensor]:
    """k, v [B, A, H, D] into the rows of the active set; the attended K and V."""
    to_k, to_v, slots = cache.destination(layer, active)
    for to, rows in ((to_k, k), (to_v, v)):
        to.index_copy_(1, torch.arange(k.shape[1]) if slots is None else slots, rows.to(to.dtype))
    return cache.attended(layer, active)


def rows_of(frames: range, tokens: int, layer: int, stamp: int, batch: int = 1) -> Tensor:
    """K [B, A, H, D] that says where it comes from: (frame, token, pass) in its channels, layer and head in scale."""
    values = torch.tensor([[f, t, stamp] for f in frames for t in range(tokens)], dtype=torch.float32)
    heads = torch.stack([values, values + 0.25], 1)
    return torch.stack([heads + 1000 * layer + 10_000 * b for b in range(batch)])


def as_set(rows: Tensor) -> list[list[float]]:
    return sorted(rows.flatten(1).tolist())


@pytest.mark.parametrize("trial", range(40))
def test_ring_against_a_list(trial: int) -> None:
    """After any pass, exactly the rows of the listed frames are attended, each as its last pass left it."""
    draw = random.Random(trial)
    chunk, tokens, batch = draw.randint(1, 4), draw.randint(1, 3), draw.randint(1, 2)
    sink = draw.randint(0, 5)
    window = sink + chunk + draw.randint(0, 7)
    cache = make_cache(window, sink, tokens, batch)
    kept: list[tuple[int, int]] = []  # (frame, pass that wrote it)
    evicted = 0
    for index in range(draw.randint(3, 12)):
        frames = range(index * chunk, (index + 1) * chunk)
        while len(kept) + chunk > window:  # Self-Forcing: the sink counts; the oldest after it makes room
            del kept[sink]
            evicted += 1
        for stamp in range(draw.randint(1, 4)):
            active = active_set(cache, frames)
            for layer in range(2):
                k = rows_of(frames, tokens, layer, stamp, batch)
                seen_k, seen_v = write(cache, layer, k, -k, active)
                now = kept + [(f, stamp) for f in frames]
                for b in range(batch):
                    whole = [rows_of(range(f, f + 1), tokens, layer, s, batch)[b] for f, s in now]
                    assert as_set(seen_k[b]) == as_set(torch.cat(whole))
                    assert as_set(seen_v[b]) == as_set(-torch.cat(whole))
                    # K and V of one row belong together
                    assert torch.equal(seen_k[b], -seen_v[b])
        kept += [(f, stamp) for f in frames]
    assert len(kept) <= window and cache.k.shape[2] == window * tokens
    assert evicted == max(0, (index + 1) * chunk - window)


@pytest.mark.parametrize("sink", [0, 2])
@pytest.mark.parametrize("scattered", [False, True])
def test_gradient_path_sees_the_same_rows(sink: int, scattered: bool) -> None:
    """With a gradient wanted: the same values as in place, the buffer untouched, a gradient for fresh rows alone."""
    tokens, window, chunk = 2, sink + 5, 2
    cache, other = make_cache(window, sink, tokens), make_cache(window, sink, tokens)
    for index in range(5):  # past the window; 5 places and chunks of 2, so a chunk is torn in two
        frames = range(index * chunk, (index + 1) * chunk)
        active = active_set(cache, frames)
        k, v = (torch.randn(1, chunk * tokens, 2, 3) for _ in range(2))
        if scattered:
            order = torch.randperm(chunk * tokens)
            active = ActiveSet(*(torch.empty(0),) * 4, active.slots[order], active.valid)
        before = cache.k.clone(), cache.v.clone()
        fresh_k, fresh_v = k.clone().requires_grad_(), v.clone().requires_grad_()
        graph_k, graph_v = cache.update(1, fresh_k, fresh_v, active)
        assert torch.equal(cache.k.nan_to_num(), before[0].nan_to_num())
        assert torch.equal(cache.v.nan_to_num(), before[1].nan_to_num())
        plain_k, plain_v = write(other, 1, k, v, active)
        assert torch.equal(graph_k, plain_k) and torch.equal(graph_v, plain_v)
        assert not graph_k.isnan().any()
        weight = torch.randn_like(graph_k)
        (graph_k * weight - 2 * graph_v * weight).sum().backward()
        expected = torch.stack([weight[0, slot] for slot in active.slots.tolist()])[None]
        assert torch.equal(fresh_k.grad, expected) and torch.equal(fresh_v.grad, -2 * expected)
        write(cache, 1, k, v, active)


def test_bf16_cache_takes_the_rounded_rows() -> None:
    cache = make_cache(3, 0, 2, dtype=torch.bfloat16)
    k, v = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2, 3)
    for slots in (torch.tensor([0, 1, 2, 3]), torch.tensor([3, 0, 5, 1])):
        active = ActiveSet(*(torch.empty(0),) * 4, slots, 6)
        seen_k, seen_v = write(cache, 0, k, v, active)
        assert torch.equal(seen_k[:, slots], k.bfloat16()) and torch.equal(seen_v[:, slots], v.bfloat16())


def test_consecutive_slots_are_recognised() -> None:
    def slot_range(slots: list[int]) -> tuple[int, int] | None:
        return ActiveSet(*(torch.empty(0),) * 4, torch.tensor(slots, dtype=torch.int64), 9).slot_range

    assert slot_range([4, 5, 6]) == (4, 7) and slot_range([2]) == (2, 3)
    assert slot_range([4, 6, 5]) is slot_range([0, 2]) is slot_range([3, 2, 1]) is slot_range([]) is None
    assert ActiveSet(*(torch.empty(0),) * 4).slot_range is None


@pytest.mark.parametrize(("window", "sink"), [(3, 3), (0, 0), (4, -1), (2, 5)])
def test_a_window_that_is_all_sink(window: int, sink: int) -> None:
    with pytest.raises(OptionError, match=f"sink is {sink} .*window .{window}"):
        make_cache(window, sink, 1)


def test_a_chunk_that_does_not_fit() -> None:
    cache = make_cache(5, 3, 1)
    with pytest.raises(OptionError, match="chunk of 3 .*window of 5 .*sink of 3.* at least 6"):
        cache.slots(range(3, 6))


def test_cache_bytes_are_those_of_the_buffers() -> None:
    cache = make_cache(7, 2, 5, batch=3, dtype=torch.bfloat16)
    assert cache_bytes(2, 3, 7, 5, 6, torch.bfloat16) == cache.k.nbytes + cache.v.nbytes
