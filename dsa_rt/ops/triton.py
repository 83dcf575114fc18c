"""The Triton versions of the ops (:mod:`dsa_rt.kernels.triton`), imported with their first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

FAMILIES = {
    "norm_modulate": "norm",
    "residual_norm_modulate": "norm",
    "rms_norm": "norm",
    "qk_norm_rope_store": "rope",
    "gather_rows": "rows",
    "scatter_rows": "rows",
    "quantize_rows": "quantize",
    "philox_normal": "step",
    "renoise": "step",
    "cached_step": "step",
    "exit_decision": "step",
    "confidence_pool": "pool",
    "confidence_pool_scratch": "pool",
    "active_attention": "attention",
    "active_attention_scratch": "attention",
    "active_attention_fp8": "attention_fp8",
}
"""Function -> the module of ``dsa_rt.kernels.triton`` that has it."""


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


@cache
def function(name: str) -> Callable[..., Any]:
    """The Triton version of an op, or the function that says how much scratch it takes."""
    module = importlib.import_module(f"dsa_rt.kernels.triton.{FAMILIES[name]}")
    found: Callable[..., Any] = getattr(module, name)
    return found


def _renoise(
    out: Tensor, x0: Tensor | None, x: Tensor, velocity: Tensor, seeds: Tensor, tokens: Tensor, sigma: float,
    sigma_next: float, draw: int,
) -> None:  # fmt: skip
    function("renoise")(out, x, velocity, sigma, sigma_next, seeds, tokens, draw, x0)


def _cached_step(x: Tensor, cache: Tensor, score: Tensor | None, *rest: Any) -> None:
    function("cached_step")(x, cache, *rest, score)


def _active_attention(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None
) -> None:
    count = function("active_attention_scratch")(q, k, segments)
    scratch = torch.empty(count, device=q.device) if count else None
    function("active_attention")(out, q, k, v, lse, segments, scratch)


def _active_attention_fp8(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor,
    segments: Tensor | None,
) -> None:  # fmt: skip
    function("active_attention_fp8")(out, q, k, v, k_scale, v_scale, lse, segments)


def _confidence_pool(out: Tensor, query: Tensor, keys: Tensor, weight: Tensor, tokens: Tensor, eps: float) -> None:
    scratch = torch.empty(function("confidence_pool_scratch")(out, tokens), device=out.device)
    function("confidence_pool")(out, query, keys, weight, tokens, eps, scratch)


_OTHER_ORDER: dict[str, Callable[..., None]] = {
    "renoise": _renoise,
    "cached_step": _cached_step,
    "active_attention": _active_attention,
    "active_attention_fp8": _active_attention_fp8,
    "confidence_pool": _confidence_pool,
}


def runner(op: str) -> Callable[..., None]:
    """Runs an op with the arguments of its schema, in their order, on the device of the first. Scratch comes from the
    framework's allocator."""

    def run(*arguments: Any) -> None:
        with torch.cuda.device_of(arguments[0]):
            (_OTHER_ORDER.get(op) or function(op))(*arguments)

    return run
