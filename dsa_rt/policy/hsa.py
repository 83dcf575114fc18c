"""Heterogeneous Step Allocation: some tokens take every step, most take few (arXiv 2605.06892, training-free).

Tokens are split into groups, each with a budget of steps. A step computes the groups whose turn it is; for all other
tokens the sampler goes on with the velocity it last saw, and attention reads the keys and values they last had. Near
both ends of the schedule every token takes every step. Group sizes, and with them the run time, are fixed; which token
belongs to which group is decided once per sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsa_rt.errors import PolicyError
from dsa_rt.policy.base import Decider, Policy
from dsa_rt.policy.steps import StepPlan

if TYPE_CHECKING:
    from dsa_rt.policy.calibration import Calibration
    from dsa_rt.policy.targets import Cost

SELECTIONS = ("dynamic", "uniform", "random", "random-first-frame")
UPDATES = ("held", "extrapolated")

_SUM_TOLERANCE = Fraction(1, 10**6)


@dataclass(frozen=True)
class HSA(Policy):
    """groups: (share of the tokens, budget in steps) each; shares sum to 1. The largest budget is the baseline's: it
    is the number of steps T, and every budget divides T. A single group may have a smaller budget than T: then whole
    steps are skipped, for all tokens alike (the ablation "window only").

    window: the middle share w of the schedule in which groups count, in (0, 1]. In the first and the last
    floor((1 - w)·T / 2) steps all tokens are computed.

    selection: "dynamic": tokens whose velocity changes least before the window get the smallest budget, those whose
    velocity changes most the baseline; "uniform": groups spread evenly over the sequence; "random": drawn by the
    seed; "random-first-frame": drawn by the seed, the first latent frame in the baseline.

    update: "held": a skipped token keeps its last velocity, as published; "extrapolated" (ours): it goes on along the
    line, in sigma, through its last two velocities, by ``strength`` of that line's slope (None:
    :func:`default_strength`).

    steps: T, where groups alone do not say it: for a single group. None: that many as the bundle has by default.
    """

    groups: tuple[tuple[float, int], ...] = ((0.16, 40), (0.84, 10))
    window: float = 0.8
    selection: str = "dynamic"
    update: str = "held"
    strength: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", _groups(self.groups))
        if not _is_number(self.window) or not 0 < self.window <= 1:
            raise PolicyError(f"HSA: window is {self.window!r}; expected a share of the steps above 0 and up to 1")
        object.__setattr__(self, "window", float(self.window))
        for name, known in (("selection", SELECTIONS), ("update", UPDATES)):
            if getattr(self, name) not in known:
                raise PolicyError(f"HSA: {name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.strength is not None:
            if not _is_number(self.strength) or not 0 < self.strength <= 2:
                raise PolicyError(f"HSA: strength is {self.strength!r}; expected a number above 0 and up to 2, or None")
            if self.update != "extrapolated":
                raise PolicyError(f"HSA: strength={self.strength:g} is for update='extrapolated'; leave it out")
            object.__setattr__(self, "strength", float(self.strength))
        if self.steps is None and len(self.groups) > 1:
            object.__setattr__(self, "steps", self.groups[0][1])
        if self.steps is not None:
            if type(self.steps) is not int or self.steps < 1:
                raise PolicyError(f"HSA: steps is {self.steps!r}; expected a whole number of 1 or more, or None")
            self._check_budgets(self.steps)

    @property
    def name(self) -> str:
        for preset, policy in {**PRESETS, **OURS}.items():
            if (policy.groups, policy.window, policy.steps) == (self.groups, self.window, self.steps):
                base, usual, options = preset, policy, []
                break
        else:
            base, usual = "hsa", HSA()
            options = ["groups=" + "+".join(f"{_text(share)}@{budget}" for share, budget in self.groups)]
            if self.window != usual.window:
                options.append(f"window={_text(self.window)}")
        options += [f"{key}={getattr(self, key)}" for key in ("selection", "update")
                    if getattr(self, key) != getattr(usual, key)]  # fmt: skip
        if self.strength is not None:
            options.append(f"strength={_text(self.strength)}")
        if base == "hsa" and self.steps is not None and len(self.groups) == 1:
            options.append(f"steps={self.steps}")
        return f"{base}:{','.join(options)}" if options else base

    def begin(
        self,
        passes_max: int,
        chunks: int | None,
        calibration: Calibration | None = None,
        *,
        has_head: bool = False,
        cost: Cost | None = None,
    ) -> Decider:
        """Always :class:`PolicyError`: what HSA decides is tokens per step, not passes per chunk."""
        raise PolicyError(
            f"policy {self.name} allocates the steps of a whole clip to its tokens, but this few-step generator makes "
            "chunks in a few passes each; use dsa, dense or fixed-N with it, or a many-step bundle such as "
            "'demo-many-step'"
        )

    def margin(self, steps: int) -> int:
        """Steps at either end that compute all tokens: floor((1 - window)·T / 2), exact for the decimal as written."""
        return math.floor((1 - _exact(self.window)) * steps / 2)

    def plan(
        self, steps: int, tokens: int, tokens_per_frame: int, *, fixed: int = 0, full: Sequence[int] = ()
    ) -> StepPlan:
        """How many tokens every step computes.

        steps: T. tokens: N, all tokens; fixed: of those, conditions that never move (in the first latent frame, as
        image-to-video has them). full: further steps that compute all tokens, such as one with other weights.
        Raises :class:`PolicyError` where a budget does not divide T, where there are too few full steps to score
        tokens, or where the baseline cannot hold the first frame.
        """
        self._check_budgets(steps)
        if not 0 <= fixed < tokens:
            raise PolicyError(f"policy {self.name}: {fixed} of {tokens} tokens are conditions; one or more must move")
        margin, everyone = self.margin(steps), tuple(range(len(self.groups)))
        strides = [steps // budget for _, budget in self.groups]
        active = tuple(
            everyone if step < margin or step >= steps - margin or step in full
            else tuple(group for group in everyone if step % strides[group] == 0)
            for step in range(steps)
        )  # fmt: skip
        plan = StepPlan(self, tokens, fixed, tokens_per_frame, self._sizes(tokens - fixed), active)
        if not plan.stale:
            return plan  # no step needs to know who is in which group
        if self.selection == "random-first-frame" and plan.sizes[0] < tokens_per_frame - fixed:
            share = math.ceil(1000 * (tokens_per_frame - fixed) / (tokens - fixed)) / 1000
            raise PolicyError(
                f"policy {self.name}: the first latent frame has {tokens_per_frame - fixed} tokens, but the baseline "
                f"group has {plan.sizes[0]}: raise its share to {share:g} or more, or use selection=random"
            )
        if self.selection != "dynamic":
            return plan
        if margin < 2:
            raise PolicyError(self._too_few_to_score(steps, margin))
        return replace(plan, scoring=range(1, margin))

    def order(
        self, plan: StepPlan, moving: NDArray[np.int64], seed: int, scores: NDArray[np.float32] | None
    ) -> NDArray[np.int64]:
        """The moving tokens, group after group from the smallest budget to the baseline; rising inside a group.

        moving [N - fixed]: indices of the tokens that are no conditions, rising. scores [N]: relative change of each
        token's velocity, for dynamic selection. The same on any device; ties go by token.
        """
        if not plan.stale:
            return moving  # one group, or every token in every step
        if self.selection == "uniform":
            ranked = _spread(plan.sizes)
        elif self.selection == "dynamic":
            assert scores is not None
            ranked = np.argsort(scores[moving], kind="stable")
        else:
            # Raw words of the bit generator: numpy promises that those stay as they are from version to version.
            keys = np.random.Philox(key=seed % 2**64).random_raw(len(moving))
            if self.selection == "random-first-frame":
                keys[moving < plan.tokens_per_frame] = np.iinfo(np.uint64).max
            ranked = np.argsort(keys, kind="stable")
        cuts = np.cumsum(plan.sizes[::-1])[:-1]
        return np.concatenate([np.sort(moving[part]) for part in np.split(ranked, cuts)])

    def strengths(self, steps: int) -> tuple[float, ...]:
        """Of the extrapolation, for each group; 0 for all under update="held"."""
        if self.update == "held":
            return (0.0,) * len(self.groups)
        return tuple(
            default_strength(steps // budget, steps) if self.strength is None else self.strength
            for _, budget in self.groups
        )

    def _on(self, steps: int, reference: int) -> HSA:
        """What the policy is on ``reference`` steps, on another number of them, which the strides must divide."""
        groups = tuple((share, budget * steps // reference) for share, budget in self.groups)
        return replace(self, groups=groups, steps=steps)

    def _check_budgets(self, steps: int) -> None:
        """:class:`PolicyError` unless every budget divides T and the baseline of several groups takes all steps."""
        divisors = [n for n in range(1, steps + 1) if steps % n == 0]
        wrong = next((budget for _, budget in self.groups if steps % budget), None)
        if wrong is None and (len(self.groups) == 1 or self.groups[0][1] == steps):
            return
        if wrong is None:
            wrong = self.groups[0][1]
            fault = f"the baseline group has a budget of {wrong} steps, but T is {steps} and it takes all of them"
        else:
            fault = f"a budget of {wrong} steps does not divide T = {steps}"
        same, baseline = "", self.groups[0][1]
        strides = [baseline // budget for _, budget in self.groups if baseline % budget == 0]
        if len(strides) == len(self.groups) > 1 and steps % math.lcm(*strides) == 0:
            same = f"; {self._on(steps, baseline).name} is the same in {steps} steps"
        raise PolicyError(f"HSA: {fault}; budgets can be {', '.join(map(str, divisors))}{same}")

    def _sizes(self, moving: int) -> tuple[int, ...]:
        """Tokens of each group: shares of ``moving`` rounded by largest remainder, so that they sum exactly."""
        total = sum((_exact(share) for share, _ in self.groups), Fraction(0))
        ideal = [_exact(share) * moving / total for share, _ in self.groups]
        sizes = [math.floor(value) for value in ideal]
        by_remainder = sorted(range(len(ideal)), key=lambda group: sizes[group] - ideal[group])
        for group in by_remainder[: moving - sum(sizes)]:
            sizes[group] += 1
        return tuple(sizes)

    def _too_few_to_score(self, steps: int, margin: int) -> str:
        message = (
            f"policy {self.name}: dynamic selection scores tokens over the full steps before the window, from the "
            f"second on, but with T = {steps} and window {_text(self.window)} there "
            + ("is 1 full step" if margin == 1 else "are none")
        )
        if self.window == 1:
            return f"{message}; use a window below 1, or selection=random"
        cycle = math.lcm(*(steps // budget for _, budget in self.groups))
        enough = math.ceil(4 / (1 - _exact(self.window)) / cycle) * cycle
        return f"{message}; T = {enough} would do ({self._on(enough, steps).name}), or selection=random"


def default_strength(gap: int, steps: int) -> float:
    """Share of the slope to extrapolate with, for tokens evaluated every ``gap`` of ``steps`` steps.

    Ours: all of it over a gap of two, and over longer ones less, in inverse proportion to their share of the schedule
    (one half for gap 4 at T = 40): a line through two velocities says little about a far one. Read from
    ``bench/results/hsa-strength.json``: within 1.3 dB of the best strength in 30 of its 32 settings, 3.4 dB at most.
    """
    return 1.0 if gap <= 2 else min(1.0, steps / (20 * gap))


def _groups(groups: Sequence[tuple[float, int]]) -> tuple[tuple[float, int], ...]:
    """Checked, and sorted by falling budget."""
    shown = f"HSA: groups are {groups!r}; expected pairs (share of the tokens, budget in steps)"
    if not isinstance(groups, list | tuple) or not groups:
        raise PolicyError(shown)
    checked = []
    for pair in groups:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise PolicyError(shown)
        share, budget = pair
        if not _is_number(share) or not 0 < share <= 1:
            raise PolicyError(f"HSA: a group has a share of {share!r}; expected a number above 0 and up to 1")
        if type(budget) is not int or budget < 1:
            raise PolicyError(f"HSA: a group has a budget of {budget!r}; expected a whole number of steps, 1 or more")
        checked.append((float(share), budget))
    total = sum((_exact(share) for share, _ in checked), Fraction(0))
    if abs(total - 1) > _SUM_TOLERANCE:
        raise PolicyError(f"HSA: the shares of the groups sum to {float(total):g}; expected 1")
    return tuple(sorted(checked, key=lambda pair: -pair[1]))


def _spread(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Positions of the groups, smallest budget first, each spread as evenly as it goes over what the groups with larger
    budgets left."""
    rest = np.arange(sum(sizes), dtype=np.int64)
    taken = []
    for size in sizes[:-1]:
        places = (2 * np.arange(size) + 1) * len(rest) // (2 * max(size, 1))
        taken.append(rest[places])
        rest = np.delete(rest, places)
    return np.concatenate([rest, *reversed(taken)])


def _exact(value: float) -> Fraction:
    """The decimal that a person wrote: 0.8 is 4/5."""
    return Fraction(repr(value))


def _text(value: float) -> str:
    return repr(value).removesuffix(".0")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


PRESETS = MappingProxyType(
    {
        "hsa-75a": HSA(((0.25, 40), (0.25, 20), (0.5, 10)), window=0.5),
        "hsa-75b": HSA(((0.33, 40), (0.67, 10)), window=0.5),
        "hsa-50": HSA(((0.16, 40), (0.84, 10)), window=0.8),
        "hsa-25": HSA(((0.16, 20), (0.84, 5)), window=0.8, selection="random"),
    }
)
"""As published; named by their run time in percent of 40 full steps."""
OURS = MappingProxyType(
    {
        "window-75": HSA(((1, 20),), window=0.5, update="extrapolated", steps=40),
        "window-55": HSA(((1, 20),), window=0.9, update="extrapolated", steps=40),
    }
)
"""Every second step inside the window is skipped, for all tokens alike, and the velocity goes on along its line; named
by their share of 40 full steps. They keep no K/V; on the demo, under guidance 6 and shift 8, no choice of tokens comes
near (bench/hsa)."""
