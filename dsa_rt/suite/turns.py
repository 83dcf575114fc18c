"""Timing rules: how long to warm up, and whose turn it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")

SETTLED = 0.05  # relative difference of two successive runs below which a way counts as warm
MOST_RUNS = 3
WARM_UP_RULE = (
    f"each way is run until two successive runs differ by less than {SETTLED:.0%}, at most {MOST_RUNS} times or until "
    "its time is spent; none of these runs is in a figure"
)


@dataclass(frozen=True)
class WarmUp:
    """How one way was warmed up. ended_by: "settled", "runs" or "seconds"; difference: of the last two runs, relative
    to the shorter one, None after a single run."""

    runs: int
    ended_by: str
    difference: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def warm_up(
    run: Callable[[], object], *, seconds: float = 60.0, clock: Callable[[], float] = time.perf_counter
) -> WarmUp:
    """Run until two successive runs take the same time within :data:`SETTLED`, or :data:`MOST_RUNS` are done, or the
    next one would begin after ``seconds``."""
    taken: list[float] = []
    difference: float | None = None
    while True:
        start = clock()
        run()
        taken.append(clock() - start)
        if len(taken) > 1:
            difference = abs(taken[-1] - taken[-2]) / max(min(taken[-2:]), 1e-9)
            if difference < SETTLED:
                return WarmUp(len(taken), "settled", difference, sum(taken))
        if len(taken) == MOST_RUNS:
            return WarmUp(len(taken), "runs", difference, sum(taken))
        if sum(taken) >= seconds:
            return WarmUp(len(taken), "seconds", difference, sum(taken))


def in_turns(ways: Mapping[str, Callable[[int], _T]], rounds: int) -> Iterator[tuple[str, int, _T]]:
    """(name, round, result) of every way in every round, each called with the number of the round. The order rotates
    from round to round, so that no way always comes after the same one, and a change of the machine's clock meets all
    of them alike."""
    names = list(ways)
    for number in range(rounds):
        shift = number % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            yield name, number, ways[name](number)
