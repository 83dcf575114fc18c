"""Many-step Euler sampling of a whole clip with a bidirectional generator, dense or with heterogeneous steps (HSA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dsa_rt.arena import Arena
from dsa_rt.cache import TextKV
from dsa_rt.clock import Clock
from dsa_rt.errors import OptionError, ShapeError
from dsa_rt.models.wan import Modulation, WanModel
from dsa_rt.ops import rows as moves
from dsa_rt.ops import step as ops
from dsa_rt.plan import ActiveSet, TokenGrid, frame_tokens
from dsa_rt.policy.steps import StepPlan
from dsa_rt.recording import Recorded, Recorder
from dsa_rt.sampler.conditions import Conditions
from dsa_rt.sampler.groups import Extrapolation, Groups
from dsa_rt.sampler.rollout import DenoisedChunk
from dsa_rt.schedule import TRAIN_TIMESTEPS
from dsa_rt.sync import SyncCache, sync_caches
from dsa_rt.trace import stage


@dataclass(frozen=True, eq=False)
class Expert:
    """One set of weights with its prompt; under classifier-free guidance also ``empty``, the unconditional one."""

    model: WanModel
    text: TextKV
    empty: TextKV | None = None
    guidance: float = 1.0


def switch_step(sigmas: Sequence[float], boundary: float) -> int:
    """The first step of the second expert: the first with a sigma below ``boundary``; :meth:`HSA.plan` takes it in
    ``full``, as K/V of the first expert mean nothing to the second."""
    return next((step for step, sigma in enumerate(sigmas[:-1]) if sigma < boundary), len(sigmas) - 1)


class Solver:
    """What many-step clips of one plan run on, one at a time: Euler over all tokens, ``x += (sigma' - sigma) v`` in
    every step, where a token that is skipped moves on by the velocity it last had.

    high: the expert, or with ``low`` the one for sigmas not below ``boundary`` (Wan 2.2 A14B: 0.875 text-to-video, 0.9
    image-to-video); their text is read in every pass, and written by whoever made it. sigmas: T + 1 levels, the last
    one 0. plan: which tokens a step computes; storage: of K/V between steps, see :func:`dsa_rt.sync.sync_caches`.

    Every buffer is in ``arena``, by name, so that solvers of several plans may take turns in one. recorder: what makes
    passes replayable, by :meth:`warm_up`; without one the model is called.
    """

    def __init__(
        self, high: Expert, grid: TokenGrid, frames: range, sigmas: Sequence[float], plan: StepPlan, *,
        low: Expert | None = None, boundary: float = 0.0, storage: str = "model", arena: Arena | None = None,
        recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        model, config = high.model, high.model.config
        device = model.patch_embedding.weight.device
        self.grid, self.frames, self.sigmas, self.plan = grid, frames, sigmas, plan
        self.device, self.width = device, config.velocity_dim
        self.tokens = len(frames) * grid.tokens
        self._check_plan(plan.fixed)
        self.switch = len(sigmas) if low is None else switch_step(sigmas, boundary)
        if self.switch < plan.steps and not plan.is_full(self.switch):
            raise OptionError(
                f"the experts switch at step {self.switch}, where the plan skips tokens; give it full=({self.switch},)"
            )
        self.experts = (high,) if low is None else (high, low)
        self.arena = arena = Arena(device) if arena is None else arena
        self._recorder = recorder
        self.passes: dict[tuple[int, int, int, bool], tuple[Recorded, list[Tensor]]] = {}
        self._timesteps = [(0, min(self.switch, plan.steps)), (self.switch, plan.steps)][: len(self.experts)]
        with torch.no_grad():
            self._tables = [self._modulation(e.model, *t) for e, t in zip(self.experts, self._timesteps, strict=True)]
        guided = any(expert.empty is not None for expert in self.experts)
        caches = sync_caches(plan, 2 if guided else 1, config.layers, config.heads, config.head_dim, model.dtype,
                             device, storage, arena)  # fmt: skip
        self.groups = Groups(
            plan, frame_tokens(grid, frames, config.head_dim, per_frame=False, device=device), caches
        )

        def rows(name: str, width: int = self.width) -> Tensor:
            return arena.get(name, (1, self.tokens, width), torch.float32)

        extrapolated = plan.policy is not None and plan.policy.update == "extrapolated"
        self._extra = config.patch_dim - self.width
        self._x, self._held, self._fresh = rows("latents"), rows("held velocities"), rows("fresh velocities")
        self._other = rows("other velocities") if guided or extrapolated else self._fresh
        self._line = Extrapolation(rows("slopes"), self._other) if extrapolated else None
        ordered = any(plan.is_partial(step) for step in range(plan.steps))
        self._rows = rows("input rows", config.patch_dim) if self._extra or ordered else self._x
        self._further = rows("further channels", self._extra) if self._extra and ordered else None
        self._score, self._scores = rows("scores", 2).view(2, 1, self.tokens).unbind()
        self._seed = torch.zeros(1, dtype=torch.int64, device=device)
        self._last: torch.cuda.Event | None = None

    @torch.no_grad()
    def warm_up(self) -> None:
        """Run every kind of pass, those with most rows first, and record it where there is a recorder."""
        turns = sorted(self.groups.turns(), key=lambda turn: -len(turn[1][0].tokens))
        for step, (active, caches) in turns:
            number = int(step >= self.switch)
            for branch in range(1 if self.experts[number].empty is None else 2):
                self._pass(number, branch, active, caches[branch])
        self._mark_last()

    @torch.no_grad()
    def run(
        self, seed: int, on_pass: Callable[[int, float | None], None], check: Callable[[], None],
        conditions: Conditions | None = None,
    ) -> DenoisedChunk:  # fmt: skip
        """A clip as one chunk; its latents lie there until the next run. conditions: of image-to-video. on_pass: called
        after every step with a forward pass; check: before every step."""
        if self._last is not None:
            torch.cuda.current_stream(self.device).wait_event(self._last)
        clock = Clock(self.device)
        start = clock.mark()
        conditions = conditions or Conditions()
        conditions.check(self.tokens, self.width, self.width + self._extra)
        self._check_plan(conditions.count)
        fixed = np.empty(0, np.int64) if conditions.fixed is None else conditions.fixed.cpu().numpy()
        plan, groups, x, held, line = self.plan, self.groups, self._x, self._held, self._line
        groups.restart(seed, fixed)
        self._seed.fill_(seed)
        ops.philox_normal(x, self._seed, groups.dense.tokens, 0)
        conditions.place(x)
        held.zero_()
        self._scores.zero_()
        if line is not None:
            line.restart()
        passes = 0
        for step, (sigma, following) in enumerate(pairwise(self.sigmas)):
            check()
            active, caches = groups.at(step)
            velocity = self._fresh[:, : len(active.tokens)]
            if len(active.tokens):
                with stage("step"):
                    self._prepare(step, active, conditions)
                    self._evaluate(int(step >= self.switch), active, caches, velocity)
                passes += 1
            if line is not None:
                line.observe(active.tokens, velocity, held, sigma, fresh_start=step == self.switch)
            scoring = step in plan.scoring
            ops.cached_step(
                x, held, active.tokens, velocity, following - sigma, self._score if scoring else None
            )  # fmt: skip
            if line is not None and not plan.is_full(step):
                x.addcmul_(line.slope, line.ahead(groups.strength, sigma, following - sigma))
            conditions.place(x)
            if scoring:
                self._scores += self._score
                if step == plan.scoring[-1]:
                    groups.assign(self._scores[0].cpu().numpy())  # the one time in a clip that the host waits
            if len(active.tokens):
                on_pass(passes, None)
        self._mark_last()
        end = clock.mark()
        spent = lambda: (clock.between(start, end), 0.0)  # noqa: E731  # waits for the device
        return DenoisedChunk(0, self.frames, x, passes, (None,) * passes, None, spent)

    def _prepare(self, step: int, active: ActiveSet, conditions: Conditions) -> None:
        """What the passes of a step read: input rows and the rows of their modulation."""
        first, stop = self._timesteps[int(step >= self.switch)]
        active.modulation_rows.fill_(step - first)
        if conditions.fixed is not None and self.plan.is_full(step):
            if active is self.groups.dense:
                active.modulation_rows.index_fill_(0, conditions.fixed, stop - first)
            else:  # they come first where tokens have groups
                active.modulation_rows[: conditions.count].fill_(stop - first)
        given, latents, extra = self._input(active), self._x, conditions.extra
        dense, count = active is self.groups.dense, len(active.tokens)
        if extra is None:
            if not dense:
                moves.gather_rows(given, latents, active.tokens)
            return
        if not dense:
            assert self._further is not None
            latents, further = self._fresh[:, :count], self._further[:, :count]
            moves.gather_rows(latents, self._x, active.tokens)
            moves.gather_rows(further, extra.to(self._x.dtype), active.tokens)
            extra = further
        elements = self.grid.patch[1] * self.grid.patch[2]
        cells, own = given.unflatten(-1, (elements, -1)), self.width // elements
        cells[..., :own] = latents.unflatten(-1, (elements, -1))
        cells[..., own:] = extra.unflatten(-1, (elements, -1))

    def _input(self, active: ActiveSet) -> Tensor:
        """[1, A, patch_dim]: the latents themselves where these are the rows of a pass."""
        if active is self.groups.dense and not self._extra:
            return self._x
        return self._rows[:, : len(active.tokens)]

    def _evaluate(self, number: int, active: ActiveSet, caches: Sequence[SyncCache | None], out: Tensor) -> None:
        """Velocity [1, A, P] fp32 of the active tokens, after guidance."""
        expert = self.experts[number]
        out.copy_(self._pass(number, 0, active, caches[0]))
        if expert.empty is not None:
            other = self._other[:, : len(active.tokens)]
            other.copy_(self._pass(number, 1, active, caches[1]))
            out.sub_(other).mul_(expert.guidance).add_(other)

    def _pass(self, number: int, branch: int, active: ActiveSet, cache: SyncCache | None) -> Tensor:
        """Velocity [1, A, P] of one expert and branch, in working memory."""
        kind = (number, branch, id(active), cache is None)
        if kind not in self.passes:
            forward, made = self._forward(number, branch, active, cache)
            forward()  # makes the buffers that are still missing
            recorded = Recorded("eager", forward, forward)
            if self._recorder is not None:
                recorded = self._recorder(self.device, forward)
            self.passes[kind] = recorded, made
            return made[0]
        recorded, made = self.passes[kind]
        recorded.replay()
        return made[0]

    def _forward(
        self, number: int, branch: int, active: ActiveSet, cache: SyncCache | None
    ) -> tuple[Callable[[], None], list[Tensor]]:
        """A pass, and where its result will be."""
        expert, made = self.experts[number], list[Tensor]()
        text = expert.text if branch == 0 else expert.empty
        assert text is not None
        model, tables, arena = expert.model, self._tables[number], self.arena
        rows = self._input(active)

        def forward() -> None:
            made[:] = [model(rows, active, tables, text, cache, (), arena).velocity]

        return forward, made

    def _modulation(self, model: WanModel, first: int, stop: int) -> Modulation:
        """Of an expert's steps; the last row is that of timestep 0, which conditions have. Made row by row, as a call
        with one timestep would."""
        sigmas = (*self.sigmas[first:stop], 0.0)
        steps = [model.modulation(torch.full((1, 1), TRAIN_TIMESTEPS * s, device=self.device)) for s in sigmas]

        def joined(tables: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            return tuple(torch.cat(rows, 1) for rows in zip(*tables, strict=True))

        blocks = [joined(step.blocks[layer] for step in steps) for layer in range(model.config.layers)]
        shift, scale = joined(step.head for step in steps)
        return Modulation(blocks, steps[0].affine, (shift, scale))

    def _check_plan(self, fixed: int) -> None:
        plan, steps = self.plan, len(self.sigmas) - 1
        if (plan.steps, plan.tokens, plan.fixed) != (steps, self.tokens, fixed):
            raise ShapeError(
                f"the plan is for {plan.steps} steps, {plan.tokens} tokens and {plan.fixed} conditions; this run has "
                f"{steps}, {self.tokens} and {fixed}"
            )

    def _mark_last(self) -> None:
        """Another stream that runs the next clip waits for this one."""
        if self.device.type == "cuda":
            self._last = torch.cuda.current_stream(self.device).record_event()


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
    """One clip on a :class:`Solver` of its own, with the model called in every pass; plan None: all tokens in every
    step. See there."""
    conditions = conditions or Conditions()
    tokens = len(frames) * grid.tokens
    conditions.check(tokens, model.config.velocity_dim, model.config.patch_dim)
    plan = plan or StepPlan.dense(len(sigmas) - 1, tokens, conditions.count)
    solver = Solver(
        Expert(model, text, empty, guidance), grid, frames, sigmas, plan, low=low, boundary=boundary, storage=storage
    )
    return solver.run(seed, on_pass, check, conditions)
