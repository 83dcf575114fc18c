"""Many-step Euler sampling of a whole clip with a bidirectional generator, dense or with heterogeneous steps (HSA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dsa_rt.cache import TextKV
from dsa_rt.clock import Clock
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.models.wan import WanModel
from dsa_rt.ops import step as ops
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens
from dsa_rt.policy.steps import CONDITIONS, StepPlan
from dsa_rt.sampler.conditions import Conditions
from dsa_rt.sampler.rollout import DenoisedChunk
from dsa_rt.sync import SyncCache, sync_caches
from dsa_rt.trace import stage


@dataclass(frozen=True, eq=False)
class Expert:
    """One set of weights with its prompt; under classifier-free guidance also ``empty``, the unconditional one."""

    model: WanModel
    text: TextKV
    empty: TextKV | None = None
    guidance: float = 1.0

    def velocity(
        self, rows: Tensor, active: ActiveSet, timesteps: Tensor, caches: Sequence[SyncCache | None]
    ) -> Tensor:
        """Velocity [1, A, P] fp32 of the active rows, after guidance; a cache for each branch."""
        velocity = self.model(rows, active, timesteps, self.text, caches[0]).velocity.float()
        if self.empty is None:
            return velocity
        other = self.model(rows, active, timesteps, self.empty, caches[1]).velocity.float()
        return other + self.guidance * (velocity - other)


def switch_step(sigmas: Sequence[float], boundary: float) -> int:
    """The first step of the second expert: the first with a sigma below ``boundary``; :meth:`HSA.plan` takes it in
    ``full``, as K/V of the first expert mean nothing to the second."""
    return next((step for step, sigma in enumerate(sigmas[:-1]) if sigma < boundary), len(sigmas) - 1)


@torch.no_grad()
def solve(
    model: WanModel,
    grid: TokenGrid,
    frames: range,
    text: TextKV,
    empty: TextKV | None,
    sigmas: Sequence[float],
    guidance: float,
    seed: int,
    on_pass: Callable[[int, float | None], None],
    check: Callable[[], None],
    *,
    plan: StepPlan | None = None,
    conditions: Conditions | None = None,
    low: Expert | None = None,
    boundary: float = 0.0,
    storage: str = "model",
) -> DenoisedChunk:
    """Euler over all tokens, ``x += (sigma' - sigma) v`` in every step; with ``empty`` under classifier-free guidance.

    sigmas: T + 1 levels, the last one 0. plan: which tokens a step computes (None: all); a token that is skipped moves
    on by the velocity it last had. conditions: of image-to-video. low: the expert for sigmas below ``boundary`` (the
    first one's sizes; Wan 2.2 A14B: boundary 0.875 text-to-video, 0.9 image-to-video). storage: of K/V between steps,
    see :func:`dsa_rt.sync.sync_caches`. The clip is one chunk; passes are the steps with a forward pass.
    """
    clock = Clock(model.patch_embedding.weight.device)
    start = clock.mark()
    device, width = model.patch_embedding.weight.device, model.config.velocity_dim
    conditions = conditions or Conditions()
    dense = frame_tokens(grid, frames, model.config.head_dim, per_frame=False, device=device)
    tokens = len(dense.tokens)
    conditions.check(tokens, width, model.config.patch_dim)
    plan = plan or StepPlan.dense(len(sigmas) - 1, tokens, conditions.count)
    _check_plan(plan, len(sigmas) - 1, tokens, conditions.count)
    switch = len(sigmas) if low is None else switch_step(sigmas, boundary)
    if switch < plan.steps and not plan.is_full(switch):
        raise OptionError(f"the experts switch at step {switch}, where the plan skips tokens; give it full=({switch},)")
    dense = replace(dense, modulation_rows=conditions.modulation_rows(tokens, device))
    high = Expert(model, text, empty, guidance)
    branches = 1 if empty is None and (low is None or low.empty is None) else 2
    config = model.config
    caches = sync_caches(
        plan, branches, config.layers, config.heads, config.head_dim, model.dtype, device, storage
    )  # fmt: skip
    groups = Groups(plan, dense, conditions, caches, seed)

    x = torch.empty(1, tokens, width, device=device)
    ops.philox_normal(x, torch.tensor([seed], device=device), dense.tokens, 0)
    conditions.place(x)
    velocity_cache, nothing = torch.zeros_like(x), x.new_empty(1, 0, width)
    score, scores = x.new_empty(1, tokens), x.new_zeros(1, tokens)
    line = Extrapolation(x) if plan.policy is not None and plan.policy.update == "extrapolated" else None
    passes = 0
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        check()
        expert = low if low is not None and step >= switch else high
        active, kept = groups.at(step)
        velocity = nothing
        if len(active.tokens):
            rows = x if active is dense else x[:, active.tokens]
            rows = conditions.join(rows, active.tokens, grid.patch[1] * grid.patch[2])
            with stage("step"):
                velocity = expert.velocity(rows, active, conditions.timesteps(sigma, device), kept)
            passes += 1
        if line is not None:
            line.observe(active.tokens, velocity, velocity_cache, sigma, fresh_start=step == switch)
        scoring = step in plan.scoring
        ops.cached_step(
            x, velocity_cache, active.tokens, velocity, following - sigma, score if scoring else None
        )  # fmt: skip
        if line is not None and not plan.is_full(step):
            line.advance(x, groups.strength, sigma, following)
        conditions.place(x)
        if scoring:
            scores += score
            if step == plan.scoring[-1]:
                groups.assign(scores[0].cpu().numpy())  # the one time in a clip that the host waits
        if len(active.tokens):
            on_pass(passes, None)
    spent = (clock.between(start, clock.mark()), 0.0)
    return DenoisedChunk(0, frames, x, passes, (None,) * passes, None, lambda: spent)


def _check_plan(plan: StepPlan, steps: int, tokens: int, fixed: int) -> None:
    if (plan.steps, plan.tokens, plan.fixed) != (steps, tokens, fixed):
        raise ShapeError(
            f"the plan is for {plan.steps} steps, {plan.tokens} tokens and {plan.fixed} conditions; this run has "
            f"{steps}, {tokens} and {fixed}"
        )


class Groups:
    """The active set and the caches of every step. All tokens in their own order until groups are known and needed."""

    def __init__(
        self, plan: StepPlan, dense: ActiveSet, conditions: Conditions, caches: Sequence[SyncCache], seed: int
    ) -> None:
        self.plan, self.dense, self.caches, self.seed = plan, dense, caches, seed
        self.fixed = np.empty(0, np.int64) if conditions.fixed is None else conditions.fixed.cpu().numpy()
        self.strength = torch.zeros(plan.tokens, device=dense.tokens.device)
        self._order: Tensor | None = None
        self._sets: dict[tuple[int, ...], ActiveSet] = {}
        self._none = dense.take(dense.tokens[:0], (), plan.tokens)
        if min(plan.counts) < plan.tokens and not plan.scoring:
            self.assign(None)

    def assign(self, scores: np.ndarray | None) -> None:
        """Put every token into its group; K/V that were kept before go with it."""
        plan, device = self.plan, self.dense.tokens.device
        assert plan.policy is not None
        moving = np.setdiff1d(np.arange(plan.tokens), self.fixed)
        order = np.concatenate([self.fixed, plan.policy.order(plan, moving, self.seed, scores)])
        self._order = torch.from_numpy(order).to(device)
        strengths = plan.policy.strengths(plan.steps)
        for group, rows in plan.layout:
            if group != CONDITIONS:
                self.strength[self._order[rows.start : rows.stop]] = strengths[group]
        for cache in self.caches:
            cache.arrange(self._order)

    def at(self, step: int) -> tuple[ActiveSet, Sequence[SyncCache | None]]:
        """A cache for each branch where K/V of other steps are read or these will be."""
        plan = self.plan
        if not plan.counts[step]:
            return self._none, (None, None)
        if plan.is_full(step) and not plan.keeps(step):
            return self.dense, (None, None)
        if self._order is None:
            return self.dense, self.caches
        groups = plan.active[step]
        if groups not in self._sets:
            full = plan.is_full(step)
            parts = [rows for group, rows in plan.layout if full or group in groups]
            index = torch.cat([self._order[rows.start : rows.stop] for rows in parts])
            self._sets[groups] = self.dense.take(index, parts, plan.tokens)
        return self._sets[groups], self.caches


class Extrapolation:
    """Velocity of skipped tokens, linear in sigma through their last two evaluations (ours; update="extrapolated").

    slope [1, N, P]: of the velocity over sigma; evaluated [N]: sigma of the last evaluation.
    """

    def __init__(self, x: Tensor) -> None:
        self.slope = torch.zeros_like(x)
        self.evaluated = torch.full((x.shape[1],), torch.inf, device=x.device)

    def observe(self, tokens: Tensor, fresh: Tensor, cached: Tensor, sigma: float, *, fresh_start: bool) -> None:
        """Note an evaluation before it enters the cache. fresh_start: other weights; no line goes through both."""
        gap = sigma - (torch.full_like(self.evaluated[tokens], torch.inf) if fresh_start else self.evaluated[tokens])
        self.slope[:, tokens] = (fresh - cached[:, tokens]) / gap[:, None]
        self.evaluated[tokens] = sigma

    def advance(self, x: Tensor, strength: Tensor, sigma: float, following: float) -> None:
        """Add to an Euler step with held velocities what the line adds, by strength [N] of its slope; that is nothing
        for tokens evaluated at ``sigma``."""
        x += ((following - sigma) * strength * (sigma - self.evaluated))[:, None] * self.slope
