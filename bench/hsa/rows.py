"""The rows of the comparison, as names, and what they stand for.

| name | method |
|---|---|
| dense | all tokens in all 40 steps: the reference |
| steps-N | all tokens in N steps |
| hsa-50, hsa:groups=...,... | a policy, as :func:`dsa_rt.policy.parse_policy` reads it |
| by-change:hsa-50 | the same with tokens ranked by ‖Δv‖; by-magnitude: by ‖v‖; by-relative: HSA's own score |
| teacache@0.5, easycache@0.5, ras@0.5 | a rival, its knob set so that it computes that share of the dense run |

A single group that takes every k-th step is "window only": whole steps are skipped inside the window, for all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from bench.hsa.allocated import SCORES, Allocated, ByScore
from bench.hsa.clip import STEPS, Clip, Method, measure
from bench.hsa.ras import RAS
from bench.hsa.skipping import EasyCache, TeaCache, fit_polynomial
from dsa_rt.errors import OptionError
from dsa_rt.policy import HSA, parse_policy

DENSE = "dense"
TARGETS = (0.75, 0.5, 0.25)
NEAR = 0.051  # shares that count as a target's

_EXTRAPOLATED = ",update=extrapolated"
FEWER = tuple(f"steps-{n}" for n in (34, 30, 25, 22, 20, 16, 12, 10, 8))
WINDOW = (
    "hsa:groups=1@20,window=0.5,steps=40",  # 30 of 40 steps; extrapolated: window-75
    "hsa:groups=1@10,window=0.35,steps=40",  # 29
    "hsa:groups=1@10,window=0.7,steps=40",  # 19
    "hsa:groups=1@5,window=0.55,steps=40",  # 20
    "hsa:groups=1@20,window=0.9,steps=40",  # 22; extrapolated: window-55
    "hsa:groups=1@5,window=0.85,steps=40",  # 10
    "hsa:groups=1@5,window=0.7,steps=20",  # 10, on the grid of 20
)
HSA_ROWS = (
    "hsa-75a", "hsa-75b", "hsa-75a:update=extrapolated", "hsa-75b:update=extrapolated",
    "hsa-50", "hsa-50:selection=uniform", "hsa-50:selection=random", "hsa-50:selection=random-first-frame",
    "by-change:hsa-50", "by-magnitude:hsa-50",
    "hsa-50:update=extrapolated", "hsa-50:update=extrapolated,strength=0.5",
    "hsa-50:selection=uniform,update=extrapolated", "hsa-50:selection=random,update=extrapolated",
    "hsa-25", "hsa-25:selection=uniform", "hsa-25:update=extrapolated", "hsa-25:selection=uniform,update=extrapolated",
)  # fmt: skip
RIVALS = tuple(f"{rival}@{share:g}" for share in TARGETS for rival in ("teacache", "easycache", "ras"))
ALL = (DENSE, *FEWER, *WINDOW, *(name + _EXTRAPOLATED for name in WINDOW), *HSA_ROWS, *RIVALS)
QUICK = (
    DENSE, "steps-30", "steps-20", "steps-10", WINDOW[2], WINDOW[2] + _EXTRAPOLATED, "hsa-50",
    "hsa-50:update=extrapolated", "teacache@0.5", "easycache@0.5", "ras@0.5",
)  # fmt: skip


def build(names: Sequence[str], fit_on: Sequence[Clip], say: Callable[[str], None]) -> dict[str, Method]:
    """Methods by name. fit_on: clips of other prompts, on which rivals get their knobs; say: takes progress lines."""
    tuned = _Tuned(fit_on, say)
    return {name: _method(name, tuned) for name in names}


def check(names: Sequence[str]) -> None:
    """:class:`dsa_rt.errors.DsaRtError` for a name that stands for nothing."""
    for name in names:
        _method(name, None)


def _method(name: str, tuned: _Tuned | None) -> Method:
    if name == DENSE:
        return Allocated(STEPS)
    base, at, share = name.partition("@")
    if at and base in ("teacache", "easycache", "ras"):
        target = _share(share, name)
        if base == "ras":
            return RAS.at_share(target)
        return EasyCache(math.inf) if tuned is None else tuned.at(base, target)
    kind, colon, rest = name.partition(":")
    if kind.startswith("by-") and colon and kind.removeprefix("by-") in SCORES:
        policy = _policy(rest)
        return ByScore(policy.steps or STEPS, policy, kind.removeprefix("by-"))
    steps = name.removeprefix("steps-")
    if steps != name and steps.isdecimal() and int(steps):
        return Allocated(int(steps))
    policy = _policy(name)
    return Allocated(policy.steps or STEPS, policy)


def _policy(name: str) -> HSA:
    policy = parse_policy(name)
    if not isinstance(policy, HSA):
        raise OptionError(f"row {name!r} is no way to spend the steps of a many-step clip; see python -m bench.hsa -h")
    return policy


def _share(text: str, name: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise OptionError(f"row {name!r}: the share is {text!r}; expected a number above 0 and up to 1")
    return share


class _Tuned:
    """Rivals with a threshold, set on clips of other prompts by bisection."""

    def __init__(self, clips: Sequence[Clip], say: Callable[[str], None]) -> None:
        self.clips, self.say = clips, say
        self._polynomial: tuple[float, ...] | None = None

    def at(self, rival: str, share: float) -> Method:
        if rival == "teacache":
            polynomial = self.polynomial()
            make: Callable[[float], Method] = lambda threshold: TeaCache(threshold, polynomial)  # noqa: E731
        else:
            warm_up = min(STEPS // 5, round(share * STEPS) // 2)  # leave as many again to the criterion
            make = lambda threshold: EasyCache(threshold, warm_up)  # noqa: E731
        method, found = bisect(make, self.clips, share)
        self.say(f"{rival}@{share:g}: {method}: share {found:.3f} on {len(self.clips)} other prompts")
        return method

    def polynomial(self) -> tuple[float, ...]:
        if self._polynomial is None:
            self._polynomial = fit_polynomial(self.clips)
        return self._polynomial


def bisect(
    make: Callable[[float], Method], clips: Sequence[Clip], share: float, *, rounds: int = 12
) -> tuple[Method, float]:
    """The threshold, and the share it gives as mean over clips, nearest to ``share``; a larger one skips more."""
    low, high = 1e-4, 10.0
    best: tuple[Method, float] | None = None
    for _ in range(rounds):
        method = make(math.sqrt(low * high))
        found = sum(measure(method, clip).share for clip in clips) / len(clips)
        if best is None or abs(found - share) < abs(best[1] - share):
            best = method, found
        if abs(found - share) < 0.5 / STEPS:
            break
        low, high = (math.sqrt(low * high), high) if found > share else (low, math.sqrt(low * high))
    assert best is not None
    return best


def kind(name: str) -> str:
    """What sort of method a row is, for verdicts and pictures."""
    base = name.partition("@")[0].partition(":")[0]
    if base == DENSE or base.startswith("steps-"):
        return "fewer steps"
    if base in ("teacache", "easycache", "ras"):
        return {"teacache": "TeaCache", "easycache": "EasyCache", "ras": "RAS"}[base]
    if base.startswith("by-"):
        return "HSA, other score"
    policy = _policy(name)
    sort = "window only" if len(policy.groups) == 1 else "HSA"
    return sort if policy.update == "held" else f"{sort}, extrapolated"
