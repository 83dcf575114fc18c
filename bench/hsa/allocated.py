"""The runtime's own sampler as a method: dense, fewer steps, HSA, and HSA by other scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.hsa.clip import Clip
from dsa_rt.policy import HSA, StepPlan
from dsa_rt.sampler.ode import solve

SCORES = ("relative", "change", "magnitude")


@dataclass(frozen=True)
class Allocated:
    """``dsa_rt.sampler.ode.solve`` on a schedule of ``steps``; policy None: all tokens in every step.

    storage: of K/V between steps, one of :data:`dsa_rt.sync.STORAGES`.
    """

    steps: int
    policy: HSA | None = None
    storage: str = "model"

    def __call__(self, clip: Clip) -> Tensor:
        if self.policy is None:
            plan = StepPlan.dense(self.steps, clip.tokens)
        else:
            plan = self.policy.plan(self.steps, clip.tokens, clip.grid.tokens)
        return solve(
            clip.model, clip.grid, clip.frames, clip.text, clip.empty, clip.sigmas(self.steps),
            clip.regime.guidance, clip.seed, lambda _passes, _confidence: None, lambda: None, plan=plan,
            storage=self.storage,
        ).x0  # fmt: skip


@dataclass(frozen=True)
class ByScore:
    """HSA with dynamic selection by another score of the same full steps before the window.

    score: "relative" is HSA's own ‖v_i − v_{i−1}‖₁ / ‖v_i‖₁; "change" is its numerator and "magnitude" its
    denominator alone. As there, tokens with the smallest score get the smallest budget.
    """

    steps: int
    policy: HSA
    score: str

    def __call__(self, clip: Clip) -> Tensor:
        watched: list[Tensor] = []

        def watch(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if output.velocity.shape[1] == clip.tokens:
                watched.append(output.velocity.float().clone())  # the next pass takes its memory

        def scores() -> NDArray[np.float32]:
            count = clip.branches
            steps = [clip.guided(watched[i : i + count]) for i in range(0, len(watched), count)]
            return score(steps, self.score)

        options = {field.name: getattr(self.policy, field.name) for field in fields(HSA)}
        hook = clip.model.register_forward_hook(watch)
        try:
            return Allocated(self.steps, _Ranked(**options, scores=scores))(clip)
        finally:
            hook.remove()


@dataclass(frozen=True)
class _Ranked(HSA):
    """HSA that asks elsewhere for its scores."""

    scores: Callable[[], NDArray[np.float32]] | None = None

    def order(
        self, plan: StepPlan, moving: NDArray[np.int64], seed: int, scores: NDArray[np.float32] | None
    ) -> NDArray[np.int64]:
        return super().order(plan, moving, seed, self.scores() if self.scores is not None else scores)


def score(velocities: Sequence[Tensor], kind: str) -> NDArray[np.float32]:
    """[N]: mean over the steps from the second on; velocities [1, N, P] of consecutive full steps."""
    pairs = list(pairwise(velocities))
    change = torch.stack([(fresh - old).abs().sum(-1)[0] for old, fresh in pairs])
    magnitude = torch.stack([fresh.abs().sum(-1)[0] for _, fresh in pairs])
    values = {"relative": change / magnitude, "change": change, "magnitude": magnitude}[kind]
    return values.mean(0).numpy()
