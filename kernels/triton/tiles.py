"""Which tile and how many shares of the rows an attention call takes: a pure function of sizes and card.

The estimate: a call lasts as long as its busiest multiprocessor computes. With T tiles of M queries on P
multiprocessors and the rows cut into S shares, that one has ⌈T·S / P⌉ programs of M·⌈N / S⌉·2·D multiply-adds each.
This is where waves show: on 132 multiprocessors with 12 heads, 11 tiles of 128 queries are one wave, so 1,409 queries
take twice as long as 1,408. Smaller tiles fill the last wave better and run the matrix units less well; ``rate`` says
how well, beside the largest tile. Sharing adds the partial results' way through memory and a second launch.

Rates, cycles and bytes below are assumptions from the cards' data sheets; they have not been fitted to measurements.
"""

from dataclasses import dataclass
from functools import lru_cache

from dsa_rt.kernels.triton.card import Card, ceil_div


@dataclass(frozen=True)
class Tile:
    """queries × rows of a program's scores, its warps, its stages of the pipeline, its rate beside the best tile."""

    queries: int
    rows: int
    warps: int
    stages: int
    rate: float


@dataclass(frozen=True)
class Choice:
    """A tile, and in how many shares the rows are attended to by programs of their own."""

    tile: Tile
    shares: int = 1


_SHARES = (1, 2, 3, 4, 6, 8)
_MERGE_CYCLES = 4000  # a second launch, about 2 µs
_BYTES_PER_CYCLE = 16  # of a multiprocessor, from and to memory


def tiles_for(dim: int, element_size: int, card: Card) -> tuple[Tile, ...]:
    """Tiles that fit registers (compiled for sm_80, sm_90 and sm_120 with none spilled, but for fp32 above D = 64) and
    shared memory (228 KB of a multiprocessor on sm_90, 100 KB on sm_86, sm_89 and sm_120), the largest first.

    Stages of K and V take 2·rows·D·element_size bytes each, beside them Hopper keeps the queries' tile there. The
    smaller tiles leave room for two programs on a multiprocessor.
    """
    if card.capability[0] == 9:  # wgmma: 64 queries for each four warps, operands from shared memory
        if element_size == 4:
            return (Tile(64, 32 if dim <= 64 else 16, 4, 2, 1.0),)
        if dim <= 64:
            return (Tile(128, 128, 8, 3, 1.0), Tile(64, 128, 4, 3, 0.85))
        if dim <= 128:
            return (Tile(128, 128, 8, 2, 1.0), Tile(64, 64, 4, 3, 0.8))
        return (Tile(128, 32, 8, 2, 1.0), Tile(64, 32, 4, 2, 0.8))
    if element_size == 4:
        return (Tile(32, 16, 4, 2, 1.0),)
    if dim <= 64:
        return (Tile(128, 64, 8, 2, 1.0), Tile(64, 64, 4, 2, 0.85))
    if dim <= 128:
        return (Tile(128, 64 if card.capability[0] == 8 else 32, 8, 2, 1.0), Tile(64, 32, 4, 2, 0.85))
    return (Tile(64, 16, 4, 2, 1.0),)


def multiply_adds_per_cycle(element_size: int, card: Card) -> int:
    """Of a multiprocessor, dense, into fp32. tf32 has half the rate of 16 bits, and three of its products make one."""
    dense = {(8, 0): 1024, (9, 0): 2048}.get(card.capability, 512)
    return dense if element_size == 2 else dense // 6


def cycles(
    choice: Choice, active: int, rows: int, heads: int, batch: int, dim: int, element_size: int, card: Card
) -> float:
    """The estimate for ``active`` queries of ``rows`` rows each, in cycles of the card."""
    tile, shares = choice.tile, choice.shares
    programs = ceil_div(active, tile.queries) * heads * batch * shares
    steps = ceil_div(ceil_div(rows, tile.rows), shares)
    work = tile.queries * steps * tile.rows * 2 * dim / (multiply_adds_per_cycle(element_size, card) * tile.rate)
    busiest = ceil_div(programs, card.multiprocessors) * work
    if shares == 1:
        return busiest
    partial_bytes = 2 * 4 * shares * active * heads * batch * dim
    return busiest + partial_bytes / (_BYTES_PER_CYCLE * card.multiprocessors) + _MERGE_CYCLES


@lru_cache(maxsize=1024)
def choose(
    active: int, rows: int, heads: int, batch: int, dim: int, element_size: int, card: Card, may_share: bool
) -> Choice:
    """The choice with the lowest estimate; among equals the larger tile. Shared rows have to promise a tenth less, for
    they take scratch of the size of the queries, in fp32, for each share."""
    choices = [
        Choice(tile, shares)
        for tile in tiles_for(dim, element_size, card)
        for shares in (_SHARES if may_share else (1,))
        if shares == 1 or shares <= ceil_div(rows, tile.rows)
    ]

    def estimate(choice: Choice) -> float:
        wanted = 1.0 if choice.shares == 1 else 1.1
        return wanted * cycles(choice, active, rows, heads, batch, dim, element_size, card)

    return min(choices, key=estimate)
