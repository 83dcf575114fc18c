"""Ours and what others run, on the same weights, in turns in one process.

    python -m bench.peers

Streaming: a compiled function against the published Self-Forcing loop in plain modules, with all passes and with the
pass counts that DSA took, end to end: prompt to uint8 frames. Many-step: the dense step against diffusers' model, and
HSA against token skipping with gathers, denoising alone. All make the same clips, which is checked in fp32 first.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

import dsa_rt
from bench import common
from bench.peers.many_step import DiffusersLoop, GatherLoop
from bench.peers.plain_loop import PlainLoop, published_noise, runtime_noise
from bench.peers.plain_model import flash_attention
from bench.prompts import Case, held_out_cases
from dsa_rt.errors import OptionError
from dsa_rt.generate import Generate
from dsa_rt.media import Video
from dsa_rt.suite.random_weights import random_runtime
from dsa_rt.suite.scripted import suite_policy
from dsa_rt.suite.turns import WARM_UP_RULE, in_turns, warm_up

BOUND = 1e-3  # of latents, between ours and a peer in fp32
CHECKED_FRAMES = 21  # of random weights
HSA = {"hsa-50": "hsa-50:groups=0.16@20+0.84@5,steps=20", "hsa-25": "hsa-25:steps=20"}  # as published, on 20 steps

Size = Mapping[str, int | None]
Open = Callable[[str, str], dsa_rt.Runtime]
Figures = Mapping[str, tuple[str, str, float | None]]
STREAMING: Figures = {  # figure: (ours, peer, what it must reach)
    "DSA end to end, plain loop at the same NFE": ("ours dsa", "plain loop, passes of dsa", 1.5),
    "dense end to end, plain loop": ("ours dense", "plain loop", None),
    "DSA end to end, plain loop with all passes": ("ours dsa", "plain loop", None),
}
MANY_STEP: Figures = {
    "dense per step, diffusers' model": ("ours dense", "diffusers", 1.3),
    "dense per step, diffusers' model compiled": ("ours dense", "diffusers, torch.compile", None),
    "hsa-50 denoising, gather-based skipping": ("ours hsa-50", "gather hsa-50", None),
    "hsa-25 denoising, gather-based skipping": ("ours hsa-25", "gather hsa-25", None),
}
INCLUDES = [
    "ratios: the peer's time over ours of the same round, median over rounds",
    "streaming: wall clock of a call, prompt to uint8 frames; the peer has the bundle's own text encoder and codec, "
    "draws its noise with torch, and decodes once at the end; passes of dsa: it is told "
    "how many passes to take and which context passes to leave out, and runs no confidence head",
    "many-step: denoising alone, both branches of guidance, divided by the steps; diffusers' model embeds the text in "
    "every pass, as its pipeline does",
    "gather: the policy's own choice of tokens, and K/V of the text kept from step to step",
    "excluded: loading, compiling, warm-up, writing files",
]


@dataclass
class Ways:
    """What takes turns: name -> seconds of a clip, or of its step, of the case with that number; why others cannot."""

    timed: dict[str, Callable[[int], float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def streaming(runtime: dsa_rt.Runtime, cases: Sequence[Case], size: Size, policy: str) -> Ways:
    """Clips of a causal bundle, end to end. policy: what "dsa" stands for."""
    dense, dsa = (runtime.compile(**size, policy=suite_policy(name)) for name in ("dense", policy))
    taken = [passes_of(_clip(dsa, case)) for case in cases]

    def ours(generate: Generate) -> Callable[[int], float]:
        return lambda number: _seconds(lambda: _clip(generate, cases[number]))

    def plain(loop: PlainLoop, as_taken: Sequence[tuple[list[int], int]] | None) -> Callable[[int], float]:
        def run(number: int) -> float:
            case, (passes, contexts) = cases[number], (None, None) if as_taken is None else as_taken[number]
            return _seconds(lambda: loop(case.prompt, published_noise(dense, case.seed), passes, contexts))

        return run

    loop = PlainLoop(dense)
    ways = Ways({
        "ours dense": ours(dense), "ours dsa": ours(dsa), "plain loop": plain(loop, None),
        "plain loop, passes of dsa": plain(loop, taken),
    })  # fmt: skip
    try:
        if runtime.device.type != "cuda":
            raise OptionError("FlashAttention has no kernel for a CPU")
        flash = PlainLoop(dense, flash_attention())
        ways.timed["plain loop, FlashAttention"] = plain(flash, None)
        ways.timed["plain loop, FlashAttention, passes of dsa"] = plain(flash, taken)
    except OptionError as error:
        ways.refused["plain loop, FlashAttention"] = str(error)
    return ways


def many_step(runtime: dsa_rt.Runtime, cases: Sequence[Case], size: Size, steps: int, compiled: bool) -> Ways:
    """Seconds per step of clips of a bidirectional bundle."""

    def per_step(generate: Generate, run: Callable[[Case], float]) -> Callable[[int], float]:
        count = generate.settings.passes
        return lambda number: run(cases[number]) / count

    def ours(policy: str, **options: int) -> Callable[[int], float]:
        generate = runtime.compile(**size, policy=policy, **options)
        return per_step(generate, lambda case: _clip(generate, case).stats.denoise_ms / 1000)

    def theirs(loop: DiffusersLoop | GatherLoop) -> Callable[[int], float]:
        return per_step(loop.generate, lambda case: loop(case.prompt, case.seed).seconds)

    ways = Ways({"ours dense": ours("dense", steps=steps)})
    dense = runtime.compile(**size, policy="dense", steps=steps)
    try:
        ways.timed["diffusers"] = theirs(DiffusersLoop(dense))
        if not compiled:
            raise OptionError("left out with --no-compile")
        ways.timed["diffusers, torch.compile"] = theirs(DiffusersLoop(dense, compiled=True))
    except OptionError as error:
        ways.refused["diffusers" if "diffusers" not in ways.timed else "diffusers, torch.compile"] = str(error)
    for name, policy in HSA.items():
        ways.timed[f"ours {name}"] = ours(policy)
        ways.timed[f"gather {name}"] = theirs(GatherLoop(runtime.compile(**size, policy=policy)))
    return ways


def check(open_runtime: Open, size: Size, steps: int, case: Case, policy: str) -> dict[str, float]:
    """Largest difference of latents between ours and each peer, fp32; RuntimeError above :data:`BOUND`."""
    found = {}
    runtime = open_runtime("causal", "fp32")
    for name in ("dense", policy):
        generate = runtime.compile(**size, policy=suite_policy(name))
        video = _clip(generate, case)
        clip = PlainLoop(generate)(case.prompt, runtime_noise(generate, case.seed), *passes_of(video))
        assert clip.model_calls == video.stats.model_calls
        found[f"plain loop, {name}"] = _difference(clip.latents, video)
    runtime = open_runtime("bidirectional", "fp32")
    loops: dict[str, DiffusersLoop | GatherLoop] = {
        f"gather {name}": GatherLoop(runtime.compile(**size, policy=policy)) for name, policy in HSA.items()
    }
    with contextlib.suppress(OptionError):  # not installed; said where it would have been timed
        loops["diffusers"] = DiffusersLoop(runtime.compile(**size, policy="dense", steps=steps))
    for name, loop in loops.items():
        found[name] = _difference(loop(case.prompt, case.seed).latents, _clip(loop.generate, case))
    for name, difference in found.items():
        if not difference <= BOUND:
            raise RuntimeError(
                f"{name}: latents differ from ours by {difference:.1e} in fp32, more than {BOUND:g}; nothing was timed"
            )
    return found


def measure(ways: Ways, rounds: int, quiet: bool) -> dict[str, Any]:
    """Warm up, then take turns."""
    warmed: dict[str, Any] = {}
    for name in list(ways.timed):
        run = ways.timed[name]
        try:
            warmed[name] = warm_up(lambda run=run: run(0)).to_dict()
        except Exception as error:  # such as torch.compile without a C++ compiler
            if name.startswith("ours"):
                raise
            ways.refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            del ways.timed[name]
    taken: dict[str, list[float]] = {name: [] for name in ways.timed}
    total = rounds * len(ways.timed)
    with tqdm(total=total, desc="peers", unit="run", disable=True if quiet else None) as bar:
        for name, _, seconds in in_turns(ways.timed, rounds):
            taken[name].append(seconds)
            bar.update()
    return {"seconds": taken, "warm_up": warmed, "refused": ways.refused}


def ratios(taken: Mapping[str, Sequence[float]], figures: Figures) -> dict[str, Any]:
    """The peer's time over ours, round by round. met: None where nothing must be reached."""
    found: dict[str, Any] = {}
    for figure, (ours, peer, target) in figures.items():
        if ours in taken and peer in taken:
            each = [theirs / mine for mine, theirs in zip(taken[ours], taken[peer], strict=True)]
            met = None if target is None else statistics.median(each) >= target
            found[figure] = {"ratio": common.spread(each), "each": each, "target": target, "met": met}
    return found


def missing(found: Mapping[str, Any], figures: Figures) -> list[str]:
    """Figures with a target that were not measured."""
    return [figure for figure, (_, _, target) in figures.items() if target is not None and figure not in found]


def opener(options: Namespace) -> Open:
    """What opens the runtime of a form in a dtype: bundles, or with --size random weights."""
    bundles = {"causal": options.bundle, "bidirectional": options.many_step}

    def open_runtime(form: str, dtype: str) -> dsa_rt.Runtime:
        if options.size is None:
            return dsa_rt.load(bundles[form], device=options.device, dtype=dtype)
        return random_runtime(options.size, form, options.device, dtype)

    return open_runtime


def report(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables for people."""
    unit = {"streaming": "clip", "many_step": "step"}
    rows = [
        [f"{name} (ms per {unit[part]})",
         *(common.figure(spread[key], 1, scale=1000) for key in ("median", "p20", "p80")), str(spread["n"])]
        for part, result in parts.items()
        for name, seconds in result["seconds"].items()
        if (spread := common.spread(seconds)) is not None
    ]  # fmt: skip
    met = {None: "-", True: "met", False: "MISSED"}
    compared = [
        [f"{figure}: times as fast", *(common.figure(row["ratio"][key], 2) for key in ("median", "p20", "p80")),
         common.figure(row["target"], 2), met[row["met"]]]
        for result in parts.values()
        for figure, row in result["ratios"].items()
    ]  # fmt: skip
    times = common.table(["way", "median", "p20", "p80", "n"], rows)
    return f"{times}\n\n{common.table(['ours against', 'median', 'p20', 'p80', 'must reach', ''], compared)}"


def passes_of(video: Video) -> tuple[list[int], int]:
    """The denoise passes of each chunk, and how many chunks had a context pass."""
    chunks = video.stats.chunks
    return [chunk.passes for chunk in chunks], sum(chunk.context_passes for chunk in chunks)


def _clip(generate: Generate, case: Case) -> Video:
    video = generate(case.prompt, seed=case.seed)
    assert isinstance(video, Video)
    return video


def _seconds(run: Callable[[], object]) -> float:
    """Wall clock of a call that hands out frames in host memory."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _difference(latents: torch.Tensor, video: Video) -> float:
    return float((latents.cpu() - video.latents.cpu()).abs().max())


def settings(arguments: Sequence[str] | None) -> Namespace:
    parse = common.parser("peers", "Ours and what others run, on the same weights, in turns.")
    parse.add_argument("--many-step", default="demo-many-step", metavar="BUNDLE", help="the bidirectional bundle")
    parse.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    parse.add_argument(
        "--size", help="random weights of that size in place of both bundles, for speed: wan2.1-t2v-1.3b, …"
    )
    parse.add_argument(
        "--policy", help="what is called dsa: a policy (dsa; with --size scripted:0,2,5, which refines chunks 0, 2, 5)"
    )
    for name in ("frames", "height", "width"):
        parse.add_argument(f"--{name}", type=common.positive, help="of every clip (the bundle's)")
    parse.add_argument("--steps", type=common.positive, default=8, help="steps of a dense many-step clip")
    parse.add_argument("--rounds", type=common.positive, default=7, help="timed turns of every way")
    parse.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes a minute")
    return parse.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``peers.json``; 1 where a ratio with a target misses it or could not be taken."""
    options = settings(arguments)
    torch.set_num_threads(options.threads)
    result = common.fingerprint("peers", options, warm_up=WARM_UP_RULE, included=INCLUDES)
    cases, open_runtime = held_out_cases(options.rounds), opener(options)
    size = {name: getattr(options, name) for name in ("frames", "height", "width")}
    policy = options.policy or ("dsa" if options.size is None else "scripted:0,2,5")
    short = (size | {"frames": CHECKED_FRAMES}, "scripted:0")  # fp32 takes its time at full size
    checked, by = (size, policy) if options.size is None else short
    result["largest_difference_fp32"] = check(open_runtime, checked, options.steps, cases[0], by)
    result["random_weights"] = options.size is not None
    parts: dict[str, dict[str, Any]] = {}
    runtime = open_runtime("causal", options.dtype)
    parts["streaming"] = measure(streaming(runtime, cases, size, policy), options.rounds, options.quiet)
    parts["streaming"]["ratios"] = ratios(parts["streaming"]["seconds"], STREAMING)
    runtime = open_runtime("bidirectional", options.dtype)
    ways = many_step(runtime, cases, size, options.steps, not options.no_compile)
    parts["many_step"] = measure(ways, options.rounds, options.quiet)
    parts["many_step"]["ratios"] = ratios(parts["many_step"]["seconds"], MANY_STEP)
    result |= {"threads": torch.get_num_threads(), "dtype": str(runtime.dtype)} | parts
    print(report(parts))
    for name, reason in (item for part in parts.values() for item in part["refused"].items()):
        print(f"not run: {name}: {reason}")
    lost = [*missing(parts["streaming"]["ratios"], STREAMING), *missing(parts["many_step"]["ratios"], MANY_STEP)]
    lines = [f"MISSED {figure}: not measured" for figure in lost]
    lines += [
        f"MISSED {figure}: {row['ratio']['median']:.2f}, must reach {row['target']:g}"
        for part in parts.values() for figure, row in part["ratios"].items() if row["met"] is False
    ]  # fmt: skip
    for line in lines:
        print(line)
    if busy := common.warn_if_busy(result):
        print(busy)
    print("written:", common.show_path(common.write_json(options.out, "peers.json", result)))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(common.run(main))
