"""A pass over static buffers that calls every native op, for the tests of recording."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_rt.ops import attention, norm, pool, rope, rows, step

BATCH, ACTIVE, CACHED, HEADS, DIM, TABLE = 2, 5, 9, 3, 8, 4
WIDTH, EPS = HEADS * DIM, 1e-6
WRITTEN = {
    "philox_normal": ("noise",),
    "renoise": ("x", "x0"),
    "norm_modulate": ("normed",),
    "residual_norm_modulate": ("sum", "sum_normed"),
    "gather_rows": ("picked",),
    "scatter_rows": ("placed",),
    "qk_norm_rope_store": ("q", "k_cache", "v_cache"),
    "active_attention": ("attended", "lse"),
    "quantize_rows": ("quantized", "quantized_scale"),
    "active_attention_fp8": ("attended_fp8", "lse_fp8"),
    "cached_step": ("latents", "velocity_cache", "score"),
    "confidence_pool": ("pooled",),
    "exit_decision": ("refine", "confidence"),
}
"""The ops of a pass in order -> the buffers that each writes."""


def contents(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Buffers of a pass with new random inputs and NaN wherever only the pass writes."""
    row, cache, table = (BATCH, ACTIVE, WIDTH), (BATCH, CACHED, HEADS, DIM), (BATCH, TABLE, WIDTH)

    def unwritten(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    split = int(torch.randint(1, ACTIVE, ()))
    return {
        "seeds": torch.randint(1 << 40, (BATCH,)),
        "tokens": torch.randint(1 << 20, (ACTIVE,)),
        "noise": unwritten(*row),
        "velocity": torch.randn(row).to(dtype),
        "x": unwritten(*row),
        "x0": unwritten(*row),
        "shift": torch.randn(table),
        "scale": torch.randn(table),
        "gate": torch.randn(1, TABLE, WIDTH),
        "table_rows": torch.randint(TABLE, (ACTIVE,)),
        "normed": unwritten(*row),
        "sum": unwritten(*row),
        "sum_normed": unwritten(*row),
        "picked_rows": torch.randperm(ACTIVE)[:3],
        "picked": unwritten(BATCH, 3, WIDTH),
        "placed": torch.randn(row).to(dtype),
        "placed_rows": torch.randperm(ACTIVE)[:3],
        "q_weight": torch.randn(WIDTH).to(dtype),
        "k_weight": torch.randn(WIDTH).to(dtype),
        "cos": torch.randn(ACTIVE, DIM // 2),
        "sin": torch.randn(ACTIVE, DIM // 2),
        "slots": torch.randperm(CACHED)[:ACTIVE],
        "q": unwritten(BATCH, ACTIVE, HEADS, DIM),
        "k_cache": torch.randn(cache).to(dtype),
        "v_cache": torch.randn(cache).to(dtype),
        "segments": torch.tensor([[split, 0, 4, 6, 8], [ACTIVE - split, 1, CACHED, 0, 0]]),
        "attended": unwritten(BATCH, ACTIVE, HEADS, DIM),
        "lse": unwritten(BATCH, HEADS, ACTIVE, dtype=torch.float32),
        "quantized": torch.randn(cache).to(torch.float8_e4m3fn),
        "quantized_scale": torch.rand(BATCH, CACHED, HEADS),
        "quantized_slots": torch.randperm(CACHED)[:ACTIVE],
        "attended_fp8": unwritten(BATCH, ACTIVE, HEADS, DIM),
        "lse_fp8": unwritten(BATCH, HEADS, ACTIVE, dtype=torch.float32),
        "latents": torch.randn(BATCH, CACHED, WIDTH),
        "velocity_cache": torch.randn(BATCH, CACHED, WIDTH).to(dtype),
        "velocity_rows": torch.randperm(CACHED)[:ACTIVE],
        "score": unwritten(BATCH, ACTIVE, dtype=torch.float32),
        "query": torch.randn(HEADS, DIM),
        "pooled": unwritten(BATCH, HEADS, WIDTH, dtype=torch.float32),
        "logit": torch.randn(BATCH),
        "threshold": torch.rand(BATCH),
        "refine": torch.full((BATCH,), 77, dtype=torch.uint8),
        "confidence": unwritten(BATCH, dtype=torch.float32),
    }


def run(b: dict[str, Tensor]) -> None:
    """The pass: every op once, most of them on what earlier ones wrote, with views as a model takes them."""
    step.philox_normal(b["noise"], b["seeds"], b["tokens"], 3)
    step.renoise(b["x"], b["noise"], b["velocity"], 0.9, 0.5, b["seeds"], b["tokens"], 2, b["x0"])
    tables = b["shift"], b["scale"], b["table_rows"], EPS
    norm.norm_modulate(b["normed"], b["x"], *tables)
    norm.residual_norm_modulate(b["sum"], b["sum_normed"], b["x"], b["normed"], b["gate"], *tables)
    rows.gather_rows(b["picked"], b["sum_normed"], b["picked_rows"])
    rows.scatter_rows(b["placed"], b["placed_rows"], b["picked"])
    rope.qk_norm_rope_store(
        b["q"], b["k_cache"], b["v_cache"], b["placed"], b["sum_normed"], b["sum"], b["q_weight"], b["k_weight"],
        b["cos"], b["sin"], b["slots"], EPS,
    )  # fmt: skip
    attention.active_attention(b["attended"], b["q"], b["k_cache"], b["v_cache"], b["lse"], b["segments"])
    kept = b["quantized"], b["quantized_scale"]
    rows.quantize_rows(*kept, b["attended"], b["quantized_slots"])
    attention.active_attention_fp8(
        b["attended_fp8"], b["q"], kept[0], kept[0], kept[1], kept[1], b["lse_fp8"], b["segments"]
    )
    fresh = b["attended_fp8"].flatten(-2)
    step.cached_step(b["latents"], b["velocity_cache"], b["velocity_rows"], fresh, -0.25, b["score"])
    pool.confidence_pool(b["pooled"], b["query"], fresh, b["k_weight"], b["sum"], EPS)
    step.exit_decision(b["refine"], b["confidence"], b["logit"], b["threshold"])


def fill(buffers: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """New contents for the same memory."""
    for name, value in values.items():
        buffers[name].copy_(value)


def clones(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in buffers.items()}
