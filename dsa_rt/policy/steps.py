"""The plan of a many-step run: how many tokens every step computes. Numbers only, known before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsa_rt.policy.hsa import HSA

CONDITIONS = -1
"""Stands for the condition tokens where groups are listed."""


@dataclass(frozen=True)
class StepPlan:
    """Which groups of tokens every step computes.

    policy: who says which token is in which group, None in a dense run. tokens: N, of the whole sequence. fixed: of
    those, conditions that never move; they are computed where all others are. tokens_per_frame: of a latent frame.
    sizes: tokens of each group, baseline first; they sum to N - fixed. active: for each step the groups it computes.
    scoring: the steps after which the change of every token's velocity is read, in order to form the groups.
    """

    policy: HSA | None
    tokens: int
    fixed: int
    tokens_per_frame: int
    sizes: tuple[int, ...]
    active: tuple[tuple[int, ...], ...]
    scoring: range = range(0)

    @classmethod
    def dense(cls, steps: int, tokens: int, fixed: int = 0) -> StepPlan:
        """All tokens in every step."""
        return cls(None, tokens, fixed, tokens, (tokens - fixed,), ((0,),) * steps)

    @property
    def steps(self) -> int:
        return len(self.active)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each step: N, fewer, or 0 where no forward pass runs."""
        moving = self.tokens - self.fixed
        counts = (sum(self.sizes[group] for group in groups) for groups in self.active)
        return tuple(self.tokens if count == moving else count for count in counts)

    @property
    def passes(self) -> int:
        """Steps with a forward pass."""
        return sum(count > 0 for count in self.counts)

    @property
    def token_step_share(self) -> float:
        """mean |A_i| / N. Every term of a step's cost is linear in |A_i|: the ideal share of a dense run's time."""
        return sum(self.counts) / (self.steps * self.tokens)

    def is_full(self, step: int) -> bool:
        """Whether the step computes all tokens."""
        return self.counts[step] == self.tokens

    def is_partial(self, step: int) -> bool:
        """Whether the step computes some tokens, and reads the K/V of the others."""
        return 0 < self.counts[step] < self.tokens

    def keeps(self, step: int) -> bool:
        """Whether K/V of this step are read by a later one: the next pass is partial."""
        later = (i for i in range(step + 1, self.steps) if self.counts[i])
        following = next(later, None)
        return following is not None and self.is_partial(following)

    @cached_property
    def layout(self) -> tuple[tuple[int, range], ...]:
        """(group, its K/V rows) in the order of the rows: conditions, then the groups from the smallest budget to the
        baseline (HSA, section "Reordering"). Parts without tokens are left out."""
        parts, start = [], 0
        for group in (CONDITIONS, *reversed(range(len(self.sizes)))):
            size = self.fixed if group == CONDITIONS else self.sizes[group]
            if size:
                parts.append((group, range(start, start + size)))
            start += size
        return tuple(parts)

    @cached_property
    def stale(self) -> frozenset[int]:
        """Groups (and the conditions) that some partial step skips: their K/V must survive between steps."""
        partial = [set(self.active[step]) for step in range(self.steps) if self.is_partial(step)]
        return frozenset(group for group, _ in self.layout if any(group not in groups for groups in partial))

    @cached_property
    def arranged(self) -> dict[tuple[int, ...], tuple[range, ...]]:
        """Of every kind of step that reads or leaves K/V, once tokens have groups: its groups, and their K/V rows. With
        all groups come the conditions."""
        kinds: dict[tuple[int, ...], tuple[range, ...]] = {}
        for step, groups in enumerate(self.active):
            if self.is_partial(step):
                kinds[groups] = tuple(rows for group, rows in self.layout if group in groups)
            elif self.is_full(step) and self.keeps(step):
                kinds[groups] = tuple(rows for _, rows in self.layout)
        return kinds

    @property
    def captures(self) -> bool:
        """Whether K/V must be kept before the groups are known: dynamic selection, and a partial step right after."""
        return len(self.scoring) > 0 and self.keeps(self.scoring[-1])

    @property
    def kept_rows(self) -> int:
        """K/V rows per layer and guidance branch that must be stored; 0 where no step is partial."""
        stale = sum(len(rows) for group, rows in self.layout if group in self.stale)
        return self.tokens if self.captures else stale
