"""The plan of the Hopper attention kernel: which block computes which queries with which keys, what is joined, and
where keys are split."""

from __future__ import annotations

from ctypes import byref, c_int64

import numpy as np
import pytest
import torch

from . import hopper
from .attention_oracle import Segments, random_segments

dims = pytest.mark.parametrize("dim", [64, 128])
H100 = 132  # multiprocessors


def params(
    batch: int, active: int, heads: int, rows: int, segments: Segments | None = None, dim: int = 64
) -> hopper.Params:
    """Of tensors that take no memory."""
    element = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16)
    q, k = element.expand(batch, active, heads, dim), element.expand(batch, rows, heads, dim)
    return hopper.params(q, q, k, k, None, segments)


def key_tiles(p: hopper.Params, query: int) -> np.ndarray:
    """[first row, rows] of the key tiles of the query's segment."""
    buffer = (c_int64 * (2 * (p.rows // 128 + 3)))()
    return np.array(buffer[: 2 * hopper.library().key_tiles_of(byref(p), query, buffer)]).reshape(-1, 2)


def splittings(rng: np.random.Generator, p: hopper.Params) -> list[hopper.Splitting]:
    """None, the host's own, and some that no estimate would choose; at most 132 blocks."""
    blocks = int(rng.integers(1, 133))
    tiles = hopper.plan(p, hopper.Splitting(blocks)).tiles
    forced = [(0, 1), (int(rng.integers(tiles + 1)), int(rng.integers(1, 30))), (tiles // 2, 2)]
    return [
        hopper.Splitting(blocks),
        hopper.Splitting(blocks, decided=1),
        *(hopper.Splitting(blocks, whole=whole, length=length) for whole, length in forced),
    ]


@pytest.mark.parametrize("case", range(20))
def test_every_query_meets_every_key_tile_once(case: int, rng: np.random.Generator) -> None:
    batch, active, heads, rows = (int(n) for n in rng.integers((1, 0, 1, 1), (3, 1200, 9, 6000)))
    segments = None if case % 5 == 0 else random_segments(rng, active, rows)
    p = params(batch, active, heads, rows, segments)
    for splitting in splittings(rng, p):
        print(f"batch {batch}, active {active}, heads {heads}, rows {rows}, segments {segments}, blocks "
              f"{splitting.blocks}, whole {splitting.whole}, length {splitting.length}")  # fmt: skip
        plan = hopper.plan(p, splitting)
        works = np.concatenate(plan.of_block)
        assert len(works) == plan.works and plan.whole <= plan.tiles <= plan.works
        seen = np.zeros((batch, heads, active, rows // 128 + 3), int)
        for query, b, head, size, first, end, _ in works:
            assert 1 <= size <= 128 and first < end
            seen[b, head, query : query + size, first:end] += 1
        for query, size in {(query, size) for query, _, _, size, *_ in works}:
            want = np.arange(seen.shape[-1]) < len(key_tiles(p, query))
            assert (seen[:, :, query : query + size] == want).all()
        assert active == 0 or (seen[..., 0] == 1).all()
        check_slots(p, splitting, plan, works)


def check_slots(
    p: hopper.Params, splitting: hopper.Splitting, plan: hopper.Plan, works: np.ndarray
) -> None:
    """Whole tiles go to the result, parts to places of their own, and each tile's parts are joined in their order."""
    parts: dict[tuple[int, ...], list[list[int]]] = {}
    for query, b, head, _, first, end, slot in works:
        whole = end - first == len(key_tiles(p, query))
        assert (slot == -1) == whole
        if not whole:
            parts.setdefault((query, b, head), []).append([first, end, slot])
    slots = [slot for tile in parts.values() for *_, slot in tile]
    assert len(set(slots)) == len(slots)
    assert hopper.scratch_floats(p, splitting) * 4 >= (max(slots, default=-1) + 1) * 128 * (p.dim + 2) * 4
    assert min(slots, default=0) >= 0
    joins = {
        tuple(join[:3]): [first_slot + i * stride for i in range(count)]
        for *join, count, first_slot, stride in plan.joins.tolist()
    }
    assert joins == {tile: [slot for *_, slot in sorted(of_tile)] for tile, of_tile in parts.items()}


@pytest.mark.parametrize("case", range(20))
def test_every_row_of_a_segment_is_attended_once(case: int, rng: np.random.Generator) -> None:
    active, rows = 40, int(rng.integers(1, 2000))
    segments = random_segments(rng, active, rows)
    print(f"rows {rows}, segments {segments}")
    p = params(1, active, 1, rows, segments)
    start = 0
    for count, a, b, c, d in segments:
        for query in (start, start + count - 1) if count else ():
            seen = np.zeros(rows + 128, int)
            for row, size in key_tiles(p, query):
                assert 1 <= size <= 128
                seen[row : row + size] += 1
            want = np.zeros_like(seen)
            want[a:b] += 1
            want[c:d] += 1
            assert (seen == want).all()
        start += count


def test_adjoining_ranges_are_one() -> None:
    """60 + 40 rows are one tile, in either order, and not two."""
    for segment in ([1, 10, 70, 70, 110], [1, 70, 110, 10, 70]):
        assert key_tiles(params(1, 1, 1, 200, [segment]), 0).tolist() == [[10, 100]]


def test_long_segments_come_first() -> None:
    p = params(1, 300, 1, 1000, [[100, 0, 100, 0, 0], [100, 0, 1000, 0, 0], [100, 0, 400, 0, 0]])
    assert hopper.plan(p, hopper.Splitting(1)).of_block[0][:, 0].tolist() == [100, 200, 0]


def cycles(plan: hopper.Plan, dim: int) -> int:
    """Of the busiest multiprocessor and the kernel that joins: the notes' estimate, summed work by work."""
    tile, work = 16 * dim, 4096
    busiest = max(sum((end - first) * tile + work for *_, first, end, _ in block) for block in plan.of_block)
    if not len(plan.joins):
        return busiest
    slots = sum(int(join[3]) for join in plan.joins)
    return busiest + -(-slots // len(plan.of_block)) * tile + 6144


@dims
@pytest.mark.parametrize("case", range(60))
def test_a_split_saves_time(dim: int, case: int, rng: np.random.Generator) -> None:
    """By the estimate, for segments of whatever lengths; its parts are not short, and not more than two a block."""
    batch, active, heads, rows = (int(n) for n in rng.integers((1, 1, 1, 1), (3, 3000, 13, 40000)))
    segments = None if case % 3 == 0 else random_segments(rng, active, rows, most=1 + case % 4)
    blocks = int(rng.choice([1, 2, 7, 114, H100]))
    print(f"batch {batch}, active {active}, heads {heads}, rows {rows}, segments {segments}, blocks {blocks}")
    p = params(batch, active, heads, rows, segments, dim)
    plain, plan = (hopper.plan(p, hopper.Splitting(blocks, decided=d)) for d in (0, 1))
    assert plan.tiles == plain.tiles == plain.works and hopper.scratch_floats(p, hopper.Splitting(blocks)) == 0
    if len(plan.joins) == 0:
        assert plan.works == plan.tiles and hopper.scratch_floats(p, hopper.Splitting(blocks, 1)) == 0
        return
    assert cycles(plan, dim) < cycles(plain, dim)
    assert plan.tiles - plan.whole < blocks and plan.whole % blocks == 0
    assert plan.works - plan.whole <= 2 * blocks
    for *_, first, end, slot in np.concatenate(plan.of_block):
        assert slot == -1 or end - first >= 4


WAN = {1: 11, 192: 5, 400: 5, 1170: 1, 1408: 1, 1409: 11, 4680: 5, 5632: 1, 8190: 1, 32760: 3}


@pytest.mark.parametrize("active", WAN)
def test_wan_at_480p(active: int) -> None:
    """The parts that the notes' table has: 12 heads of 128, 32760 rows, 132 multiprocessors."""
    p = params(1, active, 12, 32760, None, 128)
    plan = hopper.plan(p, hopper.Splitting(H100, decided=1))
    parts = {int(join[3]) for join in plan.joins} or {1}
    assert parts == {WAN[active]} and len(plan.joins) == (plan.tiles % H100 if WAN[active] > 1 else 0)


def test_what_is_not_split() -> None:
    """Few keys, as text has them; tiles that fill their wave; whole waves of mixed lengths."""

    def parts(active: int, rows: int, segments: Segments | None = None) -> int:
        return len(hopper.plan(params(1, active, 12, rows, segments, 128), hopper.Splitting(H100, 1)).joins)

    assert parts(400, 512) == parts(400, 2047) == parts(1408, 32760) == parts(1300, 32760) == 0
    assert parts(400, 8190) > 0
    mixed = [[700, 0, 32760, 0, 0], [800, 0, 16000, 0, 0]]
    assert parts(1500, 32760, mixed) == 0
    assert parts(500, 32760, [[200, 0, 32760, 0, 0], [300, 0, 16000, 0, 0]]) > 0
