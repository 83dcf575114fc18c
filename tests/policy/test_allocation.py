"""Solved thresholds against plain recursion over every choice."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from dsa_rt.policy.allocation import HORIZON, Allocation, _transitions


def problem(
    generator: np.random.Generator, steps: int, bins: int
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Falling gains and transitions that keep order, so that some threshold rule is the best of all rules."""
    gain = np.sort(generator.exponential(size=(steps, bins)) * generator.uniform(0.2, 2), 1)[:, ::-1].copy()
    index = np.arange(bins)
    near = np.exp(-(np.subtract.outer(index, index) ** 2) / generator.uniform(0.5, 3))
    counts = [np.rint(near * 50).astype(np.int64) for _ in range(steps - 1)]
    return gain, counts, generator.integers(1, 20, bins)


def values(
    gains: tuple[np.ndarray, np.ndarray],
    moves: list[list[list[float]]],
    arrive: list[float],
    chunks: int,
    rule: Allocation | None,
) -> dict[tuple[int, bool], float]:
    """Expected gain of a clip by (budget, whether its first chunk is special): of a rule, or the best."""
    steps = len(gains[0])

    @cache
    def at_chunk(left: int, budget: int, is_first: bool) -> float:
        if left == 0:
            return 0.0
        return sum(p * at_level(left, budget, 0, k, is_first) for k, p in enumerate(arrive))

    @cache
    def at_level(left: int, budget: int, level: int, k: int, is_first: bool) -> float:
        stop = at_chunk(left - 1, budget, False)
        if level == steps or budget == 0:
            return stop
        step: float = gains[is_first][level, k]
        if level == steps - 1:
            step += at_level(left, budget - 1, steps, 0, is_first)
        else:
            chances = enumerate(moves[level][k])
            step += sum(p * at_level(left, budget - 1, level + 1, j, is_first) for j, p in chances)
        if rule is None:
            return max(step, stop)
        return step if k < rule.cut(left, budget, level, is_first=is_first) else stop

    budgets = range(chunks * steps + 3)
    return {(b, is_first): at_chunk(chunks, b, is_first) for b in budgets for is_first in (True, False)}


@pytest.mark.parametrize(("steps", "bins"), [(1, 2), (1, 5), (2, 3), (3, 4)])
def test_value_equals_the_best_of_all_rules(steps: int, bins: int, generator: np.random.Generator) -> None:
    for _ in range(6):
        later, level_counts, counts = problem(generator, steps, bins)
        first = later * generator.uniform(0.5, 2, (steps, 1))
        allocation = Allocation.solve(later, first, level_counts, counts)
        moves = [_transitions(table).tolist() for table in level_counts]
        arrive = (counts / counts.sum()).tolist()
        best = values((later, first), moves, arrive, 4, None)
        assert values((later, first), moves, arrive, 4, allocation) == pytest.approx(best, rel=1e-6)
        assert all(best[b + 1, False] >= best[b, False] - 1e-9 for b in range(4 * steps + 2))


def test_nothing_is_left_over_and_nothing_is_borrowed(generator: np.random.Generator) -> None:
    gain, level_counts, counts = problem(generator, 3, 4)
    gain[:, 2:] = 0.0  # passes that are worth nothing are still taken when they cost nothing
    allocation = Allocation.solve(gain, gain, level_counts, counts)
    for left in range(1, 2 * HORIZON):
        for level in range(3):
            assert allocation.cut(left, 0, level) == 0
            for over in range(3 - level):
                assert allocation.cut(left, left * 3 - level - over, level) == 4, (left, level, over)
    assert all(allocation.cut(1, b, level) == 4 for b in range(1, 4) for level in range(3))


def test_a_useless_head_spreads_evenly() -> None:
    """Gains equal in all bins, falling from pass to pass: no chunk gets a third pass before all have two."""
    gain = np.repeat([[4.0], [2.0], [1.0]], 4, 1)
    allocation = Allocation.solve(gain, gain, [np.eye(4, dtype=np.int64) * 9] * 2, np.full(4, 9))
    for left in range(1, HORIZON + 1):
        for budget in range(1, left * 3):
            assert allocation.cut(left, budget, 0) == 4
            assert (allocation.cut(left, budget, 1) == 4) == (budget >= left)
            assert (allocation.cut(left, budget, 2) == 4) == (budget >= 2 * left - 1)
