"""Which tokens a step of a many-step run computes, and how those go on that it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dsa_rt.ops import rows as moves
from dsa_rt.plan import ActiveSet
from dsa_rt.policy.steps import CONDITIONS, StepPlan
from dsa_rt.sync import SyncCache

Turn = tuple[ActiveSet, Sequence[SyncCache | None]]
"""The tokens of a pass, and a cache for each guidance branch where K/V of other steps are read or these will be."""

_NONE = (None, None)


class Groups:
    """The active set and the caches of every step of a clip, in tensors that stay where they are from clip to clip. All
    tokens in their own order until groups are known and needed; then those of a step, group after group.

    dense: all tokens, and the modulation row of each. One clip at a time, from :meth:`restart` to the next.
    """

    def __init__(self, plan: StepPlan, dense: ActiveSet, caches: Sequence[SyncCache]) -> None:
        self.plan, self.dense, self.caches = plan, dense, caches
        device = dense.tokens.device
        self.strength = torch.zeros(plan.tokens, device=device)
        self._order = torch.zeros(plan.tokens, dtype=torch.int64, device=device)
        self._known = False
        self._none = dense.room((), plan.tokens)
        self._sets = {groups: dense.room(parts, plan.tokens) for groups, parts in plan.arranged.items()}

    def restart(self, seed: int, fixed: np.ndarray) -> None:
        """Begin a clip. fixed: indices of condition tokens, rising."""
        self._seed, self._fixed, self._known = seed, fixed, False
        self.strength.zero_()
        for cache in self.caches:
            cache.restart()
        if min(self.plan.counts) < self.plan.tokens and not self.plan.scoring:
            self.assign(None)

    def assign(self, scores: np.ndarray | None) -> None:
        """Put every token into its group; K/V that were kept before go with it."""
        plan, dense = self.plan, self.dense
        assert plan.policy is not None
        moving = np.setdiff1d(np.arange(plan.tokens), self._fixed)
        order = np.concatenate([self._fixed, plan.policy.order(plan, moving, self._seed, scores)])
        self._order.copy_(torch.from_numpy(order), non_blocking=True)
        strengths = plan.policy.strengths(plan.steps)
        for group, rows in plan.layout:
            if group != CONDITIONS:
                self.strength.index_fill_(0, self._order[rows.start : rows.stop], strengths[group])
        for active in self._sets.values():
            begin = 0
            for part in active.parts:
                index, end = self._order[part.start : part.stop], begin + len(part)
                for name in ("tokens", "cos", "sin", "modulation_rows"):
                    torch.index_select(getattr(dense, name), 0, index, out=getattr(active, name)[begin:end])
                begin = end
        for cache in self.caches:
            cache.arrange(self._order)
        self._known = True

    def at(self, step: int) -> Turn:
        return self._at(step, self._known)

    def turns(self) -> Iterator[tuple[int, Turn]]:
        """Every step with a pass, and what it will run on."""
        scoring = self.plan.scoring
        for step, count in enumerate(self.plan.counts):
            if count:
                yield step, self._at(step, not scoring or step > scoring[-1])

    def _at(self, step: int, known: bool) -> Turn:
        plan = self.plan
        if not plan.counts[step]:
            return self._none, _NONE
        if plan.is_full(step) and not plan.keeps(step):
            return self.dense, _NONE
        return (self._sets[plan.active[step]] if known else self.dense), self.caches


class Extrapolation:
    """Velocity of skipped tokens, linear in sigma through their last two evaluations (ours; update="extrapolated").

    slope [1, N, P]: of the velocity over sigma; evaluated [N]: sigma of the last evaluation; spare [1, N, P]: working
    memory.
    """

    def __init__(self, slope: Tensor, spare: Tensor) -> None:
        self.slope, self._spare = slope, spare
        self.evaluated, self._factor = torch.empty(2, slope.shape[1], device=slope.device).unbind()
        self.restart()

    def restart(self) -> None:
        """Begin a clip: nothing was evaluated."""
        self.slope.zero_()
        self.evaluated.fill_(torch.inf)

    def observe(self, tokens: Tensor, fresh: Tensor, cached: Tensor, sigma: float, *, fresh_start: bool) -> None:
        """Note an evaluation before it enters the cache. fresh_start: other weights; no line goes through both."""
        if not len(tokens):
            return
        if fresh_start:
            self.evaluated.index_fill_(0, tokens, torch.inf)
        change, gap = self._spare[:, : len(tokens)], self._factor[: len(tokens)]
        moves.gather_rows(change, cached, tokens)
        torch.index_select(self.evaluated, 0, tokens, out=gap)
        torch.sub(fresh, change, out=change).div_(gap.neg_().add_(sigma)[:, None])
        moves.scatter_rows(self.slope, tokens, change)
        self.evaluated.index_fill_(0, tokens, sigma)

    def ahead(self, strength: Tensor, sigma: float, factor: float) -> Tensor:
        """[N, 1]: what to multiply the slope with for the way from a token's last evaluation to ``sigma``, by strength
        [N] of the slope, times ``factor``; 0 for tokens that were evaluated there. Until the next call."""
        return self._factor.copy_(self.evaluated).neg_().add_(sigma).mul_(strength).mul_(factor)[:, None]
