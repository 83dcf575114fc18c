"""The step family and the transformer's memory-bound ops, one by one: the native kernels against compositions of torch,
in GB/s, as a share of a plain copy and as a share of their floor. Attention and linear: the native kernel against
torch's, in GFLOP/s and as the ratio of the two.

    python -m bench.ops

Two competitors run beside the native kernel. "definition" is dsa_rt.reference, which makes the same bits in the step
family and computes the counter-based noise in 64-bit integers; "torch" is the fastest thing to write by hand, in place
where it can be, with torch's own generator for noise, so its numbers are other ones, and in the dtype of the rows where
the op computes in fp32. Native results are compared with the definition first.

The floor of an op is the larger of two times: that of a copy which moves as many bytes, and that of its arithmetic at
the rate of a product of matrices in fp32 that fits the caches, which is within a few percent of what the processor's
units for fused multiply-adds can do. Both yardsticks take turns with the op.

Attention is compared with scaled_dot_product_attention on the same tensors, their samples in turn, so that what
else the machine does falls on both; where K and V are in FP8, torch makes them wide again first. Linear in the same way
with F.linear (and F.gelu), whose weights are as they are, and for orientation with the product that has its weights
reordered once, which torch.compile's CPU code uses.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from bench import common, op_cases, product_cases
from bench.op_cases import Op
from bench.product_cases import Product
from dsa_rt.ops import backend

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
LINEAR = {  # (rows, K, N, activation)
    f"{rows} x {k} -> {n}{' gelu' * (activation == 'gelu')}": (rows, k, n, activation)
    for k, n, activation in (
        (192, 192, "none"), (192, 576, "none"), (192, 512, "gelu"), (512, 192, "none"), (512, 2048, "none"),
        (1536, 1536, "none"), (1536, 8960, "none"),
    )
    for rows in (48, 96, 336, 1560, 4680)
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS = {  # (batch, tokens, heads, head dim)
    "demo chunk": (1, 108, 3, 64), "demo clip": (1, 756, 3, 64), "480p chunk, 1.3B": (1, 4680, 12, 128),
    "480p chunk, 14B": (1, 4680, 40, 128),
}  # fmt: skip
PRODUCTS: dict[str, tuple[str, dict[str, Any], Callable[..., Product]]] = {  # section -> option, shapes, case
    "attention": ("attention", ATTENTION, product_cases.attention),
    "attention_fp8": ("attention", ATTENTION, product_cases.attention_fp8),
    "linear": ("linear", LINEAR, product_cases.linear),
}
SAMPLE_SECONDS = 0.01
YARDSTICK: product_cases.LinearShape = (192, 512, 512, "none")  # the product that says what arithmetic takes


OPS: dict[str, Callable[..., Op]] = {
    op.__name__: op for op in (op_cases.philox_normal, op_cases.renoise, op_cases.cached_step, op_cases.exit_decision)
}
LAYER_OPS: dict[str, Callable[..., Op]] = {
    op.__name__: op
    for op in (
        op_cases.norm_modulate, op_cases.residual_norm_modulate, op_cases.rms_norm, op_cases.qk_norm_rope_store,
        op_cases.gather_rows, op_cases.scatter_rows, op_cases.quantize_rows, op_cases.confidence_pool,
    )
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
    """RuntimeError unless the native kernel makes the definition's bits, or numbers as near as the op says."""
    made = []
    for run in (op.native, op.definition):
        op.reset()
        for output in op.outputs:
            if output.is_floating_point() and name != "cached_step":  # its outputs are inputs too
                output.fill_(float("nan"))
        run()
        made.append([output.clone() for output in op.outputs])
    if not all(_agree(a, b, op.tolerance) for a, b in zip(*made, strict=True)):
        raise RuntimeError(f"{name}: the native kernel and the definition differ")


def _agree(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    if not tolerance:
        return torch.equal(a, b)
    return bool(((a.float() - b.float()).abs() <= tolerance * (1 + b.float().abs())).all())


def measure(name: str, shape: tuple[int, ...], dtype: torch.dtype, samples: int) -> dict[str, float]:
    """Microseconds of each way, and GB/s of the native one beside its floor: a copy that moves as many bytes, or its
    operations at the rate of a product of matrices, whichever takes longer."""
    op = (OPS | LAYER_OPS)[name](shape, dtype)
    check(op, name)
    source = torch.ones(max(op.bytes // 2, 1), dtype=torch.uint8)  # written: else all of it is one page of zeros
    target = torch.empty_like(source)
    product = product_cases.linear(YARDSTICK, torch.float32)
    ways: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source), "product": product.ways["native"], "native": op.native, "torch": op.torch
    }  # fmt: skip
    copy, of_product, native, by_hand = in_turn(ways, samples).values()
    arithmetic = of_product / product.operations * op.operations
    definition = seconds(op.definition, samples)
    return {
        "bytes": op.bytes, "native_us": 1e6 * native, "definition_us": 1e6 * definition,
        "torch_us": 1e6 * by_hand,
        "native_gb_s": op.bytes / native / 1e9, "torch_gb_s": op.bytes / by_hand / 1e9,
        "copy_gb_s": op.bytes / copy / 1e9, "share_of_copy": copy / native, "times_as_fast": by_hand / native,
        "operations": op.operations, "product_gflop_s": product.operations / of_product / 1e9,
        "arithmetic_us": 1e6 * arithmetic, "share_of_floor": max(copy, arithmetic) / native,
    }  # fmt: skip


def measure_product(name: str, product: Product, samples: int) -> dict[str, float]:
    """Microseconds of each way, medians of samples taken in turn; GFLOP/s of the native one and of torch, and their
    ratio. RuntimeError where the native kernel is further from the definition than roundings explain.
    """
    product.ways["native"]()
    if not product.error() <= product.tolerance:
        raise RuntimeError(f"{name}: the native kernel and the definition differ by {product.error()}")
    taken = in_turn(product.ways, samples)
    return {
        "operations": product.operations, **{f"{way}_us": 1e6 * seconds for way, seconds in taken.items()},
        **{f"{way}_gflop_s": product.operations / taken[way] / 1e9 for way in ("native", "torch")},
        "times_as_fast": taken["torch"] / taken["native"],
    }  # fmt: skip


def in_turn(runs: dict[str, Callable[[], object]], samples: int) -> dict[str, float]:
    """Median seconds of each, their samples in turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, run in runs.items():
            taken[name].append(seconds(run, 1))
    return {name: statistics.median(times) for name, times in taken.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``ops.json``."""
    parse = common.parser("ops", "The ops, one by one: native kernels against torch.", bundle=None)
    parse.add_argument(
        "--samples", type=common.positive, default=15, help="samples of about 10 ms for each figure"
    )
    kinds_of_shapes = {"shapes": SHAPES, "layers": LAYERS, "attention": ATTENTION, "linear": LINEAR}
    for kind, known in kinds_of_shapes.items():
        parse.add_argument(f"--{kind}", nargs="*", choices=known, help=f"shapes by name; none: all {len(known)}; given "
                           "one of these four, the others are left out")  # fmt: skip
    options = parse.parse_args(arguments)
    everything = all(getattr(options, kind) is None for kind in kinds_of_shapes)
    for kind, known in kinds_of_shapes.items():
        named = getattr(options, kind)
        setattr(options, kind, named or (list(known) if everything or named == [] else []))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = common.fingerprint(
        "ops", options, warm_up="as many calls as one sample has (10 ms)",
        included=["wall clock of a Python call, checks and dispatch included; data as warm in cache "
                  "as a loop leaves it",
                  "bytes: every operand read or written once; a copy is timed that moves as many bytes",
                  "operations: a multiply-add as two, at the rate of a product of matrices in fp32 in the same "
                  "run; the floor is the larger of that time and the copy's"],
    )  # fmt: skip
    kinds = [(name, shape, kind) for name in OPS for shape in options.shapes for kind in DTYPES]
    rows = {}
    with torch.no_grad():
        for name, shape, kind in tqdm(kinds, desc="ops", disable=True if options.quiet else None):
            if name != "exit_decision" or shape == options.shapes[0]:
                rows[f"{name}, {shape}, {kind}"] = measure(name, SHAPES[shape], DTYPES[kind], options.samples)
        layers = {
            f"{name}, {shape}, {kind}": measure(name, LAYERS[shape], DTYPES[kind], options.samples)
            for name in tqdm(LAYER_OPS, desc="layers", disable=True if options.quiet else None)
            for shape in options.layers
            for kind in DTYPES
        }
        products = {
            section: {
                f"{shape}, {kind}": measure_product(f"{section}, {shape}, {kind}", case(known[shape], DTYPES[kind]),
                                                    options.samples)
                for shape in tqdm(getattr(options, option), desc=section, disable=True if options.quiet else None)
                for kind in DTYPES
            }
            for section, (option, known, case) in PRODUCTS.items()
        }  # fmt: skip
    result |= {"native": backend.native.build_info(), "threads": torch.get_num_threads(), "rows": rows}
    result |= {"layers": layers} | products
    print(common.table(
        ["op, shape, dtype", "native µs", "torch µs", "torch / native", "definition µs", "native GB/s", "torch GB/s",
         "copy GB/s", "% of copy", "arithmetic µs", "% of floor"],
        [[name, *(common.figure(row[key]) for key in ("native_us", "torch_us")), common.figure(row["times_as_fast"], 2),
          *(common.figure(row[key]) for key in ("definition_us", "native_gb_s", "torch_gb_s", "copy_gb_s")),
          common.figure(row["share_of_copy"], 0, scale=100), common.figure(row["arithmetic_us"]),
          common.figure(row["share_of_floor"], 0, scale=100)]
         for name, row in (rows | layers).items()],
    ))  # fmt: skip
    for section, found in products.items():
        print(common.table(
            [f"{section}, dtype", "native µs", "torch µs", "prepacked µs", "native GFLOP/s", "torch GFLOP/s",
             "torch / native"],
            [[name, *(common.figure(row.get(f"{key}_us")) for key in ("native", "torch", "prepacked")),
              *(common.figure(row[f"{key}_gflop_s"]) for key in ("native", "torch")),
              common.figure(row["times_as_fast"], 2)] for name, row in found.items()],
        ))  # fmt: skip
    if busy := common.warn_if_busy(result):
        print(busy)
    print("written:", common.show_path(common.write_json(options.out, "ops.json", result)))
    return 0


if __name__ == "__main__":
    sys.exit(common.run(main))
