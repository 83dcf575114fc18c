"""The compiled module (csrc/). Call it through dsa_rt.ops, where outputs, checks and backends are documented.

Arguments are torch tensors on one device. ``instruction_set`` (CPU) is for tests: "" takes the best that runs
here. ``stream`` (CUDA) is the stream's address. Each check_… does the checks of its op alone, for tensors of
any device. Each direct_… takes a backend's name or None, the tensor that decides what serves the call, and the
arguments of its op as two tuples: it runs the op and returns True, or does nothing and returns False, where native
kernels are not what serves that tensor, a listener of direct_calls hears, or a tensor is of a subclass or wants a
gradient.
"""

from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor

from dsa_rt.errors import OptionError

class Unserved(OptionError):
    """The arguments are good, but the module has no kernel that takes them."""

class BuildInfo(TypedDict):
    compiler: str
    instruction_sets: list[str]
    amx_bf16: bool
    last_cache: int
    threads: str
    cuda: str

def build_info() -> BuildInfo: ...

def direct_calls(
    listeners: tuple[Callable[[], object], ...],
    tables: dict[str, Any],
    native_first: Callable[[str, torch.dtype, str | None], bool],
    threads: Callable[[], int],
    grad_enabled: Callable[[], bool],
) -> None:
    """What each direct_… asks: who would miss a call that passes by torch's dispatcher; what serves it, kept while
    IMPLEMENTATIONS[op] and MEASURED in ``tables`` are the same objects; threads; whether gradients are wanted."""

class Program:
    """Ops on CPU tensors, recorded once and replayed in one call; see dsa_rt.recording."""

    def record(self, function: Callable[[], object]) -> None: ...
    def replay(self, threads: int = 1) -> None: ...
    @property
    def ops(self) -> list[str]: ...
    @property
    def bytes(self) -> int: ...

def philox_normal(
    out: Tensor,
    seeds: Tensor,
    tokens: Tensor,
    draw: int,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_philox_normal(out: Tensor, seeds: Tensor, tokens: Tensor, draw: int) -> None: ...
def renoise(
    out: Tensor,
    x0: Tensor | None,
    x: Tensor,
    velocity: Tensor,
    seeds: Tensor,
    tokens: Tensor,
    sigma: float,
    sigma_next: float,
    draw: int,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_renoise(
    out: Tensor,
    x0: Tensor | None,
    x: Tensor,
    velocity: Tensor,
    seeds: Tensor,
    tokens: Tensor,
    sigma: float,
    sigma_next: float,
    draw: int,
) -> None: ...
def cached_step(
    x: Tensor,
    velocity_cache: Tensor,
    score: Tensor | None,
    rows: Tensor,
    fresh: Tensor,
    delta_sigma: float,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_cached_step(
    x: Tensor, velocity_cache: Tensor, score: Tensor | None, rows: Tensor, fresh: Tensor, delta_sigma: float
) -> None: ...
def exit_decision(
    refine: Tensor,
    confidence: Tensor,
    logit: Tensor,
    threshold: Tensor,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_exit_decision(refine: Tensor, confidence: Tensor, logit: Tensor, threshold: Tensor) -> None: ...
def active_attention(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None = None,
    scratch: Tensor | None = None,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_active_attention(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None
) -> None: ...
def active_attention_fp8(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    segments: Tensor | None = None,
    scratch: Tensor | None = None,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_active_attention_fp8(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    segments: Tensor | None = None,
) -> None: ...
def active_attention_scratch(
    out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None
) -> int: ...
def active_attention_fp8_scratch(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    segments: Tensor | None = None,
) -> int: ...
def norm_modulate(
    out: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_norm_modulate(
    out: Tensor, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float
) -> None: ...
def residual_norm_modulate(
    sum: Tensor,
    out: Tensor,
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_residual_norm_modulate(
    sum: Tensor,
    out: Tensor,
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    eps: float,
) -> None: ...
def rms_norm(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None: ...
def qk_norm_rope_store(
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor | None,
    eps: float,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_qk_norm_rope_store(
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor | None,
    eps: float,
) -> None: ...
def linear(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    layout: str,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_linear(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, layout: str
) -> None: ...
def linear_layout(weights: str, instruction_set: str = "") -> tuple[str, int, int, int]:
    """Of the kernel for weights of that dtype: its name, rows of a panel, what the last one is rounded up to, and
    elements along K that lie together."""

def gather_rows(
    out: Tensor, x: Tensor, rows: Tensor, threads: int = 1, instruction_set: str = "", stream: int = 0
) -> None: ...
def check_gather_rows(out: Tensor, x: Tensor, rows: Tensor) -> None: ...
def scatter_rows(
    x: Tensor, rows: Tensor, src: Tensor, threads: int = 1, instruction_set: str = "", stream: int = 0
) -> None: ...
def check_scatter_rows(x: Tensor, rows: Tensor, src: Tensor) -> None: ...
def quantize_rows(
    out: Tensor,
    scale: Tensor,
    rows: Tensor,
    slots: Tensor | None = None,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_quantize_rows(out: Tensor, scale: Tensor, rows: Tensor, slots: Tensor | None = None) -> None: ...
def confidence_pool(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    key_weight: Tensor,
    tokens: Tensor,
    eps: float,
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_confidence_pool(
    out: Tensor, query: Tensor, keys: Tensor, key_weight: Tensor, tokens: Tensor, eps: float
) -> None: ...
