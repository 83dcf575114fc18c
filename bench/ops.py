"""The step family, op by op: the native kernels against compositions of torch, in GB/s and as a share of a
plain copy. Attention: the native kernel against torch's fused one, in GFLOP/s and as the ratio of the two.

    python -m bench.ops

Two competitors run beside the native kernel. "definition" is dsa_rt.reference, which makes the same bits and
computes the counter-based noise in 64-bit integers; "torch" is the fastest thing to write by hand, in place
where it can be, with torch's own generator for noise, so its numbers are other ones. Native results are
compared with the definition first.

Attention is compared with scaled_dot_product_attention on the same tensors, their samples in turn, so that what
else the machine does falls on both.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from bench import common
from dsa_rt.ops import attention, backend
from dsa_rt.ops import step as ops
from dsa_rt.reference import layers as reference

SHAPES = {  # (batch, tokens, elements)
    "demo chunk": (1, 108, 32), "demo clip": (1, 756, 32), "demo clip, batch 8": (8, 756, 32),
    "480p chunk": (1, 4680, 64), "480p clip": (1, 32760, 64),
}  # fmt: skip
ATTENTION = {  # (batch, active queries, cache rows, heads, head dim)
    "demo chunk": (1, 108, 756, 3, 64), "demo clip": (1, 756, 756, 3, 64),
    "192 of 768, D 64": (1, 192, 768, 12, 64), "192 of 768, D 128": (1, 192, 768, 12, 128),
    "390 of 1560, D 64": (1, 390, 1560, 12, 64), "390 of 1560, D 128": (1, 390, 1560, 12, 128),
    "1560 of 4680, D 64": (1, 1560, 4680, 4, 64), "1560 of 4680, D 128": (1, 1560, 4680, 4, 128),
    "1560 of 512 text rows, D 128": (1, 1560, 512, 12, 128),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIGMA, NEXT = 0.9375, 0.8333
SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Op:
    """One op on one shape. bytes: read and written, each operand once; outputs: tensors to compare after a
    call.
    """

    bytes: int
    native: Callable[[], None]
    definition: Callable[[], None]
    torch: Callable[[], None]
    outputs: tuple[Tensor, ...]
    reset: Callable[[], None] = lambda: None


def philox_normal(shape: tuple[int, int, int], dtype: torch.dtype) -> Op:
    out, seeds, tokens = torch.empty(shape, dtype=dtype), torch.arange(shape[0]), torch.arange(shape[1])
    return Op(
        out.nbytes, lambda: ops.philox_normal(out, seeds, tokens, 1, backend="native"),
        lambda: ops.philox_normal(out, seeds, tokens, 1, backend="torch"), lambda: _drop(out.normal_()),
        (out,),
    )  # fmt: skip


def renoise(shape: tuple[int, int, int], dtype: torch.dtype) -> Op:
    x, velocity = (torch.randn(shape).to(dtype) for _ in range(2))
    out, x0, seeds, tokens = (
        torch.empty_like(x),
        torch.empty_like(x),
        torch.arange(shape[0]),
        torch.arange(shape[1]),
    )

    def run(name: str) -> Callable[[], None]:
        return lambda: ops.renoise(out, x, velocity, SIGMA, NEXT, seeds, tokens, 1, x0=x0, backend=name)

    def by_hand() -> None:
        torch.sub(x, velocity, alpha=SIGMA, out=x0)
        out.normal_().mul_(NEXT).add_(x0, alpha=1 - NEXT)

    return Op(4 * x.nbytes, run("native"), run("torch"), by_hand, (out, x0))


def cached_step(shape: tuple[int, int, int], dtype: torch.dtype) -> Op:
    """Half of the tokens are fresh."""
    batch, count, width = shape
    rows = torch.randperm(count)[: count // 2].sort().values
    begin, cache0 = (torch.randn(shape).to(dtype) for _ in range(2))
    fresh = torch.randn(batch, len(rows), width).to(dtype)
    x, cache, score = begin.clone(), cache0.clone(), torch.empty(batch, len(rows))
    step = -0.01

    def run(name: str) -> Callable[[], None]:
        return lambda: ops.cached_step(x, cache, rows, fresh, step, score=score, backend=name)

    def by_hand() -> None:
        old = cache.index_select(1, rows)
        torch.div(
            (fresh - old).abs().sum(-1),
            fresh.abs().sum(-1).clamp_min(1e-30),
            out=score if x.dtype == score.dtype else None,
        )
        cache.index_copy_(1, rows, fresh)
        x.add_(cache, alpha=step)

    def reset() -> None:
        x.copy_(begin)
        cache.copy_(cache0)

    # x is read and written, the cache read once (fresh rows: once to compare) and its fresh rows written.
    moved = 3 * x.nbytes + 2 * fresh.nbytes + score.nbytes
    return Op(moved, run("native"), run("torch"), by_hand, (x, cache), reset)


def exit_decision(shape: tuple[int, int, int], dtype: torch.dtype) -> Op:
    """One logit for each sample of the batch: its cost is that of a call."""
    logit, threshold = torch.randn(shape[0]).to(dtype), torch.rand(shape[0])
    refine, confidence = torch.empty(shape[0], dtype=torch.bool), torch.empty(shape[0])

    def run(name: str) -> Callable[[], None]:
        return lambda: ops.exit_decision(refine, confidence, logit, threshold, backend=name)

    def by_hand() -> None:
        confidence.copy_(logit).sigmoid_()
        torch.lt(confidence, threshold, out=refine)

    moved = logit.nbytes + threshold.nbytes + refine.nbytes + confidence.nbytes
    return Op(moved, run("native"), run("torch"), by_hand, (refine, confidence))


OPS: dict[str, Callable[[tuple[int, int, int], torch.dtype], Op]] = {
    "philox_normal": philox_normal, "renoise": renoise, "cached_step": cached_step,
    "exit_decision": exit_decision,
}  # fmt: skip


def seconds(run: Callable[[], object], samples: int) -> float:
    """Median seconds of a call, after as many calls as a sample has; a sample takes about 10 ms."""
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < SAMPLE_SECONDS:
        run()
        calls += 1
    taken = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        taken.append((time.perf_counter() - start) / calls)
    return statistics.median(taken)


def check(op: Op, name: str) -> None:
    """RuntimeError unless the native kernel makes the definition's bits."""
    made = []
    for run in (op.native, op.definition):
        op.reset()
        for output in op.outputs:
            if output.is_floating_point() and name != "cached_step":  # its outputs are inputs too
                output.fill_(float("nan"))
        run()
        made.append([output.clone() for output in op.outputs])
    if not all(map(torch.equal, *made)):
        raise RuntimeError(f"{name}: the native kernel and the definition differ")


def measure(name: str, shape: tuple[int, int, int], dtype: torch.dtype, samples: int) -> dict[str, float]:
    """Microseconds of each way, and GB/s of the native one beside a copy that moves as many bytes."""
    op = OPS[name](shape, dtype)
    check(op, name)
    source = torch.empty(max(op.bytes // 2, 1), dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), samples)
    native, definition, by_hand = (seconds(run, samples) for run in (op.native, op.definition, op.torch))
    return {
        "bytes": op.bytes, "native_us": 1e6 * native, "definition_us": 1e6 * definition,
        "torch_us": 1e6 * by_hand,
        "native_gb_s": op.bytes / native / 1e9, "torch_gb_s": op.bytes / by_hand / 1e9,
        "copy_gb_s": op.bytes / copy / 1e9, "share_of_copy": copy / native,
    }  # fmt: skip


def measure_attention(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, samples: int
) -> dict[str, float]:
    """Microseconds and GFLOP/s of the native kernel and of torch's, medians of samples taken in turn, and their
    ratio. RuntimeError where the native kernel is further from the definition than roundings explain.
    """
    batch, active, rows, heads, dim = shape
    q, k, v = (torch.randn(batch, n, heads, dim).to(dtype) for n in (active, rows, rows))
    out = torch.empty_like(q)
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    runs = {
        "native": lambda: attention.active_attention(out, q, k, v, backend="native"),
        "torch": lambda: _drop(torch.nn.functional.scaled_dot_product_attention(*turned)),
    }
    for run in runs.values():
        run()
    few = slice(None, None, max(active // 16, 1))
    error = (out[:, few].float() - reference.active_attention(q[:, few].float(), k, v)).abs().max()
    if not error <= (2e-2 if dtype == torch.bfloat16 else 1e-5):
        raise RuntimeError(f"attention {shape}, {dtype}: the native kernel and the definition differ by {error}")
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, run in runs.items():
            taken[name].append(seconds(run, 1))
    native, by_torch = (statistics.median(taken[name]) for name in runs)
    operations = 4 * batch * heads * active * rows * dim
    return {
        "operations": operations, "native_us": 1e6 * native, "torch_us": 1e6 * by_torch,
        "native_gflop_s": operations / native / 1e9, "torch_gflop_s": operations / by_torch / 1e9,
        "times_as_fast": by_torch / native,
    }  # fmt: skip


def _drop(_: object) -> None:
    """For lambdas that are called for what they do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``ops.json``."""
    parse = common.parser("ops", "The step family and attention: native kernels against torch.", bundle=None)
    parse.add_argument(
        "--samples", type=common.positive, default=15, help="samples of about 10 ms for each figure"
    )
    parse.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), help="shapes by name")
    parse.add_argument(
        "--attention", nargs="*", choices=ATTENTION, default=list(ATTENTION), help="attention shapes by name"
    )
    options = parse.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = common.fingerprint(
        "ops", options, warm_up="as many calls as one sample has (10 ms)",
        included=["wall clock of a Python call, checks and dispatch included; data as warm in cache "
                  "as a loop leaves it",
                  "bytes: every operand read or written once; a copy is timed that moves as many bytes",
                  "noise is arithmetic, not traffic: philox_normal and renoise do not run at a "
                  "copy's speed"],
    )  # fmt: skip
    kinds = [(name, shape, kind) for name in OPS for shape in options.shapes for kind in DTYPES]
    rows = {}
    with torch.no_grad():
        for name, shape, kind in tqdm(kinds, desc="ops", disable=True if options.quiet else None):
            if name != "exit_decision" or shape == options.shapes[0]:
                rows[f"{name}, {shape}, {kind}"] = measure(name, SHAPES[shape], DTYPES[kind], options.samples)
        pairs = {
            f"{shape}, {kind}": measure_attention(ATTENTION[shape], DTYPES[kind], options.samples)
            for shape in tqdm(options.attention, desc="attention", disable=True if options.quiet else None)
            for kind in DTYPES
        }
    result |= {"native": backend.native.build_info(), "threads": torch.get_num_threads(), "rows": rows}
    result["attention"] = pairs
    print(common.table(
        ["op, shape, dtype", "native µs", "torch µs", "definition µs", "native GB/s", "torch GB/s",
         "copy GB/s", "% of copy"],
        [[name, *(common.figure(row[key]) for key in ("native_us", "torch_us", "definition_us", "native_gb_s",
          "torch_gb_s", "copy_gb_s")), common.figure(row["share_of_copy"], 0, scale=100)]
         for name, row in rows.items()],
    ))  # fmt: skip
    print(common.table(
        ["attention, dtype", "native µs", "torch µs", "native GFLOP/s", "torch GFLOP/s", "torch / native"],
        [[name, *(common.figure(row[key]) for key in ("native_us", "torch_us", "native_gflop_s", "torch_gflop_s")),
          common.figure(row["times_as_fast"], 2)] for name, row in pairs.items()],
    ))  # fmt: skip
    if busy := common.warn_if_busy(result):
        print(busy)
    print("written:", common.show_path(common.write_json(options.out, "ops.json", result)))
    return 0


if __name__ == "__main__":
    sys.exit(common.run(main))
