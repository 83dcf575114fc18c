"""How much of the slope to extrapolate with, by the length of the gap (ours): what the rule of thumb is read from."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench import common
from bench.hsa import rows
from bench.hsa.clip import STEPS, Method, Regime, Studio
from bench.hsa.evaluate import Job, evaluate_all
from bench.hsa.quality import regimes
from bench.prompts import held_out_cases
from dsa_rt.policy import HSA
from dsa_rt.policy.hsa import default_strength

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
GAPS = {40: (2, 4, 5, 8, 10), 20: (2, 4, 5)}  # by the number of steps
KINDS = ("window only", "hsa-50-like")
WINDOW, BASELINE = 0.8, 0.16
INCLUDES = [
    f"PSNR: frames against {STEPS} full steps of the same seed, mean over clips; fewer steps than that cost PSNR too",
    f"window only: all tokens every gap-th step inside the window of {WINDOW:g}; hsa-50-like: a baseline of "
    f"{BASELINE:.0%} takes every step, the others every gap-th, dynamic selection",
    "strength 0: the velocity is held; best: top of the parabola through the best strength and its neighbours",
]


@dataclass(frozen=True)
class Cell:
    """One setting. gap: steps from one evaluation of a skipped token to the next."""

    kind: str
    steps: int
    gap: int
    strength: float

    @property
    def name(self) -> str:
        """As a row."""
        budget = self.steps // self.gap
        shares = ((1.0, budget),) if self.kind == KINDS[0] else ((BASELINE, self.steps), (1 - BASELINE, budget))
        update = {"update": "extrapolated", "strength": self.strength} if self.strength else {}
        return HSA(shares, WINDOW, steps=self.steps, **update).name  # type: ignore[arg-type]


def cells(quick: bool) -> list[Cell]:
    gaps = {40: (4,)} if quick else GAPS
    strengths = (0.0, 0.5, 1.0) if quick else STRENGTHS
    return [
        Cell(kind, steps, gap, strength)
        for kind in KINDS
        for steps, some in gaps.items()
        for gap in some
        for strength in strengths
    ]


def best_strength(psnr: Mapping[float, float]) -> float:
    """Top of the parabola through the best strength and its two neighbours; at an end, that end."""
    known = sorted(psnr)
    at = max(range(len(known)), key=lambda i: psnr[known[i]])
    if at in (0, len(known) - 1):
        return known[at]
    x = known[at - 1 : at + 2]
    a, b, _ = np.polyfit(x, [psnr[value] for value in x], 2)
    return float(-b / (2 * a))


def table(found: Mapping[Cell, float]) -> str:
    """Markdown: a line for each kind, number of steps and gap; decibels by strength."""
    strengths = sorted({cell.strength for cell in found})
    lines = dict.fromkeys((cell.kind, cell.steps, cell.gap) for cell in found)
    body = []
    for kind, steps, gap in lines:
        values = {strength: found[Cell(kind, steps, gap, strength)] for strength in strengths}
        body.append([
            f"{kind}, {steps} steps, gap {gap}", *(common.figure(values[s], 2) for s in strengths),
            common.figure(best_strength(values), 2), common.figure(default_strength(gap, steps), 2),
        ])  # fmt: skip
    return common.table(["setting", *(f"{s:g}" for s in strengths), "best", "the rule's"], body)


def main(options: Namespace) -> int:
    """Make, measure, print, write ``hsa-strength.json``."""
    result = common.fingerprint("hsa", options, included=INCLUDES, warm_up="none: nothing is timed")
    torch.set_num_threads(options.threads)
    studio = Studio(options.bundle, options.dtype)
    chosen = cells(options.quick)
    built: Mapping[str, Method] = rows.build(list(dict.fromkeys(cell.name for cell in chosen)), (), print)
    methods: dict[Regime, Mapping[str, Method]] = dict.fromkeys(regimes(studio), built)
    cases = held_out_cases(1 if options.quick else options.prompts)
    results = list(
        tqdm(
            evaluate_all(Job(options.bundle, options.dtype, scored=False), methods, cases, options.workers),
            total=len(cases), desc="strength", unit="prompt", disable=True if options.quiet else None,
        )
    )  # fmt: skip
    lines: dict[str, list[dict[str, Any]]] = {}
    for regime in methods:
        found = {
            cell: float(np.mean([entry["regimes"][regime.name][cell.name]["psnr"] for entry in results]))
            for cell in chosen
        }
        print(f"\n{regime.name}: PSNR by strength\n\n{table(found)}")
        lines[regime.name] = [vars(cell) | {"psnr": value} for cell, value in found.items()]
    print(*(f"- {line}" for line in INCLUDES), sep="\n")
    result |= {"bundle_name": studio.runtime.manifest.name, "clips": len(cases), "regimes": lines}
    print("written:", common.show_path(common.write_json(options.out, "hsa-strength.json", result)))
    return 0
