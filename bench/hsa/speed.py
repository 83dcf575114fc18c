"""Run time of the presets against their share of token-steps; dense against diffusers' model of the same weights."""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import common
from bench.hsa.clip import STEPS
from dsa_rt.arena import Arena
from dsa_rt.cache import TextKV
from dsa_rt.convert.names import config_from_diffusers, from_diffusers
from dsa_rt.errors import OptionError
from dsa_rt.models.wan import WanModel
from dsa_rt.plan import TokenGrid, frame_tokens
from dsa_rt.policy import HSA, StepPlan, parse_policy
from dsa_rt.recording import record
from dsa_rt.runtime import DTYPES
from dsa_rt.sampler.ode import Expert, Solver
from dsa_rt.schedule import TRAIN_TIMESTEPS, euler_sigmas

PRESETS = ("hsa-75a", "hsa-75b", "hsa-50", "hsa-25")
POINTS = 0.04  # how far a preset's time may be above its share of token-steps
SHIFT, CHANNELS, TEXT_LENGTH, TEXT_DIM = 8.0, 16, 512, 512
INCLUDES = [
    "a generator with random weights, heads of 64, feed-forward of 4 x dim, 512 text rows; one clip, no guidance",
    f"token-steps: tokens computed over all steps, of those of {STEPS} full steps; layers are the same for all",
    "time of runs: median over rounds of the whole run, noise and caches included, against dense in the same round; "
    "policies take turns run by run",
    "time by steps: every step's wall clock within those runs; its kind's median over steps and rounds, summed over "
    "the run: what is left when a disturbance is taken out",
    "forward: one pass over all tokens, the two models taking turns; diffusers embeds the text in every pass, ours "
    "once a clip, so ours is also given with it",
]


@dataclass(frozen=True, eq=False)
class Subject:
    """A generator of ours, diffusers' with the same weights, and inputs of both."""

    ours: WanModel
    theirs: Any
    grid: TokenGrid
    frames: range
    latents: Tensor  # [1, C, F, h, w]
    text: Tensor  # [1, L, text_dim]

    def to(self, dtype: torch.dtype) -> Subject:
        """Both models in another dtype, in place; inputs too."""
        return Subject(
            self.ours.to(dtype), self.theirs.to(dtype), self.grid, self.frames, self.latents.to(dtype),
            self.text.to(dtype),
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        return len(self.frames) * self.grid.tokens

    def our_velocity(self, text: TextKV) -> Tensor:
        """[1, N, P] of the pass that is timed."""
        active = frame_tokens(self.grid, self.frames, self.ours.config.head_dim, per_frame=False)
        timesteps = torch.full((1, 1), 0.7 * TRAIN_TIMESTEPS)
        return self.ours(self.grid.patchify(self.latents), active, timesteps, text).velocity

    def their_velocity(self) -> Tensor:
        """[1, C, F, h, w]."""
        timestep = torch.tensor([0.7 * TRAIN_TIMESTEPS])
        return self.theirs(self.latents, timestep, self.text, return_dict=False)[0]


def build(dim: int, layers: int, frames: int, height: int, width: int) -> Subject:
    """fp32, seeded. dim: a multiple of 64; frames latent; height, width in tokens."""
    try:
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    except ImportError as error:
        raise OptionError("bench.hsa --speed needs diffusers: pip install 'dsa-rt[hf]'") from error
    if dim % 64:
        raise OptionError(f"dim is {dim}; expected a multiple of 64, the size of a head")
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=dim // 64, attention_head_dim=64, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_DIM, freq_dim=256, ffn_dim=4 * dim, num_layers=layers,
    ).eval().requires_grad_(False)  # fmt: skip
    ours = WanModel(config_from_diffusers(theirs.config))
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    grid = TokenGrid(height, width)
    latents = torch.randn(1, CHANNELS, frames, height * grid.patch[1], width * grid.patch[2])
    text = torch.randn(1, TEXT_LENGTH, TEXT_DIM)
    return Subject(ours.requires_grad_(False).eval(), theirs, grid, range(frames), latents, text)


@torch.no_grad()
def check(subject: Subject) -> float:
    """Largest difference of the two models' velocities, of the largest velocity; RuntimeError above 1e-3. For fp32."""
    mine = subject.grid.unpatchify(subject.our_velocity(subject.ours.embed_text(subject.text)))
    yours = subject.their_velocity()
    difference = float((mine - yours).abs().max() / yours.abs().max())
    if not difference <= 1e-3:
        raise RuntimeError(f"the two models differ by {difference:.1e} of the largest velocity; nothing was timed")
    return difference


@torch.no_grad()
def time_forward(subject: Subject, samples: int) -> dict[str, Any]:
    """Milliseconds of a pass, three ways in turns, after one of each."""
    text = subject.ours.embed_text(subject.text)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: subject.our_velocity(text),
        "ours with text": lambda: subject.our_velocity(subject.ours.embed_text(subject.text)),
        "diffusers": subject.their_velocity,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for sample in range(samples + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if sample:
                taken[name].append(1000 * (time.perf_counter() - start))
    ratios = [d / o for d, o in zip(taken["diffusers"], taken["ours"], strict=True)]
    return {"ms": {name: common.spread(values) for name, values in taken.items()},
            "diffusers_over_ours": common.spread(ratios)}  # fmt: skip


def kinds(plan: StepPlan) -> list[str]:
    """What each step does, so that steps which do the same can be told."""
    return [
        "none" if not count else f"{count} tokens" if plan.is_partial(step)
        else "all, kept" if plan.keeps(step) and plan.kept_rows else "all"
        for step, count in enumerate(plan.counts)
    ]  # fmt: skip


def plan_of(subject: Subject, policy: HSA | None) -> StepPlan:
    if policy is None:
        return StepPlan.dense(STEPS, subject.tokens)
    return policy.plan(policy.steps or STEPS, subject.tokens, subject.grid.tokens)


def time_run(solver: Solver, steps: int | None) -> tuple[float, list[float]]:
    """Seconds of a whole run and of each of its steps. steps: stop after so many."""
    marks: list[float] = []

    def mark() -> None:
        marks.append(time.perf_counter())
        if steps is not None and len(marks) > steps:
            raise _Enough

    start = time.perf_counter()
    try:
        solver.run(0, lambda _passes, _confidence: None, mark)
        mark()
    except _Enough:
        pass
    return marks[-1] - start, [after - before for before, after in pairwise(marks)]


class _Enough(Exception):
    """Ends a run early."""


def time_policies(subject: Subject, rounds: int, quiet: bool, presets: Sequence[str] = PRESETS) -> dict[str, Any]:
    """Every preset and dense, in turns, their passes recorded before, after two dense steps that are thrown away."""
    with torch.no_grad():
        text = subject.ours.embed_text(subject.text)
    policies: dict[str, HSA | None] = {"dense": None}
    for name in presets:
        policy = parse_policy(name)
        assert isinstance(policy, HSA)
        policies[name] = policy
    plans = {name: plan_of(subject, policy) for name, policy in policies.items()}
    whole: dict[str, list[float]] = {name: [] for name in plans}
    by_kind: dict[str, dict[str, list[float]]] = {name: {} for name in plans}
    arena = Arena()
    solvers = {
        name: Solver(Expert(subject.ours, text), subject.grid, subject.frames, euler_sigmas(plan.steps, SHIFT), plan,
                     arena=arena, recorder=record)
        for name, plan in plans.items()
    }  # fmt: skip
    for solver in solvers.values():
        solver.warm_up()
    time_run(solvers["dense"], 2)
    with tqdm(total=rounds * len(plans), desc="runs", unit="run", disable=True if quiet else None) as bar:
        for _ in range(rounds):
            for name, plan in plans.items():
                total, steps = time_run(solvers[name], None)
                whole[name].append(total)
                for kind, seconds in zip(kinds(plan), steps, strict=True):
                    by_kind[name].setdefault(kind, []).append(seconds)
                bar.update()
    return summarise(plans, whole, by_kind)


def summarise(
    plans: Mapping[str, StepPlan], whole: Mapping[str, Sequence[float]],
    by_kind: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:  # fmt: skip
    """Shares of the dense run, by steps and by whole runs, beside the share of token-steps."""
    medians = {
        name: {kind: statistics.median(taken) for kind, taken in kinds_.items()} for name, kinds_ in by_kind.items()
    }
    sums = {name: sum(medians[name][kind] for kind in kinds(plan)) for name, plan in plans.items()}
    dense_steps = sum(plans["dense"].counts)
    rows: dict[str, Any] = {}
    for name, plan in plans.items():
        token_steps, by_steps = sum(plan.counts) / dense_steps, sums[name] / sums["dense"]
        ratios = [run / dense for run, dense in zip(whole[name], whole["dense"], strict=True)]
        rows[name] = {
            "token_steps": token_steps, "time_by_steps": by_steps, "time_of_runs": statistics.median(ratios),
            "points_over": 100 * (statistics.median(ratios) - token_steps), "seconds": common.spread(whole[name]),
            "within": statistics.median(ratios) <= token_steps + POINTS,
            "steps": {kind: {"steps": kinds(plan).count(kind), "ms": 1000 * value,
                             "of_a_dense_step": value * STEPS / sums["dense"]}
                      for kind, value in medians[name].items()},
        }  # fmt: skip
    return rows


def report(rows: Mapping[str, Any], forward: Mapping[str, Any]) -> str:
    """Tables for people."""
    figure = common.figure
    presets = common.table(
        ["policy", "token-steps", "time of runs", "points over", "time by steps", "seconds"],
        [[name, figure(row["token_steps"], 3), figure(row["time_of_runs"], 3), figure(row["points_over"], 1),
          figure(row["time_by_steps"], 3), figure(row["seconds"]["median"], 2)] for name, row in rows.items()],
    )  # fmt: skip
    steps = common.table(
        ["step", "steps of the run", "ms", "of a dense step"],
        [[f"{name}: {kind}", str(step["steps"]), figure(step["ms"], 1), figure(step["of_a_dense_step"], 3)]
         for name, row in rows.items() for kind, step in row["steps"].items()],
    )  # fmt: skip
    passes = common.table(
        ["forward pass", "ms", "p20", "p80"],
        [[name, *(figure(ms[key], 1) for key in ("median", "p20", "p80"))] for name, ms in forward["ms"].items()],
    )
    return f"{presets}\n\n{steps}\n\n{passes}\ndiffusers over ours: {forward['diffusers_over_ours']['median']:.3f}"


def main(options: Namespace) -> int:
    """Measure, print, write ``hsa-speed.json``; 1 where a preset is too slow, or dense slower than diffusers."""
    dim, layers, shape = (128, 2, (3, 4, 5)) if options.quick else (options.dim, options.layers, options.grid)
    result = common.fingerprint(
        "hsa", options, included=INCLUDES, warm_up="one pass of each model, two steps of the sampler; thrown away"
    )
    torch.set_num_threads(options.threads)
    subject = build(dim, layers, *shape)
    result |= {
        "threads": torch.get_num_threads(), "dim": dim, "layers": layers, "tokens": subject.tokens,
        "difference_to_diffusers": check(subject), "dtypes": {},
    }  # fmt: skip
    good = True
    for name in options.dtypes:
        made = subject.to(DTYPES[name])  # from the first on: fp32 weights that were bf16 stay what they were
        forward = time_forward(made, options.samples)
        rows = time_policies(made, options.rounds, options.quiet)
        result["dtypes"][name] = {"policies": rows, "forward": forward}
        print(f"\n{name}, {subject.tokens} tokens, dim {dim}, {layers} layers\n\n{report(rows, forward)}")
        for policy, row in rows.items():
            if not row["within"]:
                print(f"MISSED {policy}: {row['points_over']:.1f} points over its share; at most {100 * POINTS:g}")
        if forward["diffusers_over_ours"]["median"] < 1:
            print("MISSED dense is slower than diffusers' model")
        good &= all(row["within"] for row in rows.values()) and forward["diffusers_over_ours"]["median"] >= 1
    print(*(f"- {line}" for line in INCLUDES), sep="\n")
    if busy := common.warn_if_busy(result):
        print(busy)
    print("written:", common.show_path(common.write_json(options.out, "hsa-speed.json", result)))
    return 0 if good else 1
