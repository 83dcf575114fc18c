"""attach: what it refuses, by whom, and that a refused pipeline is as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanVACEPipeline,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel
from torch import nn

import dsa_rt
import dsa_rt.pipelines
from dsa_rt.errors import OptionError, PolicyError
from dsa_rt.policy import DSA, Fixed

from .cases import HSA_8, Case, make, noise


def enabled(case: Case) -> None:
    case.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def low_rank(case: Case) -> None:
    """A LoRA that was loaded and not fused: by peft, or by its names alone where that is not installed."""
    if find_spec("peft"):
        import peft

        case.pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
        return
    for block in case.pipe.transformer.blocks:
        adapted = nn.Module()
        adapted.base_layer, adapted.lora_A = block.attn1.to_q, nn.ModuleDict({"default": nn.Linear(48, 2, bias=False)})
        block.attn1.to_q = adapted


def offloaded(case: Case, whole: bool) -> None:
    """As pipe.enable_model_cpu_offload() does, or enable_sequential_cpu_offload(), which has a hook for every layer: by
    accelerate, or by the attribute that it leaves."""
    model = case.pipe.transformer
    if find_spec("accelerate"):
        import accelerate

        (accelerate.cpu_offload_with_hook if whole else accelerate.cpu_offload)(model, "cpu")
        return
    for module in [model] if whole else [module for module in model.modules() if not [*module.children()]]:
        vars(module)["_hf_hook"] = object()


def quantised(case: Case) -> None:
    weight = case.pipe.transformer.blocks[0].ffn.net[2].weight
    case.pipe.transformer.blocks[0].ffn.net[2].weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)


def scheduler(case: Case, kind: Any, **options: Any) -> None:
    case.pipe.scheduler = kind(**options)


REFUSED: dict[str, tuple[Callable[[Case], Any], str]] = {
    "multistep": (
        lambda case: scheduler(case, UniPCMultistepScheduler, use_flow_sigmas=True, flow_shift=3.0),
        "is a UniPCMultistepScheduler; expected a FlowMatchEulerDiscreteScheduler.*not a step of a multistep",
    ),
    "stochastic": (
        lambda case: scheduler(case, FlowMatchEulerDiscreteScheduler, stochastic_sampling=True),
        "stochastic_sampling=True",
    ),
    "cache": (enabled, r"has a cache enabled; call pipe.transformer.disable_cache\(\)"),
    "LoRA": (
        low_rank, r"attn1.to_q.base_layer.*LoRA layers, call pipe.fuse_lora\(\) and pipe.unload_lora_weights\(\)"
    ),
    "fused": (lambda case: case.pipe.transformer.fuse_qkv_projections(), r"to_qkv.*unfuse_qkv_projections\(\)"),
    "quantised": (quantised, "'blocks.0.ffn.net.2.weight' is a Parameter of torch.int8"),
    "hook": (
        lambda case: case.pipe.transformer.blocks[1].register_forward_hook(lambda *_: None),
        "pipe.transformer.blocks.1 has forward hooks",
    ),
    "offloaded": (
        lambda case: offloaded(case, True), r"transformer is offloaded by accelerate; call pipe.remove_all_hooks\(\)"
    ),
    "offloaded layer by layer": (
        lambda case: offloaded(case, False), r"pipe.transformer.* is offloaded by accelerate; .*with pipe.to\(device\)"
    ),
    "offloaded in groups": (
        lambda case: case.pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        r"has forward hooks \(a cache, layerwise casting, group offloading",
    ),
    "cast layer by layer": (
        lambda case: case.pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        "has forward hooks",
    ),
    "processor": (
        lambda case: case.pipe.transformer.set_attn_processor(type("Mine", (WanAttnProcessor,), {})()),
        "is not diffusers' plain WanAttnProcessor",
    ),
    "backend": (
        lambda case: case.pipe.transformer.set_attention_backend("_native_math"), r"reset_attention_backend\(\)"
    ),
    "compiled": (
        lambda case: vars(case.pipe.transformer.blocks[0]).update(_compiled_call_impl=id), "blocks.0 is compiled"
    ),
    "wrapped": (
        lambda case: setattr(case.pipe, "transformer", nn.Sequential(case.pipe.transformer)),
        "is a Sequential; expected diffusers' WanTransformer3DModel",
    ),
    "first and last frame": (
        lambda case: setattr(case.pipe, "transformer", WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8, image_dim=4, added_kv_proj_dim=12,
            pos_embed_seq_len=6,
        )),
        "pos_embed_seq_len is 6",
    ),
    "none": (lambda case: setattr(case.pipe, "transformer", None), "has no transformer"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason: str) -> None:
    """By attach, with the pipeline as it was; by a call and by detach, where it came after attach."""
    change, message = REFUSED[reason]
    case = make()
    change(case)
    before, parts = vars(case.pipe).copy(), dict(vars(case.pipe.transformer)) if case.pipe.transformer else {}
    with pytest.raises(OptionError, match=message):
        dsa_rt.attach(case.pipe, HSA_8)
    assert vars(case.pipe) == before and dsa_rt.attached(case.pipe) is None
    if parts:
        assert vars(case.pipe.transformer) == parts
    if reason in ("wrapped", "first and last frame", "none"):
        return  # another transformer is not a stand-in that changed
    if reason == "offloaded in groups" and not find_spec("accelerate"):
        return  # diffusers' own hook fails before anything of ours is called
    case = make()
    dsa_rt.attach(case.pipe, HSA_8)
    change(case)
    with pytest.raises(OptionError, match=message):
        case()
    if reason not in ("multistep", "stochastic", "LoRA", "fused"):
        with pytest.raises(OptionError, match=message):
            dsa_rt.detach(case.pipe)
        assert dsa_rt.attached(case.pipe) is not None


def test_the_line_that_changes_the_scheduler() -> None:
    """What the refusal says to type works, and keeps Wan's shift."""
    case = make()
    scheduler(case, UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    with pytest.raises(OptionError) as refusal:
        dsa_rt.attach(case.pipe, HSA_8)
    line = str(refusal.value).partition("Use ")[2]
    exec(line, {"pipe": case.pipe, "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler})
    assert type(case.pipe.scheduler) is FlowMatchEulerDiscreteScheduler and case.pipe.scheduler.shift == 3.0
    dsa_rt.attach(case.pipe, HSA_8)
    assert torch.isfinite(case()).all()


def test_diffusers_is_not_imported() -> None:
    """Who has a pipeline of it has it. By the text: a fresh interpreter costs seconds."""
    sources = {path.name: path.read_text() for path in Path(dsa_rt.pipelines.__path__[0]).glob("*.py")}
    assert {"attach.py", "run.py"} <= sources.keys()
    assert not [name for name, text in sources.items() if re.search(r"^\s*(import|from) diffusers", text, re.M)]


def test_wrong_arguments() -> None:
    case = make()
    vace = object.__new__(WanVACEPipeline)
    for value in (None, "pipe", case.pipe.transformer, vace):
        with pytest.raises(OptionError, match="expected diffusers' WanPipeline or WanImageToVideoPipeline"):
            dsa_rt.attach(value)
        assert dsa_rt.attached(value) is None
    for policy in ("dsa", DSA(), Fixed(2), "fixed-3"):
        with pytest.raises(PolicyError, match="decides passes per chunk"):
            dsa_rt.attach(case.pipe, policy)
    with pytest.raises(PolicyError, match="unknown policy"):
        dsa_rt.attach(case.pipe, "hsa-51")
    for option, value in {"memory_limit": "much", "kv_storage": "disk", "seed": 1.5}.items():
        with pytest.raises(OptionError):
            dsa_rt.attach(case.pipe, **{option: value})
    with pytest.raises(OptionError, match="is not attached"):
        dsa_rt.detach(case.pipe)
    dsa_rt.attach(case.pipe)
    assert dsa_rt.attached(case.pipe).policy.name == "hsa-50"
    with pytest.raises(OptionError, match="attached already"):
        dsa_rt.attach(case.pipe)
    with pytest.raises(PolicyError, match="Call the pipeline with num_inference_steps=40"):
        case()
    text = case.arguments["prompt_embeds"]
    for dictionary in (True, False):
        with pytest.raises(OptionError, match="outside of a call"):
            case.pipe.transformer(noise(16), torch.tensor([500.0]), text, return_dict=dictionary)
    with pytest.raises(OptionError, match="attention_kwargs"):
        case(num_inference_steps=40, attention_kwargs={"scale": 0.5})
    stand_in = case.pipe.transformer
    dsa_rt.detach(case.pipe)
    with pytest.raises(OptionError, match="while attached"):
        stand_in(noise(16), torch.tensor([500.0]), text, return_dict=False)
    assert copy.copy(case.pipe.transformer).forward.__func__ is WanTransformer3DModel.forward
