"""What each part of the compiled function saves, alone and together: recorded passes, the context pass in the next
first pass, the last context pass left out, and clips that share passes; of a many-step bundle recorded passes.

    python -m bench.engine

Denoising alone, of the bundles' clips; decoding is the same in all rows. Rows take turns clip by clip.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import dsa_rt
from bench import common
from dsa_rt.engine import Engine, Lane, Sizes
from dsa_rt.generate import Generate
from dsa_rt.recording import Recorded, Recorder, record
from dsa_rt.runtime import Runtime
from dsa_rt.sampler.rollout import Rollout, advance
from dsa_rt.workspace import Workspace

PROMPT = "a red square bouncing, a blue circle at rest"
INCLUDES = [
    "milliseconds: wall clock of all denoise and context passes of a clip with the head's work, divided by the clips "
    "that ran side by side; text encoder and decoder left out",
    "over the first row: how many times as fast; medians over clips, rows in turns",
]


@dataclass(frozen=True)
class Row:
    """recorded: passes are replayed, else the model is called; joint: context passes run with the next first pass;
    last: the last chunk has a context pass, too; clips: side by side."""

    name: str
    recorded: bool
    joint: bool
    last: bool = False
    clips: int = 1


ROWS = (
    Row("called, context apart, last one too", False, False, last=True),
    Row("called, context apart", False, False),
    Row("called, context joined", False, True),
    Row("recorded, context apart", True, False),
    Row("recorded, context joined", True, True),
    Row("recorded, context joined, 2 clips", True, True, clips=2),
    Row("recorded, context joined, 4 clips", True, True, clips=4),
)


def call(device: torch.device, function: Callable[[], None], *, pool: Any = None) -> Recorded:
    """A recorder that records nothing."""
    function()
    return Recorded("eager", function, function)


class Apart(Lane):
    """A lane whose context passes run alone."""

    def together(self, side: int) -> bool:
        return False


def lanes_for(generate: Generate, row: Row) -> list[Lane]:
    """Of an engine that runs as the row says."""
    s, runtime = generate.settings, generate.runtime
    recorder: Recorder = record if row.recorded else call
    sizes = Sizes(s.grid, s.chunk_frames, s.window, s.sink, s.places, s.sigmas, row.clips)
    engine = Engine(runtime.model, runtime.head, sizes, runtime.device, recorder)
    lanes = engine.lanes()
    if not row.joint:
        for lane in lanes:
            lane.__class__ = Apart
    rows = runtime.text_encoder.encode([PROMPT])
    with engine.working():
        engine.warm_up(lanes, s.chunks, judged=True)
        for lane in lanes:
            engine.read_prompt(lane, rows)
    return lanes


def time_clips(generate: Generate, row: Row, lanes: Sequence[Lane], seed: int) -> float:
    """Milliseconds a clip."""
    rollouts = [Rollout(lane, generate.decider(generate.settings.chunks), seed + n) for n, lane in enumerate(lanes)]
    running = list(rollouts)
    start = time.perf_counter()
    while running:
        advance(running)
        running = [rollout for rollout in running if rollout.index < generate.settings.chunks]
    if row.last:
        for rollout in rollouts:
            rollout.write_context()
    if generate.runtime.device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / len(lanes)


def autoregressive(runtime: Runtime, policy: str) -> dict[str, Callable[[int], float]]:
    """Milliseconds a clip by row, of a seed."""
    generate = runtime.compile(policy=policy)
    return {row.name: partial(time_clips, generate, row, lanes_for(generate, row)) for row in ROWS}


def many_step(runtime: Runtime, policy: str) -> dict[str, Callable[[int], float]]:
    """The same of a many-step bundle."""
    settings = runtime.compile(policy=policy).settings
    rows = [runtime.text_encoder.encode([prompt]) for prompt in (PROMPT, "")]
    plan = settings.token_plan
    assert plan is not None

    def time_clip(workspace: Workspace, seed: int) -> float:
        start = time.perf_counter()
        workspace.solvers[plan].run(seed, lambda _passes, _confidence: None, lambda: None)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    ways: dict[str, Callable[[int], float]] = {}
    for name, recorder in (("called", None), ("recorded", record)):
        workspace = Workspace(runtime, settings, recorder)
        workspace.warm_up()
        workspace.read_prompt(rows[0], rows[1] if settings.guided else None, None)
        ways[name] = partial(time_clip, workspace)
    return ways


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``engine.json``."""
    parse = common.parser("engine", "What each part of the compiled function saves.")
    parse.add_argument("--policies", type=common.names, default=("dense", "dsa"), help="names, spaces between")
    parse.add_argument("--many-step", default="demo-many-step", help="a bundle of that kind (demo-many-step)")
    parse.add_argument("--many-step-policies", type=common.names, default=("dense", "hsa-50"), help="for that bundle")
    parse.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1")
    parse.add_argument("--runs", type=common.positive, default=15, help="timed clips of each row")
    options = parse.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = common.fingerprint("engine", options, included=INCLUDES, warm_up="three clips of each row, thrown away")
    tables: dict[str, Any] = {}
    for bundle, policies, rows_of in (
        (options.bundle, options.policies, autoregressive),
        (options.many_step, options.many_step_policies, many_step),
    ):
        runtime = dsa_rt.load(bundle, options.device, options.dtype)
        for policy in policies:
            name = f"{runtime.manifest.name}, {policy}"
            tables[name] = in_turns(name, rows_of(runtime, policy), options.runs, options.quiet)
    result |= {"threads": torch.get_num_threads(), "dtype": str(runtime.dtype), "policies": tables}
    if busy := common.warn_if_busy(result):
        print(busy)
    print("written:", common.show_path(common.write_json(options.out, "engine.json", result)))
    return 0


def in_turns(name: str, ways: dict[str, Callable[[int], float]], runs: int, quiet: bool) -> dict[str, Any]:
    """Times of each row, and how many times as fast as the first it is; printed."""
    taken: dict[str, list[float]] = {row: [] for row in ways}
    for turn in tqdm(range(-3, runs), desc=name, unit="turn", disable=True if quiet else None):
        for row, time_one in ways.items():
            ms = time_one(10 * abs(turn))
            if turn >= 0:
                taken[row].append(ms)
    table, first = dict[str, Any](), None
    for row, values in taken.items():
        figures = common.spread(values)
        assert figures is not None
        first = first or figures["median"]
        table[row] = figures | {"over_first": first / figures["median"]}
    print(f"\n{name}\n\n" + common.table(
        ["row", "ms a clip", "p20", "p80", "over the first row"],
        [[row, *(common.figure(f[k]) for k in ("median", "p20", "p80")), common.figure(f["over_first"], 2)]
         for row, f in table.items()],
    ))  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(common.run(main))
