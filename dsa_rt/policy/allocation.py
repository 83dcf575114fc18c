"""When is a pass worth its place in the budget? Thresholds on the confidence for every state of a clip.

A pass given to this chunk is a pass that a later chunk cannot have. Its price is what the budget left would
earn in the rest of the clip with one pass less; a chunk gets another pass if the error it is expected to
remove is worth that. Both are expectations over the calibration run, so the best rule follows by dynamic
programming, backwards over (chunks left n, refining steps left b, level):

    value of stopping = W[n - 1, b]
    value of a step   = gain[level, bin] + E[value at the next level with b - 1 left | bin]
    W[n, b]           = E[value at the first level]

A rule is a threshold: bins below it get another step. The budget is never exceeded, and since no gain is
negative all of it is spent while there are chunks that can take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HORIZON = 16
"""Chunks looked ahead. A longer rest is planned as HORIZON chunks with their share of the budget."""

_TIE = 1e-9  # of the largest gain: smaller differences are rounding, and ties refine

Array = NDArray[np.float64]
Cuts = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Allocation:
    """Solved thresholds. steps: refining steps a chunk can get, each one decision.

    later[n - 1][level][b]: with n chunks left, this one counted, ``level`` steps taken and b left for the
    clip, bins below the entry get another step. first: the same for the first chunk of a clip.
    """

    steps: int
    later: Cuts
    first: Cuts

    @classmethod
    def solve(
        cls, later: Array, first: Array, level_counts: Sequence[NDArray[np.int64]], counts: NDArray[np.int64]
    ) -> Allocation:
        """later, first [steps, bins]: gains; level_counts: steps - 1 tables [bins, bins] of chunks by bin at
        a level and at the next; counts [bins]: chunks by bin at the first level."""
        scale = max(later.max(), first.max()) or 1.0
        moves = [_transitions(table) for table in level_counts]
        arrival = counts / counts.sum()
        worth = np.zeros(1)  # W[0]: nothing is earned after the last chunk
        later_cuts, first_cuts = [], []
        for _ in range(HORIZON):
            first_cuts.append(_chunk(first / scale, moves, worth)[0])
            cuts, value = _chunk(later / scale, moves, worth)
            later_cuts.append(cuts)
            worth = value @ arrival
        return cls(later.shape[0], tuple(later_cuts), tuple(first_cuts))

    def cut(self, left: int, budget: int, level: int, *, is_first: bool = False) -> int:
        """Bins below this get another step: 0 none, the number of bins all.

        left: chunks left, this one counted, 1 or more; level: steps this one has had; budget: steps left.
        """
        if budget <= 0:
            return 0
        if left > HORIZON:
            left, budget = HORIZON, max(1, (budget * HORIZON + left // 2) // left)
        row = (self.first if is_first else self.later)[left - 1][level]
        return row[min(budget, len(row) - 1)]


def _chunk(gain: Array, moves: Sequence[Array], after: Array) -> tuple[tuple[tuple[int, ...], ...], Array]:
    """Thresholds [level][b] of one chunk and its value [b, bin], given the value [b] of those behind it."""
    steps, bins = gain.shape
    budget = np.arange(len(after) + steps)
    stop = after[np.minimum(budget, len(after) - 1)][:, None]
    value = np.broadcast_to(stop, (len(budget), bins))  # after the last step
    cuts: list[tuple[int, ...]] = []
    for level in reversed(range(steps)):
        expected = value @ moves[level].T if level < steps - 1 else value
        step = np.full_like(expected, -np.inf)  # without budget there is no step
        step[1:] = gain[level] + expected[:-1]
        cut = _best_cut(step - stop)
        cuts.append(tuple(cut.tolist()))
        value = np.where(np.arange(bins) < cut[:, None], step, stop)
    return tuple(cuts[::-1]), value


def _best_cut(advantage: Array) -> NDArray[np.int64]:
    """How many bins, from the least confident on, to refine for the most advantage [b, bins]; ties: more."""
    advantage = np.where(np.abs(advantage) < _TIE, 0.0, np.maximum(advantage, -1e6))
    sums = np.cumsum(np.pad(advantage, ((0, 0), (1, 0))), 1)
    return advantage.shape[1] - np.argmax(sums[:, ::-1], 1)


def _transitions(counts: NDArray[np.int64]) -> Array:
    """Counts [bins, bins] -> probabilities by row, smoothed over neighbouring bins, which are alike."""
    index = np.arange(len(counts), dtype=float)
    kernel = np.exp(-0.5 * np.subtract.outer(index, index) ** 2)
    smooth = kernel @ counts @ kernel.T + 0.5 / len(counts)  # half a chunk of doubt in every row
    return smooth / smooth.sum(1, keepdims=True)
