"""Memory over hundreds of generations and over an endless stream: resident size after each, and its slope.

    python -m bench.memory

Both parts run in one process, first the generations, then the stream; what each one adds is told by its own
slope.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import dsa_rt
from bench import common
from bench.prompts import held_out_cases
from dsa_rt.generate import Generate

MEGABYTE = 1e6
FLAT_MEGABYTES = 8.0  # over a whole part; of 300 clips 30 KB each, where the cache and frames of one are 6 MB
DRIFT = 0.1  # share by which the last quarter of a stream may take longer than the first
SETTLE = 0.1  # share of a part that comes first and is left out: allocators fill their pools


def resident_bytes() -> int:
    """Resident size of this process now."""
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many_generations(generate: Generate, count: int, bar: Callable[[], object]) -> list[int]:
    """Resident size after each of ``count`` whole clips, each of another prompt and seed, each dropped at
    once.
    """
    cases = held_out_cases(min(count, 200))
    sizes = []
    for number in range(count):
        video = generate(cases[number % len(cases)].prompt, number)
        del video
        sizes.append(resident_bytes())
        bar()
    return sizes


def endless_stream(
    generate: Generate, frames: int, bar: Callable[[], object]
) -> tuple[list[int], list[float]]:
    """Of one session of at least ``frames`` frames, with a new prompt every 25 chunks: resident size after
    each chunk, and the chunk's milliseconds for a model call (head included) and its decoding.
    """
    cases = held_out_cases(16)
    session = generate.session(cases[0].prompt, 0, endless=True)
    sizes, milliseconds, made, chunks = [], [], 0, 0
    while made < frames:
        if chunks and chunks % 25 == 0:
            session.set_prompt(cases[chunks // 25 % len(cases)].prompt, recache=chunks // 25 % 2 == 0)
        chunk = session.next_chunk()
        made, spent = made + len(chunk.frames), chunk.stats
        milliseconds.append((spent.denoise_ms + spent.context_ms) / spent.model_calls + spent.decode_ms)
        chunks += 1
        sizes.append(resident_bytes())
        bar()
    session.close()
    return sizes, milliseconds


def drift(milliseconds: Sequence[float]) -> dict[str, Any]:
    """JSON-ready: medians of the first and the last quarter after the first tenth, their ratio, and whether
    that is flat.
    """
    settled = milliseconds[int(len(milliseconds) * SETTLE) :]
    quarter = max(1, len(settled) // 4)
    first, last = (float(np.median(part)) for part in (settled[:quarter], settled[-quarter:]))
    return {"first_ms": first, "last_ms": last, "ratio": last / first, "flat": last / first <= 1 + DRIFT}


def summarise(sizes: Sequence[int]) -> dict[str, Any]:
    """JSON-ready, megabytes: first, last and largest size, growth (least squares over all but the first
    tenth, times its length), whether that is flat, and all sizes.
    """
    megabytes = np.array(sizes) / MEGABYTE
    settled = megabytes[int(len(sizes) * SETTLE) :]
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0]) if len(settled) > 1 else 0.0
    growth = slope * (len(settled) - 1)
    return {
        "count": len(sizes), "first": float(megabytes[0]), "last": float(megabytes[-1]),
        "largest": float(megabytes.max()),
        "slope_per_step": slope, "growth": growth, "flat": abs(growth) <= FLAT_MEGABYTES or growth < 0,
        "sizes": np.round(megabytes, 3).tolist(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``memory.json``; 1 where memory is not flat."""
    parse = common.parser("memory", "Resident memory over many generations and over an endless stream.")
    parse.add_argument("--policy", default="dsa", help="policy of both parts")
    parse.add_argument("--generations", type=common.positive, default=300, help="whole clips")
    parse.add_argument(
        "--stream-frames", type=int, default=10_000, help="frames of the endless stream, 0 for none"
    )
    parse.add_argument("--frames", type=common.positive, help="length of each clip (the bundle's)")
    options = parse.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = common.fingerprint(
        "memory", options, warm_up=f"compile; the first {SETTLE:.0%} of each part are left out of its slope",
        included=["resident size of the whole process (interpreter, torch and weights too), after every "
                  "clip or chunk, without a garbage collection before it",
                  f"flat: fitted growth over a part of at most {FLAT_MEGABYTES} MB",
                  "pace: of the endless stream, milliseconds of a chunk for one model call and its decoding; flat: the "
                  f"median of the last quarter at most {DRIFT:.0%} above that of the first"],
    )  # fmt: skip
    runtime = dsa_rt.load(options.bundle, dtype=options.dtype)
    generate = runtime.compile(frames=options.frames, policy=options.policy)
    gc.collect()
    quiet = True if options.quiet else None
    with tqdm(total=options.generations, desc="generations", unit="clip", disable=quiet) as bar:
        parts = {"generations": summarise(many_generations(generate, options.generations, bar.update))}
    if options.stream_frames > 0:
        with tqdm(desc="endless stream", unit="chunk", disable=quiet) as bar:
            sizes, milliseconds = endless_stream(generate, options.stream_frames, bar.update)
            parts["endless stream"], result["pace"] = summarise(sizes), drift(milliseconds)
    print(common.table(
        ["part", "steps", "first MB", "last MB", "largest MB", "KB per step", "growth MB", "flat"],
        [[name, str(part["count"]), *(common.figure(part[key]) for key in ("first", "last", "largest")),
          common.figure(part["slope_per_step"], 2, scale=1000), common.figure(part["growth"], 2),
          "yes" if part["flat"] else "NO"] for name, part in parts.items()],
    ))  # fmt: skip
    print(f"planned for one generation: {generate.plan.total / MEGABYTE:.1f} MB beside interpreter and torch")
    if pace := result.get("pace"):
        print(
            f"pace of the stream: {pace['first_ms']:.2f} ms at first, {pace['last_ms']:.2f} ms at last, "
            f"{'flat' if pace['flat'] else 'NOT FLAT'}"
        )
    result |= {"planned_mb": generate.plan.total / MEGABYTE, "parts": parts}
    print("written:", common.show_path(common.write_json(options.out, "memory.json", result)))
    return 0 if all(part["flat"] for part in (*parts.values(), result.get("pace", {"flat": True}))) else 1


if __name__ == "__main__":
    sys.exit(common.run(main))
