"""The choice of tiles: waves as they are, shares where programs are too few, nothing that does not fit."""

from __future__ import annotations

import pytest
import torch
from dsa_rt.kernels.triton.card import H100, Card, ceil_div, power_of_two
from dsa_rt.kernels.triton.tiles import Choice, Tile, choose, cycles, tiles_for

WAN = {"rows": 32760, "heads": 12, "batch": 1, "dim": 128, "element_size": 2}
SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (12, 0): 99}  # KB a program can have
CARDS = [Card(count, capability) for capability in SHARED_MEMORY for count in (20, 132)]


def estimate(choice: Choice, active: int) -> float:
    return cycles(choice, active, card=H100, **WAN)


def test_waves() -> None:
    """132 multiprocessors and 12 heads: 11 tiles of 128 queries are one wave."""
    choice = Choice(Tile(128, 128, 8, 2, 1.0))
    assert estimate(choice, 1) == estimate(choice, 1170) == estimate(choice, 1408)
    assert estimate(choice, 1409) == estimate(choice, 2816) == 2 * estimate(choice, 1408)


def test_full_waves_take_the_largest_tile() -> None:
    for active in (1408, 2816, 5632, 32760):
        choice = choose(active, card=H100, may_share=True, **WAN)
        assert (choice.tile.queries, choice.shares) == (128, 1)


def test_rows_are_shared_where_tiles_leave_multiprocessors_idle() -> None:
    few = {**WAN, "heads": 1}
    shared, whole = (choose(128, card=H100, may_share=may, **few) for may in (True, False))
    assert shared.shares > 1 and whole.shares == 1
    estimates = [cycles(choice, 128, card=H100, **few) for choice in (shared, whole)]
    assert estimates[0] < estimates[1]
    short = {**few, "rows": 256}  # merging costs more than it saves
    assert choose(128, card=H100, may_share=True, **short).shares == 1


@pytest.mark.parametrize("card", CARDS, ids=str)
@pytest.mark.parametrize("element_size", [2, 4])
def test_every_tile_fits(card: Card, element_size: int) -> None:
    for dim in (2, 64, 66, 128, 130, 256):
        for tile in tiles_for(dim, element_size, card):
            width = max(16, power_of_two(dim)) * element_size
            held = tile.queries * width if card.capability[0] == 9 else 0
            assert held + 2 * tile.stages * tile.rows * width <= SHARED_MEMORY[card.capability] * 1024
            accumulators = tile.queries * (width // element_size + tile.rows) / (32 * tile.warps)
            assert accumulators <= 160 and 0 < tile.rate <= 1


def test_the_choice_has_the_lowest_estimate() -> None:
    """Against every tile and number of shares there is, over many sizes; sharing has to promise a tenth."""
    numbers = torch.Generator().manual_seed(5)
    for _ in range(200):
        active, rows = (int(torch.randint(1, 40000, (), generator=numbers)) for _ in range(2))
        sizes = {"rows": rows, "heads": 40, "batch": 2, "dim": 64, "element_size": 2}
        best = choose(active, card=H100, may_share=True, **sizes)
        chosen = cycles(best, active, card=H100, **sizes) * (1.1 if best.shares > 1 else 1)
        for tile in tiles_for(64, 2, H100):
            for shares in (1, 2, 3, 4, 6, 8):
                if shares <= ceil_div(rows, tile.rows):
                    other = cycles(Choice(tile, shares), active, card=H100, **sizes)
                    assert chosen <= other * (1.1 if shares > 1 else 1)
