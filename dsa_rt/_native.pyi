"""The compiled module (csrc/). Call it through dsa_rt.ops, where outputs, checks and backends are documented.

Arguments are torch tensors on one device. ``instruction_set`` (CPU) is for tests: "" takes the best that runs
here. ``stream`` (CUDA) is the stream's address. Each check_… does the checks of its op alone, for tensors of
any device.
"""

from typing import TypedDict

from torch import Tensor

class BuildInfo(TypedDict):
    compiler: str
    instruction_sets: list[str]
    amx_bf16: bool
    threads: str
    cuda: str

def build_info() -> BuildInfo: ...
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
    threads: int = 1,
    instruction_set: str = "",
    stream: int = 0,
) -> None: ...
def check_active_attention(out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None: ...
