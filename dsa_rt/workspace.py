"""What a compiled many-step function runs on: text K/V, rows, K/V of tokens that wait, and recorded passes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsa_rt.arena import Arena
from dsa_rt.cache import TextKV
from dsa_rt.models.wan import WanModel
from dsa_rt.planner import image_rows
from dsa_rt.policy import StepPlan
from dsa_rt.recording import Recorder
from dsa_rt.sampler.ode import Expert, Solver

if TYPE_CHECKING:
    from dsa_rt.runtime import Runtime
    from dsa_rt.settings import Settings


class Workspace:
    """For one clip at a time: prompts with :meth:`read_prompt`, then the solver of the clip's plan, which is there for
    a run without condition tokens and for one whose first frame is given. Solvers take turns in the same buffers.

    recorder: what makes passes replayable; None: the model is called in every pass.
    """

    def __init__(self, runtime: Runtime, settings: Settings, recorder: Recorder | None = None) -> None:
        self.arena = Arena(runtime.device)
        if recorder is not None and runtime.device.type == "cuda":
            recorder = partial(recorder, pool=torch.cuda.graph_pool_handle())
        images = image_rows(runtime.manifest)

        def text(model: WanModel) -> TextKV:
            config = model.config
            shape = (1, config.text_length, config.heads, config.head_dim)
            return TextKV.room(config.layers, shape, model.dtype, runtime.device, images)

        def expert(model: WanModel, guidance: float) -> Expert:
            return Expert(model, text(model), text(model) if settings.guided else None, guidance)

        high, low = expert(runtime.model, settings.guidance), None
        if runtime.model_2 is not None and settings.guidance_2 is not None:
            low = expert(runtime.model_2, settings.guidance_2)
        self._experts = [high] if low is None else [high, low]
        plans = [plan for plan in (settings.token_plan, settings.image_plan) if plan is not None]
        self.solvers: dict[StepPlan, Solver] = {
            plan: Solver(
                high, settings.grid, range(settings.latent_frames), settings.sigmas, plan, low=low,
                boundary=runtime.manifest.boundary or 0.0, storage=settings.plan.storage, arena=self.arena,
                recorder=recorder,
            )
            for plan in plans
        }  # fmt: skip

    def warm_up(self) -> None:
        """Run every kind of pass, and record it where there is a recorder."""
        for solver in self.solvers.values():
            solver.warm_up()
        self.arena.allocations = 0

    @torch.no_grad()
    def read_prompt(self, rows: Tensor, other: Tensor | None, image: Tensor | None) -> None:
        """Text K/V of the next clip, from rows [1, text_length, text_dim] of the text encoder: of the prompt, and of
        what guidance leads away from. image [1, I, image_dim]: of the image encoder, where the generator reads such."""
        for expert in self._experts:
            expert.model.embed_text(rows, image, out=expert.text)
            if expert.empty is not None and other is not None:
                expert.model.embed_text(other, image, out=expert.empty)
