"""Fixed numbers of passes: the static competitors of DSA, and the dense reference. No head is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsa_rt.errors import PolicyError
from dsa_rt.policy.base import Decider, Policy, check_run

if TYPE_CHECKING:
    from dsa_rt.policy.calibration import Calibration
    from dsa_rt.policy.targets import Cost


@dataclass(frozen=True)
class Fixed(Policy):
    """``passes`` for every chunk (None: all scheduled), ``first`` for the first one (None: as ``passes``).

    ``Fixed()`` is the dense policy. More passes than a model schedules are refused by :meth:`begin`.
    """

    passes: int | None = None
    first: int | None = None

    def __post_init__(self) -> None:
        for field in ("passes", "first"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < 1):
                raise PolicyError(
                    f"Fixed: {field} is {value!r}; expected a whole number of 1 or more, or None"
                )
        if self.first == self.passes:
            object.__setattr__(self, "first", None)  # one policy, one spelling

    @property
    def name(self) -> str:
        later = "all" if self.passes is None else str(self.passes)
        if self.first is not None:
            return f"fixed-{self.first}-then-{later}"
        return "dense" if self.passes is None else f"fixed-{later}"

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
        for value in (self.first, self.passes):
            if value is not None and value > passes_max:
                raise PolicyError(
                    f"policy {self.name} asks for {value} passes, but {passes_max} are scheduled: "
                    f"ask for 1 to {passes_max}"
                )
        later = self.passes or passes_max
        return FixedDecider(passes_max, self.first or later, later)


class FixedDecider(Decider):
    """Counts passes."""

    def __init__(self, passes_max: int, first: int, later: int) -> None:
        super().__init__(passes_max)
        self._first, self._later = first, later

    def wants_confidence(self, chunk: int, passes: int) -> bool:
        return False

    def _another_pass(self, chunk: int, passes: int, confidence: float | None) -> bool:
        return passes < (self._first if chunk == 0 else self._later)
