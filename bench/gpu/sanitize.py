"""Every CUDA and Triton op once at odd small sizes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m bench.gpu.sanitize

Set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own and its end is a border. The last
line says how many calls ran; 1 where an op that this machine has was never served, or an output is not finite.
``--device cpu`` runs what there is on the CPU, to see that the program works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from bench.gpu.cases import OPS, Inputs, Sizes
from dsa_rt.errors import OptionError
from dsa_rt.ops import attention, norm
from dsa_rt.ops import rows as rows_into
from dsa_rt.ops.backend import native
from dsa_rt.reference import layers as reference

# Rows of 16-byte pieces in a warp, the same in a block, in fp16, and what has no alignment at all; two batches; more
# tokens than channels, so that pooling takes rounds.
SIZES = {
    "D 64": Sizes(37, cached=150, heads=3, dim=64, latent=33, frames=5, batch=2),
    "D 128": Sizes(131, cached=259, heads=13, dim=128, latent=64, frames=4),
    "D 128, fp16": Sizes(29, cached=67, heads=2, dim=128, latent=30, frames=2, dtype=torch.float16),
    "odd": Sizes(41, cached=53, heads=5, dim=6, latent=7, frames=3, batch=2, dtype=torch.float32),
}
ROWS_TO_SPLIT = 5123  # rows of a cache that the native attention kernel splits where there are few queries


def more_calls(sizes: Sizes, device: torch.device) -> list[tuple[str, Callable[[str], None]]]:
    """Arguments that the cases of :mod:`bench.gpu.cases` leave out: segments, log-sum-exp, split keys, no gate, one
    table row, slots."""

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(sizes.dtype)

    q = rows(sizes.batch, sizes.active, sizes.heads, sizes.dim)
    k, v = (rows(sizes.batch, sizes.cached, sizes.heads, sizes.dim) for _ in range(2))
    first, middle = sizes.active // 3, sizes.cached // 2
    segments = torch.tensor([[first, 0, middle, 0, 0], [sizes.active - first, 0, 5, middle, sizes.cached]])
    out, lse = torch.empty_like(q), torch.empty(sizes.batch, sizes.heads, sizes.active, device=device)
    far_k, far_v = (rows(sizes.batch, ROWS_TO_SPLIT, sizes.heads, sizes.dim) for _ in range(2))
    far_segments = torch.tensor([[first, 0, ROWS_TO_SPLIT, 0, 0], [sizes.active - first, 7, 2000, 2300, 5000]])
    near_fp8, far_fp8 = in_fp8(k, v), in_fp8(far_k, far_v)
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    kernel_for_hopper = on_hopper and sizes.dim in (64, 128)
    x, y = (rows(sizes.batch, sizes.active, sizes.width) for _ in range(2))
    shift, scale = (torch.randn(1, 1, sizes.width, device=device) for _ in range(2))
    normed = torch.empty_like(x)
    codes = torch.zeros(k.shape, dtype=torch.float8_e4m3fn, device=device)
    scales, slots = torch.zeros(k.shape[:3], device=device), torch.randperm(sizes.cached, device=device)[: sizes.active]

    def attend(name: str) -> None:
        attention.active_attention(out, q, k, v, lse, segments, backend=name)
        finite("active_attention", out, lse)

    def attend_far(name: str) -> None:
        if name == "native" and kernel_for_hopper:
            assert native.active_attention_scratch(out, lse, q, far_k, far_v, far_segments), "nothing is split"
        attention.active_attention(out, q, far_k, far_v, lse, far_segments, backend=name)
        finite("active_attention", out, lse)

    def attend_fp8(name: str) -> None:
        attention.active_attention_fp8(out, q, *near_fp8, lse, segments, backend=name)
        finite("active_attention_fp8", out, lse)

    def attend_far_fp8(name: str) -> None:
        if name == "native" and kernel_for_hopper:
            arguments = (out, lse, q, *far_fp8, far_segments)
            assert native.active_attention_fp8_scratch(*arguments), "nothing is split"
        attention.active_attention_fp8(out, q, *far_fp8, lse, far_segments, backend=name)
        finite("active_attention_fp8", out, lse)

    def add(name: str) -> None:
        norm.residual_norm_modulate(x, normed, x, y, None, shift, scale, None, 1e-6, backend=name)
        finite("residual_norm_modulate", x, normed)

    def quantize(name: str) -> None:
        rows_into.quantize_rows(codes, scales, q, slots, backend=name)
        finite("quantize_rows", codes, scales)

    return [
        ("active_attention", attend), ("active_attention", attend_far), ("active_attention_fp8", attend_fp8),
        ("active_attention_fp8", attend_far_fp8), ("residual_norm_modulate", add), ("quantize_rows", quantize),
    ]  # fmt: skip


def in_fp8(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, v, k_scale, v_scale."""
    (k, k_scale), (v, v_scale) = (reference.quantize_rows(x) for x in (k, v))
    return k, v, k_scale, v_scale


def checked(op: str, inputs: Inputs) -> Callable[[str], None]:
    def call(name: str) -> None:
        inputs.call(name)
        finite(op, *inputs.outputs)

    return call


def finite(op: str, *outputs: torch.Tensor) -> None:
    for output in outputs:
        if not bool(output.float().cpu().isfinite().all()):
            raise ArithmeticError(f"{op} left something that is not finite")


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m bench.gpu.sanitize", description="Every op once, odd and small.")
    made.add_argument("--device", default="cuda")
    made.add_argument("--backends", nargs="*", default=["native", "triton"])
    options = made.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    ran: dict[tuple[str, str], int] = {(name, op): 0 for name in options.backends for op in OPS}
    refusals: dict[tuple[str, str], str] = {}
    with torch.no_grad():
        for label, sizes in SIZES.items():
            calls: list[tuple[str, Callable[[str], None]]] = []
            for op, case in OPS.items():
                calls.append((op, checked(op, case.make(sizes, device))))
            calls += more_calls(sizes, device)
            for name, (op, call) in ((name, pair) for name in options.backends for pair in calls):
                try:
                    call(name)
                except OptionError as error:
                    refusals[name, op] = f"{label}: {error}"
                else:
                    ran[name, op] += 1
    never = [pair for pair, count in ran.items() if not count]
    for pair in never:
        print(f"NEVER RAN: {' '.join(pair)}: {refusals[pair]}")
    print(f"sanitize: {sum(ran.values())} calls ran")
    return 1 if set(never) - _excused(device) else 0


def _excused(device: torch.device) -> set[tuple[str, str]]:
    """What a card has no kernel for: E4M3 in Triton from compute capability 8.9 on, the native attention kernels for
    9.0 alone."""
    if device.type != "cuda":
        return set()
    excused: set[tuple[str, str]] = set()
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        excused |= {("native", "active_attention"), ("native", "active_attention_fp8")}
    if capability < (8, 9):
        excused.add(("triton", "active_attention_fp8"))
    return excused


if __name__ == "__main__":
    sys.exit(main())
