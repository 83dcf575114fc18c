"""K/V storages of HSA: what FP8 and host memory change in a clip, and the memory a run takes against its plan."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dsa_rt
from bench import common
from bench.common import ROOT
from bench.hsa.allocated import Allocated
from bench.hsa.clip import Studio, measure
from bench.hsa.evaluate import latent_psnr
from bench.hsa.quality import regimes
from bench.memory import MEGABYTE, resident_bytes
from bench.metrics import mean_squared_error, psnr
from bench.prompts import held_out_cases
from dsa_rt.machine import peak_memory
from dsa_rt.policy import HSA, parse_policy
from dsa_rt.sync import STORAGES

POLICIES = ("hsa-50", "hsa-25", "hsa-75a")
LEAST = 40.0  # dB to the cache in the model's dtype
SLACK = 0.05  # of the planned memory
PLANNED = "hsa-50"
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
INCLUDES = [
    "PSNR: frames (peak 255) and latents (peak: the range of the reference) of whole runs against the same policy, "
    "prompt and seed with K/V in the model's dtype; the smallest over clips",
    "memory: highest resident size of a fresh process over its second compile and clip, "
    "less what it held before that beside weights: interpreter, torch, and what these keep once a clip has run",
    "as it comes: glibc keeps part of what is freed; the other figures are with "
    f"{' '.join(f'{name}={value}' for name, value in RETURNING.items())}, so that freed memory goes back at once",
]


def resident(bundle: str, dtype: str, threads: int, storage: str, size: list[int]) -> dict[str, Any]:
    """Megabytes, JSON-ready: ``before`` (interpreter, torch), ``whole`` beside that; the plan."""
    torch.set_num_threads(threads)
    runtime = dsa_rt.load(bundle, dtype=dtype, verify_hashes=False)
    generate = runtime.compile(*size, policy=PLANNED, kv_storage=storage)
    prompt, plan = held_out_cases(1)[0].prompt, generate.plan
    generate(prompt, 0)
    del generate
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes() - plan.weights
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    runtime.compile(*size, policy=PLANNED, kv_storage=storage)(prompt, 0)
    taken = {"whole": (peak_memory() or 0) - before, "before": before}
    parts = {name: part / MEGABYTE for name, part in plan.to_dict().items() if isinstance(part, int)}
    return {name: amount / MEGABYTE for name, amount in taken.items()} | {"planned": parts}


def measured(options: Namespace, storage: str, size: Sequence[int]) -> dict[str, Any]:
    """:func:`resident` in a process of its own, held against the plan; and with the allocator as it comes."""
    arguments = [options.bundle, options.dtype, options.threads, storage, size]
    command = [sys.executable, "-m", "bench.hsa.storage", json.dumps(arguments)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found, default = (
        json.loads(subprocess.run(command, env=plain | more, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout)
        for more in (RETURNING, {})
    )
    planned = found["planned"]
    return found | {
        "size": size, "storage": storage, "whole_of_plan": found["whole"] / planned["total"],
        "whole_as_it_comes": default["whole"] / planned["total"],
    }  # fmt: skip


def likeness(options: Namespace) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """By regime, policy and storage: the smallest PSNR [dB] of frames and of latents over the clips."""
    studio, cases = Studio(options.bundle, options.dtype), held_out_cases(options.prompts)
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    asked = [(regime, name) for regime in regimes(studio) for name in (POLICIES[:1] if options.quick else POLICIES)]
    for regime, name in tqdm(asked, desc="storage", unit="policy", disable=True if options.quiet else None):
        policy = parse_policy(name)
        assert isinstance(policy, HSA) and policy.steps is not None
        row = found.setdefault(regime.name, {}).setdefault(name, {})
        for case in cases:
            clip = studio.clip(case.prompt, case.seed, regime)
            runs = {kind: measure(Allocated(policy.steps, policy, kind), clip).rows for kind in STORAGES}
            reference, frames = runs["model"], studio.decode(runs["model"])
            for kind in STORAGES[1:]:
                made = {
                    "frames": psnr(mean_squared_error(studio.decode(runs[kind]), frames)),
                    "latents": latent_psnr(runs[kind], reference),
                }
                row[kind] = {key: min(value, row.get(kind, made)[key]) for key, value in made.items()}
    return found


def main(options: Namespace) -> int:
    """Make, measure, print, write ``hsa-storage.json``; 1 where a bound is missed."""
    torch.set_num_threads(options.threads)
    quiet = True if options.quiet else None
    result = common.fingerprint("hsa", options, included=INCLUDES, warm_up="memory: compile and one clip")
    found = likeness(options)
    for regime, rows in found.items():
        body = [
            [f"{name}, {kind}", *("same" if row[key] == float("inf") else common.figure(row[key]) for key in row)]
            for name, kinds in rows.items()
            for kind, row in kinds.items()
        ]
        print(f"\n{regime}: PSNR in dB to K/V in {options.dtype}\n\n{common.table(['run', 'frames', 'latents'], body)}")
    sizes = ((64, 64, 9),) if options.quick else ((64, 64, 81), (128, 128, 81))
    kinds = ("fp8",) if options.quick else STORAGES
    asked = [(size, kind) for size in sizes for kind in kinds]
    memory = [measured(options, kind, size) for size, kind in tqdm(asked, desc="memory", unit="run", disable=quiet)]
    body = [
        ["{}x{}, {} frames, ".format(*run["size"]) + run["storage"], common.figure(run["before"]),
         common.figure(run["planned"]["total"]), common.figure(run["whole_of_plan"], 3),
         common.figure(run["whole_as_it_comes"], 3)] for run in memory
    ]  # fmt: skip
    header = ["run", "before MB", "planned MB", "taken of it", "as it comes"]
    print(f"\n{PLANNED}: planned memory, and what was taken of it\n\n{common.table(header, body)}")
    print(*(f"- {line}" for line in INCLUDES), sep="\n")
    result |= {"clips": options.prompts, "psnr": found, "memory": memory}
    print("written:", common.show_path(common.write_json(options.out, "hsa-storage.json", result)))
    near = all(row[key] >= LEAST for rows in found.values() for kinds in rows.values() for row in kinds.values()
               for key in row)  # fmt: skip
    fits = all(abs(run["whole_of_plan"] - 1) <= SLACK for run in memory)
    return 0 if near and fits else 1


if __name__ == "__main__":
    print(json.dumps(resident(*json.loads(sys.argv[1]))))
