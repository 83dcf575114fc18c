"""One line on a diffusers pipeline: ``dsa_rt.attach(pipe, policy="hsa-50")``.

The pipeline keeps its call, its arguments, its callbacks and its scheduler. In place of each transformer it gets a
shallow copy of it: the same class, configuration, modules and parameters, with a forward pass that goes through
:mod:`dsa_rt.pipelines.run`. The transformer itself is not touched; :func:`detach` puts it back.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_rt.errors import OptionError, PolicyError
from dsa_rt.memory import parse_bytes
from dsa_rt.pipelines.checks import (
    PIPELINES,
    TRANSFORMERS,
    check_pipeline,
    check_scheduler,
    check_transformer,
    is_of_diffusers,
)
from dsa_rt.pipelines.run import Options, Run, RunStats
from dsa_rt.pipelines.shared import SharedWan
from dsa_rt.policy import HSA, Fixed, Policy, parse_policy
from dsa_rt.sync import STORAGES

_MARK = "_dsa_rt_stand_in"


@dataclass(frozen=True)
class Attached:
    """policy: of the pipeline. last_run: what its last call spent, so far if it is running; None before the first."""

    policy: Policy
    last_run: RunStats | None


def attach(
    pipe: Any, policy: str | Policy = "hsa-50", *, memory_limit: int | str | None = None, kv_storage: str = "model",
    seed: int = 0,
) -> None:  # fmt: skip
    """Let a diffusers ``WanPipeline`` or ``WanImageToVideoPipeline`` spend its steps as the policy says.

    policy: "dense", a name such as "hsa-50", or a :class:`dsa_rt.policy.HSA`; presets with 40 steps need
    num_inference_steps=40. memory_limit: of what a call holds beside the weights (K/V, velocities), in bytes or text
    such as "20GB". kv_storage: of K/V between steps, "model" (the model's dtype), "fp8" or "host" memory. seed: of
    groups that are drawn (selection "random"); sample n of a batch has seed + n.

    Raises :class:`OptionError` or :class:`PolicyError`, with the pipeline as it was, for what cannot be driven; at a
    call, before the transformer runs, for steps, sizes and memory that do not fit.
    """
    options = Options(_policy(policy), parse_bytes(memory_limit), _storage(kv_storage), _seed(seed))
    if attached(pipe) is not None:
        raise OptionError("pipe is attached already; call dsa_rt.detach(pipe) first")
    check_pipeline(pipe)
    attachment = _Attachment(pipe, options)
    stand_ins = {}
    for index, name in enumerate(TRANSFORMERS):
        transformer = getattr(pipe, name)
        if transformer is not None:
            check_transformer(name, transformer)
            stand_ins[name] = _StandIn(attachment, index, name, transformer)
    for name, stand_in in stand_ins.items():
        setattr(pipe, name, stand_in.copy())


def detach(pipe: Any) -> None:
    """Give the pipeline its own transformers back and free what a call had left.

    :class:`OptionError` where it is not attached, or where its stand-ins were given hooks or layers that would stay.
    """
    stand_ins = _stand_ins(pipe)
    if not stand_ins:
        raise OptionError("pipe is not attached; there is nothing to detach")
    for name in stand_ins:
        check_transformer(name, getattr(pipe, name))
    for name, stand_in in stand_ins.items():
        stand_in.attachment.release()
        setattr(pipe, name, stand_in.original)


def attached(pipe: Any) -> Attached | None:
    """The policy of a pipeline and what its last call spent; None where it is not attached."""
    for stand_in in _stand_ins(pipe).values():
        attachment = stand_in.attachment
        return Attached(attachment.options.policy, attachment.stats)
    return None


class _Attachment:
    """The options of a pipeline and its run, which the stand-ins of its transformers share."""

    def __init__(self, pipe: Any, options: Options) -> None:
        self.options = options
        self._pipe = weakref.ref(pipe)  # which holds this
        self._run: Run | None = None
        self._last: RunStats | None = None
        self._timesteps: Tensor | None = None

    @property
    def stats(self) -> RunStats | None:
        return self._last if self._run is None else self._run.stats

    def release(self, recurse: bool = True) -> None:
        """Free the buffers of a run. diffusers calls it at the end of a call, with its own argument."""
        self._last, self._run = self.stats, None

    def velocity(
        self, stand_in: _StandIn, latents: Tensor, timestep: Tensor, text: Tensor, image: Tensor | None
    ) -> Tensor:
        pipe = self._pipe()
        if pipe is None or stand_in.name not in _stand_ins(pipe):
            raise OptionError("this stood in for the transformer of a pipeline while attached; use pipe.transformer")
        step = pipe.scheduler.step_index or 0
        if pipe.scheduler.timesteps is not self._timesteps:  # the scheduler makes new ones for every call
            rows = text.shape[1] + (0 if image is None else image.shape[1])
            self._begin(pipe, stand_in, step, latents, timestep, rows)
        if self._run is None:
            raise OptionError(_OUTSIDE)
        try:
            model = stand_in.model(self._run)
            velocity = self._run.velocity(step, stand_in.index, model, latents, timestep, text, image)
        except BaseException:
            self.release()
            raise
        if self._run.is_last(pipe.do_classifier_free_guidance):
            self.release()
        return velocity

    def _begin(
        self, pipe: Any, stand_in: _StandIn, step: int, latents: Tensor, timestep: Tensor, text_rows: int
    ) -> None:
        timesteps, current = pipe.scheduler.timesteps, vars(pipe).get("_current_timestep")
        self._run, self._timesteps = None, timesteps
        check_scheduler(pipe.scheduler)
        if step or current is None or float(current) != float(timesteps[0]):
            raise OptionError(_OUTSIDE)
        for name in _stand_ins(pipe):
            check_transformer(name, getattr(pipe, name))
        self._run = Run(pipe, self.options, stand_in.shared.config, latents, timestep, text_rows)


_OUTSIDE = (
    "the transformer of an attached pipeline was called outside of a call of that pipeline, or from the middle of one; "
    "detach first to use it on its own"
)


class _StandIn:
    """What one transformer of the pipeline is replaced by. index: 0 for ``transformer``, 1 for ``transformer_2``."""

    def __init__(self, attachment: _Attachment, index: int, name: str, original: Any) -> None:
        self.attachment, self.index, self.name, self.original = attachment, index, name, original
        self.shared = SharedWan(name, original)
        self.shared.share(original)
        self._shared_for: weakref.ref[Run] | None = None

    def copy(self) -> Any:
        """The shallow copy that the pipeline calls."""
        module = copy.copy(self.original)
        vars(module).pop("_diffusers_hook", None)  # a registry of no hooks, which knows its module
        module.forward = self.forward
        module._reset_stateful_cache = self.attachment.release
        vars(module)[_MARK] = self
        return module

    def model(self, run: Run) -> SharedWan:
        """Over the parameters as they are in this run: they may have moved since the last one."""
        if self._shared_for is None or self._shared_for() is not run:
            self.shared.share(self.original)
            self._shared_for = weakref.ref(run)
        return self.shared

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor]:
        """As that of diffusers' WanTransformer3DModel, for its pipelines."""
        if attention_kwargs:
            raise OptionError(
                f"attention_kwargs is {attention_kwargs!r}, which has no effect on an attached pipeline; leave it out"
            )
        if return_dict:
            raise OptionError(_OUTSIDE)
        image = encoder_hidden_states_image
        return (self.attachment.velocity(self, hidden_states, timestep, encoder_hidden_states, image),)


def _stand_ins(pipe: Any) -> dict[str, _StandIn]:
    """Of a pipeline's transformers, by attribute; empty where it is not attached, or not a pipeline."""
    if not is_of_diffusers(pipe, *PIPELINES):
        return {}
    parts = {name: getattr(pipe, name) for name in TRANSFORMERS}
    return {name: vars(part)[_MARK] for name, part in parts.items() if part is not None and _MARK in vars(part)}


def _policy(policy: str | Policy) -> Policy:
    chosen = parse_policy(policy)
    if chosen != Fixed() and not isinstance(chosen, HSA):
        raise PolicyError(
            f"policy {chosen.name} decides passes per chunk, but a Wan pipeline makes the whole clip at once; use "
            "'hsa-50', another hsa policy, or 'dense'"
        )
    return chosen


def _storage(storage: str) -> str:
    if storage not in STORAGES:
        raise OptionError(f"kv_storage is {storage!r}; expected one of {', '.join(STORAGES)}")
    return storage


def _seed(seed: int) -> int:
    if type(seed) is not int:
        raise OptionError(f"seed is {seed!r}; expected a whole number")
    return seed
