"""Dynamic Step Allocation: a confidence head decides how many passes a chunk gets (arXiv 2606.04432).

Two rules. ``paper`` is Algorithm 1 as printed: refine where the first pass is less confident than the
previous chunk was in the end. As confidences differ by noise level, that compares unlike with unlike and
mostly alternates. ``calibrated`` compares like with like, by a calibration run stored in the bundle, and
keeps to a budget the user states; see :mod:`dsa_rt.policy.calibration` and :mod:`dsa_rt.policy.allocation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from dsa_rt.errors import PolicyError
from dsa_rt.policy.allocation import HORIZON
from dsa_rt.policy.base import Decider, Policy, check_run
from dsa_rt.policy.targets import clip_budget

if TYPE_CHECKING:
    from dsa_rt.policy.calibration import Calibration
    from dsa_rt.policy.targets import Cost

RULES = ("auto", "paper", "calibrated")
TARGETS = {"passes_per_chunk": "passes", "model_calls": "calls", "fps": "fps"}


@dataclass(frozen=True)
class DSA(Policy):
    """rule: "paper", "calibrated", or "auto": calibrated where the bundle has a calibration, else paper.

    retest: decide after every pass instead of once per chunk, where a chunk takes one pass or all. None: what
    suits the rule, which is once for paper (as printed) and every pass for calibrated.

    One target at most, for the calibrated rule; none: 70% of a dense run's model calls.
    passes_per_chunk: mean over the clip. model_calls: per clip, context passes counted (passes + chunks).
    fps: at least so many frames per second, by times measured at compile.
    A clip never takes more than its budget, and spends it (decided by the chunk: but for up to T - 2 passes).

    refine_first: the first chunk gets all passes, as in the paper. False: it is decided like the others.
    """

    rule: str = "auto"
    retest: bool | None = None
    passes_per_chunk: float | None = None
    model_calls: float | None = None
    fps: float | None = None
    refine_first: bool = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise PolicyError(f"DSA: rule is {self.rule!r}; expected one of {', '.join(RULES)}")
        if not isinstance(self.refine_first, bool) or not isinstance(self.retest, bool | None):
            raise PolicyError(
                f"DSA: retest is {self.retest!r}, refine_first {self.refine_first!r}; expected True or False"
            )
        stated = {field: getattr(self, field) for field in TARGETS if getattr(self, field) is not None}
        for field, value in stated.items():
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
                raise PolicyError(f"DSA: {field} is {value!r}; expected a number above 0")
            object.__setattr__(self, field, float(value))
        if len(stated) > 1:
            raise PolicyError(f"DSA: {' and '.join(stated)} are both stated; expected one target")
        if self.rule == "paper" and self.needs_calibration:
            what = next(iter(stated), "refine_first=False")
            raise PolicyError(
                f"DSA: {what} is for the calibrated rule; the paper's has nothing to set but retest"
            )
        if self.retest is None and self.rule != "auto":  # one policy, one spelling
            object.__setattr__(self, "retest", self.rule == "calibrated")

    @property
    def name(self) -> str:
        base = "dsa" if self.rule == "auto" else f"dsa-{self.rule}"
        options = []
        if self.rule == "paper" and self.retest:
            base += "-retest"
        elif self.rule == "auto" and self.retest:
            options.append("retest")
        elif self.rule != "paper" and self.retest is False:
            options.append("retest=no")
        if not self.refine_first:
            options.append("first=free")
        targets = {key: getattr(self, field) for field, key in TARGETS.items()}
        options += [
            f"{key}={value!r}".removesuffix(".0") for key, value in targets.items() if value is not None
        ]
        return f"{base}:{','.join(options)}" if options else base

    @property
    def needs_calibration(self) -> bool:
        """Whether something was asked for that the paper's rule cannot do."""
        stated = any(getattr(self, field) is not None for field in TARGETS)
        return self.rule == "calibrated" or not self.refine_first or stated

    @property
    def needs_cost(self) -> bool:
        return self.fps is not None

    def begin(
        self,
        passes_max: int,
        chunks: int | None,
        calibration: Calibration | None = None,
        *,
        has_head: bool = False,
        cost: Cost | None = None,
    ) -> Decider:
        check_run(passes_max, chunks)
        if not has_head:
            raise PolicyError(
                f"policy {self.name} needs a confidence head and this bundle has none: use dense or fixed-N, "
                "or train a head for the bundle"
            )
        if calibration is None and self.needs_calibration:
            raise PolicyError(
                f"policy {self.name} needs a calibration and this bundle has none: "
                "calibrate the head, or use dsa-paper, dense or fixed-N"
            )
        if calibration is None or self.rule == "paper":
            return PaperDecider(passes_max, retest=bool(self.retest))
        if calibration.passes != passes_max:
            raise PolicyError(
                f"policy {self.name}: the bundle's calibration is for {calibration.passes} passes, but "
                f"{passes_max} are scheduled: schedule {calibration.passes}, or calibrate for {passes_max}"
            )
        budget = clip_budget(
            passes_max,
            chunks,
            refine_first=self.refine_first,
            passes_per_chunk=self.passes_per_chunk,
            model_calls=self.model_calls,
            fps=self.fps,
            cost=cost,
        )
        return CalibratedDecider(
            calibration, chunks, budget, retest=self.retest is not False, refine_first=self.refine_first
        )


class PaperDecider(Decider):
    """Algorithm 1: ``previous`` is the confidence of the last pass that ran, 1.0 before the first chunk."""

    def __init__(self, passes_max: int, *, retest: bool) -> None:
        super().__init__(passes_max)
        self._retest, self._previous = retest, 1.0

    def wants_confidence(self, chunk: int, passes: int) -> bool:
        return self._retest or passes in (1, self.passes_max)

    def _another_pass(self, chunk: int, passes: int, confidence: float | None) -> bool:
        if passes < self.passes_max:
            if passes > 1 and not self._retest:
                return True
            self.threshold = self._previous
            if _known(confidence) < self._previous:
                return True
        self._previous = _known(confidence)
        return False


class CalibratedDecider(Decider):
    """Keeps to ``budget``: passes of the whole clip, or their running mean where ``chunks`` is None.

    The unit inside is a refining step: one more pass, or all remaining ones where a chunk is decided once. A
    session without end is planned as a clip that always ends HORIZON chunks ahead; passes of its first chunks
    beyond the mean are saved later, and what calm chunks leave is kept for busy ones.
    """

    def __init__(
        self, calibration: Calibration, chunks: int | None, budget: float, *, retest: bool, refine_first: bool
    ) -> None:
        super().__init__(calibration.passes)
        self._allocation = calibration.by_pass if retest else calibration.by_chunk
        self._curves, self._first_curves = calibration.later, calibration.first
        self._chunks, self._retest, self._refine_first = chunks, retest, refine_first
        self._passes_per_step = 1 if retest else calibration.passes - 1
        self._budget = budget  # passes of the clip, or per chunk
        self._spent = 0  # steps

    def _left(self, chunk: int) -> tuple[int, int]:
        """Chunks left, this one counted, and steps left for them."""
        if self._chunks is not None:
            steps = (int(self._budget) - self._chunks) // self._passes_per_step
            return self._chunks - chunk, steps - self._spent
        steps = math.floor((self._budget - 1.0) * (chunk + HORIZON) / self._passes_per_step + 1e-9)
        return HORIZON, steps - self._spent

    def _forced(self, chunk: int, passes: int) -> bool | None:
        """The answer where it does not depend on the confidence, None where it does."""
        if passes >= self.passes_max:
            return False
        if (chunk == 0 and self._refine_first) or (passes > 1 and not self._retest):
            return True
        left, steps = self._left(chunk)
        if steps <= 0:
            return False
        enough = left * self._allocation.steps - (passes - 1)
        return True if steps >= enough else None

    def wants_confidence(self, chunk: int, passes: int) -> bool:
        # The first pass is always judged, so that statistics have one comparable confidence per chunk.
        return passes == 1 or self._forced(chunk, passes) is None

    def _another_pass(self, chunk: int, passes: int, confidence: float | None) -> bool:
        answer = self._forced(chunk, passes)
        if answer is None:
            left, steps = self._left(chunk)
            cut = self._allocation.cut(left, steps, passes - 1, is_first=chunk == 0)
            curves = self._first_curves if chunk == 0 else self._curves
            self.threshold = (0.0, *curves.edges[passes - 1], None)[cut]
            answer = self.threshold is None or _known(confidence) < self.threshold
        if answer and (self._retest or passes == 1):
            self._spent += 1
        return answer


def _known(confidence: float | None) -> float:
    assert confidence is not None  # Decider.another_pass has seen to it
    return confidence
