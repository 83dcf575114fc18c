"""What a diffusers pipeline must be to be driven: checked before anything is changed, and again where a call begins.

Classes are told by name. Who has such a pipeline has diffusers; nothing here imports it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsa_rt.errors import OptionError

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
TRANSFORMER = "WanTransformer3DModel"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TRANSFORMERS = ("transformer", "transformer_2")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_of_diffusers(value: object, *names: str) -> bool:
    """Whether the object is of one of these classes of diffusers, and not of one derived from them."""
    kind = type(value)
    return kind.__name__ in names and kind.__module__.partition(".")[0] == "diffusers"


def check_pipeline(pipe: Any) -> None:
    """:class:`OptionError` for a pipeline of another class, scheduler, or without a transformer."""
    if not is_of_diffusers(pipe, *PIPELINES):
        raise OptionError(
            f"pipe is a {type(pipe).__name__}; expected diffusers' {' or '.join(PIPELINES)} itself (VACE, Animate and "
            "video-to-video pipelines do other things with their transformer and are not supported)"
        )
    check_scheduler(pipe.scheduler)
    if pipe.transformer is None and pipe.transformer_2 is None:
        raise OptionError("pipe has no transformer; load one first")


def check_scheduler(scheduler: Any) -> None:
    """:class:`OptionError` unless it takes plain Euler steps; the message has the line that changes it."""
    kind = type(scheduler).__name__
    if not is_of_diffusers(scheduler, SCHEDULER):
        shift = "pipe.scheduler.config.flow_shift" if "flow_shift" in scheduler.config else "5.0"
        raise OptionError(
            f"pipe.scheduler is a {kind}; expected a {SCHEDULER}. A skipped token goes on with the velocity it last "
            "had: that is an Euler step over a longer interval, but not a step of a multistep or higher-order solver. "
            f"Use pipe.scheduler = {SCHEDULER}.from_config(pipe.scheduler.config, shift={shift})"
        )
    if scheduler.config.stochastic_sampling:
        raise OptionError(
            "pipe.scheduler has stochastic_sampling=True, which draws new noise for every token in every step; use "
            f"pipe.scheduler = {SCHEDULER}.from_config(pipe.scheduler.config, stochastic_sampling=False)"
        )


def check_transformer(name: str, module: Any) -> None:
    """:class:`OptionError` where its own forward pass would do more than its parameters say: quantized or adapted
    weights, hooks, offloading, caches, compiled parts, another attention. ``name``: its attribute of the pipeline."""
    where = f"pipe.{name}"
    if not is_of_diffusers(module, TRANSFORMER):
        raise OptionError(
            f"{where} is a {type(module).__name__}; expected diffusers' {TRANSFORMER} itself, neither wrapped nor "
            "compiled"
        )
    if module.is_cache_enabled:
        raise OptionError(f"{where} has a cache enabled; call {where}.disable_cache() first: two caches do not mix")
    for part, child in module.named_modules():
        _check_module(f"{where}.{part}".removesuffix("."), child)
    for part, processor in module.attn_processors.items():
        chosen = [key for key in ("_attention_backend", "_parallel_config") if vars(processor).get(key) is not None]
        if chosen or not is_of_diffusers(processor, "WanAttnProcessor"):
            raise OptionError(
                f"{where}.{part} is not diffusers' plain WanAttnProcessor; call {where}.reset_attention_backend() or "
                f"{where}.set_attn_processor(WanAttnProcessor()) first: attention is dsa_rt's own while attached"
            )
    for part, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype not in _DTYPES:
            raise OptionError(
                f"{where} parameter '{part}' is a {type(parameter).__name__} of {parameter.dtype}; expected plain "
                "fp32, bf16 or fp16 weights (quantized ones are not supported)"
            )


def _check_module(where: str, module: nn.Module) -> None:
    state = vars(module)
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"]
    if "_hf_hook" in state:
        raise OptionError(
            f"{where} is offloaded by accelerate; call pipe.remove_all_hooks() first and move the pipeline with "
            "pipe.to(device)"
        )
    if hooks or ("_diffusers_hook" in state and state["_diffusers_hook"].hooks):
        raise OptionError(
            f"{where} has forward hooks (a cache, layerwise casting, group offloading, or your own), which would never "
            "run; remove them first"
        )
    if state.get("_compiled_call_impl") is not None:
        raise OptionError(f"{where} is compiled, which would have no effect; use a transformer that is not")
