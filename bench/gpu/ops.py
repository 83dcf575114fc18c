"""Every op on a GPU, by every backend and its rivals: microseconds, GB/s beside a copy's, TFLOP/s beside a product's.

    python -m bench.gpu.ops --out FOLDER

Results of the backends are compared with each other before they are timed. ``--device cpu --sizes tiny`` runs the same
program on a machine without a GPU, to see that it works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import common
from bench.gpu import cases, timing
from bench.gpu.cases import OPS, Inputs, Sizes
from dsa_rt.errors import OptionError
from dsa_rt.ops import choices
from dsa_rt.ops.backend import IMPLEMENTATIONS

ACTIVE = {"wan": (1408, 4680, 5632, 8190, 32760), "tiny": (5, 13)}
FEW_QUERIES = (1, 400, 1170, 1409)  # of attention, whose tiles fill few multiprocessors, or a second wave hardly
SIZES = {"wan": Sizes(0), "tiny": Sizes(0, cached=21, heads=2, dim=16, latent=12, frames=3)}
MOST_SCORES = 1 << 31  # bytes of fp32 scores above which the definition of attention is left out
ONE_SIZE_OF_COMPILED = 4680  # torch.compile takes a while for every shape
ONE_SIZE_OF_FP16 = 4680  # whose kernels differ from those of bf16 in conversions alone
ALLOWED = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # between backends, of results of which each is rounded


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m bench.gpu.ops", description="Every op on a GPU.")
    made.add_argument("--out", type=Path, required=True, help="folder for gpu-ops.json")
    made.add_argument("--device", default="cuda")
    made.add_argument("--sizes", choices=SIZES, default="wan")
    made.add_argument("--active", type=common.positive, nargs="*", help="active tokens, instead of the usual ones")
    made.add_argument("--cached", type=common.positive, nargs="*", help="rows of the cache, instead of the usual ones")
    made.add_argument("--ops", nargs="*", choices=OPS, default=list(OPS))
    made.add_argument("--commit", help="what to write down as the commit, where this is no git checkout")
    return made.parse_args(arguments)


def check(op: str, sizes: Sizes, device: torch.device, backends: Sequence[str]) -> str:
    """How a backend's outputs differ from the definition's beyond rounding; "" where none does."""

    def run(name: str) -> tuple[Inputs, tuple[torch.Tensor, ...]]:
        torch.manual_seed(0)
        inputs = OPS[op].make(sizes, device)
        if name == "torch" and inputs.expected is not None:
            return inputs, inputs.expected()
        for output in inputs.outputs:
            if op not in ("cached_step", "scatter_rows", "qk_norm_rope_store") and output.is_floating_point():
                output.fill_(float("nan"))  # those of the others are inputs too
        inputs.call(name)
        return inputs, inputs.outputs

    expected = run("torch")[1]
    for name in backends:
        if name == "torch":
            continue
        for value, right in zip(run(name)[1], expected, strict=True):
            size = right.float().abs() + right.float().square().mean().sqrt() + 1e-30
            error = (value.float() - right.float()).abs() / size
            allowed = ALLOWED.get(value.dtype, 1e-3)
            if op == "active_attention_fp8" and name == "native" and device.type == "cuda":
                allowed = 0.3  # queries and weights in E4M3 too: a root mean square of 0.04, and many values
            if not bool((error <= allowed).all()):
                return f"{name} differs from the definition by {float(error.nan_to_num(float('inf')).max()):.3g}"
    return ""


def served_by(op: str, sizes: Sizes, device: torch.device) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The backends that take such a call, why others do not, and what happened to those that took it and failed."""
    inputs, able, refused, failed = OPS[op].make(sizes, device), [], {}, {}
    for name in dict.fromkeys(implementation.backend for implementation in IMPLEMENTATIONS[op]):
        if name == "torch" and inputs.expected is not None:
            scores = 4 * sizes.batch * sizes.heads * sizes.active * sizes.cached
            if scores > MOST_SCORES:
                refused[name] = "the definition keeps all scores, too many here"
                continue
        try:
            inputs.call(name)
        except OptionError as error:
            refused[name] = str(error)
        except RuntimeError as error:
            failed[name] = f"{type(error).__name__}: {error}"
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where nothing can run any more
        else:
            able.append(name)
    return able, refused, failed


def measure_op(op: str, sizes: Sizes, device: torch.device, best: dict[str, float]) -> dict[str, Any]:
    """The row of an op and a size."""
    nbytes, operations = OPS[op].nbytes(sizes), OPS[op].operations(sizes)
    able, refused, failed = served_by(op, sizes, device)
    row: dict[str, Any] = {
        "op": op, "active": sizes.active, "cached": sizes.cached, "dim": OPS[op].dim(sizes),
        "dtype": OPS[op].dtype(sizes), "bytes": nbytes, "operations": operations, "backends": able, "refused": refused,
        "differs": check(op, sizes, device, able), "ways": {}, "failed": failed,
    }  # fmt: skip
    sets = [OPS[op].make(sizes, device) for _ in range(timing.sets_for(nbytes, device))]
    ways: dict[str, list[Callable[[], object]]] = {
        name: [lambda name=name, one=one: one.call(name) for one in sets] for name in able  # type: ignore[misc]
    }
    for name in sets[0].others:
        if not name.startswith("compiled") or (sizes.active == ONE_SIZE_OF_COMPILED and device.type == "cuda"):
            ways[name] = [one.others[name] for one in sets]
    for name, calls in ways.items():
        try:
            cold = timing.measure(calls, device)
            warm = timing.measure(calls[:1], device) if len(calls) > 1 else cold
        except Exception as error:
            row["failed"][name] = f"{type(error).__name__}: {error}"
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where nothing can run any more
            continue
        row["ways"][name] = {"cold": cold, "warm": warm, **_rates(nbytes, operations, cold["median"], best)}
    own = row["ways"].get("native")
    for way in row["ways"].values():
        way["times_native"] = way["cold"]["median"] / own["cold"]["median"] if own else None
    return row


def _rates(nbytes: int, operations: int, microseconds: float, best: dict[str, float]) -> dict[str, float]:
    gb_s = nbytes / microseconds / 1e3
    found = {"gb_s": gb_s, "share_of_copy": gb_s / best["copy_gb_s"]}
    if operations:
        tflop_s = operations / microseconds / 1e6
        found |= {"tflop_s": tflop_s, "share_of_matmul": tflop_s / best["matmul_tflop_s"]}
    return found


def label(row: dict[str, Any]) -> str:
    """What was called: the op, its sizes, and its dtype where that is not the usual one."""
    cached = f", N {row['cached']}" if has_cache(row["op"]) else ""
    return f"{row['op']}, A {row['active']}{cached}{', fp16' if row['dtype'] == 'float16' else ''}"


def has_cache(op: str) -> bool:
    """Whether the number of cached rows changes the call."""
    return "cached" in choices.SIZES.get(op, {"cached": None})  # those that no table orders all have one


def lines(rows: Sequence[dict[str, Any]]) -> str:
    """The table that is printed."""
    of_ways = []
    for row in rows:
        for name, way in row["ways"].items():
            cold, figure = way["cold"], common.figure
            of_ways.append([
                f"{label(row)}, {name}", figure(cold["median"]), figure(cold["p20"]),
                figure(cold["p80"]), figure(way["warm"]["median"]), figure(way["gb_s"], 0),
                figure(way["share_of_copy"], 0, scale=100), figure(way.get("tflop_s"), 0),
                figure(way.get("share_of_matmul"), 0, scale=100), figure(way["times_native"], 2), cold["timed"],
            ])  # fmt: skip
    header = ["op, sizes, way", "µs", "p20", "p80", "warm µs", "GB/s", "% of copy", "TFLOP/s", "% of matmul",
              "time / native", "timed by"]  # fmt: skip
    return common.table(header, of_ways)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``gpu-ops.json``; 1 where a way failed or a result differs."""
    options = parse(arguments)
    device, usual = torch.device(options.device), SIZES[options.sizes]
    result = timing.fingerprint("gpu.ops", options, options.commit, [
        "calls in a CUDA graph, so without their launch from Python; 'cold': sets of tensors in turn, together "
        f"{timing.CACHES} times the last-level cache; 'warm': one set",
        "bytes: every operand once; share of copy: of a copy of 1 GiB measured in this run",
    ])  # fmt: skip
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        best = timing.rates(device, small=options.sizes == "tiny")
        print(f"copy {best['copy_gb_s']:.0f} GB/s, bf16 product {best['matmul_tflop_s']:.0f} TFLOP/s")
        active = options.active or ACTIVE[options.sizes]
        few = FEW_QUERIES if active is ACTIVE["wan"] else ()
        cached = options.cached or [usual.cached]
        sizes = [
            (op, count, total)
            for op in options.ops
            for count in ((*few, *active) if op.startswith("active_attention") else active)
            for total in cached
        ]
        calls = [(*each, usual.dtype) for each in sizes] + [
            (*each, torch.float16) for each in sizes if each[1] == ONE_SIZE_OF_FP16 and not OPS[each[0]].wide
        ]
        for op, count, total, dtype in tqdm(calls, disable=None):
            if count > total:
                continue
            if op == "exit_decision" and count != active[0]:
                continue  # one logit, whatever the active set
            if not has_cache(op) and total != cached[0]:
                continue
            rows.append(measure_op(op, replace(usual, active=count, cached=total, dtype=dtype), device, best))
            cases.compiled.cache_clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(lines(rows))
    wrong = [f"{label(row)}: {row['differs']}" for row in rows if row["differs"]]
    wrong += [f"{label(row)}, {n}: {e}" for row in rows for n, e in row["failed"].items()]
    for row in rows:
        for name, why in row["refused"].items():
            print(f"not measured: {label(row)}, {name}: {why}")
    for line in wrong:
        print(f"WRONG: {line}")
    result |= {"best": best, "card_after": timing.card(), "rows": rows}
    print("written:", common.show_path(common.write_json(options.out, "gpu-ops.json", result)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(common.run(main))
