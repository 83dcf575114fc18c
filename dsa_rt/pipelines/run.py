"""One call of a pipeline: its plan, its caches, and the velocity of every call of a transformer in it.

The pipeline keeps its loop: for each step it calls a transformer for the prompt, then, under classifier-free guidance,
for the empty prompt; it mixes the two and takes an Euler step. What it gets for a branch is the velocity of all tokens:
fresh where they were computed, the one they last had elsewhere. Mixing and Euler are linear, so the pipeline's own step
is cached Euler (HSA, section "Cached Euler").

Samples of a batch run one after another, each with groups of its own, so that none depends on the others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_rt.cache import TextKV
from dsa_rt.errors import OptionError, PolicyError
from dsa_rt.memory import MemoryPlan
from dsa_rt.models.config import WanConfig
from dsa_rt.ops import step as ops
from dsa_rt.pipelines.shared import SharedWan
from dsa_rt.plan import TokenGrid, frame_tokens
from dsa_rt.policy import HSA, Policy, StepPlan
from dsa_rt.sampler.conditions import Conditions
from dsa_rt.sampler.groups import Extrapolation, Groups
from dsa_rt.sync import spare_bytes, sync_bytes, sync_caches, sync_host_bytes


@dataclass(frozen=True)
class Options:
    """As given to :func:`dsa_rt.attach`; memory_limit in bytes."""

    policy: Policy
    memory_limit: int | None
    storage: str
    seed: int


@dataclass(frozen=True)
class RunStats:
    """What a call of the pipeline spent in its transformers.

    steps: planned; batch: samples; tokens: of a sample. active_tokens, seconds: of each step that ran, the former of
    each sample and guidance branch, the latter wall clock of all transformer calls of the step, waiting for the device.
    memory: bytes that were held from step to step.
    """

    steps: int
    batch: int
    tokens: int
    active_tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    memory: int

    @property
    def token_step_share(self) -> float:
        """Mean share of the tokens that a step computed."""
        return sum(self.active_tokens) / (max(1, len(self.active_tokens)) * self.tokens)


class Run:
    """A call of ``pipe`` that begins with these inputs of its transformer, [B, C, F, h, w] and [B] or [B, N]; text_rows
    counts those of the image encoder too.

    Raises before anything is allocated: :class:`PolicyError` where the policy does not fit the steps,
    :class:`MemoryLimitError`, :class:`ShapeError`, :class:`OptionError`.
    """

    def __init__(
        self, pipe: Any, options: Options, config: WanConfig, latents: Tensor, timestep: Tensor, text_rows: int
    ) -> None:
        self.sigmas: list[float] = pipe.scheduler.sigmas.tolist()
        self.switch = _switch_step(pipe)
        self.guidance = [pipe.guidance_scale]
        if pipe.config.boundary_ratio is not None:
            self.guidance.append(pipe._guidance_scale_2)
        self.grid = TokenGrid.for_latents(latents.shape[3], latents.shape[4], config.patch)
        dense = frame_tokens(
            self.grid, range(latents.shape[2]), config.head_dim, per_frame=False, device=latents.device
        )
        conditions = self._conditions(latents, timestep)
        self.plan = _plan(options.policy, len(self.sigmas) - 1, self.grid, len(dense.tokens), conditions, self.switch)
        batch, branches = len(latents), 2 if pipe.do_classifier_free_guidance else 1
        extrapolated = isinstance(options.policy, HSA) and options.policy.update == "extrapolated"
        memory = _memory(config, self.plan, batch, branches, latents.dtype, text_rows, options.storage, extrapolated,
                         latents.device)  # fmt: skip
        if latents.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks that torch keeps for reuse do not count as free
        memory.check(options.memory_limit, latents.device)

        dense = replace(dense, modulation_rows=conditions.modulation_rows(len(dense.tokens), latents.device))
        caches = sync_caches(
            self.plan, batch * branches, config.layers, config.heads, config.head_dim, latents.dtype, latents.device,
            options.storage,
        )  # fmt: skip
        fixed = np.empty(0, np.int64) if conditions.fixed is None else conditions.fixed.cpu().numpy()
        groups = [Groups(self.plan, dense, caches[n * branches : (n + 1) * branches]) for n in range(batch)]
        for n, part in enumerate(groups):
            part.restart(options.seed + n, fixed)
        self._samples = [
            _Sample(
                part,
                [latents.new_zeros(1, len(dense.tokens), config.velocity_dim) for _ in range(branches)],
                extrapolated,
            )
            for part in groups
        ]
        self._branches = [_Branch() for _ in range(branches)]
        self._step, self._calls, self._expert, self._began = -1, 0, 0, 0.0
        self._memory = memory.total
        self._counts: list[int] = []
        self._seconds: list[float] = []

    def _conditions(self, latents: Tensor, timestep: Tensor) -> Conditions:
        """Tokens at timestep 0 (TI2V: the first frame) are conditions."""
        if timestep.ndim == 1:
            return Conditions()
        levels = timestep[0]
        if bool(((timestep != levels) | ((levels != 0) & (levels != levels.amax()))).any()):
            raise OptionError(
                "the transformer got other timesteps than one for all tokens, or that and 0 for condition tokens; "
                "under dsa_rt.attach there are no others"
            )
        fixed = torch.nonzero(levels == 0).flatten()
        if not len(fixed):
            return Conditions()
        return Conditions(fixed=fixed, fixed_rows=self.grid.patchify(latents[:1])[:, fixed])

    @property
    def stats(self) -> RunStats:
        """Of the steps so far."""
        counts, seconds = tuple(self._counts), tuple(self._seconds)
        return RunStats(self.plan.steps, len(self._samples), self.plan.tokens, counts, seconds, self._memory)

    def is_last(self, guided: bool) -> bool:
        """Whether no call follows the one that was made. guided: whether the step has a call for the empty prompt."""
        return self._step == self.plan.steps - 1 and self._calls == (2 if guided else 1)

    def velocity(
        self, step: int, expert: int, model: SharedWan, latents: Tensor, timestep: Tensor, text: Tensor,
        image: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """[B, C, F, h, w] of the step's next guidance branch, in the dtype of the model.

        step: the scheduler's. expert: 0 for ``transformer``, 1 for ``transformer_2``. text [B, L, text_dim], image
        [B or 1, I, image_dim].
        """
        self._advance(step, expert)
        branch = self._calls
        self._check_branch(branch)
        rows = self.grid.patchify(latents)
        contexts = self._branches[branch].contexts(model, text, image, len(latents))
        timesteps = timestep[:, None] if timestep.ndim == 1 else timestep.amax(-1, keepdim=True)
        if self.plan.fixed:
            timesteps = torch.cat((timesteps, torch.zeros_like(timesteps)), 1)
        parts = [
            sample.velocity(
                self._step, branch, model, rows[n : n + 1], timesteps[n : n + 1], contexts[n],
                self.sigmas[self._step], fresh_start=self._step == self.switch,
            )
            for n, sample in enumerate(self._samples)
        ]  # fmt: skip
        velocity = self.grid.unpatchify(torch.cat(parts))
        if velocity.device.type == "cuda":
            torch.cuda.synchronize(velocity.device)
        self._branches[branch].step = self._step
        self._calls += 1
        self._seconds[-1] = time.perf_counter() - self._began
        return velocity

    def _advance(self, step: int, expert: int) -> None:
        """Follow the pipeline to a step; the velocities of the one before are complete."""
        if step != self._step:
            if step != self._step + 1 or step >= self.plan.steps:
                raise OptionError(
                    f"the pipeline calls its transformer at step {step} after step {self._step} of {self.plan.steps}; "
                    "under dsa_rt.attach every step of a call runs once, in order"
                )
            if self._step >= 0:
                for sample in self._samples:
                    sample.score(self._step, self.guidance[self._expert] if self._calls > 1 else None)
            self._step, self._calls, self._began = step, 0, time.perf_counter()
            self._counts.append(self.plan.counts[step])
            self._seconds.append(0.0)
        self._expert = expert

    def _check_branch(self, branch: int) -> None:
        """Guidance that a callback switched on cannot start in a step that skips tokens: there is nothing to hold."""
        known = branch < len(self._branches)
        if known and (self.plan.is_full(self._step) or self._branches[branch].step == self._step - 1):
            return
        raise OptionError(
            f"guidance is on at step {self._step}, but was off before; under this policy leave it on from the first "
            "step, or off"
        )


class _Branch:
    """A guidance branch: the last step it ran in, and its text as every sample's cross-attention reads it."""

    def __init__(self) -> None:
        self.step = -1
        self._made_of: tuple[SharedWan, Tensor, int, Tensor | None] | None = None
        self._contexts: list[TextKV] = []

    def contexts(self, model: SharedWan, text: Tensor, image: Tensor | None, batch: int) -> list[TextKV]:
        """For each sample. Made again where a callback changed the text, and for other weights."""
        version = 0 if text.is_inference() else text._version  # rises when values are changed in place
        known = self._made_of
        if known and known[0] is model and known[1] is text and known[2] == version and known[3] is image:
            return self._contexts
        self._made_of, self._contexts = None, []  # what they hold is free for the new ones
        texts = text.split(1)
        images = [None] * len(texts) if image is None else image.expand(len(texts), -1, -1).split(1)
        made = [model.embed_text(*pair) for pair in zip(texts, images, strict=True)]
        self._contexts = made * batch if len(made) == 1 else made
        self._made_of = (model, text, version, image)
        return self._contexts


class _Sample:
    """One sample of the batch: its groups with their K/V, and for each branch the last velocity [1, N, P] of every
    token."""

    def __init__(self, groups: Groups, velocities: list[Tensor], extrapolated: bool) -> None:
        self.groups, self.velocities = groups, velocities
        self.guided = torch.zeros_like(velocities[0], dtype=torch.float32)
        self.lines: list[Extrapolation] = []
        if extrapolated:
            spare = torch.empty_like(self.guided)
            self.lines = [Extrapolation(torch.empty_like(spare), spare) for _ in velocities]
        self.scores = self.guided.new_zeros(self.guided.shape[:2])

    def velocity(
        self, step: int, branch: int, model: SharedWan, rows: Tensor, timesteps: Tensor, text: TextKV, sigma: float, *,
        fresh_start: bool,
    ) -> Tensor:  # fmt: skip
        """[1, N, P] of all tokens, from input rows [1, N, patch_dim] and timesteps [1, R]."""
        active, caches = self.groups.at(step)
        held = self.velocities[branch]
        line = self.lines[branch] if self.lines else None
        if len(active.tokens):
            rows = rows if active is self.groups.dense else rows[:, active.tokens]
            fresh = model(rows, active, timesteps, text, caches[branch]).velocity
            if line is not None:
                line.observe(active.tokens, fresh.float(), held.float(), sigma, fresh_start=fresh_start)
            held[:, active.tokens] = fresh
        if line is None or self.groups.plan.is_full(step):
            return held
        return (held + line.ahead(self.groups.strength, sigma, 1.0) * line.slope).to(held.dtype)

    def score(self, step: int, guidance: float | None) -> None:
        """Once all branches of a step are known: change of every token's velocity, after guidance."""
        scoring = self.groups.plan.scoring
        if not scoring or not scoring.start - 1 <= step < scoring.stop:
            return
        velocity = self.velocities[0].float()
        if guidance is not None:
            other = self.velocities[1].float()
            velocity = other + guidance * (velocity - other)
        change = torch.empty_like(self.scores)
        still = torch.zeros_like(velocity)
        ops.cached_step(still, self.guided, self.groups.dense.tokens, velocity, 0.0, change)
        if step in scoring:
            self.scores += change
        if step == scoring[-1]:
            self.groups.assign(self.scores[0].cpu().numpy())


def _switch_step(pipe: Any) -> int:
    """The first step of ``transformer_2``, by the pipeline's own comparison; the number of steps without one."""
    timesteps, boundary = pipe.scheduler.timesteps, pipe.config.boundary_ratio
    below = [] if boundary is None else (timesteps < boundary * pipe.scheduler.config.num_train_timesteps).tolist()
    return below.index(True) if True in below else len(timesteps)


def _plan(
    policy: Policy, steps: int, grid: TokenGrid, tokens: int, conditions: Conditions, switch: int
) -> StepPlan:
    if not isinstance(policy, HSA):
        return StepPlan.dense(steps, tokens, conditions.count)
    try:
        return policy.plan(
            steps, tokens, grid.tokens, fixed=conditions.count, full=(switch,) if switch < steps else ()
        )
    except PolicyError as error:
        if policy.steps is None or policy.steps == steps:
            raise
        raise PolicyError(f"{error}. Call the pipeline with num_inference_steps={policy.steps}") from error


def _memory(
    config: WanConfig, plan: StepPlan, batch: int, branches: int, dtype: torch.dtype, text_rows: int, storage: str,
    extrapolated: bool, device: torch.device,
) -> MemoryPlan:  # fmt: skip
    """What a run holds from step to step beside the pipeline's own: K/V and rows of velocity."""
    kept = (plan, batch * branches, config.layers, config.heads, config.head_dim, dtype, storage, device)
    text = 2 * config.layers * batch * branches * text_rows * config.dim * dtype.itemsize
    wide = 1 + (branches + 1 if extrapolated else 0)  # fp32 rows: velocity after guidance, slopes, working memory
    spare = spare_bytes(plan, config.heads, config.head_dim, dtype, storage)
    rows = batch * plan.tokens * config.velocity_dim * (branches * dtype.itemsize + 4 * wide)
    return MemoryPlan(0, sync_bytes(*kept) + text + spare, 0, 0, 0, rows, sync_host_bytes(*kept), storage)
